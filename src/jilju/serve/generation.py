"""Generation: the one pipeline from requests to pieces of text, under streams and whole answers alike.

Owns a call's sequences from submit to their terminal events: text, stop strings, finish reasons, counts, what admission
learns of them, and the abort of whatever is live when the call ends early. Knows nothing of JSON, SSE or HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jilju.clock import Clock
from jilju.engine.admission import Admission
from jilju.engine.client import EngineClient
from jilju.engine.request import (
    EngineEvent,
    PromptScored,
    Request,
    RequestAborted,
    RequestEnded,
    RequestFailed,
    RequestTimes,
    TokenEvent,
    is_terminal,
)
from jilju.errors import DeadlineExceeded, InternalError
from jilju.serve.errors import error_of
from jilju.serve.ledger import Call, Ledger, SequenceLife
from jilju.serve.runs.kept import KeptSequence
from jilju.serve.timings import Marks
from jilju.text.history import Opening
from jilju.text.message import MessageParser, Part, PlainText
from jilju.text.stream import TextStream

FinishReason = Literal["stop", "length", "repetition", "tool_calls"]


class EncodedPrompt(NamedTuple):
    ids: list[int]
    opening: Opening | None = None  # None: what answers it is not remembered
    text: str | None = None  # as it was rendered, or given; None: it came as ids
    num_truncated: int = 0  # tokens that were cut off, as the caller asked
    messages: Sequence[Mapping[str, Any]] = ()  # that it was rendered from


@dataclass(slots=True)
class PromptScores:
    """Of the prompt's tokens from the second on: the logprob of each, and of the likeliest in its place."""

    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, scored: PromptScored) -> None:
        self.logprobs += scored.logprobs
        self.tops += scored.tops or [[] for _ in scored.logprobs]


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of a call and its text so far."""

    index: int
    request: Request
    text: TextStream
    life: SequenceLife
    kept: KeptSequence | None = None  # None: nothing of it is kept
    parser: MessageParser = field(default_factory=PlainText)
    prompt: EncodedPrompt | None = None
    num_tokens: int = 0  # up to the token that ended it
    num_reasoning_tokens: int = 0
    num_calls: int = 0  # tool calls begun
    logprob: float = 0.0  # of all tokens
    scores: PromptScores = field(default_factory=PromptScores)  # if they were asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    times: RequestTimes | None = None  # with its terminal event
    ended: bool = False  # the terminal event is here
    last_token_ns: int = 0
    held: "Delta | None" = None  # the last delta, kept until the terminal event
    is_reasoning: bool = False  # the last part was reasoning


@dataclass(frozen=True, slots=True)
class Delta:
    """The effect of one token, or of several: parts of the message, perhaps none. An answer may end without a token."""

    choice: Choice
    parts: tuple[Part, ...]
    tokens: tuple[TokenEvent, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def joined(self, kind: Literal["text", "reasoning"]) -> str:
        return "".join(part.text for part in self.parts if part.kind == kind)

    def followed_by(self, later: "Delta") -> "Delta":
        """One delta for both."""
        return Delta(
            self.choice,
            self.parts + later.parts,
            self.tokens + later.tokens,
            later.finish_reason,
            later.stop_reason,
        )


class Together:
    """Puts so many tokens of a choice into one delta; its first token, and what ends it, go at once."""

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._waiting: dict[int, Delta] = {}  # by choice
        self._begun: set[int] = set()

    def take(self, deltas: Sequence[Delta]) -> list[Delta]:
        """What goes out now; what stays is never an answer's last."""
        if self._num_tokens == 1:
            return list(deltas)
        ready: list[Delta] = []
        for delta in deltas:
            index = delta.choice.index
            if (earlier := self._waiting.pop(index, None)) is not None:
                delta = earlier.followed_by(delta)
            if delta.finish_reason is not None or index not in self._begun or len(delta.tokens) >= self._num_tokens:
                self._begun.add(index)
                ready.append(delta)
            else:
                self._waiting[index] = delta
        return ready


