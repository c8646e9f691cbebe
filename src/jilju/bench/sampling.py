"""Sampling: what choosing the tokens costs of a decode step, by how its rows sample.

Owns the ways of sampling that are measured and their figures. A way is every row's at once; which ids its lists and masks hold is
random but fixed. Knows nothing of kernels.
"""

import statistics
from collections.abc import Callable

import msgspec

from jilju.bench.batches import Sampling
from jilju.bench.guard import Guard
from jilju.bench.model import OpLedger
from jilju.bench.steps import ProfiledExecutor, Steps

RUN_S = 0.3  # of a way in a round; the guard sees the clock ticks of the system, 10 ms each
WAYS: tuple[tuple[str, Sampling], ...] = (
    ("greedy", Sampling()),
    ("greedy, 20 alternatives", Sampling(num_top=20)),
    ("temperature 1", Sampling(temperature=1)),
    ("temperature 0.7", Sampling(temperature=0.7)),
    ("0.7, top-k 50", Sampling(temperature=0.7, top_k=50)),
    ("0.7, min-p 0.05", Sampling(temperature=0.7, min_p=0.05)),
    ("0.7, top-p 0.9", Sampling(temperature=0.7, top_p=0.9)),
    ("1, top-p 0.95", Sampling(temperature=1, top_p=0.95)),
    ("0.7, top-k 20, top-p 0.8, repetition of 500 ids",
     Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, num_penalized=500)),
    ("1, top-p 0.95, penalties of 500 ids, 300 biases",
     Sampling(temperature=1, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5, num_penalized=500,
              num_biases=300)),
    ("1, mask of 1 %", Sampling(temperature=1, allowed_share=0.01)),
    ("1, mask of 50 %", Sampling(temperature=1, allowed_share=0.5)),
    ("1, top-k 5000", Sampling(temperature=1, top_k=5000)),
)  # fmt: skip


class WayCost(msgspec.Struct, frozen=True, kw_only=True):
    way: str
    sample_ms: float  # of a step
    step_ms: float
    others_share: float

    @property
    def share(self) -> float:
        return self.sample_ms / self.step_ms


class SamplingReport(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    kernel_set: str
    vocab_size: int
    rows: int
    num_threads: int
    num_rounds: int
    costs: list[WayCost]


def measure_way(executor: ProfiledExecutor, steps: Steps, rows: int, context: int, sampling: Sampling) -> WayCost:
    """One run; the way has no name yet."""
    with (times := OpLedger(executor)):
        step_ms = 1e3 * steps.decode(rows, context, RUN_S, sampling)
    return WayCost(way="", sample_ms=times.shares()["sample"] * step_ms, step_ms=step_ms, others_share=0.0)


def measure_sampling(
    executor: ProfiledExecutor,
    steps: Steps,
    rows: int,
    context: int,
    *,
    guard: Guard,
    num_rounds: int = 5,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[WayCost]:
    """Medians of `num_rounds` runs of each way. Raises BusyMachine."""
    costs: list[WayCost] = []
    for way, sampling in WAYS:
        measure_way(executor, steps, rows, context, sampling)  # fills the rows, warms the caches
        runs = [guard.run(lambda s=sampling: measure_way(executor, steps, rows, context, s)) for _ in range(num_rounds)]  # type: ignore[misc]
        costs.append(
            WayCost(
                way=way,
                sample_ms=statistics.median(run.value.sample_ms for run in runs),
                step_ms=statistics.median(run.value.step_ms for run in runs),
                others_share=max(run.others_share for run in runs),
            )
        )
        progress(len(costs), len(WAYS), way)
    return costs
