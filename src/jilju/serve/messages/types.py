"""The answer of /v1/messages as types: what its renderer builds, and what the OpenAPI description says of it.

Owns names and kinds of the message's fields, of its blocks and of its errors. Knows nothing of how they are filled.
"""

from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from jilju.serve.answer import CacheUsage
from jilju.serve.timings import Timings

StopReason = Literal["end_turn", "stop_sequence", "max_tokens", "tool_use", "model_context_window_exceeded"]


class AnsweredText(TypedDict):
    type: Literal["text"]
    text: str


class AnsweredThinking(TypedDict):
    type: Literal["thinking"]
    thinking: str  # empty where the caller asked not to see it
    signature: str


class AnsweredToolUse(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Any  # an object; of a call that was cut the members that are whole


AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredToolUse


class ThinkingTokens(msgspec.Struct, frozen=True):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int  # without those out of the prefix cache
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0  # nobody pays for what is kept: such tokens are in input_tokens
    output_tokens: int
    output_tokens_details: ThinkingTokens
    jilju_cache: CacheUsage | msgspec.UnsetType = msgspec.UNSET


class MessageAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Any]  # of AnsweredBlock
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    timings: NotRequired[Timings]


class CountedTokens(TypedDict):
    input_tokens: int


class MessageErrorObject(TypedDict):
    type: str
    message: str


class MessageErrorAnswer(TypedDict):
    type: Literal["error"]
    error: MessageErrorObject
    request_id: str
