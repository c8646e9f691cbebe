"""Cost: FLOPs and bytes of a step, as the plan's ops count them, and the time that a machine would take for it.

Owns the grouping of a plan's ops: the layers of a model repeat the same few, so each kind is asked once and multiplied,
fast enough to be asked in every step. The sums equal plan.flops() and plan.bytes(). Knows nothing of what an op counts,
and no machine but by six numbers.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from jilju.plan.batch import StepShape, num_pairs_before
from jilju.plan.ops import Attention, Op, Rows, Value, WeightSpec
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


class Roofs(NamedTuple):
    """What a machine can do at most, as measured on it with the threads that an engine uses."""

    read_bytes_per_s: float  # of memory
    flops_per_s: float  # of linear ops on many rows, in the number format that most weights have


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


class OpCost(NamedTuple):
    """What all ops of one kind count in a step, together."""

    op: Op  # one of them
    num_ops: int
    flops: int
    num_bytes: int
    ns: float  # modelled
    is_memory_bound: bool


class _AttentionRow(NamedTuple):
    """What one row adds to an attention op: FLOPs a query-key pair, bytes a key that is read and a token of its own."""

    pair_flops: int
    key_bytes: int
    token_bytes: int
    window: int

    @classmethod
    def of(cls, op: Attention, kv_element_bytes: int) -> "_AttentionRow":
        """An op counts linearly in the three: steps of one token give them."""
        whole = msgspec.structs.replace(op, window=0)
        first, second = StepShape((0,), (1,), 0), StepShape((1,), (1,), 0)  # of one key, and of two
        key_bytes = whole.bytes(second, kv_element_bytes) - whole.bytes(first, kv_element_bytes)
        return cls(whole.flops(first), key_bytes, whole.bytes(first, kv_element_bytes) - key_bytes, op.window)

    def flops(self, rows: Sequence[tuple[int, int, float]]) -> list[int]:
        """Of each row (start, count, ...)."""
        window, each = self.window, self.pair_flops
        if window:
            return [
                each * (num_pairs_before(start + count, window) - num_pairs_before(start, window))
                if count > 1
                else each * min(start + 1, window)
                for start, count, _ in rows
            ]
        return [each * (count * start + count * (count + 1) // 2) for start, count, _ in rows]

    def bytes(self, rows: Sequence[tuple[int, int, float]]) -> list[int]:
        window, key, token = self.window, self.key_bytes, self.token_bytes
        if window:
            firsts = [max(0, start + 1 - window) for start, _, _ in rows]
            return [
                key * (start + count - first) + token * count
                for (start, count, _), first in zip(rows, firsts, strict=True)
            ]
        return [key * start + (key + token) * count for start, count, _ in rows]


class PlanCost:
    def __init__(self, plan: Plan, kv_element_bytes: int):
        self._kv_element_bytes = kv_element_bytes
        # Names of weights, numbers of buffers and layers do not enter a cost: ops that differ in nothing else are one kind.
        kinds = Counter(_nameless(op) for op in plan.ops).items()
        self._attention = [(op, count) for op, count in kinds if isinstance(op, Attention)]  # depends on contexts
        self._others = [(op, count) for op, count in kinds if not isinstance(op, Attention)]  # on numbers of rows alone
        self._tallies: dict[tuple[int, int], tuple[_Tally, ...]] = {}  # of the others
        self._drivers: list[Rows] = [(op.writes or op.reads)[0].rows for op, _ in self._others]
        self._attention_rows = [(_AttentionRow.of(op, kv_element_bytes), count) for op, count in self._attention]

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

    def rows_ns(self, rows: Sequence[tuple[int, int, float]], machine: Machine) -> list[float]:
        """What step_ns sums, split over the rows (start, count, logit rows) by what drives each op.

        That is tokens or logit rows; of attention the FLOPs or bytes of the row itself, whichever bound the op; the rest is
        shared equally.
        """
        ns_per_flop = 1e9 / (machine.eta_c * machine.flops_per_s)
        ns_per_byte = 1e9 / (machine.eta_b * machine.bytes_per_s)
        num_tokens, num_logits = sum([row[1] for row in rows]), round(sum([row[2] for row in rows]))
        driven = {"tokens": 0.0, "logits": 0.0}
        for driver, (num_ops, op_flops, op_bytes) in zip(
            self._drivers, self._tally_others(num_tokens, num_logits), strict=True
        ):
            compute_ns, memory_ns = op_flops * ns_per_flop, op_bytes * ns_per_byte
            driven[driver] += num_ops * (compute_ns if compute_ns > memory_ns else memory_ns)
        token_ns, each_ns = driven["tokens"] / num_tokens, machine.base_ns / len(rows) + machine.row_ns
        logit_ns = driven["logits"] / num_logits if num_logits else 0.0
        if not num_logits:
            each_ns += driven["logits"] / len(rows)  # their weights are read all the same, as the ops count
        parts = [each_ns + count * token_ns + logits * logit_ns for _, count, logits in rows]
        for of_row, num_ops in self._attention_rows:
            flops, num_bytes = of_row.flops(rows), of_row.bytes(rows)
            is_compute_bound = ns_per_flop * sum(flops) > ns_per_byte * sum(num_bytes)
            scale = num_ops * (ns_per_flop if is_compute_bound else ns_per_byte)
            parts = [part + scale * n for part, n in zip(parts, flops if is_compute_bound else num_bytes, strict=True)]
        return parts

    def by_op(self, shape: StepShape, machine: Machine) -> list[OpCost]:
        """What step_ns sums, kind by kind, the longest first."""
        ns_per_flop = 1e9 / (machine.eta_c * machine.flops_per_s)
        ns_per_byte = 1e9 / (machine.eta_b * machine.bytes_per_s)
        found: list[OpCost] = []
        for op, num_ops in self._attention + self._others:
            flops, num_bytes = op.flops(shape), op.bytes(shape, self._kv_element_bytes)
            compute_ns, memory_ns = flops * ns_per_flop, num_bytes * ns_per_byte
            ns = num_ops * max(compute_ns, memory_ns)
            found.append(OpCost(op, num_ops, num_ops * flops, num_ops * num_bytes, ns, memory_ns >= compute_ns))
        return sorted(found, key=lambda cost: -cost.ns)

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
        return self._count(self._attention, shape) + self._tally_others(shape.num_tokens, shape.num_logits)

    def _tally_others(self, num_tokens: int, num_logits: int) -> tuple[_Tally, ...]:
        others = self._tallies.get((num_tokens, num_logits))
        if others is None:
            if len(self._tallies) == MAX_TALLIES:
                self._tallies.clear()
            shape = SummedShape((), (), num_logits, num_tokens)
            others = self._tallies[num_tokens, num_logits] = self._count(self._others, shape)
        return others

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
