"""Real files through the reference backend: their greedy answers are those of `transformers`, token for token."""

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

from .batches import BatchRow, Logit, chunks_of, make_batch, run

FOLDER = Path(__file__).parents[1] / "golden" / "model"
CACHED = {listed.entry.name: listed.path for listed in list_models() if listed.cached}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    """Each answer is given in whole after its prompt: at every place the most probable next token must be the next."""
    golden = json.loads((FOLDER / f"{name}.greedy.json").read_text())
    if golden["model"] not in CACHED:
        pytest.skip(f"`jilju pull {golden['model']}` first")
    file = GgufFile.open(CACHED[golden["model"]])
    plan = build_plan(spec_from_gguf(file), {tensor.name: tensor.type for tensor in file.tensors.values()})
    executor = ReferenceExecutor()
    limits = Limits(num_blocks=48, block_size=16, max_rows=1, max_tokens=256, max_context=768, num_threads=1)
    executor.load(plan, load_weights(file, plan), limits)
    for answer in golden["greedy"]:
        ids, first = answer["prompt_ids"] + answer["ids"], len(answer["prompt_ids"]) - 1
        for start, count in chunks_of(first, [256] * 3):
            run(executor, make_batch([BatchRow(ids[start : start + count], start, range(48))]))
        row = BatchRow(ids[first:-1], first, range(48))
        result = run(executor, make_batch([row], [Logit(i) for i in range(len(answer["ids"]))]))
        assert result.token_ids.tolist() == answer["ids"]
    executor.free()
