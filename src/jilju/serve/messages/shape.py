"""The shape of /v1/messages: a message of blocks, whole or as events.

Owns how deltas become blocks, what the end is called here, and the names of usage. A whole answer is made of the same blocks
that a stream tells of. Knows nothing of how deltas come to be.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from jilju.errors import JiljuError
from jilju.serve.answer import Head, Usage
from jilju.serve.errors import message_error
from jilju.serve.generation import Choice, Delta
from jilju.serve.messages.types import (
    AnsweredBlock,
    AnsweredText,
    AnsweredThinking,
    AnsweredToolUse,
    MessageAnswer,
    MessageUsage,
    StopReason,
    ThinkingTokens,
)
from jilju.serve.sealed import sealed
from jilju.serve.timings import Timings
from jilju.text.message import PartKind

BlockType = Literal["text", "thinking", "tool_use"]
TYPES: Mapping[PartKind, BlockType] = MappingProxyType(
    {"text": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}
)


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event, named by its type."""
    return f"event: {data['type']}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


PING = event({"type": "ping"})


def message_usage(num_prompt_tokens: int, num_cached: int, num_tokens: int = 0, num_thinking: int = 0) -> MessageUsage:
    return MessageUsage(
        input_tokens=num_prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=num_tokens,
        output_tokens_details=ThinkingTokens(num_thinking),
    )


def _final_usage(usage: Usage) -> MessageUsage:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    assert prompt is not None and completion is not None, "every sequence has ended"
    final = message_usage(
        usage.prompt_tokens, prompt.cached_tokens, usage.completion_tokens, completion.reasoning_tokens
    )
    return final if usage.jilju_cache is None else msgspec.structs.replace(final, jilju_cache=usage.jilju_cache)


@dataclass(slots=True)
class _Block:
    """One block so far. Thoughts are `thinking`, a call is `tool_use`."""

    type: BlockType
    is_shown: bool = True  # otherwise only its signature, which thoughts alone have
    call: int = 0
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    def opening(self) -> AnsweredBlock:
        if self.type == "tool_use":
            return AnsweredToolUse(type="tool_use", id=self.id, name=self.name, input={})
        if self.type == "text":
            return AnsweredText(type="text", text="")
        return AnsweredThinking(type="thinking", thinking="", signature="")

    def delta(self, text: str) -> dict[str, Any]:
        if self.type == "tool_use":
            return {"type": "input_json_delta", "partial_json": text}
        return {"type": f"{self.type}_delta", self.type: text}

    def whole(self) -> AnsweredBlock:
        text = "".join(self.pieces)
        if self.type == "tool_use":
            arguments = msgspec.Raw(whole_object(text).encode())
            return AnsweredToolUse(type="tool_use", id=self.id, name=self.name, input=arguments)
        if self.type == "text":
            return AnsweredText(type="text", text=text)
        return AnsweredThinking(type="thinking", thinking=text if self.is_shown else "", signature=sealed(text))


class _Blocks:
    """The answer's blocks, one after the other: the next begins where the last has ended."""

    def __init__(self, choice: Choice, shows_thoughts: bool):
        self._choice, self._shows_thoughts = choice, shows_thoughts
        self._is_open = False
        self.blocks: list[_Block] = []

    def take(self, delta: Delta) -> list[dict[str, Any]]:
        """The events that tell of it."""
        events: list[dict[str, Any]] = []
        for (kind, call), parts in itertools.groupby(delta.parts, lambda part: (part.kind, part.call)):
            text = "".join(part.text for part in parts)
            if kind == "call":
                block_id = f"toolu_{self._choice.request.id}-{call}"
                events += self._open(_Block("tool_use", call=call, id=block_id, name=text))
            elif text:
                block_type = TYPES[kind]
                if not (self._is_open and self.blocks[-1].type == block_type):
                    assert block_type != "tool_use", "arguments follow the call that they belong to"
                    events += self._open(_Block(block_type, block_type == "text" or self._shows_thoughts))
                block = self.blocks[-1]
                assert kind != "arguments" or block.call == call, "calls are written one after the other"
                block.pieces.append(text)
                if block.is_shown:
                    events.append(self._event("content_block_delta", delta=block.delta(text)))
        return events + (self._close() if delta.finish_reason is not None else [])

    def _open(self, block: _Block) -> list[dict[str, Any]]:
        events = self._close()
        self.blocks.append(block)
        self._is_open = True
        return [*events, self._event("content_block_start", content_block=block.opening())]

    def _close(self) -> list[dict[str, Any]]:
        if not self._is_open:
            return []
        self._is_open = False
        stop, block = self._event("content_block_stop"), self.blocks[-1]
        if block.type != "thinking":
            return [stop]
        signature = {"type": "signature_delta", "signature": sealed("".join(block.pieces))}
        return [self._event("content_block_delta", delta=signature), stop]

    def _event(self, kind: str, **rest: Any) -> dict[str, Any]:
        return {"type": kind, "index": len(self.blocks) - 1, **rest}


