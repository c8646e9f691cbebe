"""Tiny random models of each family, from file to logits, against `transformers` in float32; the golden files too."""

import json
from pathlib import Path

import numpy as np
import pytest
from real_model import greedy_at_each_place, load_by_transformers
from tiny_models import (
    GOLDEN,
    MODELS,
    NUM_TOKENS,
    Tiny,
    build,
    logits_by_transformers,
    tensors_for_gguf,
    token_ids,
    write_gguf,
)

from jilju.backends.reference import ReferenceExecutor
from jilju.formats.gguf import GgufFile
from jilju.model.decoder import build_plan
from jilju.model.sources import list_models
from jilju.model.spec import spec_from_gguf
from jilju.model.weights import load_weights
from jilju.plan import Limits
from tests.model.batches import chunks_of, logits_of

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden" / "model"
# Of the row's largest logit, for ten layers; both sides are float32 with different orders of summation, a rounding more a layer.
TOLERANCE = 2e-5
BLOCK_SIZE = 8


def load(path: Path) -> ReferenceExecutor:
    file = GgufFile.open(path)
    plan = build_plan(spec_from_gguf(file), {tensor.name: tensor.type for tensor in file.tensors.values()})
    executor = ReferenceExecutor()
    limits = Limits(
        num_blocks=20, block_size=BLOCK_SIZE, max_rows=1, max_tokens=NUM_TOKENS, max_context=160, num_threads=1
    )
    executor.load(plan, load_weights(file, plan), limits)
    return executor


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_logits_of_every_family(tiny: Tiny, tmp_path: Path) -> None:
    model, ids = build(tiny), token_ids()
    write_gguf(tmp_path / "tiny.gguf", model, tiny)
    want = logits_by_transformers(model, ids)
    executor = load(tmp_path / "tiny.gguf")
    rng, tolerance = np.random.default_rng(0), TOLERANCE * max(1, tiny.num_layers / 10)
    ways = {
        "one pass": [(0, NUM_TOKENS)],
        "chunks": chunks_of(NUM_TOKENS, rng.integers(1, 17, NUM_TOKENS).tolist()),
        "token by token": chunks_of(NUM_TOKENS, [1] * NUM_TOKENS),
    }
    for way, parts in ways.items():
        block_ids = rng.permutation(20)[: NUM_TOKENS // BLOCK_SIZE].tolist()
        got = logits_of(executor, ids, parts, block_ids)
        error = abs(got - want).max(axis=1) / abs(want).max(axis=1)
        print(
            f"{tiny.name}, {way}: largest error {error.max():.1e} of the row's largest logit, at token {error.argmax()}"
        )
        assert error.max() <= tolerance, f"{way}, token {error.argmax()}: {error.max():.1e}, bound {tolerance}"


@pytest.mark.parametrize("tiny", GOLDEN, ids=lambda tiny: tiny.name)
def test_golden_files_are_what_transformers_says_today(tiny: Tiny) -> None:
    model = build(tiny)
    golden = np.load(GOLDEN_FOLDER / f"{tiny.name}.npz")
    assert golden["token_ids"].tolist() == token_ids()
    want = logits_by_transformers(model, token_ids())
    assert (abs(golden["logits"] - want) <= 1e-5 * abs(want).max(axis=1, keepdims=True)).all()
    with GgufFile.open(GOLDEN_FOLDER / f"{tiny.name}.gguf") as file:
        tensors = tensors_for_gguf(model, tiny)
        assert set(file.tensors) == set(tensors)
        for name, x in tensors.items():
            assert file.tensor_data(name).tobytes() == np.ascontiguousarray(x).tobytes(), name


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_golden_answers_of_a_real_file_are_what_transformers_says_today(name: str) -> None:
    golden = json.loads((GOLDEN_FOLDER / f"{name}.greedy.json").read_text())
    path = next((m.path for m in list_models() if m.entry.name == golden["model"] and m.cached), None)
    if path is None:
        pytest.skip(f"{golden['model']} is not in the cache: jilju pull {golden['model']}")
    model = load_by_transformers(path)
    for answer in golden["greedy"]:
        assert greedy_at_each_place(model, answer["prompt_ids"], answer["ids"]) == answer["ids"]
