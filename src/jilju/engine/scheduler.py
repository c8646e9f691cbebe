"""Scheduler: which tokens of which sequences the next step computes, and what its result changes.

Owns the running sequences and every change of them: `schedule()` decides, `commit()` takes the result, and between the two
nothing changes, so a step that fails commits nothing. Pure decisions: time comes in as an argument; knows nothing of clocks,
randomness, threads, backends or the link.

Every sequence that needs one token only is in every step; what the step's budget leaves goes to prefill chunks, the most
senior first. Beside a decoding sequence a step is cut so that it is predicted to take no more than `gap_ns`, less the headroom
that predictions were seen to need, but a chunk of MIN_CHUNK tokens is always allowed: a stream waits for others' prompts at most max(gap_ns, its batch + MIN_CHUNK tokens).

Who waits is let in by the turns of `queue`, while all tokens that are known can be held. One that does not fit is passed by
others of its priority MAX_BYPASSES times, then all wait for it. When blocks run out the most junior sequence is preempted: it
loses its blocks, goes back to its place in the queue and is computed again, MAX_PREEMPTIONS times, then it is let in for
good. So each step brings somebody nearer to the end, and everybody's turn comes.
"""

import heapq
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from jilju.engine.blocks import BlockPool
from jilju.engine.events import Closed, prefill_share_ns
from jilju.engine.matcher import Grammar
from jilju.engine.prefix import PrefixIndex
from jilju.engine.queue import WaitingQueue, due_ns
from jilju.engine.request import (
    EngineEvent,
    FinishReason,
    PromptScored,
    Request,
    RequestAborted,
    RequestEnded,
    RequestFailed,
    TokenEvent,
)
from jilju.engine.sequence import MAX_PREEMPTIONS, Sequence, max_slots
from jilju.engine.step_times import StepTimes, num_pairs
from jilju.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EmptyPrompt,
    GrammarDeadEnd,
    InternalError,
    JiljuError,
    KvCapacityExceeded,
    NanLogits,
)
from jilju.plan import Limits, StepResult

MIN_CHUNK = 16  # prefill tokens that a step may always hold, or a prompt beside many streams would never be done
MAX_BYPASSES = 16  # of a sequence that does not fit, by later ones of its priority that do
RETRY_STEPS = (
    16  # until one that did not fit is tried again though no more room is to be had: the cache may have more of it
)
LOOK_AHEAD = 8  # sequences behind one that does not fit that are tried in a step

