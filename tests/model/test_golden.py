"""Tiny models of each family, from file to logprobs, against the logits that `transformers` computed (tests/oracle)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jilju.backends.reference import ReferenceExecutor
from jilju.formats.gguf import GgufFile
from jilju.model.decoder import build_plan
from jilju.model.spec import spec_from_gguf
from jilju.model.weights import load_weights
from jilju.plan import Executor, Limits
from jilju.plan.batch import MAX_TOP

from .batches import BatchRow, Logit, chunks_of, logits_of, make_batch, run

FOLDER = Path(__file__).parents[1] / "golden" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))
NUM_BLOCKS, BLOCK_SIZE = 8, 16


def native_is_built() -> bool:
    found = importlib.util.find_spec("jilju.backends.native")
    return found is not None and importlib.util.find_spec("jilju.backends.native._kernels") is not None


def make(backend: str) -> Executor:
    if backend == "reference":
        return ReferenceExecutor()
    from jilju.backends.native import NativeExecutor

    return NativeExecutor()


# Of the row's largest logit. Reference: float32 throughout, other orders of summation. Native: K and V are float16, so each
# of the two layers changes scores and values by 2^-11 of themselves; scores here reach about 4 and go through exp.
TOLERANCES = {"reference": 2e-5, "native": 2 * (1 + 4) * 2.0**-11}
BACKENDS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native_is_built(), reason="the native extension is not built here")
    ),
]


def load(executor: Executor, name: str) -> GgufFile:
    file = GgufFile.open(FOLDER / f"{name}.gguf")
    plan = build_plan(spec_from_gguf(file), {tensor.name: tensor.type for tensor in file.tensors.values()})
    limits = Limits(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_rows=2, max_tokens=64, max_context=128, num_threads=1
    )
    executor.load(plan, load_weights(file, plan), limits)
    return file


def golden(name: str) -> tuple[list[int], np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return stored["token_ids"].tolist(), stored["logits"]


def test_there_is_a_golden_model_of_each_family() -> None:
    assert [name.split("-")[0] for name in NAMES] == ["gemma3", "llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [[64], [1] * 64, [17, 1, 30, 16]], ids=["one pass", "token by token", "chunks"])
def test_logits_of_the_reference_backend(name: str, sizes: list[int]) -> None:
    executor = ReferenceExecutor()
    load(executor, name)
    ids, want = golden(name)
    got = logits_of(executor, ids, chunks_of(len(ids), sizes), [3, 0, 6, 1])
    error = abs(got - want).max(axis=1) / abs(want).max(axis=1)
    assert error.max() <= TOLERANCES["reference"], f"token {error.argmax()}: {error.max():.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_logprobs_of_every_backend(backend: str, name: str) -> None:
    """Of random targets, and of the twenty most probable ids, at every position."""
    executor = make(backend)
    load(executor, name)
    ids, logits = golden(name)
    wide = logits.astype(float)
    shifted = wide - wide.max(axis=1, keepdims=True)
    want = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    bound = 2 * TOLERANCES[backend] * abs(logits).max(axis=1)  # once in the logit, once in the normaliser
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(6):
        targets = rng.integers(0, wide.shape[1], len(ids)).tolist()
        rows = [Logit(i, target=target, position=i + 1, num_top=MAX_TOP) for i, target in enumerate(targets)]
        result = run(executor, make_batch([BatchRow(ids, 0, rng.permutation(NUM_BLOCKS)[:4].tolist())], rows))
        assert result.finite.all()
        assert result.token_ids.tolist() == targets
        errors = [abs(result.logprobs - want[np.arange(len(ids)), targets])]
        errors += [abs(result.top_logprobs - np.take_along_axis(want, result.top_ids, axis=1)).max(axis=1)]
        # The k-th reported id is the k-th most probable, up to the error of a logprob.
        errors += [abs(result.top_logprobs - -np.sort(-want, axis=1)[:, :MAX_TOP]).max(axis=1)]
        for error in errors:
            worst = max(worst, float((error / bound).max()))
            assert (error <= bound).all(), (
                f"token {(error - bound).argmax()}: {error.max():.1e}, bound {bound.min():.1e}"
            )
    print(f"{name} on {executor.kernel_set}: largest error {worst:.2f} of the bound")
    executor.free()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_choice_of_every_backend(backend: str, name: str) -> None:
    """Prefill half, then decode token by token: the choice is the golden one wherever that is clear."""
    executor = make(backend)
    load(executor, name)
    ids, logits = golden(name)
    chosen = []
    for start, count in [(0, 32), *((i, 1) for i in range(32, 64))]:
        row = BatchRow(ids[start : start + count], start, [5, 2, 7, 0])
        chosen += run(executor, make_batch([row], [Logit(i) for i in range(count)])).token_ids.tolist()
    best, second = -np.sort(-logits, axis=1)[:, :2].T
    clear = best - second > 2 * TOLERANCES[backend] * abs(logits).max(axis=1)
    assert clear.mean() > 0.5, "the golden model must have clear favourites"
    assert (logits.argmax(axis=1) == chosen)[clear].all()
    executor.free()
