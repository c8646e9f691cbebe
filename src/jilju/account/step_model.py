"""Step model: what the rows of one step share of its time, as the cost model has it.

Owns the use of the plan's FLOPs and bytes on a step's rows: the modelled time m(rows) by which a measured time is shared out, the
part that other rows add, and the ops one by one. Where there is no plan, rows share by their tokens. Knows nothing of requests.
"""

from collections.abc import Sequence

from jilju.engine.client import EngineInfo
from jilju.engine.events import RowRecord
from jilju.plan import Plan
from jilju.plan.cost import Machine, OpCost, PlanCost, Roofs, SummedShape

ETA_C, ETA_B = 0.8, 0.8  # shares of its roofs that an engine reaches; only proportions come of them
BASE_NS, ROW_NS = 200e3, 10e3  # of a step, of a row
UNKNOWN = Roofs(20e9, 200e9)  # where no machine was measured: two cores of a server
MAX_ALONE = 1 << 15  # times of single rows that are kept, 4 MB
TOKEN_NS = 1e6  # where there is no plan


class StepModel:
    def __init__(self, plan: Plan | None, kv_bytes_per_token: int = 0, roofs: Roofs | None = None):
        self._cost = None if plan is None else PlanCost(plan, kv_bytes_per_token // plan.kv.elements_per_token)
        self.roofs = roofs
        roofs = roofs or UNKNOWN
        self._alone: dict[tuple[int, ...], int] = {}  # by start, tokens, whether it is sampled
        self._machine = Machine(roofs.flops_per_s, roofs.read_bytes_per_s, ETA_C, ETA_B, BASE_NS, ROW_NS)

    def ns(self, rows: Sequence[RowRecord]) -> int:
        """m(rows)"""
        if not rows:
            return 0
        if self._cost is None:
            return int(BASE_NS + TOKEN_NS * sum([row.num_tokens for row in rows]))
        return self._cost.step_ns(_shape(rows), self._machine)

    def rows_ns(self, rows: Sequence[tuple[int, int, int]], num_logits: int) -> list[float]:
        """m(rows) split over the rows (start, tokens, whether its next token was chosen), each op by what drives it."""
        num_scored = num_logits - sum([row[2] for row in rows])  # tokens of prompts whose logits are wanted too
        if self._cost is None:
            return [BASE_NS / len(rows) + TOKEN_NS * count for _, count, _ in rows]
        if num_scored <= 0:
            return self._cost.rows_ns(rows, self._machine)
        # The log does not say whose they are: prompts of several tokens share them by their length.
        counts = [count if count > 1 else 0 for _, count, _ in rows]
        each = num_scored / max(1, sum(counts))
        return self._cost.rows_ns(
            [(start, count, sampled + each * many) for (start, count, sampled), many in zip(rows, counts, strict=True)],
            self._machine,
        )

    def own_share(self, rows: Sequence[RowRecord], own: Sequence[RowRecord]) -> float:
        """m(own) / m(rows): the part of the step's time that these rows alone would have taken."""
        return 1.0 if len(own) == len(rows) else min(1.0, self._alone_ns(own) / self.ns(rows))

    def _alone_ns(self, own: Sequence[RowRecord]) -> int:
        """Rows of decoding sequences alone cost the same again and again."""
        if len(own) != 1:
            return self.ns(own)
        row = own[0][1:]
        found = self._alone.get(row)
        if found is None:
            if len(self._alone) == MAX_ALONE:
                self._alone.clear()
            found = self._alone[row] = self.ns(own)
        return found

    def added_ns(self, rows: Sequence[RowRecord]) -> list[int]:
        """Of each row, what it adds to the step: m(rows) - m(rows without it). Rows of one token that read the same weights add little."""
        whole = self.ns(rows)
        return [max(0, whole - self.ns([*rows[:index], *rows[index + 1 :]])) for index in range(len(rows))]

    def ops(self, rows: Sequence[RowRecord], num_logits: int) -> list[OpCost]:
        """Each kind of op, with its modelled time, the longest first; none where there is no plan."""
        return [] if self._cost is None else self._cost.by_op(_shape(rows, num_logits), self._machine)

    def memory_roof_share(self, num_bytes: int, ns: int) -> float | None:
        """Bytes moved, as modelled, over what memory can be read in that time; None where it was not measured."""
        return None if self.roofs is None or ns <= 0 else num_bytes / (self.roofs.read_bytes_per_s * ns / 1e9)

    def compute_roof_share(self, flops: int, ns: int) -> float | None:
        return None if self.roofs is None or ns <= 0 else flops / (self.roofs.flops_per_s * ns / 1e9)


def make_step_model(plan: Plan | None, info: EngineInfo | None) -> StepModel:
    """Of an engine, as far as it has told of itself."""
    if info is None:
        return StepModel(None)
    is_measured = info.read_bytes_per_s is not None and info.flops_per_s is not None
    roofs = Roofs(info.read_bytes_per_s, info.flops_per_s) if is_measured else None  # type: ignore[arg-type]
    return StepModel(plan, info.kv_bytes_per_token, roofs)


def _shape(rows: Sequence[RowRecord], num_logits: int | None = None) -> SummedShape:
    counts = tuple([row.num_tokens for row in rows])
    sampled = sum([row.is_sampled for row in rows]) if num_logits is None else num_logits
    return SummedShape(tuple([row.start for row in rows]), counts, sampled, sum(counts))
