"""The world: one script played on a virtual clock, with the parts that serve real traffic.

Owns what production leaves to processes, sockets and clients: one heap of (time, number, event), a link that may lose or bend
frames, engines that die and start again, clients that leave or stop reading. Scheduler, blocks, prefix cache, admission,
supervisor, ledger and drain are production's own. Every token is compared with the same request alone as it comes, every law
of `checks` is looked at in every turn. Knows no backend: it is handed one.

The engine has a clock of its own, which its executor moves: a turn is played at once, and what happens elsewhere meanwhile is
played afterwards with its own time. That changes nothing, since the two meet in messages only, which are taken when they have
arrived.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import msgspec

from jilju.clock import VirtualClock
from jilju.engine.admission import Admission
from jilju.engine.link import (
    Abort,
    Beat,
    EngineTurns,
    FrameReader,
    FrameWriter,
    LinkBroken,
    Ready,
    Stepped,
    Submit,
    ToEngine,
    ToServer,
)
from jilju.engine.loop import Engine
from jilju.engine.request import (
    EngineEvent,
    PromptScored,
    RepetitionDetection,
    Request,
    RequestAborted,
    RequestEnded,
    RequestFailed,
    SamplingParams,
    TokenEvent,
    is_terminal,
)
from jilju.engine.sequence import MAX_PREEMPTIONS
from jilju.engine.supervisor import MAX_DEATHS, MAX_KILLS, MAX_RESTARTS, DeathCause, Supervisor
from jilju.errors import JiljuError, NotReady
from jilju.plan import Executor
from jilju.serve.drain import Drain
from jilju.serve.ledger import Call, Ledger, state_of
from jilju.simulation.checks import EngineChecks, Violation, law
from jilju.simulation.faults import STUCK_NS, EngineDied, FaultyExecutor, Launches, bent, forged
from jilju.simulation.letters import Letters, text_before_stop
from jilju.simulation.script import Script, SimRequest
from jilju.text.stream import TextStream

TICK_NS = 500_000_000  # the watchdog looks, the engine says that it lives
STALL_NS = 30 * 10**9  # a client that reads nothing for so long has left
DRAIN_NS = 30 * 10**9
LATE_NS = 3 * 10**9  # of a frame that is late
PAUSE_NS = 2 * 10**9  # of an engine that is stopped for a while
END_NS = 7200 * 10**9  # nothing may take so long
SLACK_NS = 1_000_000
SLACK_TURNS = 1000  # that take messages, or raise


@dataclass(frozen=True, slots=True)
class Solo:
    """What a request gets alone."""

    tokens: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]
    scores: list[float]
    score_tops: list[list[tuple[int, float]]]
    finish_reason: str  # stop, length, repetition, no_token


class Backend(Protocol):
    """Makes engines for a world, and says what a request gets alone."""

    def engine(self, script: Script, clock: VirtualClock, wrap: Callable[[Executor], Executor]) -> Engine: ...

    def alone(self, script: Script, request: Request) -> Solo: ...


@dataclass(slots=True, eq=False)
class _Stream:
    """One sequence as the server holds it."""

    request: Request
    call: "_Caller"
    place: int  # in the order of arrival
    solo: Solo | None = None
    num_tokens: int = 0
    text: TextStream | None = None  # if it has stop strings
    written: str = ""
    is_stopped: bool = False  # a stop string was found
    is_closed: bool = False  # the ledger has its end: nobody reads what still comes
    is_terminal: bool = False  # its terminal event came
    was_aborted: bool = False
    aborted_ns: int = 0
    num_scored: int = 0  # tokens of the prompt whose scores came
    is_suspect: bool = False  # it was in the step of a death, and has made no token since
    deaths: Counter[str] = field(default_factory=Counter)  # counted here once more: with it in the step, by cause
    last_death_alone: bool = False
    last_cause: str = ""


@dataclass(slots=True, eq=False)
class _Caller:
    """A client's call."""

    spec: SimRequest
    call: Call
    streams: list[_Stream] = field(default_factory=list)
    num_tokens: int = 0
    is_stalled: bool = False
    end: str = ""  # state and code


@dataclass(slots=True, eq=False)
class _Process:
    """An engine's process and both directions of its link."""

    epoch: int
    clock: VirtualClock
    engine: Engine | None = None  # loading until it is there
    turns: EngineTurns | None = None
    checks: EngineChecks | None = None
    inbox: deque[tuple[int, ToEngine | bytes]] = field(default_factory=deque)
    to_engine: FrameWriter | None = None
    from_server: "FrameReader[ToEngine] | None" = None
    to_server: FrameWriter | None = None
    from_engine: "FrameReader[ToServer] | None" = None
    aborted: set[str] = field(default_factory=set)  # ids that it was told to abort
    taken_too_late: list[str] = field(default_factory=list)  # of those, what it took all the same
    last_arrival_ns: int = 0  # at the server, of a frame
    step_begin_ns: int = 0
    busy_until_ns: int = 0
    has_turn: bool = False  # one is on the heap
    is_dead: bool = False
    is_deaf: bool = False  # the server reads it no more


@dataclass(slots=True)
class Tally:
    """What happened in a run, for reports."""

    num_turns: int = 0
    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0  # computed
    num_deaths: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_step_faults: int = 0
    num_compared_tokens: int = 0  # that came, and were what the request gets alone
    num_compared_requests: int = 0  # sequences that ended whole, as alone
    ends: Counter[str] = field(default_factory=Counter)
    virtual_ns: int = 0


