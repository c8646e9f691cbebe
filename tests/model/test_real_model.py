"""A real file through the reference backend: its greedy answers are those of `transformers`, token for token."""

import json
from pathlib import Path

import pytest

from jilju.backends.reference import ReferenceExecutor
from jilju.formats.gguf import GgufFile
from jilju.model.decoder import build_plan
from jilju.model.sources import list_models
from jilju.model.spec import spec_from_gguf
from jilju.model.weights import load_weights
from jilju.plan import Limits

from .batches import BatchRow, Logit, make_batch, run

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "model" / "smollm2-135m.greedy.json").read_text())
CACHED = {listed.entry.name: listed.path for listed in list_models() if listed.cached}


@pytest.mark.slow
@pytest.mark.skipif(GOLDEN["model"] not in CACHED, reason="`jilju pull smollm2-135m` first")
def test_greedy_answers_are_those_of_transformers() -> None:
    """Each answer is given in whole as part of the prompt: at every place the most probable next token must be the next."""
    file = GgufFile.open(CACHED[GOLDEN["model"]])
    plan = build_plan(spec_from_gguf(file), {tensor.name: tensor.type for tensor in file.tensors.values()})
    executor = ReferenceExecutor()
    limits = Limits(num_blocks=16, block_size=16, max_rows=1, max_tokens=256, max_context=256, num_threads=1)
    executor.load(plan, load_weights(file, plan), limits)
    for answer in GOLDEN["greedy"]:
        ids, first = answer["prompt_ids"] + answer["ids"], len(answer["prompt_ids"]) - 1
        row = BatchRow(ids[:-1], 0, range(16))
        result = run(executor, make_batch([row], [Logit(first + i) for i in range(len(answer["ids"]))]))
        assert result.token_ids.tolist() == answer["ids"]
    executor.free()
