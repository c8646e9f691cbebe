"""Stand-ins of known pace: probes, a machine that others use, an executor whose time is known, a peer."""

import sys

import numpy as np

from jilju.bench.guard import CpuTimes, Guard, num_cores
from jilju.formats.ggml import GgmlType
from jilju.plan import Batch, Limits, StepResult
from jilju.plan.batch import MAX_TOP


class KnownProbes:
    """A bandwidth of 100 GB/s a thread and 1 more for each MB; two families, F32 in one and all else in the other."""

    families = ("A", "B")

    def family_of(self, type_):
        return "A" if type_ == GgmlType.F32 else "B"

    def weight_bytes(self, plan):
        return {name: 2 * spec.num_bytes for name, spec in plan.weights.items()}

    def read_bandwidth(self, num_bytes, num_threads, seconds):
        return 100.0 * num_threads + num_bytes / 2**20

    def fma_peak(self, num_threads, seconds):
        return 50.0 * num_threads

    def kernel_peak(self, family, num_threads, seconds):
        return {"A": 10.0, "B": 40.0}[family] * num_threads


def busy_guard(*shares: float, attempts: int = 6) -> Guard:
    """On a machine where the next runs of a second each are disturbed by so much."""
    times = []
    for index, share in enumerate(shares):
        own, machine = 10.0 * index, 20.0 * index
        times += [
            CpuTimes(float(index), machine, own),
            CpuTimes(index + 1.0, machine + 1 + share * num_cores(), own + 1),
        ]
    pending = iter(times)
    return Guard(attempts=attempts, read=lambda pids: next(pending), sleep=lambda seconds: None)


def idle_guard() -> Guard:
    return busy_guard(*[0.0] * 1000)


class CountingExecutor:
    """Keeps every batch; says that a step takes 900 ns in linear ops and 100 ns in sampling."""

    name = kernel_set = "counting"
    invariant = True

    def __init__(self):
        self.batches: list[Batch] = []

    def profile(self):
        return Profile(len(self.batches))

    def launch(self, batch):
        self.batches.append(batch)

    def wait(self):
        n = self.batches[-1].num_logits
        top = np.zeros((n, MAX_TOP), np.int32)
        wanted = np.zeros(0, np.float32)
        return StepResult(
            np.zeros(n, np.int32), np.zeros(n, np.float32), top, top.astype(np.float32), wanted, np.ones(n, bool)
        )


class Profile:
    def __init__(self, num_steps):
        self.ns = {"linear": 900 * num_steps, "sample": 100 * num_steps, "other": 0}


def limits(max_rows: int, max_context: int, max_tokens: int = 24) -> Limits:
    return Limits(max_rows * -(-max_context // 16), 16, max_rows, max_tokens, max_context, 1)


PEER = """
import json, sys
print(json.dumps({"runs": %s, "note": "a peer of known pace"}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    if ask["run"] == "prefill":
        print(json.dumps({"pass_s": ask["tokens"] / 100}), flush=True)
    elif ask["run"] == "decode":
        print(json.dumps({"pass_s": ask["rows"] / (ask["context"] + 1)}), flush=True)
    else:
        print(json.dumps({"logprobs": [[-1.0 * t for t in place] for place in ask["targets"]]}), flush=True)
"""


def peer_command(folder, runs=("prefill", "decode", "logprobs")) -> list[str]:
    (script := folder / "peer.py").write_text(PEER % list(runs))
    return [sys.executable, str(script), "model.gguf", "1"]
