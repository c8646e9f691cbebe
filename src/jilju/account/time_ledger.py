"""Time ledger: one sequence's life, cut at consecutive marks, so that its intervals sum to its wall time exactly, in ns.

Owns the kinds of interval, and who caused each. One owner an instant: until its first token leaves and after its last one was
made the server's work is counted; in between the engine owns the time, and what the server does meanwhile is not added. In a step
of measured time t, own = t m(own rows) / m(all rows); the rest goes to the other rows in proportion to what each adds.
Computed when it is asked for, never in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.step_model import StepModel
from jilju.engine.events import Closed, EventLog, LoggedStep, RowRecord

Kind = Literal[
    # in the order in which a call meets them first
    "receive",  # the body was on its way
    "parse",  # JSON to fields, checked
    "render",  # messages through the template
    "tokenize",
    "grammar",  # compiling the form of the answer, or making its matcher
    "admit",  # the rest of the way to the engine inside the server: taking places, waiting for a thread
    "link_in",  # server to engine
    "queue_step",  # the step that ran as it arrived
    "queue_rows",  # all rows are taken
    "queue_tokens",  # the steps' token budget is
    "queue_blocks",  # the KV blocks are
    "queue_order",  # others are before it
    "queue_restart",  # no engine is there
    "host",  # schedule, pack, commit, and the way between steps
    "prefill_own",
    "prefill_others",  # others' rows in the steps that computed its prompt
    "decode_own",
    "decode_others",
    "stall_budget",  # steps without a row of it, for the budget was spent
    "stall_blocks",  # ... for want of blocks
    "stall_preempted",  # from its preemption to its next row
    "recompute",  # its tokens computed again, neighbours included
    "restart",  # from an engine's last step to the first of the next
    "in_flight",  # in the engine, and no step of it says more: since the last one, of a call that still runs, or was given up,
    # or waits for another sequence of its own; or the log does not keep them any more
    "link_out",  # engine to server, of the last token
    "text",  # detokenizing, parsing and encoding after the last token
    "write",  # handing the last bytes to the socket
    "client",  # waiting for a slow reader
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_QUEUE: dict[Closed, Kind] = {
    "open": "grammar", "rows": "queue_rows", "tokens": "queue_tokens", "blocks": "queue_blocks", "order": "queue_order",
}  # fmt: skip


@dataclass(slots=True)
class Interval:
    kind: Kind
    begin_ns: int
    end_ns: int
    blame: dict[int, float] = field(default_factory=dict)  # ns by the number of the sequence that caused it
    serial: int | None = None  # of the step that it is a part of

    @property
    def ns(self) -> int:
        return self.end_ns - self.begin_ns


@dataclass(frozen=True, slots=True)
class OwnStep:
    """A step with a row of the sequence."""

    logged: LoggedStep
    row: RowRecord
    is_prefill: bool
    is_recompute: bool
    own_ns: int  # of packed to done


@dataclass(slots=True)
class TimeLedger:
    begin_ns: int
    end_ns: int
    intervals: list[Interval]
    steps: list[OwnStep]
    is_cut: bool = False  # its first steps are not in the log any more

    @property
    def total_ns(self) -> int:
        return self.end_ns - self.begin_ns

    @property
    def is_balanced(self) -> bool:
        """Every interval begins where the one before it ended, and none runs backwards."""
        ends = [self.begin_ns, *(interval.end_ns for interval in self.intervals)]
        touch = all(interval.begin_ns == end for interval, end in zip(self.intervals, ends, strict=False))
        return touch and ends[-1] == self.end_ns and all(interval.ns >= 0 for interval in self.intervals)

    def by_kind(self) -> dict[Kind, int]:
        """ns of each kind that there is any of, in the order of KINDS."""
        sums = dict.fromkeys(KINDS, 0)
        for interval in self.intervals:
            sums[interval.kind] += interval.ns
        return {kind: ns for kind, ns in sums.items() if ns}

    def blame(self) -> dict[int, float]:
        """ns by the number of the sequence that caused them, the largest first."""
        sums: dict[int, float] = {}
        for interval in self.intervals:
            for number, ns in interval.blame.items():
                sums[number] = sums.get(number, 0.0) + ns
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def make_time_ledger(
    call: CallRecord,
    sequence: SequenceRecord | None,
    log: EventLog,
    model: StepModel,
    *,
    block_size: int,
    now_ns: int,
    names_blame: bool = True,
) -> TimeLedger:
    """`sequence` None: the call did not get as far as the engine. Of a call that still runs the ledger ends at `now_ns`."""
    end_ns = call.ended_ns or now_ns
    cuts = _Cuts(call.received_ns, end_ns)
    cuts.until("receive", call.body_ns)
    cuts.until("parse", call.parsed_ns)
    if not call.submitted_ns or sequence is None:
        _lengths(cuts, call, end_ns)
        cuts.until("write", end_ns)
        return TimeLedger(call.received_ns, end_ns, cuts.intervals, [])
    _lengths(cuts, call, call.submitted_ns)
    walk = _Walk(cuts, sequence, log, model, block_size, names_blame)
    walk.arrive(sequence.queued_ns)
    walk.steps_until(sequence.ended_ns or end_ns)
    if sequence.ended_ns:
        cuts.until("link_out", sequence.ended_ns)
        cuts.until("in_flight", call.last_event_ns if call.ended_ns else end_ns)  # others of its call are not done
        _after("text", call.encoded_ns, cuts, call)
        _after("write", end_ns, cuts, call)
    cuts.until("in_flight", end_ns)
    return TimeLedger(call.received_ns, end_ns, cuts.intervals, walk.steps, walk.is_cut)


class _Cuts:
    """Intervals as they are cut off, one after the other."""

    def __init__(self, begin_ns: int, end_ns: int):
        self.at_ns, self._end_ns = begin_ns, end_ns
        self.intervals: list[Interval] = []

    def until(
        self, kind: Kind, until_ns: int, blame: dict[int, float] | None = None, serial: int | None = None
    ) -> None:
        """Cut up to a moment; one that has passed, or was never reached (0), cuts nothing."""
        until_ns = min(until_ns, self._end_ns)
        if until_ns > self.at_ns:
            self.intervals.append(Interval(kind, self.at_ns, until_ns, blame or {}, serial))
            self.at_ns = until_ns


def _lengths(cuts: _Cuts, call: CallRecord, until_ns: int) -> None:
    """What is known by its length alone comes one after the other; prompts of a call may take turns."""
    for kind, length in (
        ("render", call.render_ns), ("tokenize", call.tokenize_ns), ("grammar", call.grammar_ns),
    ):  # fmt: skip
        cuts.until(kind, min(cuts.at_ns + length, until_ns))  # type: ignore[arg-type]
    if call.parsed_ns:
        cuts.until("admit", until_ns if call.submitted_ns else call.encoded_ns)


def _after(kind: Kind, until_ns: int, cuts: _Cuts, call: CallRecord) -> None:
    """What the server does after the last token, but for the writes that its reader held up."""
    for begin_ns, wait_end_ns in call.waits:
        if begin_ns < until_ns and wait_end_ns > cuts.at_ns:
            cuts.until(kind, begin_ns)
            cuts.until("client", min(wait_end_ns, until_ns))
    cuts.until(kind, until_ns)


class _Walk:
    """Over the steps of the engine, from the moment the sequence was on its way to it."""

    def __init__(
        self, cuts: _Cuts, sequence: SequenceRecord, log: EventLog, model: StepModel, block_size: int, names_blame: bool
    ):
        self._cuts, self._sequence, self._log, self._model = cuts, sequence, log, model
        self._block_size, self._names_blame = block_size, names_blame
        self._number = sequence.number
        self.steps: list[OwnStep] = []
        self._computed = 0  # tokens, at most, so far
        self.is_cut = False  # its first steps are not in the log any more
        self._num_restarts = 0  # seen
        # Since its last row: steps without one, gaps (None), and their ends.
        self._stalled: list[tuple[LoggedStep | None, int]] = []

    def arrive(self, queued_ns: int) -> None:
        """The engine takes what came to it between two steps."""
        cuts = self._cuts
        for logged in self._log.overlapping(cuts.at_ns, queued_ns):
            cuts.until("link_in", logged.step.begin_ns)
            taken_ns = min(logged.step.end_ns, queued_ns)
            cuts.until("queue_step", taken_ns, self._blame(logged, taken_ns - cuts.at_ns), logged.serial)
        cuts.until("link_in", queued_ns)

    def steps_until(self, end_ns: int) -> None:
        queued_ns, sequence = self._cuts.at_ns, self._sequence
        found = self._known(self._log.overlapping(queued_ns, end_ns), queued_ns, end_ns)
        before_id = self._id_before(found)
        last_ns = max([logged.step.end_ns for logged in found if self._row(logged) is not None], default=0)
        for logged in found:
            step = logged.step
            is_new_engine = step.step_id <= before_id and not step.is_rerun
            before_id = step.step_id
            if sequence.finish_reason is not None and step.begin_ns >= last_ns > queued_ns:
                break
            self._gap(step.begin_ns, is_new_engine)
            row = self._row(logged)
            if row is None:
                self._without(logged, queued_ns)
            else:
                self._with(logged, row)
        self._settle_stall(None)
        is_between_engines = sequence.num_resumes > self._num_restarts
        if not self._has_run:  # it waited until somebody gave it up, or still does
            kind = "queue_step" if not found else _QUEUE[found[-1].step.closed_by]
            self._cuts.until("queue_restart" if is_between_engines else kind, end_ns)
        elif sequence.finish_reason is None:
            self._cuts.until("restart" if is_between_engines else "in_flight", end_ns)

    @property
    def _has_run(self) -> bool:
        return self.is_cut or bool(self.steps)

    def _known(self, found: list[LoggedStep], queued_ns: int, end_ns: int) -> list[LoggedStep]:
        """Without the first steps that are not kept, or not their rows: of these nothing can be said."""
        first = next((i for i, logged in enumerate(found) if logged.rows or not logged.step.num_rows), len(found))
        if first or self._log.has_dropped(queued_ns):
            self.is_cut = True
            self._cuts.until("in_flight", min(found[first].step.begin_ns, end_ns) if first < len(found) else end_ns)
        return found[first:]

    def _id_before(self, found: list[LoggedStep]) -> int:
        """Of the step before the first of these, if an engine may have died between the two while it waited."""
        if not found or not self._sequence.num_resumes:
            return -1
        before = self._log.step(found[0].serial - 1)
        if before is not None:
            return before.step.step_id
        # An engine died in its first step, unless a later one shows that death.
        ids = [logged.step.step_id for logged in found if not logged.step.is_rerun]
        is_seen = any(later <= earlier for earlier, later in pairwise(ids)) or self._sequence.finish_reason is None
        return -1 if is_seen else found[0].step.step_id

    def _row(self, logged: LoggedStep) -> RowRecord | None:
        return next((row for row in logged.rows if row.number == self._number), None)

    def _gap(self, begin_ns: int, is_new_engine: bool) -> None:
        """Between two steps."""
        if is_new_engine:
            self._settle_stall(None)
            self._num_restarts += 1
            self._cuts.until("restart" if self._has_run else "queue_restart", begin_ns)
        elif self._stalled:
            self._stalled.append((None, begin_ns))
        else:
            self._cuts.until("host", begin_ns)

    def _without(self, logged: LoggedStep, queued_ns: int) -> None:
        step = logged.step
        if self._has_run:
            self._stalled.append((logged, step.end_ns))
            return
        if step.begin_ns < queued_ns:
            self._cuts.until(
                "queue_step", step.end_ns, self._blame(logged, step.end_ns - self._cuts.at_ns), logged.serial
            )
        else:
            kind = _QUEUE[step.closed_by]
            blame = self._holders(logged, step.closed_by, step.end_ns - self._cuts.at_ns)
            self._cuts.until(kind, step.end_ns, blame, logged.serial)

    def _with(self, logged: LoggedStep, row: RowRecord) -> None:
        step, cuts = logged.step, self._cuts
        is_recompute = row.start < self._computed
        self._settle_stall(row)
        is_prefill = row.start < self._sequence.num_prompt_tokens and not is_recompute
        own = round((step.done_ns - step.packed_ns) * self._model.own_share(logged.rows, [row]))
        cuts.until("host", step.packed_ns, serial=logged.serial)
        own_end_ns = step.packed_ns + own
        if is_recompute:
            cuts.until("recompute", step.done_ns, serial=logged.serial)
        else:
            cuts.until("prefill_own" if is_prefill else "decode_own", own_end_ns, serial=logged.serial)
            blame = self._blame(logged, step.done_ns - own_end_ns, row)
            cuts.until("prefill_others" if is_prefill else "decode_others", step.done_ns, blame, logged.serial)
        cuts.until("host", step.end_ns, serial=logged.serial)
        self.steps.append(OwnStep(logged, row, is_prefill, is_recompute, own))
        self._computed = max(self._computed, row.start + row.num_tokens)

    def _settle_stall(self, row: RowRecord | None) -> None:
        """Steps that went by without it: what came next says why."""
        stalled, self._stalled = self._stalled, []
        is_preempted = row is not None and row.start < self._computed
        for logged, end_ns in stalled:
            if logged is None:
                self._cuts.until("host", end_ns)
                continue
            closed = logged.step.closed_by
            kind: Kind = "stall_preempted" if is_preempted else "stall_blocks" if closed == "blocks" else "stall_budget"
            blame = self._holders(logged, "blocks" if kind != "stall_budget" else "tokens", end_ns - self._cuts.at_ns)
            self._cuts.until(kind, end_ns, blame, logged.serial)

    def _blame(self, logged: LoggedStep, ns: int, own: RowRecord | None = None) -> dict[int, float]:
        """`ns` shared out over the other rows, by what each adds to the step."""
        others = [row for row in logged.rows if row is not own]
        if ns <= 0 or not others or not self._names_blame:
            return {}
        added = self._model.added_ns(logged.rows)
        return _shared(ns, {row.number: added[i] for i, row in enumerate(logged.rows) if row is not own})

    def _holders(self, logged: LoggedStep, closed: Closed, ns: int) -> dict[int, float]:
        """`ns` shared out over those who hold what it waits for."""
        if ns <= 0 or not self._names_blame:
            return {}
        return _shared(ns, held_by(logged.rows, closed, self._block_size))


def held_by(rows: Sequence[RowRecord], closed: Closed, block_size: int) -> dict[int, int]:
    """How much of what is wanting each sequence of a step has: blocks, prefill tokens, or a row."""
    if closed == "blocks":
        return {row.number: -(-(row.start + row.num_tokens) // block_size) for row in rows}
    if closed == "tokens":
        chunks = {row.number: row.num_tokens for row in rows if row.num_tokens > 1}
        return chunks or {row.number: row.num_tokens for row in rows}
    return {row.number: 1 for row in rows}


def _shared(ns: int, weights: dict[int, int]) -> dict[int, float]:
    total = sum(weights.values())
    return {number: ns * weight / total for number, weight in weights.items() if weight} if total else {}
