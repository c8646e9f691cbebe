"""Same bits under any load: a request alone and among random neighbours, cold and warm, on one thread and on two."""

import random

import pytest

from jilju import LLM, SamplingParams
from tests.system.conftest import needs_smollm2
from tests.system.prompts import CHAT_PROMPTS

pytestmark = needs_smollm2
NUM_NEIGHBOURS = 15
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=16, logprobs=3),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=99, max_tokens=16, logprobs=3),
)


def bits(completion):
    return completion.token_ids, [(t.logprob, t.top) for t in completion.logprobs]


@pytest.fixture(scope="module")
def alone():
    """Each prompt alone, on one thread, each in an engine that has seen nothing like it."""
    with LLM("smollm2-135m", context=1024, kv_memory="256MiB", threads=1) as llm:
        prompts = [llm.text.tokenizer.encode(p) * 3 for p in CHAT_PROMPTS]
        return prompts, [[bits(llm.generate([p], params)[0]) for p in prompts] for params in PARAMS]


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_cache_and_threads_change_no_bit(alone, threads):
    prompts, wanted = alone
    rng = random.Random(threads)
    with LLM("smollm2-135m", context=1024, kv_memory="256MiB", threads=threads, step_tokens=48) as llm:
        for params, expected in zip(PARAMS, wanted, strict=True):
            for state in ("cold", "warm"):
                neighbours = [
                    [rng.randrange(1000, 40000) for _ in range(rng.randrange(1, 120))] for _ in range(NUM_NEIGHBOURS)
                ]
                mixed = neighbours[:7] + prompts + neighbours[7:]
                done = llm.generate(mixed, params)[7 : 7 + len(prompts)]
                assert [bits(d) for d in done] == expected, (threads, state)
                if state == "warm":
                    assert all(d.num_cached_tokens > 0 for d in done if len(d.prompt_ids) > 32)