@dataclass(slots=True, eq=False)
class Generation:
    """`deltas()` once, then `close()` in every case."""

    client: EngineClient
    ledger: Ledger
    admission: Admission
    clock: Clock
    call: Call
    marks: Marks
    choices: Sequence[Choice]
    deadline_ns: int
    is_call_named: bool = False  # the caller named the function to be called: then a call is a plain end
    hold_last: bool = False  # a sequence's last delta comes only with its terminal event, so that its times are known
    _queue: "asyncio.Queue[tuple[Choice, EngineEvent | BaseException, int]]" = field(default_factory=asyncio.Queue)
    _pumps: list["asyncio.Task[None]"] = field(default_factory=list)
    _num_restarts: int = 0

    def submit(self) -> None:
        """All sequences or none. Raises what the client raises."""
        self._num_restarts = self.client.status().num_restarts
        self.marks.submitted_ns = self.clock.now_ns()
        taken: list[tuple[Choice, AsyncIterator[EngineEvent]]] = []
        try:
            taken.extend((choice, self.client.submit(choice.request)) for choice in self.choices)
        finally:
            self.ledger.sequences_submitted(self.call, len(taken))
            self.call.lives += [choice.life for choice, _ in taken]
            first: asyncio.Task[None] | None = None  # of the sequence whose prompt those behind it share
            for choice, events in taken:
                first = first if choice.request.sibling_of else None
                self._pumps.append(asyncio.create_task(self._pump(choice, events, first)))
                first = first or self._pumps[-1]

    async def deltas(self, silence_s: Callable[[], float | None]) -> AsyncIterator[list[Delta]]:
        """What came since the last turn, in order; an empty list after `silence_s()` seconds without anything."""
        while not all(choice.ended for choice in self.choices):
            silence = silence_s()
            try:
                items = [await self._next(silence)]
            except TimeoutError:
                if silence is not None:
                    yield []
                continue  # or the deadline has passed: the next turn says so
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            deltas: list[Delta] = []
            failure: BaseException | None = None
            for item in items:
                try:
                    deltas += self._take(*item)
                except Exception as error:  # what came before it is still given out
                    failure = error
                    break
            if deltas:
                yield deltas
            if failure is not None:
                raise failure

    async def close(self) -> None:
        """Abort what is live. Every sequence is ended in the ledger afterwards."""
        for choice in self.choices[: len(self._pumps)]:
            if not choice.ended:
                self.client.abort(choice.request.id)
                self._end(choice, None, self.clock.now_ns())
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(
        self, choice: Choice, events: AsyncIterator[EngineEvent], first: "asyncio.Task[None] | None"
    ) -> None:
        """A sibling that makes no token waits for no step, so it could end before its prompt's logprobs are there."""
        try:
            if first is not None and choice.request.params.max_tokens == 0:
                await asyncio.wait({first})
            async for event in events:
                self._queue.put_nowait((choice, event, self.clock.now_ns()))
        except Exception as error:
            self._queue.put_nowait((choice, error, self.clock.now_ns()))

    async def _next(self, silence_s: float | None) -> "tuple[Choice, EngineEvent | BaseException, int]":
        left_s = (self.deadline_ns - self.clock.now_ns()) / 1e9
        if left_s <= 0:
            allowed_s = (self.deadline_ns - self.call.received_ns) / 1e9
            raise DeadlineExceeded(f"the answer was not complete within {allowed_s:g} s; ask for fewer tokens")
        async with asyncio.timeout(left_s if silence_s is None else min(left_s, silence_s)):
            return await self._queue.get()

    def _take(self, choice: Choice, event: "EngineEvent | BaseException", at_ns: int) -> list[Delta]:
        if isinstance(event, BaseException):
            raise event
        delta: Delta | None = None
        times = None if isinstance(event, PromptScored | RequestFailed) else event.times
        if times is not None:
            choice.life.times, choice.life.num_resumes = times, self._num_resumes()
        if times is not None and times.scheduled_ns:
            error_ns = self.admission.started(choice.request.id, times.scheduled_ns)
            if error_ns is not None:
                self.call.eta_errors_ns.append(error_ns)
        if choice.finish_reason is None:
            if isinstance(event, TokenEvent):
                delta = self._token(choice, event, at_ns)
            elif isinstance(event, RequestEnded):
                choice.finish_reason = event.finish_reason
                delta = self._delta(choice, choice.text.finish().text, ())
            elif isinstance(event, RequestFailed):
                self._end(choice, None, at_ns)
                raise error_of(event.code, event.message)
            elif isinstance(event, RequestAborted):
                self._end(choice, event.times, at_ns)
                raise InternalError("the engine ended the request although nobody asked for it")
            else:
                assert isinstance(event, PromptScored), f"an unknown event of the engine: {event!r}"
                choice.scores.add(event)
                if choice.kept is not None:
                    choice.kept.add_scores(event)
        if is_terminal(event):
            self._end(choice, times, at_ns)
            self.marks.last_event_ns = at_ns
            delta, choice.held = choice.held or delta, None
        elif delta is not None and delta.finish_reason is not None:  # a stop string: nothing more of it is wanted
            self.client.abort(choice.request.id)
            if self.hold_last:
                delta, choice.held = None, delta
        return [] if delta is None else [delta]

    def _token(self, choice: Choice, event: TokenEvent, at_ns: int) -> Delta:
        assert event.index == choice.num_tokens, f"token {event.index} came where {choice.num_tokens} was next"
        choice.num_tokens += 1
        choice.life.num_output_tokens += 1
        if choice.kept is not None:
            choice.kept.add(event)
        choice.logprob += event.logprob or 0.0
        self.admission.token(choice.request.id)
        self.ledger.token(self.call, at_ns - choice.last_token_ns if choice.last_token_ns else None)
        choice.last_token_ns = at_ns
        self.marks.first_token_ns = self.marks.first_token_ns or at_ns
        params = choice.request.params
        if event.token_id in choice.request.end_ids and event.finish_reason == "stop":
            piece_text, stop = "", None  # it shows no text; what was held back can be shown now
            if event.token_id in params.stop_token_ids:
                choice.stop_reason = event.token_id
        else:
            piece = choice.text.push(event.token_id)
            piece_text, stop = piece.text, piece.stop
        if stop is None and event.finish_reason is not None:
            piece = choice.text.finish()
            piece_text, stop = piece_text + piece.text, piece.stop
        choice.finish_reason = event.finish_reason
        if stop is not None:
            choice.finish_reason, choice.stop_reason = "stop", stop
        elif choice.finish_reason == "repetition":
            choice.stop_reason = "repetition_detected"
        if choice.kept is not None:
            choice.kept.stop_reason = choice.stop_reason
        return self._delta(choice, piece_text, (event,))

    def _delta(self, choice: Choice, text: str, tokens: tuple[TokenEvent, ...]) -> Delta:
        """What the text means. A token counts as reasoning if what it brought last, or what came last before it, is."""
        parts = choice.parser.push(text) if text else []
        if choice.finish_reason is not None:
            parts += choice.parser.finish()
        for part in parts:
            choice.num_calls += part.kind == "call"
            choice.is_reasoning = part.kind == "reasoning"
        choice.num_reasoning_tokens += len(tokens) if choice.is_reasoning else 0
        if (
            choice.finish_reason == "stop"
            and choice.stop_reason is None
            and choice.num_calls
            and not self.is_call_named
        ):
            choice.finish_reason = "tool_calls"
        return Delta(choice, tuple(parts), tokens, choice.finish_reason, choice.stop_reason)

    def _end(self, choice: Choice, times: RequestTimes | None, at_ns: int) -> None:
        """At `at_ns` its terminal event was at hand, which may lie for a while if the reader is slow, or it was given up."""
        assert not choice.ended, f"{choice.request.id} ended twice"
        choice.ended, choice.times = True, times
        choice.life.ended_ns, choice.life.finish_reason = at_ns, choice.finish_reason
        choice.life.num_resumes = self.marks.num_resumes = self._num_resumes()
        self.ledger.sequence_ended(self.call, times)
        num_tokens = choice.num_tokens if choice.finish_reason is not None else None
        self.admission.ended(choice.request.id, self.clock.now_ns(), num_tokens)

    def _num_resumes(self) -> int:
        """Engines that were started since it came."""
        return self.client.status().num_restarts - self._num_restarts
