"""The shapes `chat.completion` and `chat.completion.chunk`.

Owns how deltas look to a client of chat, streamed or whole. Knows nothing of how they come to be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jilju.engine.request import TokenEvent
from jilju.errors import JiljuError
from jilju.serve.answer import (
    DONE,
    WAIT,
    Head,
    TokenTexts,
    Usage,
    chunk_event,
    failure_event,
    finite,
    head_fields,
    prompt_fields,
)
from jilju.serve.answer_types import AnsweredMessage, ChatChoice, ContentLogprobs, TokenLogprob, TopLogprob
from jilju.serve.generation import Choice, Delta
from jilju.serve.timings import Timings

CHUNK = "chat.completion.chunk"


@dataclass(slots=True)
class _Message:
    """One choice's answer so far."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)  # with their arguments as a list of pieces
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class ChatRenderer:
    silence = WAIT

    def __init__(self, head: Head, choices: Sequence[Choice], texts: TokenTexts, include_reasoning: bool = True):
        self._head, self._choices, self._texts, self._with_reasoning = head, choices, texts, include_reasoning
        self._opened: set[int] = set()  # choices whose role was sent
        self._messages = [_Message() for _ in choices]

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        """A choice's role goes out with its first token, what was asked of the prompt with the first chunk of all."""
        index = delta.choice.index
        opening = b""
        if index not in self._opened:
            first = prompt_fields(self._head, self._choices, self._texts) if not self._opened else {}
            role = self._choice(index, {"role": "assistant", "content": ""})
            opening = chunk_event(self._head, CHUNK, [role], usage, None, first)
            self._opened.add(index)
        choice = self._choice(index, self._delta(delta)) | {
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._head.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
        return opening + chunk_event(self._head, CHUNK, [choice], usage, timings, {})

    def _delta(self, delta: Delta) -> dict[str, Any]:
        """Empty text for a token that shows none, unless it is the last."""
        rendered: dict[str, Any] = {}
        text, reasoning = delta.joined("text"), delta.joined("reasoning")
        if reasoning and self._with_reasoning:
            rendered |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls := self._call_deltas(delta):
            rendered["tool_calls"] = calls
        if text or not (rendered or delta.finish_reason is not None):
            rendered = {"content": text, **rendered}
        return rendered

    def _call_deltas(self, delta: Delta) -> list[dict[str, Any]]:
        """The first of a call has id, type and name, later ones pieces of the arguments alone."""
        calls: dict[int, dict[str, Any]] = {}
        for part in delta.parts:
            if part.kind == "call":
                function = {"name": part.text, "arguments": ""}
                call_id = call_id_of(delta.choice, part.call)
                calls[part.call] = {"index": part.call, "id": call_id, "type": "function", "function": function}
            elif part.kind == "arguments":
                call = calls.setdefault(part.call, {"index": part.call, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
        return list(calls.values())

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
        return choice | ({"token_ids": []} if self._head.return_token_ids else {})

    def ending(self, usage: Usage, timings: Timings | None) -> bytes:
        if not self._head.include_usage:
            return DONE
        return chunk_event(self._head, CHUNK, [], usage, timings, {}) + DONE

    def failure(self, error: JiljuError) -> bytes:
        return failure_event(error)

    def add(self, delta: Delta) -> None:
        message = self._messages[delta.choice.index]
        for part in delta.parts:
            if part.kind == "text":
                message.content.append(part.text)
            elif part.kind == "reasoning":
                message.reasoning.append(part.text)
            elif part.kind == "call":
                message.calls.append({"id": call_id_of(delta.choice, part.call), "name": part.text, "arguments": []})
            else:
                message.calls[part.call]["arguments"].append(part.text)
        message.token_ids += [token.token_id for token in delta.tokens]
        if (logprobs := self._logprobs(delta)) is not None:
            message.logprobs += logprobs["content"]

    def whole(self, usage: Usage, timings: Timings | None) -> bytes:
        data = head_fields(self._head, "chat.completion") | {"service_tier": "default"}
        data |= prompt_fields(self._head, self._choices, self._texts)
        data |= {"choices": [self._whole_choice(choice) for choice in self._choices], "usage": usage}
        if timings is not None:
            data["timings"] = timings
        return msgspec.json.encode(data)

    def _whole_choice(self, choice: Choice) -> ChatChoice:
        answer = self._messages[choice.index]
        text, reasoning = "".join(answer.content), "".join(answer.reasoning)
        message: AnsweredMessage = {
            "role": "assistant",
            "content": text if text or not answer.calls else None,
            "refusal": None,
        }
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": "".join(call["arguments"])},
                }
                for call in answer.calls
            ]
        if reasoning and self._with_reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        assert choice.finish_reason is not None, "a whole answer has ended"
        rendered: ChatChoice = {
            "index": choice.index,
            "message": message,
            "logprobs": None if self._head.logprobs is None else {"content": answer.logprobs, "refusal": None},
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._head.return_token_ids:
            rendered["token_ids"] = answer.token_ids
        return rendered

    def _logprobs(self, delta: Delta) -> ContentLogprobs | None:
        if self._head.logprobs is None or not delta.tokens:
            return None
        return {"content": [token_logprob(self._texts, token) for token in delta.tokens], "refusal": None}


def token_logprob(texts: TokenTexts, token: TokenEvent) -> TokenLogprob:
    top = [_logprob_of(texts, token_id, logprob) for token_id, logprob in token.top or ()]
    return {**_logprob_of(texts, token.token_id, token.logprob), "top_logprobs": top}


def _logprob_of(texts: TokenTexts, token_id: int, logprob: float | None) -> TopLogprob:
    return {"token": texts.text_of(token_id), "logprob": finite(logprob), "bytes": list(texts.bytes_of(token_id))}


def call_id_of(choice: Choice, call: int) -> str:
    """Of a tool call: unique, and the same in a stream and in the whole answer."""
    return f"call_{choice.request.id}-{call}"
