"""Cost: FLOPs and bytes of a step, as the plan's ops count them, and the time that a machine would take for it.

Owns the grouping of a plan's ops: the layers of a model repeat the same few, so each kind is asked once and multiplied,
fast enough to be asked in every step. The sums equal plan.flops() and plan.bytes(). Knows nothing of what an op counts,
and no machine but by six numbers.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from jilju.plan.batch import StepShape
from jilju.plan.ops import Attention, Op, Value, WeightSpec
from jilju.plan.plan import Plan

MAX_TALLIES = 512  # numbers of rows whose costs are kept; some bound there must be


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step's time depends on. The last four are the engine's efficiency on it, to be fitted to measured steps."""

    flops_per_s: float  # peak of linear ops on many rows
    bytes_per_s: float  # peak of reading memory
    eta_c: float  # share of the peak FLOP/s that ops reach
    eta_b: float  # share of the bandwidth that ops reach
    base_ns: float  # per step
    row_ns: float  # per row of a step


# Two cores of a server CPU with AVX2 (2 x 198 GOP/s of 4-bit weights, measured in cache) at its memory's middling speed.
TWO_CORE_CPU = Machine(396e9, 40e9, eta_c=0.75, eta_b=0.8, base_ns=200e3, row_ns=10e3)
# The data sheet's bf16 and HBM figures, the share of them that published matrix products reach. Not fitted to any engine.
H100_SXM = Machine(989e12, 3.35e12, eta_c=0.8, eta_b=0.8, base_ns=1e6, row_ns=5e3)


class _Tally(NamedTuple):
    """What all ops of one kind count in a step, each."""

    num_ops: int
    flops: int
    num_bytes: int


@dataclass(frozen=True)
class SummedShape(StepShape):
    """A shape whose rows are summed once, not once an op."""

    num_tokens: int = 0

    def num_attended(self, window: int = 0) -> int:
        if window:
            return super().num_attended(window)
        if self.num_tokens == len(self.counts):  # all rows of one token
            return sum(self.starts) + self.num_tokens
        return sum([c * q + q * (q + 1) // 2 for c, q in zip(self.starts, self.counts, strict=True)])

    def num_keys_read(self, window: int = 0) -> int:
        return super().num_keys_read(window) if window else sum(self.starts) + self.num_tokens


class PlanCost:
    def __init__(self, plan: Plan, kv_element_bytes: int):
        self._kv_element_bytes = kv_element_bytes
        # Names of weights, numbers of buffers and layers do not enter a cost: ops that differ in nothing else are one kind.
        kinds = Counter(_nameless(op) for op in plan.ops).items()
        self._attention = [(op, count) for op, count in kinds if isinstance(op, Attention)]  # depends on contexts
        self._others = [(op, count) for op, count in kinds if not isinstance(op, Attention)]  # on numbers of rows alone
        self._tallies: dict[tuple[int, int], tuple[_Tally, ...]] = {}  # of the others

    def totals(self, shape: StepShape) -> tuple[int, int]:
        """FLOPs and bytes."""
        tallies = self._tally(shape)
        return sum([n * flops for n, flops, _ in tallies]), sum([n * num_bytes for n, _, num_bytes in tallies])

    def logit_work(self) -> float:
        """What a logit row costs, in tokens without one: by FLOPs, for tokens that want all their logits come in numbers."""
        token, with_logits = (self.totals(StepShape((0,), (1,), num_logits))[0] for num_logits in (0, 1))
        return (with_logits - token) / token

    def step_ns(self, shape: StepShape, machine: Machine) -> int:
        """sum over ops max(FLOP / (eta_c P), bytes / (eta_b BW)) + base + row_ns * rows"""
        ns_per_flop = 1e9 / (machine.eta_c * machine.flops_per_s)
        ns_per_byte = 1e9 / (machine.eta_b * machine.bytes_per_s)
        ns = machine.base_ns + machine.row_ns * len(shape.counts)
        for num_ops, flops, num_bytes in self._tally(shape):
            compute_ns, memory_ns = flops * ns_per_flop, num_bytes * ns_per_byte
            ns += num_ops * (compute_ns if compute_ns > memory_ns else memory_ns)
        return round(ns)

    def linear_bound(self, machine: Machine) -> tuple[float, float, float]:
        """ns of a step in any case, of a token, and of a query-key pair, that together no step of this machine exceeds.

        FLOPs and bytes are linear in tokens, rows, logits, pairs and keys read; no step has more rows or logits than tokens, or
        more keys than pairs. So steps of single tokens, FLOPs and bytes both counted in full, give the three.
        """
        ns_per_flop = 1e9 / (machine.eta_c * machine.flops_per_s)
        ns_per_byte = 1e9 / (machine.eta_b * machine.bytes_per_s)

        def full_ns(*starts: int) -> float:
            flops, num_bytes = self.totals(StepShape(starts, (1,) * len(starts), len(starts)))
            return machine.base_ns + machine.row_ns * len(starts) + flops * ns_per_flop + num_bytes * ns_per_byte

        one, two, far = full_ns(0), full_ns(0, 0), full_ns(1000)
        pair_ns = (far - one) / 1000
        return 2 * one - two, two - one - pair_ns, pair_ns

    def _tally(self, shape: StepShape) -> tuple[_Tally, ...]:
        if not isinstance(shape, SummedShape):
            shape = SummedShape(shape.starts, shape.counts, shape.num_logits, sum(shape.counts))
        numbers = (shape.num_tokens, shape.num_logits)
        others = self._tallies.get(numbers)
        if others is None:
            if len(self._tallies) == MAX_TALLIES:
                self._tallies.clear()
            others = self._tallies[numbers] = self._count(self._others, shape)
        return self._count(self._attention, shape) + others

    def _count(self, kinds: Iterable[tuple[Op, int]], shape: StepShape) -> tuple[_Tally, ...]:
        return tuple([_Tally(n, op.flops(shape), op.bytes(shape, self._kv_element_bytes)) for op, n in kinds])


def _nameless(op: Op) -> Op:
    changes: dict[str, object] = {}
    for name in op.__struct_fields__:
        changes[name] = _strip(getattr(op, name))
    if "layer" in changes:
        changes["layer"] = 0
    return msgspec.structs.replace(op, **changes)


def _strip(value: object) -> object:
    if isinstance(value, Value):
        return msgspec.structs.replace(value, buffer=0, offset=0)
    if isinstance(value, WeightSpec):
        return msgspec.structs.replace(value, name="")
    if isinstance(value, tuple):
        return tuple(_strip(part) for part in value)
    return value