class MessagesRenderer:
    silence = PING

    def __init__(self, head: Head, choices: Sequence[Choice], max_tokens: int | None, shows_thoughts: bool):
        (self._choice,) = choices
        self._head, self._max_tokens = head, max_tokens
        self._blocks = _Blocks(self._choice, shows_thoughts)
        self._has_begun = False

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        """Usage and timings come with the ending: this family asks for that. A token that shows nothing has no event."""
        events = self._blocks.take(delta)
        if not self._has_begun:
            self._has_begun = True
            events.insert(0, {"type": "message_start", "message": self._message(self._usage_at_first(delta))})
        return b"".join(map(event, events))

    def ending(self, usage: Usage, timings: Timings | None) -> bytes:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        data = {"type": "message_delta", "delta": delta, "usage": _final_usage(usage)}
        if timings is not None:
            data["timings"] = timings
        return event(data) + event({"type": "message_stop"})

    def failure(self, error: JiljuError) -> bytes:
        return event({"type": "error", "error": message_error(error)})

    def add(self, delta: Delta) -> None:
        self._blocks.take(delta)

    def whole(self, usage: Usage, timings: Timings | None) -> bytes:
        data = self._message(_final_usage(usage))
        data["stop_reason"], data["stop_sequence"] = self._stop()
        data["content"] = [block.whole() for block in self._blocks.blocks]
        if timings is not None:
            data["timings"] = timings
        return msgspec.json.encode(data)

    def _message(self, usage: MessageUsage) -> MessageAnswer:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _usage_at_first(self, delta: Delta) -> MessageUsage:
        """A first token tells what of the prompt was cached; an answer without one has ended, and tells it too."""
        times = delta.tokens[0].times if delta.tokens else self._choice.times
        return message_usage(self._choice.request.num_prompt_tokens, 0 if times is None else times.num_cached_tokens)

    def _stop(self) -> tuple[StopReason, str | None]:
        reason, stop = self._stop_reason(), self._choice.stop_reason
        return reason, stop if reason == "stop_sequence" and isinstance(stop, str) else None

    def _stop_reason(self) -> StopReason:
        choice = self._choice
        if choice.finish_reason == "length":
            was_cut = self._max_tokens is None or choice.request.params.max_tokens < self._max_tokens
            return "model_context_window_exceeded" if was_cut else "max_tokens"
        if choice.finish_reason == "repetition":
            return "max_tokens"
        if isinstance(choice.stop_reason, str):
            return "stop_sequence"
        return "tool_use" if choice.num_calls and choice.stop_reason is None else "end_turn"


def whole_object(text: str) -> str:
    """A call's arguments as the text of a whole object: itself, or if the answer was cut within, the members that are whole."""
    closers, safe_end = _scanned(text)
    beginning = text[:safe_end]  # up to the last place where a value had ended for sure
    for candidate in (text, text + closers, beginning + _scanned(beginning)[0]):
        if _is_object(candidate):
            return candidate
    return "{}"


def _scanned(text: str) -> tuple[str, int]:
    """What closes all that is open at the end of a JSON text, and the last place outside of a string and of a value."""
    closers: list[str] = []
    safe_end = 0
    in_string = is_escaped = False
    for at, char in enumerate(text):
        if in_string:
            in_string = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            in_string = True
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
            safe_end = at + 1
        elif char in "}]" and closers:
            closers.pop()
            safe_end = at + 1
        elif char == ",":
            safe_end = at
    return "".join(reversed(closers)), safe_end


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