class World:
    def __init__(self, script: Script, backend: Backend, *, keep_log: bool = False):
        self.script, self.settings, self.backend = script, script.settings, backend
        self.clock = VirtualClock(1)
        self.tally = Tally()
        self.log: list[str] | None = [] if keep_log else None
        self._digest = blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._num_pushed = 0
        self._num_frames = 0
        self._launches = Launches(script)
        self._turn_faults = {f.at: f for f in script.faults if f.kind in ("kill_begun", "kill_told", "kill_ran")}
        self._frame_faults = {
            f.at: f for f in script.faults if f.kind in ("drop", "double", "late", "corrupt", "foreign")
        }
        self._forged_from = [f.at for f in script.faults if f.kind == "forged"]
        self._is_wired = self.settings.is_wired
        self._is_doomed = self._is_draining = False
        self._num_tokens_asked = sum(r.n * (len(r.prompt_ids) + r.max_tokens) for r in script.requests)
        self._num_deaths_in_row = 0  # without a step between them
        self._last_stepped: tuple[int, Stepped] | None = None  # and the epoch of who said it
        self.supervisor = Supervisor(1)
        self.admission = Admission(max_requests=self.settings.max_waiting, max_pools=self.settings.max_pools)
        self.ledger = Ledger(self.clock)
        self.drain = Drain(self.ledger)
        self._process: _Process | None = None
        self._streams: dict[str, _Stream] = {}
        self.callers: list[_Caller] = []
        self._num_to_come = len(script.requests)
        self._longest_step_ns = 0
        self._tokenizer = Letters(self.settings.vocab_size)

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Tally:
        """Play the script to its end. Raises Violation, or whatever a part of the engine raises that must not."""
        self._launch()
        for spec in self.script.requests:
            self._at(self._begin_ns() + spec.at_us * 1000, lambda spec=spec: self._arrive(spec))  # type: ignore[misc]
        for fault in self.script.faults:
            when_ns = self._begin_ns() + fault.at * 1000
            if fault.kind == "kill_at":
                self._at(when_ns, lambda fault=fault: self._kill(self._process, fault.cause))  # type: ignore[misc]
            elif fault.kind == "stall_at":
                self._at(when_ns, self._pause)
            elif fault.kind == "doomed_at":
                self._at(when_ns, self._doom)
        if self.settings.drain_us >= 0:
            self._at(self._begin_ns() + self.settings.drain_us * 1000, self._drain)
        self._at(TICK_NS, self._tick)
        while self._heap:
            when_ns, _, event = heapq.heappop(self._heap)
            self.clock.advance_ns(when_ns - self.clock.now_ns())
            num_live = self.supervisor.num_live + len(self.ledger.live)
            law("liveness", when_ns < END_NS or not num_live, f"{num_live} calls are live after {when_ns / 1e9} s")
            event()
        self._check_end()
        self.tally.virtual_ns = self.clock.now_ns()
        return self.tally

    @property
    def digest(self) -> str:
        """Of all that clients saw and all that the engine decided, with times."""
        return self._digest.hexdigest()

    def _begin_ns(self) -> int:
        """Clients come when the first engine is ready."""
        return self.settings.load_us * 1000 + 2 * self._latency_ns + 1000

    @property
    def _latency_ns(self) -> int:
        return self.settings.latency_us * 1000

    def _at(self, when_ns: int, event: Callable[[], None]) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (when_ns, self._num_pushed, event))

    def _note(self, *words: object) -> None:
        line = f"{self.clock.now_ns()} {' '.join(map(str, words))}"
        self._digest.update(line.encode())
        if self.log is not None:
            self.log.append(line)

    # ---- clients ---------------------------------------------------------------------------------------------------

    def _arrive(self, spec: SimRequest) -> None:
        """A call comes in: the door, the ledger, then the engine."""
        self._num_to_come -= 1
        now_ns = self.clock.now_ns()
        record = Call(id=spec.id, route="/v1/completions", key_name=spec.tenant, label=None, received_ns=now_ns)
        caller = _Caller(spec, self.ledger.accept(record))
        self.callers.append(caller)
        record.cut = lambda error: self._end_call(caller, state_of(error), error.code)
        try:
            self._take(caller, now_ns)
        except JiljuError as error:
            never_fits = error.code in ("context_length_exceeded", "kv_capacity_exceeded")
            law("what fits is not refused as too long", not never_fits or self._is_too_long(spec), error.message)
            self._end_call(caller, state_of(error), error.code)
            return
        law("what can never fit is refused at once", not self._is_too_long(spec), spec.id)
        if spec.cancel_us >= 0:
            self._at(now_ns + spec.cancel_us * 1000, lambda: self._leave(caller))

    def _is_too_long(self, spec: SimRequest) -> bool:
        settings = self.settings
        num_slots = len(spec.prompt_ids) + max(spec.max_tokens, 1) - 1
        return (
            len(spec.prompt_ids) + spec.max_tokens > settings.max_context
            or num_slots > settings.num_blocks * settings.block_size
        )

    def _take(self, caller: _Caller, now_ns: int) -> None:
        spec, settings = caller.spec, self.settings
        self.drain.check()
        law("I28 no call is taken while draining", not self._is_draining, spec.id)
        if self.supervisor.state not in ("ready", "gone"):
            raise NotReady(f"the engine is {self.supervisor.state}", retry_after_s=1.0)
        status = self.supervisor.status(now_ns)
        info, pool_tokens = self.supervisor.info, settings.num_blocks * settings.block_size
        assert info is not None, "an engine was ready"
        self.admission.update(status.step_coefficients, settings.max_rows, pool_tokens, info.score_work)
        num_scored = len(spec.prompt_ids) if spec.prompt_logprobs is not None else 0
        deadline_ns = now_ns + spec.deadline_us * 1000 if spec.deadline_us else 0
        queue_ns = now_ns + spec.max_queue_us * 1000 if spec.max_queue_us else 0
        self.admission.check(
            now_ns, num_prompt_tokens=len(spec.prompt_ids), max_tokens=spec.max_tokens, num_sequences=spec.n,
            num_scored_tokens=spec.n * num_scored, priority=spec.priority, tenant=spec.tenant, deadline_ns=deadline_ns, queue_deadline_ns=queue_ns,
        )  # fmt: skip
        requests = [self._request(spec, index, now_ns, deadline_ns, queue_ns) for index in range(spec.n)]
        for request in requests:
            self.supervisor.submit(request, now_ns)
            stream = _Stream(request, caller, len(self._streams))
            if spec.stop:
                stream.text = TextStream(self._tokenizer, stop=spec.stop, min_tokens=spec.min_tokens)
            caller.streams.append(stream)
            self._streams[request.id] = stream
            count = 1 if request.sibling_of else len(spec.prompt_ids)
            self.admission.admitted(
                request.id, now_ns, num_prompt_tokens=count, max_tokens=spec.max_tokens, num_scored_tokens=num_scored,
                priority=spec.priority, tenant=spec.tenant,
            )  # fmt: skip
            self._tell(Submit(request))
        self.ledger.sequences_submitted(caller.call, len(requests))

    def _request(self, spec: SimRequest, index: int, now_ns: int, deadline_ns: int, queue_ns: int) -> Request:
        params = SamplingParams(
            temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p, min_p=spec.min_p,
            repetition_penalty=spec.repetition_penalty, frequency_penalty=spec.frequency_penalty, logit_bias=spec.logit_bias,
            allowed_token_ids=spec.allowed_token_ids, seed=(spec.seed + index) % 2**63, max_tokens=spec.max_tokens,
            min_tokens=spec.min_tokens, logprobs=spec.logprobs, logprob_token_ids=spec.logprob_token_ids,
            bad_words_ids=spec.bad_words_ids, repetition_detection=_repetition(spec),
        )  # fmt: skip
        return Request(
            id=f"{spec.id}-{index}", prompt_ids=spec.prompt_ids, params=params, end_ids=spec.end_ids,
            grammar=spec.grammar, salt=spec.salt.encode(), prompt_logprobs=spec.prompt_logprobs, tenant=spec.tenant, priority=spec.priority,
            arrival_ns=now_ns, deadline_ns=deadline_ns, queue_deadline_ns=queue_ns,
            sibling_of=f"{spec.id}-0" if index else "",
        )  # fmt: skip

    def _leave(self, caller: _Caller) -> None:
        if not caller.end:
            self._end_call(caller, "client_cancelled", "")

    def _end_call(self, caller: _Caller, state: str, code: str) -> None:
        """The call's one end: whatever is live of it is aborted."""
        law("I21 one terminal state", not caller.end, f"{caller.spec.id} ended as {caller.end}, then as {state}")
        caller.end = f"{state} {code}".strip()
        self._note("end", caller.spec.id, caller.end, caller.num_tokens)
        for stream in caller.streams:
            if not stream.is_closed:
                self._close(stream, None)
                self._abort(stream)
        self.tally.ends[caller.end] += 1
        self.ledger.end(caller.call, state, 200, code or None)  # type: ignore[arg-type]

    def _abort(self, stream: _Stream) -> None:
        stream.was_aborted, stream.aborted_ns = True, self.clock.now_ns()
        tell_engine, events = self.supervisor.abort(stream.request.id)
        if tell_engine:
            self._tell(Abort(stream.request.id))
        self._deliver(events)

    def _close(self, stream: _Stream, event: EngineEvent | None) -> None:
        """The ledger's end of a sequence."""
        stream.is_closed = True
        times = getattr(event, "times", None)
        self.ledger.sequence_ended(stream.call.call, times)
        is_complete = stream.is_stopped or isinstance(event, TokenEvent | RequestEnded)
        if times is not None and times.scheduled_ns:
            self.admission.started(stream.request.id, times.scheduled_ns)
        self.admission.ended(stream.request.id, self.clock.now_ns(), stream.num_tokens if is_complete else None)

    # ---- what the engine tells -------------------------------------------------------------------------------------

    def _deliver(self, events: list[EngineEvent]) -> None:
        for event in events:
            stream = self._streams[event.request_id]
            law("I21 no event after the end", not stream.is_terminal, event)
            if isinstance(event, TokenEvent):
                self._token(stream, event)
            elif isinstance(event, PromptScored):
                self._scores(stream, event)
            if is_terminal(event):
                self._terminal(stream, event)

    def _solo(self, stream: _Stream) -> Solo:
        if stream.solo is None:
            stream.solo = self.backend.alone(self.script, stream.request)
        return stream.solo

    def _scores(self, stream: _Stream, event: PromptScored) -> None:
        solo, first = self._solo(stream), stream.num_scored
        law("I19 no score lost, none doubled", event.start == first + 1 and bool(event.logprobs), (event, first))
        stream.num_scored = first + len(event.logprobs)
        law("I20 scores equal those alone", event.logprobs == solo.scores[first : stream.num_scored], event)
        law(
            "I20 alternatives equal those alone",
            (event.tops or []) == solo.score_tops[first : stream.num_scored],
            event,
        )

    def _token(self, stream: _Stream, event: TokenEvent) -> None:
        index, solo = event.index, stream.solo or self._solo(stream)
        law("I19 nothing lost, nothing doubled", index == stream.num_tokens, (event, stream.num_tokens))
        tokens = solo.tokens
        if index >= len(tokens) or tokens[index] != event.token_id:
            raise Violation(f"I20 tokens equal those alone: {event}, alone {tokens[index : index + 1]}")
        if event.logprob is not None:
            law("I20 logprobs equal those alone", event.logprob == solo.logprobs[index], event)
            law("I20 alternatives equal those alone", event.top == (solo.tops[index] if solo.tops else []), event)
        stream.num_tokens += 1
        stream.is_suspect = False
        stream.deaths["pressure alone"] = 0  # it has passed the place where it was
        self.tally.num_compared_tokens += 1
        law("the scores come before the first token", stream.num_scored == len(solo.scores), event)
        if stream.was_aborted:
            late_ns = self.clock.now_ns() - stream.aborted_ns
            law("I22 no token long after an abort", late_ns <= self._late_ns(), (event, late_ns))
        if stream.is_closed:
            return
        caller = stream.call
        if stream.is_stopped:
            return  # wasted: it was under way when the stop string was found
        self.admission.token(stream.request.id)
        self.ledger.token(caller.call, None)
        caller.num_tokens += 1
        if stream.text is not None and event.token_id not in stream.request.end_ids:
            piece = stream.text.push(event.token_id)
            stream.written += piece.text
            if piece.stop is not None:
                stream.is_stopped = True
                if event.finish_reason is None:
                    self._abort(stream)
        if caller.num_tokens == caller.spec.cancel_after:
            self._leave(caller)
        elif caller.num_tokens == caller.spec.stall_after:
            caller.is_stalled = True
            self._at(self.clock.now_ns() + STALL_NS, lambda: self._leave(caller))

    def _terminal(self, stream: _Stream, event: EngineEvent) -> None:
        stream.is_terminal = True
        self._note("terminal", event.request_id, type(event).__name__, stream.num_tokens)
        self._check_terminal(stream, event)
        if stream.is_closed:
            return
        caller = stream.call
        self._close(stream, event)
        if isinstance(event, RequestFailed):
            error_state = {"deadline_exceeded": "deadline", "not_ready": "shed"}.get(event.code, "failed")
            self._end_call(caller, error_state, event.code)
        elif all(other.is_closed for other in caller.streams) and not caller.is_stalled:
            self._end_call(caller, "completed", "")

    def _check_terminal(self, stream: _Stream, event: EngineEvent) -> None:
        request, solo = stream.request, self._solo(stream)
        if isinstance(event, RequestFailed):
            self._check_failed(stream, event)
        elif isinstance(event, RequestAborted):
            law("nobody is aborted unasked", stream.was_aborted, event)
            law("I18 tokens of an aborted one", event.num_tokens >= stream.num_tokens, event)
        else:
            law("I20 ends as alone", event.finish_reason == solo.finish_reason, (event, solo.finish_reason))  # type: ignore[union-attr]
            law("I20 all scores came", stream.num_scored == len(solo.scores), (stream.num_scored, event))
            law("I20 as long as alone", stream.num_tokens == len(solo.tokens), (stream.num_tokens, len(solo.tokens)))
            times = event.times  # type: ignore[union-attr]
            assert times is not None, "a terminal event without its times"
            law("I18 cached tokens", times.num_cached_tokens <= len(request.prompt_ids), times)
            marks = [times.queued_ns, times.scheduled_ns, times.first_token_ns, times.last_token_ns]
            law("marks in order", not stream.num_tokens or marks == sorted(marks), times)
            self.tally.num_compared_requests += 1
            self.tally.num_cached_tokens += times.num_cached_tokens
            self.tally.num_preemptions += times.num_preemptions
            law(
                "stalls lie between tokens",
                times.stalled_ns <= max(0, times.last_token_ns - times.first_token_ns),
                times,
            )
            if request.queue_deadline_ns and not self.tally.num_deaths and times.scheduled_ns:
                late_ns = times.scheduled_ns - request.queue_deadline_ns
                law(
                    "I23 no first step after the queue's deadline",
                    late_ns <= self._late_ns(),
                    f"{request.id}: {late_ns} ns",
                )
            if request.deadline_ns:
                late_ns = times.last_token_ns - request.deadline_ns
                law(
                    "I23 deadlines", late_ns <= 2 * self._longest_step_ns + SLACK_NS, f"{request.id}: {late_ns} ns late"
                )
        if stream.text is not None and not stream.is_closed and not isinstance(event, RequestFailed):
            self._check_text(stream, solo)

    def _check_text(self, stream: _Stream, solo: Solo) -> None:
        """I24: what was written is the answer's text up to the stop string, streamed or whole."""
        assert stream.text is not None, "asked of a sequence with stop strings"
        spec = stream.call.spec
        if not stream.is_stopped:
            last = stream.text.finish()
            stream.written += last.text
        shown = solo.tokens[:-1] if solo.tokens and solo.tokens[-1] in stream.request.end_ids else solo.tokens
        whole = TextStream(self._tokenizer, stop=spec.stop, min_tokens=spec.min_tokens).whole(shown)
        law("I24 stream equals whole", stream.written == whole.text, (stream.written, whole.text))
        text = text_before_stop(
            [self._tokenizer.token_bytes(token_id) for token_id in shown], spec.stop, spec.min_tokens
        )
        law("I24 nothing at or after a stop string", stream.written == text, (stream.written, text, spec.stop))

    def _check_failed(self, stream: _Stream, event: RequestFailed) -> None:
        request, spec, now_ns = stream.request, stream.call.spec, self.clock.now_ns()
        if event.code == "deadline_exceeded":
            is_of_all = "complete" in event.message
            when_ns = request.deadline_ns if is_of_all else request.queue_deadline_ns
            law("I23 no deadline fires early", when_ns <= now_ns, f"{request.id} at {now_ns}, due {when_ns}")
            law(
                "I23 no deadline fires late",
                now_ns - when_ns <= self._late_ns(),
                f"{request.id} at {now_ns}, due {when_ns}",
            )
            law("I23 the queue's deadline is before the first step", is_of_all or not stream.num_tokens, request.id)
        elif event.code == "internal":
            law("only the culprit fails", spec.fault in ("raise", "bad_id") or self._may_be_unlucky(event), event)
        elif event.code == "nan_logits":
            bad = spec.fault == "nan" or (self._solo(stream).finish_reason == "no_token" and not spec.grammar)
            law("only the culprit fails", bad, event)
        elif event.code == "grammar_dead_end":
            solo = self._solo(stream)
            law("only a dead end is one", solo.finish_reason == "no_token" and bool(spec.grammar), event)
            law("I25 dead ends are where they are alone", stream.num_tokens == len(solo.tokens), event)
        elif event.code == "request_quarantined":
            law("quarantine", _is_guilty(stream), (event, stream.deaths))
        elif event.code == "engine_unavailable":
            is_hopeless = self.supervisor.state == "gone" and self._num_deaths_in_row > MAX_RESTARTS
            law("the engine is given up for good reason", is_hopeless, (event, self._num_deaths_in_row))
        else:
            law("no request fails for another reason", False, event)

    def _late_ns(self) -> int:
        """How late the end of a request may be told: a step that ran, one that was decided, the link, the server's clockwork."""
        if self._may_hang():
            return END_NS
        is_unheard = any(
            fault.kind in ("drop", "corrupt") for fault in self.script.faults
        )  # until the next sign of life
        num_ticks = 3 if is_unheard else 1
        return 2 * self._longest_step_ns + 3 * self._latency_ns + num_ticks * TICK_NS + SLACK_NS

    def _may_be_unlucky(self, event: RequestFailed) -> bool:
        """A passing fault may come just when the search for another's culprit runs this request alone."""
        kinds = {fault.kind for fault in self.script.faults}
        is_passing = "the step" in event.message.partition("BackendFault: ")[2] and kinds & {
            "raise_before",
            "raise_after",
        }
        return bool(is_passing) and any(request.fault == "raise" for request in self.script.requests)

    # ---- the link --------------------------------------------------------------------------------------------------

    def _tell(self, message: Submit | Abort) -> None:
        """To the engine; what cannot be said to a dead one is said to the next, in its resubmissions."""
        process = self._process
        if process is None or process.is_deaf:
            return
        packed: ToEngine | bytes = message if process.to_engine is None else process.to_engine.frame(message)
        process.inbox.append((self.clock.now_ns() + self._latency_ns, packed))
        if not process.has_turn and process.turns is not None:
            process.has_turn = True
            when_ns = max(self.clock.now_ns() + self._latency_ns, process.busy_until_ns)
            self._at(when_ns, lambda: self._turn(process))

    def _send(self, process: _Process, message: ToServer, at_ns: int) -> None:
        """To the server: in order, some time later, unless the script has other plans."""
        self._num_frames += 1
        fault = self._frame_faults.get(self._num_frames)
        if (
            self._forged_from
            and self._num_frames >= self._forged_from[0]
            and isinstance(message, Stepped)
            and message.events
        ):
            self._note("forged", self._num_frames)
            message = msgspec.structs.replace(message, events=forged(message.events, self._forged_from.pop(0)))
        packed: ToServer | bytes = message if process.to_server is None else process.to_server.frame(message)
        arrival_ns = max(process.last_arrival_ns, at_ns + self._latency_ns)
        arrivals: Sequence[tuple[ToServer | bytes, bool]] = [(packed, False)]  # and whether it must be refused
        if fault is not None:
            self._note("fault", fault.kind, self._num_frames)
            if fault.kind == "late":
                arrival_ns += LATE_NS
            elif isinstance(packed, bytes):
                arrivals = bent(packed, fault, self._num_frames)
        process.last_arrival_ns = arrival_ns
        for arriving, is_bad in arrivals:
            self._at(arrival_ns, lambda arriving=arriving, is_bad=is_bad: self._receive(process, arriving, is_bad))  # type: ignore[misc]

    def _receive(self, process: _Process, packed: ToServer | bytes, is_bad: bool = False) -> None:
        if process.is_deaf:
            return
        try:
            if isinstance(packed, bytes):
                assert process.from_engine is not None, "bytes come over a wire"
                messages = process.from_engine.feed(packed)
            else:
                messages = [packed]
            law("a frame that is bent is refused", not is_bad or not messages, f"frame {self._num_frames}")
            for message in messages:
                events = self.supervisor.receive(process.epoch, message, self.clock.now_ns())
                if isinstance(message, Stepped) and message.records:
                    self._num_deaths_in_row = 0
                    self._last_stepped = process.epoch, message
                self._deliver(events)
                if isinstance(message, Ready):
                    requests = self.supervisor.resubmissions()
                    num_live = sum(not stream.is_terminal for stream in self._streams.values())
                    law("every live request is handed over", len(requests) == num_live, (len(requests), num_live))
                    places = [self._streams[request.id].place for request in requests]
                    law("I17 requests are handed over in their order", places == sorted(places), places)
                    for request in requests:
                        self._check_resubmission(request)
                        self._tell(Submit(request))
        except LinkBroken as error:
            self._note("link broken", error.message)
            is_bent = self._is_wired and bool(self._frame_faults)
            is_forged = any(fault.kind == "forged" for fault in self.script.faults)
            law("frames are refused for a reason", is_bent or is_forged, error.message)
            self._end_process(process, "other")

    def _check_resubmission(self, request: Request) -> None:
        stream = self._streams[request.id]
        solo = self._solo(stream)
        law(
            "I20 a resumed request goes on where it was",
            request.output_ids == solo.tokens[: stream.num_tokens],
            request.id,
        )
        is_suspected = request.num_probation_steps == 0 or stream.deaths["work"] + stream.deaths["pressure"] > 0
        law("only suspects are on probation", is_suspected, request.id)
        law("I22 who was aborted is not resumed", not stream.was_aborted, request.id)
        is_on_probation = request.num_probation_steps > 0
        law("suspects come back on probation", is_on_probation == stream.is_suspect, request.id)
        law("I20 a resumed request keeps its seed", request.params == stream.request.params, request.id)
        law("I23 a resumed request keeps its deadline", request.deadline_ns == stream.request.deadline_ns, request.id)

    # ---- the engine's process --------------------------------------------------------------------------------------

    def _launch(self) -> None:
        if self.supervisor.state == "gone":
            return
        epoch = self.supervisor.launched(self.clock.now_ns())
        process = self._process = _Process(epoch, VirtualClock(self.clock.now_ns()))
        if self._is_wired:
            process.to_engine, process.from_server = FrameWriter(epoch), FrameReader(ToEngine, epoch)
            process.to_server, process.from_engine = FrameWriter(epoch), FrameReader(ToServer, epoch)
        self._note("launched", epoch)
        self._at(self.clock.now_ns() + self.settings.load_us * 1000, lambda: self._loaded(process))

    def _loaded(self, process: _Process) -> None:
        if process.is_dead:
            return
        process.clock.advance_ns(self.clock.now_ns() - process.clock.now_ns())
        process.engine = self.backend.engine(
            self.script, process.clock, lambda inner: FaultyExecutor(inner, self.script, process.clock, self._launches)
        )
        process.turns = EngineTurns(process.engine)
        process.checks = checks = EngineChecks(process.engine, self.settings)
        submit = process.engine.submit

        def watched(request: Request) -> None:
            submit(request)
            if request.id in process.aborted:
                process.taken_too_late.append(request.id)
            checks.submitted(request)

        process.engine.submit = watched  # type: ignore[method-assign]
        process.busy_until_ns = self.clock.now_ns()
        self._send(process, Ready(process.engine.info), self.clock.now_ns())
        if self._last_stepped is not None and self._last_stepped[1].events:
            self._hear_the_past(*self._last_stepped)
        if self._is_doomed:
            self._kill(process, "other")

    def _hear_the_past(self, epoch: int, message: Stepped) -> None:
        """What an engine that is gone said last arrives once more."""
        law("an engine of the past", epoch < self.supervisor.epoch, (epoch, self.supervisor.epoch))
        try:
            events = self.supervisor.receive(epoch, message, self.clock.now_ns())
        except LinkBroken as error:
            raise Violation(f"what an engine of the past says is not looked at: {error.message}") from error
        law("what an engine of the past says is not taken", not events, events)

    def _doom(self) -> None:
        """From now on no engine lives."""
        self._note("doomed")
        self._is_doomed = True
        self._kill(self._process, "other")

    def _turn(self, process: _Process) -> None:
        """One turn of the engine's loop, with all that it computes."""
        process.has_turn = False
        if process.is_dead:
            return
        now_ns = self.clock.now_ns()
        engine, turns, checks = process.engine, process.turns, process.checks
        assert engine is not None and turns is not None and checks is not None, "it takes turns when it is loaded"
        process.clock.advance_ns(max(0, now_ns - process.clock.now_ns()))
        self.tally.num_turns += 1
        # Each turn computes a token, raises, or takes messages; an engine computes no token again but after a preemption.
        most = (1 + self.tally.num_deaths) * (2 + MAX_PREEMPTIONS) * self._num_tokens_asked + SLACK_TURNS
        law(
            "liveness",
            self.tally.num_turns <= most,
            f"{self.tally.num_turns} turns for {self._num_tokens_asked} tokens",
        )
        fault = self._turn_faults.get(self.tally.num_turns)
        messages = self._messages(process, now_ns)
        told = turns.begin(messages)
        step = turns.step
        assert step is not None, "a turn that has begun has a step"
        law("I22 who was aborted is not taken", not process.taken_too_late, process.taken_too_late)
        for message in messages:
            if isinstance(message, Abort):
                law("I22 aborted by the next step", engine.scheduler.find(message.request_id) is None, message)
                process.aborted.add(message.request_id)
        if told is not None:
            for event in told.events:
                if is_terminal(event):
                    checks.ended(event.request_id)
        checks.decided(step)
        if fault is not None and fault.kind == "kill_begun":
            self._kill(process, fault.cause)
            return
        if told is not None:
            self._send(process, told, now_ns)
        if fault is not None and fault.kind == "kill_told":
            self._kill(process, fault.cause)
            return
        process.step_begin_ns = now_ns if step.rows else 0
        try:
            turns.run()
        except EngineDied as death:
            self._kill(process, death.cause)
            return
        checks.ran(step)
        for event in turns.events:
            if is_terminal(event):
                checks.ended(event.request_id)
        self._count(process, step, now_ns)
        if fault is not None and fault.kind == "kill_ran":
            self._at(process.busy_until_ns, lambda: self._kill(process, fault.cause))
        if turns.has_work or process.inbox:
            process.has_turn = True
            when_ns = process.busy_until_ns
            if not turns.has_work:
                when_ns = max(when_ns, process.inbox[0][0])
            self._at(when_ns, lambda: self._turn(process))

    def _count(self, process: _Process, step: object, now_ns: int) -> None:
        """What the turn took and computed."""
        assert process.engine is not None, "it has run a turn"
        process.busy_until_ns = max(process.clock.now_ns(), now_ns + 1)
        took_ns = process.busy_until_ns - now_ns
        rows = step.rows  # type: ignore[attr-defined]
        if rows:
            if took_ns < 3600 * 10**9:
                self._longest_step_ns = max(self._longest_step_ns, took_ns)
            tally = self.tally
            tally.num_steps += 1
            tally.num_rows += len(rows)
            tally.num_tokens += step.num_prefill_tokens + step.num_decode_tokens  # type: ignore[attr-defined]
            self._digest.update(b"%d %d %d;" % (now_ns, len(rows), took_ns))
            if tally.num_turns % self.settings.deep_every == 0:
                executor = process.engine.executor
                poison = getattr(executor, "poison", None)
                if poison is not None:
                    poison(process.engine.scheduler.pool.free_ids)

    def _messages(self, process: _Process, now_ns: int) -> list[Submit | Abort]:
        messages: list[Submit | Abort] = []
        while process.inbox and process.inbox[0][0] <= now_ns:
            packed = process.inbox.popleft()[1]
            if isinstance(packed, bytes):
                assert process.from_server is not None, "bytes come over a wire"
                found = process.from_server.feed(packed)
            else:
                found = [packed]
            messages += [message for message in found if isinstance(message, Submit | Abort)]
        return messages

    def _pause(self) -> None:
        """The engine is stopped for a while and goes on: its next turn is late, and it says nothing meanwhile."""
        process = self._process
        if process is not None and not process.is_dead and process.turns is not None:
            self._note("paused", process.epoch)
            until_ns = max(process.busy_until_ns, self.clock.now_ns()) + PAUSE_NS
            process.busy_until_ns = process.last_arrival_ns = until_ns

    def _kill(self, process: _Process | None, cause: DeathCause) -> None:
        """The process dies now. What it had sent arrives, then the end of the link."""
        if process is None or process.is_dead:
            return
        self._note("killed", process.epoch, cause)
        process.is_dead = True
        if process.engine is not None:
            self.tally.num_step_faults += process.engine.num_step_faults
        end_ns = max(self.clock.now_ns(), process.last_arrival_ns) + self._latency_ns
        self._at(end_ns, lambda: self._end_process(process, cause))

    def _end_process(self, process: _Process, cause: DeathCause) -> None:
        """The server learns that the engine is gone."""
        if process.is_deaf:
            return
        process.is_dead = process.is_deaf = True
        self.tally.num_deaths += 1
        self._num_deaths_in_row += 1
        suspects = self.supervisor.suspects
        for request_id in suspects:
            stream = self._streams[request_id]
            stream.last_death_alone, stream.last_cause = len(suspects) == 1, cause
            stream.deaths[cause] += 1
            stream.deaths[f"{cause} alone"] += len(suspects) == 1
            stream.is_suspect |= cause != "other"
        wait_s, events = self.supervisor.ended(self.clock.now_ns(), cause)
        if any(isinstance(event, RequestFailed) and event.code == "request_quarantined" for event in events):
            self._num_deaths_in_row = 0
        self._deliver(events)
        for stream in (self._streams[request_id] for request_id in suspects if cause != "other"):
            law("who is to blame is quarantined", stream.is_terminal or not _is_guilty(stream), stream.deaths)
        if wait_s is not None:
            self._at(self.clock.now_ns() + int(wait_s * 1e9), self._launch)

    # ---- the server's clockwork ------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now_ns = self.clock.now_ns()
        process = self._process
        if process is not None and process.engine is not None and not process.is_dead:
            age_ns = now_ns - process.step_begin_ns if process.step_begin_ns and now_ns < process.busy_until_ns else 0
            self._send(process, Beat(age_ns), now_ns)
            law("the watchdog ends a step that hangs", age_ns < STUCK_NS // 2, f"it runs for {age_ns / 1e9} s")
        if process is not None and not process.is_dead:
            reason = self.supervisor.tick(now_ns)
            if reason is not None:
                self._note("watchdog", reason)
                law("the watchdog kills who hangs", self._may_hang(), reason)
                self._kill(process, "work")
        late = self.supervisor.expired(now_ns)
        self._deliver(late)
        for event in late:
            self._tell(Abort(event.request_id))
        law("the ledger balances", self.ledger.imbalance() == 0, "accepted = live + ended")
        if self._num_to_come or self.ledger.live or self.supervisor.num_live:
            self._at(now_ns + TICK_NS, self._tick)

    def _may_hang(self) -> bool:
        return any(fault.kind in ("stuck", "stall_at", "late") for fault in self.script.faults)

    def _drain(self) -> None:
        self._note("drain")
        self._is_draining = True
        self.drain.begin()
        self._at(self.clock.now_ns() + DRAIN_NS, self.drain.cut_live)

    def _check_end(self) -> None:
        law(
            "I21 every call ends",
            all(caller.end for caller in self.callers),
            [c.spec.id for c in self.callers if not c.end],
        )
        law("every request gets a terminal event", all(s.is_terminal for s in self._streams.values()), "left")
        law("I32 ledger", not self.ledger.live and self.ledger.imbalance() == 0, self.ledger.live)
        law("I32 supervisor", self.supervisor.num_live == 0, self.supervisor.num_live)
        left = (self.admission.num_waiting, self.admission.num_running, self.admission.num_waiting_tokens)
        law("I32 admission", left == (0, 0, 0), left)
        process = self._process
        if process is not None and not process.is_dead and process.checks is not None:
            process.checks.empty()
        if process is not None and process.engine is not None and not process.is_dead:
            self.tally.num_step_faults += process.engine.num_step_faults
        self._check_ends()

    def _check_ends(self) -> None:
        """Who did nothing wrong and was not refused, stopped or late has the whole answer."""
        is_gone = self.supervisor.state == "gone"
        for caller in self.callers:
            spec = caller.spec
            if caller.end == "completed":
                law("a call that must fail does", not spec.fault or any(s.is_stopped for s in caller.streams), spec.id)
            elif caller.end.startswith("client_cancelled"):
                is_restless = spec.cancel_us >= 0 or spec.cancel_after >= 0 or spec.stall_after >= 0
                law("nobody leaves unasked", is_restless, spec.id)
            elif caller.end == "shed not_ready":
                reasons = (
                    self.settings.drain_us >= 0 or self.tally.num_deaths > 0 or self._may_hang() or self._frame_faults
                )
                law("I28 refused as not ready for a reason", bool(reasons), spec.id)
            elif caller.end == "shed overloaded":
                law("refused as too much for a reason", self._may_be_too_much(spec), spec.id)
            elif caller.end.startswith("deadline"):
                law("late only with a deadline", bool(spec.deadline_us or spec.max_queue_us), spec.id)
            else:
                self._check_failed_end(caller, is_gone)

    def _may_be_too_much(self, spec: SimRequest) -> bool:
        settings = self.settings
        num_tokens = sum(len(request.prompt_ids) * request.n for request in self.script.requests)
        is_full = (
            num_tokens > settings.max_pools * settings.num_blocks * settings.block_size or settings.max_waiting < 1024
        )
        return is_full or bool(spec.deadline_us or spec.max_queue_us)

    def _check_failed_end(self, caller: _Caller, is_gone: bool) -> None:
        spec, code = caller.spec, caller.end.removeprefix("failed ")
        is_alright = (
            spec.fault != ""
            or (code in ("context_length_exceeded", "kv_capacity_exceeded") and self._is_too_long(spec))
            or code in ("internal", "nan_logits", "grammar_dead_end", "request_quarantined")  # looked at when they came
            or code == "no_allowed_token"
            or (code == "engine_unavailable" and is_gone)
        )
        law("nobody fails for nothing", is_alright, f"{spec.id}: {caller.end}")


def _repetition(spec: SimRequest) -> RepetitionDetection | None:
    if spec.repetition is None:
        return None
    least, most, count = spec.repetition
    return RepetitionDetection(min_pattern_size=least, max_pattern_size=most, min_count=count)


def _is_guilty(stream: _Stream) -> bool:
    deaths = stream.deaths
    is_often = deaths["work"] >= MAX_DEATHS if stream.last_cause == "work" else deaths["pressure alone"] >= MAX_KILLS
    return stream.last_death_alone and is_often
