"""Machine: the roofs that speed is measured against: read bandwidth by working set, float32 FMAs, the linear kernels at best.

Owns the tables of `jilju bench machine` and the contract of the probes behind them. A bandwidth is that of all threads, each
reading its own contiguous part again and again; a kernel's peak is that of the kernel that computes a family's matrices, on a
block that stays in the first-level cache, on all threads at once. Knows nothing of models.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from jilju.bench.guard import Guard
from jilju.formats.ggml import GgmlType
from jilju.plan import Plan

WORKING_SETS_MB = (8, 16, 32, 64, 128, 512, 1024)
WINDOW_S = 0.2  # of one probe


class Probes(Protocol):
    """What a backend can tell of the machine and of its own kernels."""

    families: tuple[str, ...]  # of kernels: number formats that one kernel computes

    def family_of(self, type_: GgmlType) -> str: ...

    def weight_bytes(self, plan: Plan) -> dict[str, int]:
        """Bytes that a step reads of each weight, by name."""
        ...

    def read_bandwidth(self, num_bytes: int, num_threads: int, seconds: float) -> float:
        """GB/s of all threads together."""
        ...

    def fma_peak(self, num_threads: int, seconds: float) -> float:
        """Float32 GFLOP/s of all threads together."""
        ...

    def kernel_peak(self, family: str, num_threads: int, seconds: float) -> float:
        """GOP/s (a multiply-add is two) of all threads together."""
        ...


class Bandwidth(msgspec.Struct, frozen=True):
    working_set_mb: int
    gb_s: list[float]  # by number of threads, from one on


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    bandwidth: list[Bandwidth]
    fma_gflop_s: list[float]  # by number of threads, from one on
    kernel_gop_s: dict[str, list[float]]  # by family, then by number of threads
    others_share: float  # the most that other processes took of the cores


def measure_machine(
    probes: Probes,
    num_threads: int,
    *,
    guard: Guard,
    working_sets_mb: Sequence[int] = WORKING_SETS_MB,
    num_rounds: int = 7,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Machine:
    """Medians of `num_rounds` probes each. Raises BusyMachine."""
    threads = range(1, num_threads + 1)
    total = num_threads * (len(working_sets_mb) + 1 + len(probes.families))
    shares: list[float] = []

    def median(what: str, probe: Callable[..., float], *arguments: object) -> float:
        done = guard.run(lambda: statistics.median(probe(*arguments, WINDOW_S) for _ in range(num_rounds)))
        shares.append(done.others_share)
        progress(len(shares), total, what)
        return done.value

    return Machine(
        bandwidth=[
            Bandwidth(mb, [median(f"{mb} MB", probes.read_bandwidth, mb << 20, n) for n in threads])
            for mb in working_sets_mb
        ],
        fma_gflop_s=[median("FMA", probes.fma_peak, n) for n in threads],
        kernel_gop_s={f: [median(f, probes.kernel_peak, f, n) for n in threads] for f in probes.families},
        others_share=max(shares),
    )