_NO_POSITIONS = range(0)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: its tokens [start, start + count) are computed."""

    sequence: Sequence
    start: int  # == num_computed when the step was made
    count: int  # 1 in decode, more in prefill; the scheduler does not tell them apart
    block_ids: tuple[int, ...]  # cover [0, start + count)
    scored: range  # positions whose next prompt token is scored
    is_sampled: bool  # the row ends at the newest token, so the next one is sampled

    @property
    def num_logits(self) -> int:
        return len(self.scored) + self.is_sampled

    @property
    def num_wanted_logprobs(self) -> int:
        return len(self.sequence.request.params.logprob_token_ids or ()) if self.is_sampled else 0


@dataclass(frozen=True, slots=True)
class Step:
    """One decision of the scheduler. No rows: there is nothing to run."""

    id: int
    begin_ns: int
    rows: tuple[Row, ...]
    num_prefill_tokens: int  # of rows that compute more than the newest token of a decoding sequence
    num_decode_tokens: int
    num_cached_tokens: int
    num_recomputed_tokens: int
    num_preempted: int
    work: float  # its tokens, with what scoring some of them adds
    num_pairs: int  # query-key pairs
    predicted_ns: int
    bound_ns: int  # what it may be predicted to take; 0: nobody's stream waits for it
    closed_by: Closed = "open"
    is_rerun: bool = False  # part of a step that raised


@dataclass(slots=True)
class _Draft:
    """A step while it is being made. Sequences map to the number of their tokens, decoding ones first."""

    counts: dict[Sequence, int] = field(default_factory=dict)
    budget: int = 0  # tokens left
    gap_ns: int = 0  # what the step is to take at most; 0: nobody's stream waits for it
    left_ns: float = 0.0  # of it, for chunks
    rows_ns: int = 0  # of the rows that need one token
    smallest_ns: float = 0.0  # of the smallest chunk that is always allowed
    num_chunk_tokens: int = 0
    num_cached: int = 0
    num_preempted: int = 0
    closed_by: Closed = "open"


def check_fits(request: Request, limits: Limits) -> None:
    """Raise unless the request could run alone, and so will run some time."""
    num_prompt, max_tokens = len(request.prompt_ids), request.params.max_tokens
    if num_prompt == 0:
        raise EmptyPrompt("the prompt has no tokens; a request needs at least one")
    if num_prompt + max_tokens > limits.max_context:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, {num_prompt + max_tokens} together; the"
            f" context is {limits.max_context} tokens; shorten the prompt or lower max_tokens"
        )
    num_slots = limits.num_blocks * limits.block_size
    if max_slots(request) > num_slots:
        raise KvCapacityExceeded(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; the KV cache holds {num_slots} tokens;"
            " shorten the prompt, lower max_tokens, or give the engine more KV memory"
        )
    request.check()


class Scheduler:
    """`gap_ns`: what a step beside a decoding sequence is to take at most, as `times` predicts it; None: no such bound.
    `score_work`: what the logits of a prompt's token cost beside the token itself, in tokens."""

    def __init__(
        self,
        limits: Limits,
        hash_key: bytes = b"",
        *,
        vocab_size: int,
        times: StepTimes | None = None,
        gap_ns: int | None = None,
        score_work: float = 0.0,
    ):
        self.limits = limits
        self.times = times if times is not None else StepTimes()
        self.prefix = PrefixIndex(limits.block_size, hash_key)
        self.pool = BlockPool(limits.num_blocks, limits.block_size, self.prefix)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # the most senior first
        self._gap_ns = gap_ns
        self._score_work = score_work
        self._vocab_size = vocab_size
        # One token of each running sequence must fit in a step.
        self._max_running = min(limits.max_rows, limits.max_tokens)
        self._live: dict[str, Sequence] = {}
        self._to_abort: dict[str, None] = {}
        self._to_end: list[Sequence] = []
        self._making: dict[Sequence, Future[Grammar]] = {}  # who waits for a grammar to be made, and is in no queue yet
        self._deadlines: list[tuple[int, int, str]] = []  # a heap of (when, 0 of the queue or 1 of all, id)
        self._num_on_probation = 0
        self._num_submitted = 0
        self._num_steps = 0

    # ---- what comes in -------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_making(self) -> int:
        """Requests whose grammar is being made; if all are such, there is nothing to do."""
        return len(self._making)

    def find(self, request_id: str) -> Sequence | None:
        return self._live.get(request_id)

    def submit(self, request: Request, now_ns: int, making: Future[Grammar] | None = None) -> None:
        """Queue a request, once its grammar is made; raises if it could never run."""
        check_fits(request, self.limits)
        assert request.params.seed is not None, f"request {request.id} has no seed; who accepts a request draws it"
        assert request.id not in self._live, f"request {request.id} is live already"
        sequence = Sequence(self._num_submitted, request, now_ns)
        self._num_submitted += 1
        self._live[request.id] = sequence
        self._num_on_probation += sequence.num_probation_steps > 0
        if request.deadline_ns:
            heapq.heappush(self._deadlines, (request.deadline_ns, 1, request.id))
        if request.queue_deadline_ns:
            heapq.heappush(self._deadlines, (request.queue_deadline_ns, 0, request.id))
        if sequence.num_wanted == 0:
            self._to_end.append(sequence)
        elif making is None or _take_grammar(sequence, making):
            self.waiting.push(sequence)
        else:
            self._making[sequence] = making

    def abort(self, request_id: str) -> None:
        """Takes effect before the next step is scheduled. Unknown ids are ignored: their request has just ended."""
        if request_id in self._live:
            self._to_abort[request_id] = None

    def settle(self, now_ns: int) -> list[EngineEvent]:
        """Apply what was asked for since the last step, and deadlines; comes before every schedule()."""
        events: list[EngineEvent] = []
        for sequence in self._to_end:
            if sequence.id not in self._to_abort:
                self._forget(sequence)
                events.append(RequestEnded(request_id=sequence.id, finish_reason="length", times=sequence.times()))
        for request_id in self._to_abort:
            aborted = self._live.get(request_id)
            if aborted is not None:
                self._withdraw(aborted)
                event = RequestAborted(request_id=request_id, num_tokens=aborted.num_output, times=aborted.times())
                events.append(event)
        self._to_end.clear()
        self._to_abort.clear()
        if self._making:
            self._queue_made(events)
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            when_ns, is_of_all, request_id = heapq.heappop(self._deadlines)
            late = self._live.get(request_id)
            if late is not None and (is_of_all or late.num_steps == 0):
                self._withdraw(late)
                events.append(deadline_event(request_id, when_ns - late.arrival_ns, bool(is_of_all)))
        if len(self._deadlines) > 4 * len(self._live) + 64:  # most are of requests that have ended
            self._deadlines = [deadline for deadline in self._deadlines if deadline[2] in self._live]
            heapq.heapify(self._deadlines)
        return events

    def _queue_made(self, events: list[EngineEvent]) -> None:
        """Queue those whose grammar is there, or end them."""
        for sequence, making in [(s, making) for s, making in self._making.items() if making.done()]:
            del self._making[sequence]
            if _take_grammar(sequence, making):
                self.waiting.push(sequence)
            elif sequence.grammar is None:
                self._fail(sequence, InternalError(f"its grammar could not be made: {making.exception()}"), events)
            else:
                self._fail(sequence, _dead_end(sequence.grammar), events)

    def _withdraw(self, sequence: Sequence) -> None:
        """Take a live sequence out, from wherever it is."""
        if sequence.is_running:
            self.running.remove(sequence)
        elif sequence in self._making:
            self._making.pop(sequence).cancel()
        elif sequence.num_wanted > 0:
            self.waiting.remove(sequence)
        self._forget(sequence)
        self.prefix.note_tail(sequence)
        self.pool.release(sequence.block_ids, sequence.tenant)
        sequence.block_ids = []

    # ---- schedule --------------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Step:
        draft = _Draft(budget=self.limits.max_tokens)
        if self._num_on_probation and self._plan_probation(draft):
            draft.closed_by = "order" if self.waiting else "open"
            return self._make_step(draft, now_ns)
        chunks: list[Sequence] = []
        for sequence in self.running.copy():
            if sequence.num_wanted - sequence.num_computed > 1:
                chunks.append(sequence)
            elif sequence.is_running:  # it may have been preempted for a more senior one
                self._plan_newest(draft, sequence)
        if chunks or self.waiting:
            self._bound(draft)
        for sequence in chunks:
            if sequence.is_running:
                self._plan_chunk(draft, sequence)
        if self.waiting:
            draft.closed_by = "blocks" if draft.num_preempted else self._admit(draft)
        return self._make_step(draft, now_ns)

    def _plan_probation(self, draft: _Draft) -> bool:
        """The most senior sequence on probation runs alone, if there is one that can."""
        suspect = next((s for s in self.running if s.num_probation_steps), None)
        if suspect is None:
            waiting = next((s for s in self.waiting if s.num_probation_steps), None)
            if waiting is not None and len(self.running) < self._max_running:
                self._let_in(draft, waiting, self._num_owed_by_running())
            return bool(draft.counts)
        while self._num_fitting(suspect) == 0:
            victim = next((s for s in reversed(self.running) if not s.is_protected and s is not suspect), None)
            if victim is None:
                return False
            self._preempt(draft, victim)
        count = min(suspect.num_wanted - suspect.num_computed, draft.budget, self._num_fitting(suspect))
        self._plan(draft, suspect, count)
        return True

    def _plan_newest(self, draft: _Draft, sequence: Sequence) -> None:
        """The one token that a sequence lacks. If it needs a block for it, that is worth a preemption, even its own."""
        while self._num_fitting(sequence) == 0:
            victim = self._most_junior()
            assert victim is not None, f"{sequence.id} needs a block, and all that run are sure of theirs"
            self._preempt(draft, victim)
            if victim is sequence:
                return
        self._plan(draft, sequence, 1)

    def _bound(self, draft: _Draft) -> None:
        """Cut the prefill of this step for the sequences whose streams wait for it."""
        if self._gap_ns is not None and any(sequence.num_output for sequence in draft.counts):
            pairs = sum([sequence.num_computed + 1 for sequence in draft.counts])
            work = sum([self._weight(sequence) for sequence in draft.counts])
            draft.rows_ns = self.times.predict_ns(work, pairs)
            draft.gap_ns = self._gap_ns
            draft.left_ns = self._gap_ns / self.times.headroom - draft.rows_ns

    def _weight(self, sequence: Sequence) -> float:
        """What each of its next tokens counts, in tokens: at most, for of a prompt that is computed again some have their scores."""
        return 1.0 + self._score_work if sequence.is_scoring else 1.0

    def _allowed(self, draft: _Draft, start: int, wanted: int, weight: float = 1.0) -> int:
        """Tokens of a chunk that budget and bound allow."""
        count = min(wanted, draft.budget)
        if draft.gap_ns:
            within = self.times.chunk_within(draft.left_ns, start, count, weight)
            count = max(within, min(count, MIN_CHUNK - draft.num_chunk_tokens))
        return count

    def _plan_chunk(self, draft: _Draft, sequence: Sequence) -> None:
        """As many of its tokens as the step and the blocks allow. It preempts juniors, but never itself: it waits."""
        start, weight = sequence.num_computed, self._weight(sequence)
        count = self._allowed(draft, start, sequence.num_wanted - start, weight)
        if count == 0:
            return
        while self._num_fitting(sequence) == 0:
            victim = self._most_junior()
            assert victim is not None, f"{sequence.id} needs a block, and all that run are sure of theirs"
            if victim is sequence:
                return
            self._preempt(draft, victim)
        self._plan(draft, sequence, min(count, self._num_fitting(sequence)))

    def _admit(self, draft: _Draft) -> Closed:
        """Let in who waits, by turns, while all tokens that are known can be held beside those of who runs already.

        Returns what keeps out those that still wait.
        """
        num_rows = self._max_running - len(self.running)
        if num_rows <= 0 or draft.budget == 0:
            return "rows" if num_rows <= 0 else "tokens"
        owed = self._num_owed_by_running()
        blocked: list[Sequence] = []
        for sequence in self.waiting.next_turns(num_rows + LOOK_AHEAD):
            if blocked and sequence.priority != blocked[0].priority:
                return "blocks"  # a turn of another priority is not to be had by being small
            if self._awaits_sibling(sequence):
                continue
            if len(self.running) == self._max_running:
                return "rows"
            if self._allowed(draft, 0, 1) == 0:
                return "tokens"
            if not sequence.num_probation_steps and self._let_in(draft, sequence, owed):
                owed += self._num_owed(sequence)
                for passed in blocked:
                    passed.num_bypassed += 1
            else:
                blocked.append(sequence)
            if len(blocked) > LOOK_AHEAD or any(s.num_bypassed >= MAX_BYPASSES for s in blocked):
                return "blocks"
        if blocked:
            return "blocks"
        return "order" if self.waiting else "open"  # for a sibling, or behind all that were looked at

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Its call's first sequence has the same prompt and is about to compute it, or does so now."""
        first = self._live.get(sequence.request.sibling_of)
        return first is not None and first.max_computed < first.num_prompt_tokens - 1

    def _let_in(self, draft: _Draft, sequence: Sequence, owed: int) -> bool:
        """Start a waiting sequence if all its known tokens fit beside the blocks that others are owed."""
        room = self.pool.num_available - owed
        is_early = self._num_steps < sequence.refused_step + RETRY_STEPS
        if self.running and is_early and room <= sequence.refused_room:
            return False  # looking for its prompt in the cache anew would cost time in every step
        # The newest token is always computed, its logits are wanted; so are those of a prompt's tokens that are to be scored.
        most = sequence.num_scored if sequence.is_scoring else sequence.num_wanted - 1
        hits = self.prefix.match(sequence, most)
        num_new = self.pool.blocks_for(sequence.num_wanted) - len(hits)
        num_revived = sum(self.pool.is_cached(block_id) for block_id in hits)
        if num_new + num_revived > room:
            sequence.refused_room, sequence.refused_step = room, self._num_steps
            return False
        if sequence.is_protected and self._num_promised() + self._max_blocks(sequence) > self.pool.num_blocks:
            return False
        start = len(hits) * self.pool.block_size
        count = self._allowed(draft, start, sequence.num_wanted - start, self._weight(sequence))
        if count == 0:
            return False
        if sequence.miss is None:
            sequence.miss = self.prefix.explain(sequence, len(hits), most, self.running)
        sequence.refused_room = -1
        self.waiting.take(sequence)
        self._start(draft, sequence, hits)
        self._plan(draft, sequence, count)
        return True

    def _start(self, draft: _Draft, sequence: Sequence, hits: list[int]) -> None:
        for block_id in hits:
            self.pool.share(block_id)
        sequence.block_ids = hits
        sequence.num_hit_blocks = len(hits)
        sequence.num_computed = len(hits) * self.pool.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt_tokens)
            draft.num_cached += sequence.num_cached
        sequence.is_running = True
        place, seniority = len(self.running), _seniority(sequence)
        while place > 0 and _seniority(self.running[place - 1]) > seniority:
            place -= 1
        self.running.insert(place, sequence)

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        block_ids, end = sequence.block_ids, sequence.num_computed + count
        while len(block_ids) * self.pool.block_size < end:
            block_ids.append(self.pool.take(sequence.tenant))
        draft.counts[sequence] = count
        draft.budget -= count
        if draft.gap_ns:
            draft.num_chunk_tokens += count
            start, weight = sequence.num_computed, self._weight(sequence)
            draft.left_ns -= self.times.chunk_ns(start, count, weight)
            draft.smallest_ns = max(draft.smallest_ns, self.times.chunk_ns(start, MIN_CHUNK, weight))

    def _preempt(self, draft: _Draft, victim: Sequence) -> None:
        draft.budget += draft.counts.pop(victim, 0)
        draft.num_preempted += 1
        self.prefix.note_tail(victim)
        self.pool.release(victim.block_ids, victim.tenant)
        victim.block_ids = []
        victim.num_computed = 0
        victim.num_preemptions += 1
        victim.is_running = False
        self.running.remove(victim)
        self.waiting.push(victim)

    def _most_junior(self) -> Sequence | None:
        """Who is preempted next."""
        return next((s for s in reversed(self.running) if not s.is_protected), None)

    def _num_fitting(self, sequence: Sequence) -> int:
        """Tokens that it could compute now, for all that the pool can give."""
        num_blocks = len(sequence.block_ids) + self.pool.num_available
        return num_blocks * self.pool.block_size - sequence.num_computed

    def _num_owed(self, sequence: Sequence) -> int:
        """Blocks that a running sequence lacks for the tokens that are known and the next."""
        wanted = self.pool.blocks_for(sequence.num_wanted + sequence.wants_token)
        return max(0, wanted - len(sequence.block_ids))

    def _num_owed_by_running(self) -> int:
        return sum([self._num_owed(s) for s in self.running])

    def _max_blocks(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(max_slots(sequence.request))

    def _num_promised(self) -> int:
        """Blocks that protected sequences, which are not preempted, can come to hold."""
        return sum(self._max_blocks(s) for s in self.running if s.is_protected)

    def _make_step(self, draft: _Draft, now_ns: int) -> Step:
        rows: list[Row] = []
        for sequence, count in draft.counts.items():
            start = sequence.num_computed
            end = start + count
            scored = _NO_POSITIONS
            if sequence.is_scoring:
                scored = range(max(start, sequence.num_scored), min(end, sequence.num_scores))
            is_sampled = end == sequence.num_tokens and sequence.wants_token
            rows.append(Row(sequence, start, count, tuple(sequence.block_ids), scored, is_sampled))
        bound_ns = max(draft.gap_ns, draft.rows_ns + int(draft.smallest_ns) + 1) if draft.gap_ns else 0
        return self._step_of(tuple(rows), now_ns, bound_ns, draft.num_cached, draft.num_preempted, draft.closed_by)

    def _step_of(
        self,
        rows: tuple[Row, ...],
        now_ns: int,
        bound_ns: int,
        num_cached: int = 0,
        num_preempted: int = 0,
        closed_by: Closed = "open",
        is_rerun: bool = False,
    ) -> Step:
        num_prefill = num_decode = num_recomputed = num_scored = pairs = 0
        for row in rows:
            sequence, start, count = row.sequence, row.start, row.count
            if count == 1 and row.is_sampled and sequence.num_output > 0:
                num_decode += 1
            else:
                num_prefill += count
            num_scored += len(row.scored)
            pairs += num_pairs(start, count)
            if start < sequence.max_computed:
                num_recomputed += min(start + count, sequence.max_computed) - start
        if rows:
            self._num_steps += 1
        work = num_prefill + num_decode + self._score_work * num_scored
        return Step(
            id=self._num_steps,
            begin_ns=now_ns,
            rows=rows,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_cached_tokens=num_cached,
            num_recomputed_tokens=num_recomputed,
            num_preempted=num_preempted,
            work=work,
            num_pairs=pairs,
            predicted_ns=self.times.predict_ns(work, pairs) if rows else 0,
            bound_ns=bound_ns,
            closed_by=closed_by,
            is_rerun=is_rerun,
        )

    # ---- commit ----------------------------------------------------------------------------------------------------

    def commit(self, step: Step, result: StepResult, now_ns: int) -> list[EngineEvent]:
        """Take the result of a step: the only place where tokens are appended and blocks enter the prefix cache."""
        events: list[EngineEvent] = []
        finite: list[bool] = result.finite.tolist()
        token_ids: list[int] = result.token_ids.tolist()
        stalled_ns = prefill_share_ns(step.begin_ns, now_ns, step.num_prefill_tokens, step.num_decode_tokens)
        num_live, logits, wanted = len(self._live), range(0), range(0)
        for row in step.rows:
            logits = range(logits.stop, logits.stop + row.num_logits)
            wanted = range(wanted.stop, wanted.stop + row.num_wanted_logprobs)
            self._note_step(row, step, stalled_ns)
            token_id = token_ids[logits.stop - 1] if row.is_sampled else -1
            error = self._error_of(row, finite[logits.start : logits.stop], token_id)
            if error is not None:
                self._fail(row.sequence, error, events)
            else:
                self._commit_row(row, logits, wanted, token_ids, result, now_ns, events)
        if len(self._live) != num_live:
            self.running = [s for s in self.running if s.id in self._live]
        return events

    def _error_of(self, row: Row, finite: list[bool], token_id: int) -> JiljuError | None:
        """What ends the request here; if nothing does, its grammar has gone on by the token."""
        sequence = row.sequence
        grammar = sequence.grammar if row.is_sampled else None
        is_empty = grammar is not None and grammar.is_empty  # then nothing was chosen
        if not all(finite[:-1] if is_empty else finite):
            message = "the model gave a logit that is NaN or infinite, or no token was allowed; the request ends here,"
            return NanLogits(f"{message} others go on")
        if not row.is_sampled:
            return None
        if grammar is not None and is_empty:
            return None if grammar.is_complete else _dead_end(grammar)
        if not 0 <= token_id < self._vocab_size:
            return InternalError(f"the backend chose token {token_id} of a vocabulary of {self._vocab_size}")
        if grammar is not None and token_id not in sequence.end_ids and not grammar.take(token_id):
            return _dead_end(grammar)
        return None

    def part(self, step: Step, rows: tuple[Row, ...], now_ns: int) -> Step:
        """A step of some rows of one that raised; nothing of that one is committed, so they are as they were."""
        return self._step_of(rows, now_ns, step.bound_ns, closed_by=step.closed_by, is_rerun=True)

    def give_up(self, rows: Iterable[Row]) -> None:
        """Rows of a step that raised are not run now: what was taken for them goes back."""
        for row in rows:
            sequence = row.sequence
            if sequence.is_running:
                num_needed = self.pool.blocks_for(sequence.num_computed)
                spare, sequence.block_ids = sequence.block_ids[num_needed:], sequence.block_ids[:num_needed]
                self.pool.release(spare, sequence.tenant)

    def fail(self, rows: Iterable[Row], error: JiljuError) -> list[EngineEvent]:
        """End the requests of rows of a step that raised."""
        events: list[EngineEvent] = []
        for row in rows:
            self._fail(row.sequence, error, events)
        self.running = [s for s in self.running if s.id in self._live]
        return events

    def _note_step(self, row: Row, step: Step, stalled_ns: int) -> None:
        sequence = row.sequence
        if sequence.num_steps == 0:
            sequence.scheduled_ns = step.begin_ns
        sequence.num_steps += 1
        is_caught_up = row.start + row.count >= sequence.num_submitted_tokens
        if sequence.num_probation_steps and len(step.rows) == 1 and is_caught_up:
            sequence.num_probation_steps -= 1
            self._num_on_probation -= not sequence.num_probation_steps
        if row.is_sampled and row.count == 1 and sequence.num_output > len(sequence.request.output_ids):
            sequence.stalled_ns += stalled_ns

    def _commit_row(
        self, row: Row, logits: range, wanted: range, token_ids: list[int], result: StepResult, now_ns: int, events: list[EngineEvent],
    ) -> None:  # fmt: skip
        sequence = row.sequence
        end = row.start + row.count
        sequence.num_computed = end
        sequence.max_computed = max(sequence.max_computed, end)
        for index in range(row.start // self.pool.block_size, end // self.pool.block_size):
            if (orphan := self.prefix.orphan(sequence, index)) is not None:
                self.pool.forget(orphan)
            self.prefix.add(sequence, index)
        if row.scored:
            sequence.num_scored = row.scored.stop
            events.append(self._scores(row, logits, result))
        if row.is_sampled and sequence.grammar is not None and sequence.grammar.is_empty:  # it is whole
            if sequence.first_token_ns:
                sequence.last_token_ns = now_ns  # until now it might have had another
            events.append(RequestEnded(request_id=sequence.id, finish_reason="stop", times=sequence.times()))
            self._finish(sequence)
        elif row.is_sampled:
            event = self._append(sequence, token_ids[logits.stop - 1], logits.stop - 1, wanted, result, now_ns)
            events.append(event)
            if event.finish_reason is not None:
                self._finish(sequence)
        elif sequence.num_wanted == 0:  # no token is asked for, and the prompt is scored
            events.append(RequestEnded(request_id=sequence.id, finish_reason="length", times=sequence.times()))
            self._finish(sequence)

    def _scores(self, row: Row, logits: range, result: StepResult) -> PromptScored:
        scored, num_top = logits[: len(row.scored)], row.sequence.request.prompt_logprobs or 0
        return PromptScored(
            request_id=row.sequence.id,
            start=row.scored.start + 1,
            logprobs=result.logprobs[scored.start : scored.stop].tolist(),
            tops=[self._most_probable(result, logit, num_top) for logit in scored] if num_top else None,
        )

    def _most_probable(self, result: StepResult, logit: int, num: int) -> list[tuple[int, float]]:
        num = min(num, self._vocab_size)
        ids, logprobs = result.top_ids[logit, :num], result.top_logprobs[logit, :num]
        return list(zip(ids.tolist(), logprobs.tolist(), strict=True))

    def _append(
        self, sequence: Sequence, token_id: int, logit: int, wanted: range, result: StepResult, now_ns: int
    ) -> TokenEvent:
        params = sequence.request.params
        index = sequence.num_output
        sequence.append(token_id)
        sequence.last_token_ns = now_ns
        if index == len(sequence.request.output_ids):
            sequence.first_token_ns = now_ns
        logprob, top = float(result.logprobs[logit]) if params.wants_logprobs else None, None
        if params.logprob_token_ids is not None:
            logprobs = result.wanted_logprobs[wanted.start : wanted.stop].tolist()
            top = list(zip(params.logprob_token_ids, logprobs, strict=True))
        elif params.logprobs is not None:
            top = self._most_probable(result, logit, params.logprobs)
        finish_reason: FinishReason | None = None
        if token_id in sequence.end_ids or (sequence.grammar is not None and sequence.grammar.is_stopped):
            finish_reason = "stop"
        elif sequence.repeats_itself:
            finish_reason = "repetition"
        elif not sequence.wants_token:
            finish_reason = "length"
        return TokenEvent(
            request_id=sequence.id,
            index=index,
            token_id=token_id,
            logprob=logprob,
            top=top,
            finish_reason=finish_reason,
            times=sequence.times() if index == 0 or finish_reason is not None else None,
        )

    def _finish(self, sequence: Sequence) -> None:
        self._forget(sequence)
        self.prefix.note_tail(sequence)
        self.pool.release(sequence.block_ids, sequence.tenant)
        sequence.block_ids = []

    def _fail(self, sequence: Sequence, error: JiljuError, events: list[EngineEvent]) -> None:
        """End a request whose blocks may hold rubbish."""
        self._forget(sequence)
        self.prefix.note_tail(sequence)
        self.pool.discard(sequence.block_ids, sequence.num_hit_blocks, sequence.tenant)
        sequence.block_ids = []
        events.append(RequestFailed(request_id=sequence.id, code=error.code, message=error.message))

    def _forget(self, sequence: Sequence) -> None:
        del self._live[sequence.id]
        self.waiting.ended(sequence)
        sequence.is_running = False
        self._num_on_probation -= sequence.num_probation_steps > 0

    # ---- audit -----------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        head = [f"{s.id}: {s.num_computed} of {s.num_wanted} tokens" for s in self.waiting.next_turns(3)]
        waiting = f"{len(self.waiting)} wait ({'; '.join(head)}), {len(self._making)} for their grammar"
        return f"{waiting}, {len(self.running)} run, blocks {self.pool.describe()}"

    def check(self) -> None:
        """Deep audit of what must hold between steps, for tests."""
        tables = [s.block_ids for s in self._live.values()]
        self.pool.check(tables)
        for sequence in self.running:
            covered = self.pool.blocks_for(sequence.num_computed)
            assert len(sequence.block_ids) == covered, f"{sequence.id}: {len(sequence.block_ids)} blocks for {covered}"
            assert sequence.num_preemptions <= MAX_PREEMPTIONS, (
                f"{sequence.id} was preempted {sequence.num_preemptions} times"
            )
        assert not any(s.block_ids for s in self.waiting), "a waiting sequence holds blocks"
        seniorities = [_seniority(s) for s in self.running]
        assert seniorities == sorted(seniorities), f"not in order of seniority: {seniorities}"
        assert all(s.num_bypassed <= MAX_BYPASSES for s in self._live.values()), "somebody was bypassed too often"
        on_probation = sum(s.num_probation_steps > 0 for s in self._live.values())
        assert self._num_on_probation == on_probation, f"{self._num_on_probation} on probation, found {on_probation}"
        queued = [*self.running, *self.waiting, *self._to_end, *self._making]
        assert {s.id for s in queued} == set(self._live) and len(queued) == len(self._live), (
            "live, running and waiting differ"
        )


def _take_grammar(sequence: Sequence, making: Future[Grammar]) -> bool:
    """Whether it was made, and is one."""
    if not making.done() or making.exception() is not None:
        return False
    sequence.grammar = making.result()
    return not sequence.grammar.error


def _dead_end(grammar: Grammar) -> GrammarDeadEnd:
    reason = grammar.error or "no token is left that it, allowed_token_ids and bans let through"
    return GrammarDeadEnd(f"the answer cannot go on within its grammar: {reason}; the request ends here, others go on")


def _seniority(sequence: Sequence) -> tuple[int, int]:
    """Fixed for its life, so that who is preempted does not depend on the moment. Lower is more senior."""
    return due_ns(sequence), sequence.number


def deadline_event(request_id: str, allowed_ns: int, is_of_all: bool) -> RequestFailed:
    """The end of a request that was not complete, or if not `is_of_all` not in a step, within `allowed_ns`."""
    what = "complete" if is_of_all else "begun"
    message = (
        f"the answer was not {what} within {allowed_ns / 1e9:g} s; allow more time, or ask again when less is going on"
    )
    return RequestFailed(request_id=request_id, code=DeadlineExceeded.code, message=message)
