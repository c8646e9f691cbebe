"""The ledger of calls: who was accepted, what is live, how each ended.

Owns one record per accepted call and the law that each ends in exactly one terminal state: accepted = terminal + live. Mints the
numbers by which the log of steps names sequences. Access log, metrics and drain are listeners or readers. Knows nothing of HTTP, text or the engine's inside.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jilju.account.recording import Refusal
from jilju.account.records import CallRecord, SequenceRecord
from jilju.clock import Clock
from jilju.engine.events import Guard
from jilju.engine.request import RequestTimes, SamplingParams
from jilju.errors import JiljuError, ShedReason
from jilju.serve.timings import Marks

CallState = Literal["completed", "client_cancelled", "deadline", "shed", "failed"]
MAX_REFUSALS = 4096  # whose times are kept
CLIENT_LEFT_STATUS = 499  # logged only: there is nobody to send it to


@dataclass(slots=True, eq=False)
class SequenceLife:
    """What is known of one sequence of a call, as it goes."""

    number: int  # in the log
    index: int  # of the choice
    prompt_index: int
    num_prompt_tokens: int
    num_output_tokens: int = 0
    times: RequestTimes | None = None  # the engine's, with its first token and again with its terminal event
    ended_ns: int = 0
    num_resumes: int = 0
    finish_reason: str | None = None

    @property
    def num_cached_tokens(self) -> int:
        return 0 if self.times is None else self.times.num_cached_tokens

    def record(self) -> SequenceRecord:
        times = self.times
        return SequenceRecord(
            number=self.number,
            index=self.index,
            prompt_index=self.prompt_index,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            queued_ns=0 if times is None else times.queued_ns,
            ended_ns=self.ended_ns,
            num_preemptions=0 if times is None else times.num_preemptions,
            num_resumes=self.num_resumes,
            finish_reason=self.finish_reason,
            miss=None if times is None else times.miss,
        )


@dataclass(slots=True, eq=False)
class Call:
    """One accepted call, from its head to its last byte. Times are ns of the one clock, 0 where it did not get that far."""

    id: str
    route: str
    key_name: str | None
    label: str | None  # the client's own id, cleaned; never used as an id
    received_ns: int
    run_id: str = ""  # as its answer has it
    is_streamed: bool = False
    marks: Marks | None = None
    lives: list[SequenceLife] = field(default_factory=list)  # of its sequences that were submitted
    num_sequences: int = 0  # submitted to the engine
    num_live_sequences: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    first_token_ns: int = 0  # its chunk was handed to the socket, or was ready to be
    ended_ns: int = 0
    state: CallState | None = None
    status: int = 0
    code: str | None = None
    shed_reason: ShedReason | None = None
    request_id: str | None = None  # label of the body
    session_id: str | None = None
    times: list[RequestTimes] = field(default_factory=list)  # of its sequences, as they ended
    eta_errors_ns: list[int] = field(default_factory=list)  # of its sequences: predicted minus actual wait
    cut: Callable[[JiljuError], None] | None = None  # ends it from outside with that error
    message: str | None = None  # of the error that it ended with
    params: SamplingParams | None = None  # as they were understood, of its first sequence
    num_choices: int = 1  # answers to a prompt that it asks for
    machine_ns: int = 0  # its share of the machine's time, once it has ended
    joules: float | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Of all prompts, each once: what the first sequence of it found, as far as the engine has told."""
        return sum({life.prompt_index: life.num_cached_tokens for life in reversed(self.lives)}.values())

    def record(self) -> CallRecord:
        """As folds over the log take it; of a call that still runs, what there is."""
        marks = self.marks or Marks(received_ns=self.received_ns)
        return CallRecord(
            id=self.id,
            run_id=self.run_id or self.id,
            route=self.route,
            key_name=self.key_name,
            received_ns=self.received_ns,
            body_ns=marks.body_ns,
            parsed_ns=marks.parsed_ns,
            render_ns=marks.render_ns,
            tokenize_ns=marks.tokenize_ns,
            grammar_ns=marks.grammar_ns,
            submitted_ns=marks.submitted_ns,
            first_sent_ns=self.first_token_ns,
            last_event_ns=marks.last_event_ns,
            encoded_ns=marks.encoded_ns,
            ended_ns=self.ended_ns,
            waits=list(marks.waits),
            is_streamed=self.is_streamed,
            state=self.state,
            status=self.status,
            code=self.code,
            sequences=[life.record() for life in self.lives],
            machine_ns=self.machine_ns,
            joules=self.joules,
        )


