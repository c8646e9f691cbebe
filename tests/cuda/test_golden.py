"""Models from files: tiny ones of each family beside the logits of `transformers`, real ones beside its greedy answers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends.cuda.executor import CudaExecutor
from jilju.formats.gguf import GgufFile
from jilju.model.decoder import build_plan
from jilju.model.sources import list_models
from jilju.model.spec import spec_from_gguf
from jilju.model.weights import load_weights
from jilju.plan import Limits
from tests.model.batches import BatchRow, Logit, chunks_of, make_batch, run

FOLDER = Path(__file__).parents[1] / "golden" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))
CACHED = {listed.entry.name: listed.path for listed in list_models() if listed.cached}
LIMITS = Limits(num_blocks=48, block_size=16, max_rows=2, max_tokens=64, max_context=128, num_threads=1, kv_dtype="f16")


def load(path: Path, device: str, dtype: str, **changes: object) -> CudaExecutor:
    file = GgufFile.open(path)
    plan = build_plan(spec_from_gguf(file), {tensor.name: tensor.type for tensor in file.tensors.values()})
    executor = CudaExecutor(dtype, device=device)  # type: ignore[arg-type]
    executor.load(plan, load_weights(file, plan), replace(LIMITS, kv_dtype=dtype, **changes))  # type: ignore[arg-type]
    return executor


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_family(name: str, device: str) -> None:
    """Of float16, whose roundings are 2^-11: of activations, keys and values of two or three layers, and of the weights."""
    executor = load(FOLDER / f"{name}.gguf", device, "f16")
    with np.load(FOLDER / f"{name}.npz") as stored:
        ids, logits = stored["token_ids"].tolist(), stored["logits"].astype(np.float64)
    count = 40
    wanted = [Logit(i, target=ids[i + 1], position=i + 1, num_top=10) for i in range(count)]
    result = run(executor, make_batch([BatchRow(ids[:count], 0, [5, 2, 7])], wanted))
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    want = logprobs[np.arange(count), ids[1 : count + 1]]
    bound = 40 * 2.0**-11 * np.abs(logits[:count]).max()
    worst = int(np.argmax(np.abs(result.logprobs - want)))
    assert abs(result.logprobs[worst] - want[worst]) <= bound, (
        f"token {worst}: {result.logprobs[worst]}, transformers {want[worst]}, bound {bound}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_greedy_answers_of_real_models(name: str, dtype: str, device: str) -> None:
    """At each place of the answer the most probable token is the one of `transformers` in float32, or as good as that: a gap
    within what the half type's roundings move logits by."""
    golden = json.loads((FOLDER / f"{name}.greedy.json").read_text())
    if device != "cuda":
        pytest.skip("needs a GPU: the interpreter would take hours")
    if golden["model"] not in CACHED:
        pytest.skip(f"`jilju pull {golden['model']}` first")
    executor = load(CACHED[golden["model"]], device, dtype, max_tokens=256, max_context=768)
    most = {"bf16": 0.25, "f16": 0.05}[dtype]  # of logits of about 20, each some 30 layers of 2^-9 or 2^-12 away
    num_equal = num_all = 0
    for answer in golden["greedy"]:
        ids, first = answer["prompt_ids"] + answer["ids"], len(answer["prompt_ids"]) - 1
        for start, count in chunks_of(first, [256] * 3):
            if count:
                run(executor, make_batch([BatchRow(ids[start : start + count], start, range(48))]))
        for place, token in enumerate(answer["ids"]):  # token by token: by the kernels of decode
            batch = make_batch(
                [BatchRow([ids[first + place]], first + place, range(48))],
                [Logit(0, position=first + place + 1, num_top=20, wanted_ids=[token])],
            )
            result = run(executor, batch)
            num_all += 1
            num_equal += int(result.token_ids[0] == token)
            gap = result.logprobs[0] - result.wanted_logprobs[0]
            assert gap <= most, f"place {place}: {result.token_ids[0]} is {gap} more probable than {token}"
    print(f"{name}, {dtype}: {num_equal} of {num_all} greedy tokens equal")
    assert num_equal >= 0.95 * num_all
    executor.free()
