"""Scheduler: which tokens of which sequences the next step computes, and what its result changes.

Owns the queue, the running sequences and every change of them: `schedule()` decides, `commit()` takes the result, and
between the two nothing changes, so a step that fails commits nothing. First come, first served. Pure decisions: time comes
in as an argument; knows nothing of clocks, randomness, threads, backends or the link.

The token budget of a step (limits.max_tokens) bounds how long a decoding row waits for the prefill of others: every
sequence that needs one token only is in every step, and what they leave of the budget goes to prefill chunks in order of
arrival. When blocks run out the youngest sequence is preempted: it loses its blocks, goes back to its place in the queue,
ahead of all that came later, and is computed again. The oldest is thus never held up, so there is always progress.
"""

from collections import deque
from dataclasses import dataclass, field

from jilju.engine.blocks import BlockPool
from jilju.engine.events import prefill_share_ns
from jilju.engine.prefix import PrefixIndex
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
from jilju.errors import ContextLengthExceeded, EmptyPrompt, JiljuError, KvCapacityExceeded, NanLogits
from jilju.plan import Limits, StepResult


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


@dataclass(slots=True)
class _Draft:
    """A step while it is being made. Sequences map to the number of their tokens, decoding ones first."""

    counts: dict[Sequence, int] = field(default_factory=dict)
    budget: int = 0
    num_cached: int = 0
    num_preempted: int = 0


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
    def __init__(self, limits: Limits, hash_key: bytes = b""):
        self.limits = limits
        self.prefix = PrefixIndex(limits.block_size, hash_key)
        self.pool = BlockPool(limits.num_blocks, limits.block_size, self.prefix)
        self.waiting: deque[Sequence] = deque()  # in order of arrival
        self.running: list[Sequence] = []  # in order of arrival
        # One token of each running sequence must fit in a step.
        self._max_running = min(limits.max_rows, limits.max_tokens)
        self._live: dict[str, Sequence] = {}
        self._to_abort: dict[str, None] = {}
        self._to_end: list[Sequence] = []
        self._num_submitted = 0
        self._num_steps = 0

    # ---- what comes in -------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def find(self, request_id: str) -> Sequence | None:
        return self._live.get(request_id)

    def submit(self, request: Request, now_ns: int) -> None:
        """Queue a request; raises if it could never run."""
        check_fits(request, self.limits)
        assert request.params.seed is not None, f"request {request.id} has no seed; who accepts a request draws it"
        assert request.id not in self._live, f"request {request.id} is live already"
        sequence = Sequence(self._num_submitted, request, now_ns)
        self._num_submitted += 1
        self._live[request.id] = sequence
        if sequence.num_wanted > 0:
            self.waiting.append(sequence)
        else:
            self._to_end.append(sequence)

    def abort(self, request_id: str) -> None:
        """Takes effect before the next step is scheduled. Unknown ids are ignored: their request has just ended."""
        if request_id in self._live:
            self._to_abort[request_id] = None

    def settle(self, now_ns: int) -> list[EngineEvent]:
        """Apply what was asked for since the last step; comes before every schedule()."""
        events: list[EngineEvent] = []
        for sequence in self._to_end:
            if sequence.id not in self._to_abort:
                self._forget(sequence)
                events += _scores_event(sequence)
                events.append(RequestEnded(request_id=sequence.id, finish_reason="length", times=sequence.times()))
        self._to_end = []
        for request_id in self._to_abort:
            aborted = self._live.get(request_id)
            if aborted is not None:
                self._forget(aborted)
                self.pool.release(aborted.block_ids)
                aborted.block_ids = []
                events.append(
                    RequestAborted(request_id=request_id, num_tokens=aborted.num_output, times=aborted.times())
                )
        if self._to_abort:
            self.running = [s for s in self.running if s.id in self._live]
            self.waiting = deque(s for s in self.waiting if s.id in self._live)
            self._to_abort = {}
        return events

    # ---- schedule --------------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Step:
        draft = _Draft(budget=self.limits.max_tokens)
        chunks: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.num_wanted - sequence.num_computed > 1:
                chunks.append(sequence)
            elif sequence.is_running:  # it may have been preempted for an older one
                self._plan_newest(draft, sequence)
        for sequence in chunks:
            if sequence.is_running:
                self._plan_chunk(draft, sequence)
        if self.waiting and not draft.num_preempted:
            self._admit(draft)
        assert draft.counts or not self._live, f"{len(self._live)} requests are live and none can run"
        return self._make_step(draft, now_ns)

    def _plan_newest(self, draft: _Draft, sequence: Sequence) -> None:
        """The one token that a sequence lacks. If it needs a block for it, that is worth a preemption, even its own."""
        while self._num_fitting(sequence) == 0:
            victim = self._youngest_unprotected()
            assert victim is not None, f"{sequence.id} needs a block, and all that run are sure of theirs"
            self._preempt(draft, victim)
            if victim is sequence:
                return
        self._plan(draft, sequence, 1)

    def _plan_chunk(self, draft: _Draft, sequence: Sequence) -> None:
        """As many of its tokens as the budget and the blocks allow. It preempts younger ones, but never itself: it waits."""
        count = min(sequence.num_wanted - sequence.num_computed, draft.budget)
        if count == 0:
            return
        while self._num_fitting(sequence) == 0:
            victim = self._youngest_unprotected()
            assert victim is not None, f"{sequence.id} needs a block, and all that run are sure of theirs"
            if victim is sequence:
                return
            self._preempt(draft, victim)
        self._plan(draft, sequence, min(count, self._num_fitting(sequence)))

    def _admit(self, draft: _Draft) -> None:
        """Let in who waits, in order, while all tokens that are known can be held beside those of who runs already."""
        owed = sum(self._num_owed(s) for s in self.running)
        while self.waiting and draft.budget > 0 and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            # The newest token is always computed, its logits are wanted; a prompt that is scored needs all of its own.
            hits = self.prefix.match(sequence, sequence.num_wanted - 1 if sequence.scores is None else 0)
            num_new = self.pool.blocks_for(sequence.num_wanted) - len(hits)
            num_revived = sum(self.pool.is_cached(block_id) for block_id in hits)
            if num_new + num_revived + owed > self.pool.num_available:
                return
            if sequence.is_protected and self._num_promised() + self._max_blocks(sequence) > self.pool.num_blocks:
                return
            self.waiting.popleft()
            self._start(draft, sequence, hits)
            self._plan(draft, sequence, min(sequence.num_wanted - sequence.num_computed, draft.budget))
            owed += self._num_owed(sequence)

    def _start(self, draft: _Draft, sequence: Sequence, hits: list[int]) -> None:
        for block_id in hits:
            self.pool.share(block_id)
        sequence.block_ids = hits
        sequence.num_computed = len(hits) * self.pool.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt_tokens)
            draft.num_cached += sequence.num_cached
        sequence.is_running = True
        # Only a preempted sequence is older than one that runs, so this walk is short.
        place = len(self.running)
        while place > 0 and self.running[place - 1].number > sequence.number:
            place -= 1
        self.running.insert(place, sequence)

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        for _ in range(self.pool.blocks_for(sequence.num_computed + count) - len(sequence.block_ids)):
            sequence.block_ids.append(self.pool.take())
        draft.counts[sequence] = count
        draft.budget -= count

    def _preempt(self, draft: _Draft, victim: Sequence) -> None:
        draft.budget += draft.counts.pop(victim, 0)
        draft.num_preempted += 1
        self.pool.release(victim.block_ids)
        victim.block_ids = []
        victim.num_computed = 0
        victim.num_preemptions += 1
        victim.is_running = False
        self.running.remove(victim)
        place = 0
        while place < len(self.waiting) and self.waiting[place].number < victim.number:
            place += 1
        self.waiting.insert(place, victim)

    def _youngest_unprotected(self) -> Sequence | None:
        return next((s for s in reversed(self.running) if not s.is_protected), None)

    def _num_fitting(self, sequence: Sequence) -> int:
        """Tokens that it could compute now, for all that the pool can give."""
        num_blocks = len(sequence.block_ids) + self.pool.num_available
        return num_blocks * self.pool.block_size - sequence.num_computed

    def _num_owed(self, sequence: Sequence) -> int:
        """Blocks that a running sequence lacks for the tokens that are known and the next."""
        wanted = self.pool.blocks_for(sequence.num_wanted + sequence.wants_token)
        return max(0, wanted - len(sequence.block_ids))

    def _max_blocks(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(max_slots(sequence.request))

    def _num_promised(self) -> int:
        """Blocks that protected sequences, which are not preempted, can come to hold."""
        return sum(self._max_blocks(s) for s in self.running if s.is_protected)

    def _make_step(self, draft: _Draft, now_ns: int) -> Step:
        rows: list[Row] = []
        num_prefill = num_decode = num_recomputed = 0
        for sequence, count in draft.counts.items():
            start = sequence.num_computed
            end = start + count
            scored = range(0)
            if sequence.scores is not None:
                scored = range(max(start, len(sequence.scores)), min(end, sequence.num_prompt_tokens - 1))
            is_sampled = end == sequence.num_tokens and sequence.wants_token
            rows.append(Row(sequence, start, count, tuple(sequence.block_ids), scored, is_sampled))
            if count == 1 and is_sampled and sequence.num_output > 0:
                num_decode += 1
            else:
                num_prefill += count
            num_recomputed += max(0, min(end, sequence.max_computed) - start)
        if rows:
            self._num_steps += 1
        return Step(
            id=self._num_steps,
            begin_ns=now_ns,
            rows=tuple(rows),
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_cached_tokens=draft.num_cached,
            num_recomputed_tokens=num_recomputed,
            num_preempted=draft.num_preempted,
        )

    # ---- commit ----------------------------------------------------------------------------------------------------

    def commit(self, step: Step, result: StepResult, now_ns: int) -> list[EngineEvent]:
        """Take the result of a step: the only place where tokens are appended and blocks enter the prefix cache."""
        events: list[EngineEvent] = []
        finite: list[bool] = result.finite.tolist()
        token_ids: list[int] = result.token_ids.tolist()
        stalled_ns = prefill_share_ns(step.begin_ns, now_ns, step.num_prefill_tokens, step.num_decode_tokens)
        num_live, logit = len(self._live), 0
        for row in step.rows:
            logits = range(logit, logit + row.num_logits)
            logit = logits.stop
            self._note_step(row, step, stalled_ns)
            if all(finite[logits.start : logits.stop]):
                self._commit_row(row, logits, token_ids, result, now_ns, events)
            else:
                message = (
                    "the model gave a logit that is NaN or infinite, or no token was allowed; the request ends here,"
                    " others go on"
                )
                self._fail(row.sequence, NanLogits(message), events)
        if len(self._live) != num_live:
            self.running = [s for s in self.running if s.id in self._live]
        return events

    def fail(self, step: Step, error: JiljuError) -> list[EngineEvent]:
        """End every request with a row of a step that did not run to its end. Nothing of the step is committed."""
        events: list[EngineEvent] = []
        for row in step.rows:
            self._fail(row.sequence, error, events)
        self.running = [s for s in self.running if s.id in self._live]
        return events

    def _note_step(self, row: Row, step: Step, stalled_ns: int) -> None:
        sequence = row.sequence
        if sequence.num_steps == 0:
            sequence.scheduled_ns = step.begin_ns
        sequence.num_steps += 1
        if row.is_sampled and row.count == 1 and sequence.num_output > len(sequence.request.output_ids):
            sequence.stalled_ns += stalled_ns

    def _commit_row(
        self, row: Row, logits: range, token_ids: list[int], result: StepResult, now_ns: int, events: list[EngineEvent]
    ) -> None:
        sequence = row.sequence
        end = row.start + row.count
        sequence.num_computed = end
        sequence.max_computed = max(sequence.max_computed, end)
        for index in range(row.start // self.pool.block_size, end // self.pool.block_size):
            self.prefix.add(sequence, index)
        if sequence.scores is not None:
            sequence.scores += result.logprobs[logits.start : logits.start + len(row.scored)].tolist()
            if len(sequence.scores) == sequence.num_prompt_tokens - 1:
                events += _scores_event(sequence)
        if row.is_sampled:
            event = self._append(sequence, token_ids[logits.stop - 1], logits.stop - 1, result, now_ns)
            events.append(event)
            if event.finish_reason is not None:
                self._finish(sequence)
        elif sequence.num_wanted == 0:  # no token is asked for, and the prompt is scored
            events.append(RequestEnded(request_id=sequence.id, finish_reason="length", times=sequence.times()))
            self._finish(sequence)

    def _append(self, sequence: Sequence, token_id: int, logit: int, result: StepResult, now_ns: int) -> TokenEvent:
        params = sequence.request.params
        index = sequence.num_output
        sequence.append(token_id)
        sequence.last_token_ns = now_ns
        if index == len(sequence.request.output_ids):
            sequence.first_token_ns = now_ns
        logprob = top = None
        if params.logprobs is not None:
            logprob = float(result.logprobs[logit])
            ids, logprobs = result.top_ids[logit, : params.logprobs], result.top_logprobs[logit, : params.logprobs]
            top = list(zip(ids.tolist(), logprobs.tolist(), strict=True))
        finish_reason: FinishReason | None = None
        if token_id in sequence.end_ids:
            finish_reason = "stop"
        elif not sequence.wants_token:
            finish_reason = "length"
        return TokenEvent(
            request_id=sequence.id,
            index=index,
            token_id=token_id,
            logprob=logprob,
            top=top,
            finish_reason=finish_reason,
            times=sequence.times() if finish_reason is not None else None,
        )

    def _finish(self, sequence: Sequence) -> None:
        self._forget(sequence)
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []

    def _fail(self, sequence: Sequence, error: JiljuError, events: list[EngineEvent]) -> None:
        """End a request whose blocks may hold rubbish."""
        self._forget(sequence)
        self.pool.discard(sequence.block_ids)
        sequence.block_ids = []
        events.append(RequestFailed(request_id=sequence.id, code=error.code, message=error.message))

    def _forget(self, sequence: Sequence) -> None:
        del self._live[sequence.id]
        sequence.is_running = False

    # ---- audit -----------------------------------------------------------------------------------------------------

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
        for queue in (list(self.waiting), self.running):
            numbers = [s.number for s in queue]
            assert numbers == sorted(numbers), f"not in order of arrival: {numbers}"
        queued = [*self.running, *self.waiting, *self._to_end]
        assert {s.id for s in queued} == set(self._live) and len(queued) == len(self._live), (
            "live, running and waiting differ"
        )


def _scores_event(sequence: Sequence) -> list[EngineEvent]:
    if sequence.scores is None:
        return []
    event = PromptScored(request_id=sequence.id, logprobs=sequence.scores)
    sequence.scores = None
    return [event]