class LedgerListener(Protocol):
    """Who is told of calls. One that names this as its base says only what it wants to hear."""

    def on_token(self, call: Call, gap_ns: int | None) -> None:
        """One token of a sequence; `gap_ns` since the one before it, None for its first."""
        return

    def on_end(self, call: Call) -> None: ...


class Ledger:
    def __init__(self, clock: Clock):
        self._clock = clock
        self._guard = Guard("the ledger")
        self._listeners: list[LedgerListener] = []
        self.live: dict[str, Call] = {}
        self.num_accepted: Counter[str] = Counter()  # by route
        self.num_ended: Counter[tuple[str, str]] = Counter()  # by state and code
        self.num_refused: Counter[str] = Counter()  # by code; never accepted
        self.refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)  # the newest
        self.num_ignored_fields = 0  # unknown ones that a lenient server dropped
        self.num_live_sequences = 0
        self.busy_since_ns = 0  # since when sequences are live without a break
        self._num_numbers = 0

    def listen(self, listener: LedgerListener) -> None:
        self._listeners.append(listener)

    def accept(self, call: Call) -> Call:
        assert call.id not in self.live, f"ids are minted once, {call.id} is live"
        self.num_accepted[call.route] += 1
        self.live[call.id] = call
        return call

    def next_number(self) -> int:
        """Of a sequence, unique as long as the log is kept."""
        self._num_numbers += 1
        return self._num_numbers

    def refuse(self, code: str, status: int) -> None:
        self.num_refused[code] += 1
        self.refusals.append(Refusal(self._clock.now_ns(), status, code))

    def sequences_submitted(self, call: Call, count: int) -> None:
        if self.num_live_sequences == 0:
            self.busy_since_ns = self._clock.now_ns()
        call.num_sequences += count
        call.num_live_sequences += count
        self.num_live_sequences += count

    def sequence_ended(self, call: Call, times: RequestTimes | None) -> None:
        call.num_live_sequences -= 1
        self.num_live_sequences -= 1
        if times is not None:
            call.times.append(times)

    def token(self, call: Call, gap_ns: int | None) -> None:
        call.num_output_tokens += 1
        for listener in self._listeners:
            self._guard.tell(listener.on_token, call, gap_ns)

    def end(self, call: Call, state: CallState, status: int, code: str | None = None) -> None:
        assert call.state is None, f"call {call.id} ended as {call.state} and cannot end again as {state}"
        assert call.num_live_sequences == 0, f"call {call.id} ends with {call.num_live_sequences} live sequences"
        call.state, call.status, call.code = state, status, code
        call.ended_ns = self._clock.now_ns()
        call.cut = None
        del self.live[call.id]
        self.num_ended[state, code or ""] += 1
        for listener in self._listeners:
            self._guard.tell(listener.on_end, call)

    def imbalance(self) -> int:
        """Distance from accepted = terminal + live and from live sequences = the sum over live calls; must be 0, and no listener may fail."""
        calls = self.num_accepted.total() - self.num_ended.total() - len(self.live)
        sequences = self.num_live_sequences - sum(call.num_live_sequences for call in self.live.values())
        return abs(calls) + abs(sequences) + self._guard.num_failures


def state_of(error: JiljuError) -> CallState:
    """The terminal state of a call that ends with this error."""
    if error.code == "request_cancelled":
        return "client_cancelled"
    if error.code == "deadline_exceeded":
        return "deadline"
    return "shed" if error.code in ("overloaded", "not_ready") else "failed"
