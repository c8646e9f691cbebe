"""Checks: the laws of an engine, looked at after every decision and every result, from outside.

Owns counts of its own, so that a count that the engine gets wrong is seen: rows, bounds, turns, recomputed tokens. Knows
nothing of the link, of clients or of what tokens should be; `world` compares those with the request alone. Numbers such as
I13 name the invariants of the project's reliability contract.
"""

from dataclasses import dataclass, field

from jilju.engine.loop import Engine
from jilju.engine.queue import AGEING_NS, CHARGED_OUTPUT
from jilju.engine.request import Request
from jilju.engine.scheduler import MAX_BYPASSES, MIN_CHUNK, Row, Step
from jilju.engine.sequence import MAX_PREEMPTIONS, Sequence
from jilju.simulation.script import Settings


class Violation(AssertionError):
    """A law is broken; the message begins with the law."""


def law(name: str, holds: bool, what: object) -> None:
    if not holds:
        raise Violation(f"{name}: {what}")


@dataclass(slots=True)
class _Waiting:
    """One that waits for its first turn, or after a preemption for another."""

    sequence: Sequence | None  # None: it was aborted as soon as it came
    priority: int
    place: tuple[int, int]  # tag and number: the order of turns within its priority
    num_passed: int = 0  # times that one behind it had its turn first


@dataclass(slots=True)
class _Shares:
    """The tags of one priority, made once more."""

    virtual_time: int = 0
    tag_ends: dict[str, int] = field(default_factory=dict)  # by tenant


