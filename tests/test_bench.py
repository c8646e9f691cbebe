"""The benchmarks' methods: perplexity against logits of transformers and against llama.cpp, speed against a peer of known pace."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jilju.assemble.engine import EngineOptions, build_engine
from jilju.bench.quality import measure_quality, windows
from jilju.bench.speed import Comparison, Peer, Run, compare
from jilju.errors import InvalidValue, StartupError
from tests.system.conftest import needs_smollm2

ROOT = Path(__file__).parents[1]
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
    whole = measure_quality(engine, ids, window=16, progress=lambda done, total: told.append((done, total)))
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
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    quality = json.loads(done.stdout)
    assert (quality["num_text_tokens"], quality["num_scored"], quality["window"]) == (2215, 1020, 512)
    assert quality["perplexity"] == pytest.approx(LLAMA_CPP_PERPLEXITY, rel=0.01)


PEER = """
import json, sys
print(json.dumps({"name": "known"}), flush=True)
for line in sys.stdin:
    run = json.loads(line)
    assert run["prompt_ids"] == [5, 6, 7, 8]
    print(json.dumps({"prefill_s": 2.0, "decode_s": run["num_output"] / 4}), flush=True)
"""


@pytest.fixture
def peer(tmp_path):
    (script := tmp_path / "peer.py").write_text(PEER)
    made = Peer(Path(sys.executable), script, Path("model.gguf"), 1)
    yield made
    made.close()


def test_runs_alternate_and_the_first_pair_is_not_counted(peer):
    told = []
    result = compare(tiny_engine(), peer, [5, 6, 7, 8], 6, 2, lambda done, total: told.append((done, total)))
    assert result.peer_name == "known"
    assert [(run.prefill_tok_s, run.decode_tok_s) for run in result.peer] == [(2.0, 4.0)] * 2
    assert len(result.ours) == 2
    assert all(run.prefill_tok_s > 0 and run.decode_tok_s > 0 for run in result.ours)
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_the_ratio_is_the_median_of_the_pairs_ratios():
    ours, peer = ([Run(rate, 1.0, 0.0) for rate in rates] for rates in ((10.0, 30.0, 20.0), (10.0, 10.0, 40.0)))
    assert Comparison(ours=ours, peer=peer, peer_name="known").ratio("prefill_tok_s") == 1.0


def test_a_peer_that_does_not_start_is_an_error_with_its_command(tmp_path):
    (script := tmp_path / "broken.py").write_text("raise SystemExit(3)")
    with pytest.raises(StartupError, match=r"exit status 3; run it by hand .*broken\.py"):
        Peer(Path(sys.executable), script, Path("model.gguf"), 1)
