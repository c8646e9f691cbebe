"""Answers: what chat and completions have in common on the wire.

Owns usage, the text of single tokens, and the protocol by which the one pipeline drives the two shapes. A renderer sees
every delta once, in order: `chunk` gives its bytes for a stream, `add` keeps it for the whole answer, from the same parts.
Knows nothing of sockets or engines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jilju.serve.generation import Choice, Delta
from jilju.serve.timings import Timings
from jilju.text.tokenizer import Tokenizer

MINUS_INFINITY = -9999.0  # JSON has no infinity


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None  # known when every sequence has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is equal in all chunks of an answer, and how it was asked for."""

    id: str
    created: int
    model: str
    fingerprint: str
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    return_token_ids: bool
    skip_special_tokens: bool


class Renderer(Protocol):
    """One answer's shape."""

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes: ...

    def usage_chunk(self, usage: Usage, timings: Timings | None) -> bytes: ...

    def add(self, delta: Delta) -> None: ...

    def whole(self, usage: Usage, timings: Timings | None) -> bytes: ...


def usage_so_far(choices: Sequence[Choice]) -> Usage:
    """A prompt counts once, however many choices it has. Cached tokens are known only at the end of every sequence."""
    firsts = [choice for choice in choices if not choice.request.sibling_of]
    num_prompt_tokens = sum(choice.request.num_prompt_tokens for choice in firsts)
    num_tokens = sum(choice.num_tokens for choice in choices)
    details = None
    if all(choice.ended for choice in choices):
        num_cached = sum(choice.times.num_cached_tokens for choice in firsts if choice.times is not None)
        details = PromptTokensDetails(cached_tokens=num_cached)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=details,
    )


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def head_fields(head: Head, object_name: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": object_name,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def chunk_event(
    head: Head,
    object_name: str,
    choices: list[Any],
    usage: Usage | None,
    timings: Timings | None,
    first: dict[str, Any],
) -> bytes:
    """`usage` is in every chunk if it was asked for: null, running or whole."""
    data = head_fields(head, object_name) | first | {"choices": choices}
    if head.include_usage:
        data["usage"] = usage
    if timings is not None:
        data["timings"] = timings
    return event(data)


def prompt_ids_field(choices: Sequence[Choice]) -> dict[str, Any]:
    """One prompt: its ids; several: a list of them, in the order of the prompts."""
    ids = [choice.request.prompt_ids for choice in choices if not choice.request.sibling_of]
    return {"prompt_token_ids": ids[0] if len(ids) == 1 else ids}


def token_text(token_bytes: bytes) -> str:
    """A token alone. Bytes that are no whole characters are written out, never as U+FFFD."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def finite(logprob: float | None) -> float:
    return MINUS_INFINITY if logprob is None or not math.isfinite(logprob) else logprob


class TokenTexts:
    """Texts and bytes of ids, as logprobs show them."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens

    def shown_bytes(self, token_id: int) -> bytes:
        """What the token adds to the answer's text."""
        skipped = self._skip and token_id in self._tokenizer.special_ids
        return b"" if skipped else self._tokenizer.token_bytes(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def text_of(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id))