class EngineChecks:
    def __init__(self, engine: Engine, settings: Settings):
        self._engine = engine
        self._settings = settings
        self._num_turns = 0
        self._num_submitted = 0
        self._num_step_faults = 0
        self._waiting: dict[str, _Waiting] = {}
        self._shares: dict[int, _Shares] = {}  # by priority
        self._charged: dict[str, Sequence | None] = {}  # who is live and had a tag
        self._tags: dict[str, tuple[int, int]] = {}  # places of those who are live
        self._salts: dict[int, bytes] = {}  # of who computed into a block last
        self._computed: dict[str, int] = {}  # tokens of each live sequence that were ever computed by this engine
        self._members: set[Sequence] = set()  # of the step before

    def submitted(self, request: Request) -> None:
        params, num_output = request.params, len(request.output_ids)
        is_scored = (
            request.prompt_logprobs is not None and not num_output and request.num_scored < len(request.prompt_ids) - 1
        )
        number = self._num_submitted
        self._num_submitted += 1
        if params.max_tokens > num_output or is_scored:
            shares = self._shares.setdefault(request.priority, _Shares())
            tag = max(shares.virtual_time, shares.tag_ends.get(request.tenant, 0))
            shares.tag_ends[request.tenant] = tag + _charge(request)
            sequence = self._engine.scheduler.find(request.id)
            self._charged[request.id] = sequence
            self._waits(request.id, _Waiting(sequence, request.priority, (tag, number)))

    def ended(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        sequence = self._charged.pop(request_id, None)
        if sequence is not None:  # it pays for what it used
            request, used = sequence.request, sequence.num_tokens if sequence.num_steps else 0
            self._shares[request.priority].tag_ends[request.tenant] += used - _charge(request)
        self._computed.pop(request_id, None)
        self._tags.pop(request_id, None)

    def _waits(self, request_id: str, waiting: _Waiting) -> None:
        self._waiting[request_id] = waiting
        self._tags[request_id] = waiting.place

    # ---- after a decision ------------------------------------------------------------------------------------------

    def decided(self, step: Step) -> None:
        engine, settings, rows = self._engine, self._settings, step.rows
        scheduler = engine.scheduler
        self._num_turns += 1
        law("I1 blocks are conserved", scheduler.pool.is_balanced(), scheduler.pool.describe())
        law("the engine's own audit", engine.imbalance == 0, f"{engine.imbalance} imbalances")
        law("progress", bool(rows) or not scheduler.has_work, f"work and no step: {scheduler.describe()}")
        if not rows:
            return
        num_tokens = sum([row.count for row in rows])
        law("I13 tokens of a step", num_tokens <= settings.max_tokens, f"{num_tokens} of {settings.max_tokens}")
        law("I13 rows of a step", len(rows) <= settings.max_rows, f"{len(rows)} of {settings.max_rows}")
        law("the counts of a step", num_tokens == step.num_prefill_tokens + step.num_decode_tokens, step)
        members = {row.sequence for row in rows}
        law("I13 one row a sequence", len(members) == len(rows), [row.sequence.id for row in rows])
        num_recomputed, num_waiting = 0, len(self._waiting)
        if step.num_preempted:
            self._preempted(step)
        for row in rows:
            sequence, start = row.sequence, row.start
            law("I9 rows begin where the last ended", start == sequence.num_computed and row.count > 0, row)
            law("I8 blocks cover a row", len(row.block_ids) * settings.block_size >= start + row.count, row)
            if num_waiting and sequence.id in self._waiting:
                self._turn(sequence)
                self._hits(row)
            self._writes(row)
            before = self._computed.get(sequence.id)
            if before is None:
                before = self._computed[sequence.id] = sequence.max_computed
            num_recomputed += max(0, min(start + row.count, before) - start)
        law("I18 recomputed tokens", num_recomputed == step.num_recomputed_tokens, (num_recomputed, step))
        self._gap(step)
        if len(scheduler.running) > len(rows):
            self._left_out(step, members)
        if len(self._waiting) < num_waiting:
            self._owed()
        if len(rows) > 1:
            suspects = [row.sequence.id for row in rows if row.sequence.num_probation_steps]
            law("a suspect runs alone", not suspects, suspects)
        self._members = members

    def _gap(self, step: Step) -> None:
        """Beside a stream a step takes no more than the gap, unless the smallest chunk does."""
        gap_ns = self._settings.gap_us * 1000
        is_awaited = any(row.is_sampled and row.count == 1 and row.sequence in self._members for row in step.rows)
        if gap_ns and step.num_decode_tokens and is_awaited:
            chunks = [row.count for row in step.rows if row.count > 1]
            is_small = sum(chunks) <= MIN_CHUNK + len(step.rows)
            law("the gap between tokens", step.predicted_ns <= gap_ns or is_small, step)
            law("the stated bound", step.bound_ns == 0 or step.predicted_ns <= step.bound_ns or not chunks, step)

    def _left_out(self, step: Step, members: set[Sequence]) -> None:
        if any(row.sequence.num_probation_steps for row in step.rows):
            return  # it runs alone
        for sequence in self._engine.scheduler.running:
            needs_one = sequence.num_wanted - sequence.num_computed == 1
            law("I14 nobody who needs one token is left out", not needs_one or sequence in members, sequence.id)

    def _turn(self, sequence: Sequence) -> None:
        """I15, I16, I17: nobody is passed by one behind it but when it did not fit, nor by another priority out of turn."""
        mine = self._waiting.pop(sequence.id)
        shares = self._shares[mine.priority]
        shares.virtual_time = max(shares.virtual_time, mine.place[0])
        if sequence.num_probation_steps:
            return
        latest: dict[int, int] = {}  # due times of those who wait in other priorities
        passed: set[int] = set()  # those of them where somebody could have had this turn
        find = self._engine.scheduler.find
        for other in self._waiting.values():
            theirs = other.sequence
            if theirs is None:
                continue
            is_ready = not theirs.num_probation_steps and not _follows(theirs, find(theirs.request.sibling_of))
            if other.priority != mine.priority:
                latest[other.priority] = max(latest.get(other.priority, 0), _due_ns(theirs))
                if is_ready:
                    passed.add(other.priority)
            elif is_ready and other.place < mine.place:
                other.num_passed += 1
                law("I15 bypasses", other.num_passed <= MAX_BYPASSES, f"{theirs.id} by {sequence.id}")
                law("I17 in turn", other.num_passed <= theirs.num_bypassed, f"{sequence.id} before {theirs.id}")
        for priority in passed:
            law("I16 priority", _due_ns(sequence) <= latest[priority], f"{sequence.id} before all of {priority}")

    def _preempted(self, step: Step) -> None:
        """I15, I17: the most junior give way, not too often, and keep their places in the queue."""
        scheduler = self._engine.scheduler
        victims = [s for s in scheduler.waiting if s.id in self._computed and s.id not in self._waiting]
        law("preempted sequences are counted", len(victims) == step.num_preempted, (victims, step.num_preempted))
        for sequence in victims:
            law("I15 preemptions", sequence.num_preemptions <= MAX_PREEMPTIONS, sequence.id)
            self._waits(
                sequence.id, _Waiting(sequence, sequence.priority, self._tags[sequence.id], sequence.num_bypassed)
            )
        most_senior = min((_due_ns(s), s.number) for s in victims)
        for sequence in scheduler.running:
            is_senior = (_due_ns(sequence), sequence.number) < most_senior
            is_sure = sequence.is_protected or sequence.num_probation_steps > 0  # a suspect is seen through, alone
            law("juniors give way", is_senior or is_sure, (sequence.id, [s.id for s in victims]))

    def _hits(self, row: Row) -> None:
        """I12: hits only within one salt."""
        salt = row.sequence.request.salt
        for block_id in row.block_ids[: row.start // self._settings.block_size]:
            law("I12 salts", self._salts.get(block_id) == salt, f"{row.sequence.id} hits block {block_id}")

    def _writes(self, row: Row) -> None:
        """I5; and notes whose the content is."""
        size, block_ids, salt = self._settings.block_size, row.block_ids, row.sequence.request.salt
        pool = self._engine.scheduler.pool
        for index in range(row.start // size, (row.start + row.count - 1) // size + 1):
            block_id = block_ids[index]
            law(
                "I5 nobody else holds a block that is written",
                pool.num_holders(block_id) == 1,
                (row.sequence.id, block_id),
            )
            self._salts[block_id] = salt

    def _owed(self) -> None:
        """I10: whoever is let in leaves room for what those who run are owed."""
        scheduler, size = self._engine.scheduler, self._settings.block_size
        owed = sum([max(0, -(-s.num_wanted // size) - len(s.block_ids)) for s in scheduler.running])
        law("I10 no block is promised twice", owed <= scheduler.pool.num_available, (owed, scheduler.pool.describe()))

    # ---- after a result --------------------------------------------------------------------------------------------

    def ran(self, step: Step) -> None:
        for row in step.rows:
            end = row.start + row.count
            if row.sequence.num_computed == end and row.sequence.id in self._computed:
                self._computed[row.sequence.id] = max(end, self._computed[row.sequence.id])
        num_step_faults = self._engine.num_step_faults
        if self._num_turns % self._settings.deep_every == 0 or num_step_faults != self._num_step_faults:
            self._num_step_faults = num_step_faults
            self.deep()
        pool = self._engine.scheduler.pool
        law("I1 blocks are conserved", pool.is_balanced(), pool.describe())
        law("the engine's own audit", self._engine.imbalance == 0, f"{self._engine.imbalance} imbalances")

    def deep(self) -> None:
        """The engine's whole state; and what is free is made unreadable."""
        scheduler = self._engine.scheduler
        try:
            scheduler.check()
        except AssertionError as error:
            raise Violation(f"deep audit: {error}") from error
        size = self._settings.block_size
        for sequence in scheduler.running:
            num_blocks = -(-sequence.num_computed // size)
            law("I8 blocks of who runs", len(sequence.block_ids) == num_blocks, (sequence.id, sequence.block_ids))

    def empty(self) -> None:
        """I32: nothing is left of requests that have ended."""
        scheduler = self._engine.scheduler
        self.deep()
        law("I32 blocks", scheduler.pool.num_held == 0, scheduler.pool.describe())
        law("I32 sequences", not scheduler.has_work and not scheduler.running and not len(scheduler.waiting), "left")
        law("I32 counts", not self._waiting and not self._computed and not self._tags, (self._waiting, self._computed))
        law("I32 charges", not self._charged, self._charged)


def _charge(request: Request) -> int:
    return len(request.prompt_ids) + min(request.params.max_tokens, CHARGED_OUTPUT)


def _due_ns(sequence: Sequence) -> int:
    """A unit of priority is worth so much waiting."""
    return sequence.arrival_ns + sequence.priority * AGEING_NS


def _follows(sequence: Sequence, first: Sequence | None) -> bool:
    """It waits for the prompt of its call's first sequence."""
    return first is not None and first.max_computed < first.num_prompt_tokens - 1
