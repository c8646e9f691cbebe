"""Checks: the laws of an engine, looked at after every decision and every result, from outside.

Owns counts of its own, so that a count that the engine gets wrong is seen: rows, bounds, turns, recomputed tokens. Knows
nothing of the link, of clients or of what tokens should be; `world` compares those with the request alone. Numbers such as
I13 name the invariants of the project's reliability contract.
"""

from jilju.engine.loop import Engine
from jilju.engine.queue import due_ns
from jilju.engine.scheduler import MAX_BYPASSES, MIN_CHUNK, Step
from jilju.engine.sequence import MAX_PREEMPTIONS, Sequence
from jilju.simulation.script import Settings


class Violation(AssertionError):
    """A law is broken; the message begins with the law."""


def law(name: str, holds: bool, what: object) -> None:
    if not holds:
        raise Violation(f"{name}: {what}")


class EngineChecks:
    def __init__(self, engine: Engine, settings: Settings):
        self._engine = engine
        self._settings = settings
        self._num_turns = 0
        self._waiting: dict[str, Sequence] = {}  # submitted to this engine and in no step yet, in order of arrival
        self._num_passed: dict[str, int] = {}  # times that a later equal went first
        self._computed: dict[str, int] = {}  # tokens of each live sequence that were ever computed by this engine
        self._members: set[Sequence] = set()  # of the step before

    def submitted(self, request_id: str) -> None:
        sequence = self._engine.scheduler.find(request_id)
        if sequence is not None and sequence.num_wanted > 0:
            self._waiting[request_id] = sequence

    def ended(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self._num_passed.pop(request_id, None)
        self._computed.pop(request_id, None)

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
        num_recomputed = 0
        for row in rows:
            sequence, start = row.sequence, row.start
            law("I9 rows begin where the last ended", start == sequence.num_computed and row.count > 0, row)
            law("I8 blocks cover a row", len(row.block_ids) * settings.block_size >= start + row.count, row)
            before = self._computed.get(sequence.id)
            if before is None:
                self._first_turn(sequence)
                before = sequence.max_computed
                self._computed[sequence.id] = before
            num_recomputed += max(0, min(start + row.count, before) - start)
        law("I18 recomputed tokens", num_recomputed == step.num_recomputed_tokens, (num_recomputed, step))
        self._gap(step)
        if len(scheduler.running) > len(rows):
            self._left_out(step, members)
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

    def _first_turn(self, sequence: Sequence) -> None:
        """I15, I16, I17: nobody is passed by later equals too often, or by a lower priority that has not aged."""
        self._waiting.pop(sequence.id, None)
        live = self._engine.scheduler
        better: dict[int, int] = {}  # latest due time of those who wait, by priority
        for other in self._waiting.values():
            if (
                other.num_probation_steps
                or sequence.num_probation_steps
                or _follows(other, live.find(other.request.sibling_of))
            ):
                continue
            if other.priority < sequence.priority:
                better[other.priority] = max(better.get(other.priority, 0), due_ns(other))
            is_equal = other.priority == sequence.priority and other.tenant == sequence.tenant
            if is_equal and other.number < sequence.number:
                self._num_passed[other.id] = self._num_passed.get(other.id, 0) + 1
                law("I15 bypasses", self._num_passed[other.id] <= MAX_BYPASSES, f"{other.id} by {sequence.id}")
        for priority, latest_ns in better.items():
            law("I16 priority", due_ns(sequence) <= latest_ns, f"{sequence.id} before all of priority {priority}")

    # ---- after a result --------------------------------------------------------------------------------------------

    def ran(self, step: Step) -> None:
        for row in step.rows:
            end = row.start + row.count
            if row.sequence.num_computed == end and row.sequence.id in self._computed:
                self._computed[row.sequence.id] = max(end, self._computed[row.sequence.id])
        if self._num_turns % self._settings.deep_every == 0:
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
        for sequence in scheduler.running:
            law("I15 preemptions", sequence.num_preemptions <= MAX_PREEMPTIONS, sequence.id)

    def empty(self) -> None:
        """I32: nothing is left of requests that have ended."""
        scheduler = self._engine.scheduler
        self.deep()
        law("I32 blocks", scheduler.pool.num_held == 0, scheduler.pool.describe())
        law("I32 sequences", not scheduler.has_work and not scheduler.running and not len(scheduler.waiting), "left")
        law("I32 counts", not self._waiting and not self._computed, (self._waiting, self._computed))


def _follows(sequence: Sequence, first: Sequence | None) -> bool:
    """It waits for the prompt of its call's first sequence."""
    return first is not None and first.max_computed < first.num_prompt_tokens - 1
