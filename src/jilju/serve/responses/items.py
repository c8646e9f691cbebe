"""Items of a response: what an answer consists of, and the events that tell of its growth.

Owns the shapes of messages, function calls and thoughts, their ids, and the order of the events from an item's first to its
last. Whole and streamed answers are made of the same items. Knows nothing of the response around them, nor of bytes.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

from jilju.engine.request import TokenEvent
from jilju.serve.answer import Head, TokenTexts
from jilju.serve.answer_types import TokenLogprob
from jilju.serve.chat.shape import call_id_of, token_logprob
from jilju.serve.generation import Delta
from jilju.serve.responses.types import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputTextPart,
    ReasoningTextPart,
)
from jilju.serve.sealed import sealed


class Event(NamedTuple):
    """`name` without the prefix that all have."""

    name: str
    fields: dict[str, Any]


class Item(Protocol):
    """One item of the output. `begin` once, then `push`, then `end`."""

    status: str

    def begin(self) -> list[Event]: ...

    def push(self, text: str, logprobs: list[TokenLogprob]) -> Event: ...

    def end(self) -> list[Event]: ...

    def value(self) -> OutputItem: ...


@dataclass(slots=True)
class TextItem:
    """An item with one part of text; its two kinds differ in names."""

    prefix: ClassVar[str]
    text_event: ClassVar[str]

    id: str
    index: int
    status: str = "in_progress"
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def begin(self) -> list[Event]:
        """The item comes without its part, which follows by itself."""
        item = {**self.value(), "content": []}
        return [
            Event("output_item.added", {"output_index": self.index, "item": item}),
            Event("content_part.added", self._place() | {"part": self.part()}),
        ]

    def push(self, text: str, logprobs: list[TokenLogprob]) -> Event:
        self.texts.append(text)
        self.logprobs += logprobs
        return Event(f"{self.text_event}.delta", self._place() | {"delta": text} | self._logprobs_field(logprobs))

    def end(self) -> list[Event]:
        text = {"text": "".join(self.texts)} | self._logprobs_field(self.logprobs)
        return [
            Event(f"{self.text_event}.done", self._place() | text),
            Event("content_part.done", self._place() | {"part": self.part()}),
            Event("output_item.done", {"output_index": self.index, "item": self.value()}),
        ]

    def value(self) -> OutputMessage | OutputReasoning:
        raise NotImplementedError

    def part(self) -> OutputTextPart | ReasoningTextPart:
        raise NotImplementedError

    def _logprobs_field(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


@dataclass(slots=True)
class Message(TextItem):
    prefix = "msg_"
    text_event = "output_text"

    def value(self) -> OutputMessage:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": [self.part()],
        }

    def part(self) -> OutputTextPart:
        return {"type": "output_text", "text": "".join(self.texts), "annotations": [], "logprobs": list(self.logprobs)}

    def _logprobs_field(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return {"logprobs": list(logprobs)}


@dataclass(slots=True)
class Thoughts(TextItem):
    prefix = "rs_"
    text_event = "reasoning_text"

    is_sealed: bool = False

    def value(self) -> OutputReasoning:
        item: OutputReasoning = {"id": self.id, "type": "reasoning", "summary": [], "content": [self.part()]}
        if self.is_sealed:
            item["encrypted_content"] = sealed("".join(self.texts))
        return item

    def part(self) -> ReasoningTextPart:
        return {"type": "reasoning_text", "text": "".join(self.texts)}

    def _logprobs_field(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return {}


@dataclass(slots=True)
class FunctionCall:
    prefix: ClassVar[str] = "fc_"

    id: str
    index: int
    call_id: str
    name: str
    status: str = "in_progress"
    arguments: list[str] = field(default_factory=list)

    def begin(self) -> list[Event]:
        return [Event("output_item.added", {"output_index": self.index, "item": self.value()})]

    def push(self, text: str, logprobs: list[TokenLogprob]) -> Event:
        self.arguments.append(text)
        return Event("function_call_arguments.delta", self._place() | {"delta": text})

    def end(self) -> list[Event]:
        arguments = {"name": self.name, "arguments": "".join(self.arguments)}
        return [
            Event("function_call_arguments.done", self._place() | arguments),
            Event("output_item.done", {"output_index": self.index, "item": self.value()}),
        ]

    def value(self) -> OutputCall:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.arguments),
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


class Output:
    """All items of one answer. An item ends where the next one begins, the last one with the answer."""

    def __init__(self, head: Head, texts: TokenTexts, *, is_sealed: bool):
        self._answer_id = head.id.rpartition("_")[2]
        self._with_logprobs, self._texts, self._is_sealed = head.logprobs is not None, texts, is_sealed
        self._items: list[Item] = []
        self._waiting: list[TokenEvent] = []  # tokens whose text has not come, or is markup

    def take(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        self._wait(delta)
        for part in delta.parts:
            match part.kind:
                case "text":
                    events += self._ready(Message)
                case "reasoning":
                    events += self._ready(Thoughts)
                case "call":
                    call_id, index = call_id_of(delta.choice, part.call), len(self._items)
                    events += self._begin(FunctionCall(self._id(FunctionCall.prefix), index, call_id, part.text))
                    continue
                case "arguments":
                    assert isinstance(self._items[-1], FunctionCall), "arguments follow their call"
            events.append(self._items[-1].push(part.text, self._logprobs(part.text) if part.kind == "text" else []))
        if any(part.kind != "text" for part in delta.parts):
            self._waiting.clear()
        if delta.finish_reason is not None:
            if not self._items:  # an answer has an item in any case
                events += self._ready(Message)
            events += self._end("completed" if delta.finish_reason in ("stop", "tool_calls") else "incomplete")
        return events

    def values(self) -> list[OutputItem]:
        return [item.value() for item in self._items]

    def fail(self) -> None:
        """The answer ends here; nobody is told of its last item but by the whole."""
        if self._items and self._items[-1].status == "in_progress":
            self._items[-1].status = "incomplete"

    def _ready(self, kind: type[Message] | type[Thoughts]) -> list[Event]:
        """The last item is of this kind, a new one if need be."""
        if self._items and isinstance(self._items[-1], kind):
            return []
        item = kind(self._id(kind.prefix), len(self._items))
        if isinstance(item, Thoughts):
            item.is_sealed = self._is_sealed
        return self._begin(item)

    def _begin(self, item: Item) -> list[Event]:
        ended = self._end("completed") if self._items else []
        self._items.append(item)
        return ended + item.begin()

    def _end(self, status: str) -> list[Event]:
        self._items[-1].status = status
        return self._items[-1].end()

    def _id(self, prefix: str) -> str:
        return f"{prefix}{self._answer_id}-{len(self._items)}"

    def _wait(self, delta: Delta) -> None:
        """All but the token that ends the answer by its id: that has no text."""
        if self._with_logprobs:
            end_ids = delta.choice.request.end_ids
            self._waiting += [
                token for token in delta.tokens if not (token.finish_reason == "stop" and token.token_id in end_ids)
            ]

    def _logprobs(self, text: str) -> list[TokenLogprob]:
        """Of the waiting tokens that this text is made of. Those before it were markup; those after it are still held back,
        as a possible stop string is."""
        if not self._with_logprobs:
            return []
        pieces = [self._texts.shown_bytes(token.token_id) for token in self._waiting]
        data, wanted = b"".join(pieces), text.encode()
        start = 0 if data.startswith(wanted) else data.rfind(wanted)
        if start < 0:  # U+FFFD in place of bytes that are no character, or a token that began before
            start, wanted = 0, data
        ends = [*accumulate(len(piece) for piece in pieces)]
        first = bisect_right(ends, start)
        last = bisect_left(ends, start + len(wanted)) + 1
        tokens, self._waiting = self._waiting[first:last], self._waiting[last:]
        return [token_logprob(self._texts, token) for token in tokens]
