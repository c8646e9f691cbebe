"""Step cost: FLOPs and bytes of a step, as the plan's ops count them, fast enough to be asked in every step.

Owns the grouping of a plan's ops: the layers of a model repeat the same few, so each kind is asked once and multiplied.
Knows nothing of what an op counts; the sums equal plan.flops() and plan.bytes().
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from jilju.engine.scheduler import Step
from jilju.plan import Attention, Op, Plan, StepShape, Value, WeightSpec


@dataclass(frozen=True)
class _Totals(StepShape):
    """A shape whose tokens are counted once, not once an op."""

    num_tokens: int = 0


class StepCost:
    def __init__(self, plan: Plan, kv_element_bytes: int):
        self._kv_element_bytes = kv_element_bytes
        # Names of weights, numbers of buffers and layers do not enter a cost: ops that differ in nothing else are one kind.
        kinds = Counter(_nameless(op) for op in plan.ops).items()
        self._attention = [(op, count) for op, count in kinds if isinstance(op, Attention)]  # depends on contexts
        self._others = [
            (op, count) for op, count in kinds if not isinstance(op, Attention)
        ]  # on the numbers of rows alone
        self._known: tuple[tuple[int, int], tuple[int, int]] | None = (
            None  # numbers of the last step, cost of the others
        )

    def of(self, step: Step) -> tuple[int, int]:
        """FLOPs and bytes."""
        shape = step_totals(step)
        numbers = (shape.num_tokens, shape.num_logits)
        if self._known is None or self._known[0] != numbers:
            self._known = (numbers, self._sum(self._others, shape))
        flops, num_bytes = self._sum(self._attention, shape)
        return flops + self._known[1][0], num_bytes + self._known[1][1]

    def _sum(self, kinds: Iterable[tuple[Op, int]], shape: StepShape) -> tuple[int, int]:
        flops = num_bytes = 0
        for op, count in kinds:
            flops += count * op.flops(shape)
            num_bytes += count * op.bytes(shape, self._kv_element_bytes)
        return flops, num_bytes


def step_totals(step: Step) -> StepShape:
    starts = tuple([row.start for row in step.rows])
    counts = tuple([row.count for row in step.rows])
    return _Totals(
        starts=starts,
        counts=counts,
        num_logits=sum([row.num_logits for row in step.rows]),
        num_tokens=sum(counts),
    )


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
