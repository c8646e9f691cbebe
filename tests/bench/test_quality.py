"""The method of `jilju bench quality`: perplexity against logits of transformers and against llama.cpp."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jilju.assemble.engine import EngineOptions, build_engine
from jilju.bench.quality import measure_quality, windows
from jilju.errors import InvalidValue
from tests.system.conftest import needs_smollm2

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "model"
LLAMA_CPP_PERPLEXITY = (
    15.9546  # llama-cpp-python 0.3.36, smollm2-135m over LICENSE by the same windows, 1020 tokens scored
)


def tiny_engine(name: str = "llama-tied"):
    options = EngineOptions(
        path=str(GOLDEN / f"{name}.gguf"), num_blocks=8, max_context=64, max_rows=2, step_tokens=24, num_threads=1,
        backend="reference",
    )  # fmt: skip
    return build_engine(options)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-untied", "qwen3-tied", "gemma3-windows"])
def test_perplexity_is_that_of_the_oracles_logits(name):
    """One window of 64 tokens, scored from the token after the middle on; the golden logits are those of transformers."""
    with np.load(GOLDEN / f"{name}.npz") as stored:
        ids, logits = stored["token_ids"].tolist(), stored["logits"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # [64, vocab]
    wanted = [logprobs[i, ids[i + 1]] for i in range(32, 63)]
    quality = measure_quality(tiny_engine(name), ids, window=64)
    assert (quality.num_windows, quality.num_scored) == (1, len(wanted))
    assert quality.perplexity == pytest.approx(math.exp(-np.mean(wanted)), rel=1e-4)


def test_windows_are_whole_and_begin_with_bos():
    assert list(windows(list(range(10)), 4, None)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(windows(list(range(10)), 4, 99)) == [[99, 1, 2, 3], [99, 5, 6, 7]]


def test_the_figure_of_several_windows_is_over_all_their_tokens():
    ids = [(7 * i) % 300 for i in range(48)]
    engine, told = tiny_engine(), []
    whole = measure_quality(engine, ids, window=16, progress=lambda done, total, what: told.append((done, total)))
    parts = [measure_quality(engine, ids[i : i + 16], window=16) for i in (0, 16, 32)]
    assert whole.perplexity == pytest.approx(math.prod(p.perplexity for p in parts) ** (1 / 3))
    assert whole.num_scored == sum(p.num_scored for p in parts) == 3 * 7
    assert (len(whole.running), whole.running[-1], told) == (3, whole.perplexity, [(1, 3), (2, 3), (3, 3)])


def test_a_text_that_fills_no_window_is_refused():
    with pytest.raises(InvalidValue, match="5 tokens; at least 16"):
        measure_quality(tiny_engine(), [1] * 5, window=16)


@needs_smollm2
def test_perplexity_of_a_real_model_is_that_of_llama_cpp():
    """llama.cpp rounds activations to 8 bits for each product, which moves single logprobs; over 1020 tokens 1 % is ample."""
    command = [
        sys.executable,
        "-m",
        "jilju",
        "bench",
        "quality",
        "smollm2-135m",
        "--text",
        str(ROOT / "LICENSE"),
        "--json",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    quality = json.loads(done.stdout)
    assert (quality["num_text_tokens"], quality["num_scored"], quality["window"]) == (2215, 1020, 512)
    assert quality["perplexity"] == pytest.approx(LLAMA_CPP_PERPLEXITY, rel=0.01)
