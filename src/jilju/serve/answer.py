"""Answers: what the families of routes have in common on the wire.

Owns usage, the text of single tokens, and the protocol by which the one pipeline drives the shapes. A renderer sees every
delta once, in order: `chunk` gives its bytes for a stream, `add` keeps it for the whole answer, from the same parts. Knows
nothing of sockets or engines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jilju.engine.request import MissReason
from jilju.errors import JiljuError
from jilju.serve.errors import error_object
from jilju.serve.generation import Choice, Delta
from jilju.serve.timings import Timings
from jilju.text.tokenizer import Tokenizer

MINUS_INFINITY = -9999.0  # JSON has no infinity


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int  # that came out of the prefix cache
    cache_write_tokens: int  # that were computed, and are there now
    truncated_tokens: int = 0  # that were cut off, as the call asked


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class CacheUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Why the prefix cache had no more of a prompt than it had, as far as it can tell."""

    hit_tokens: int  # of all prompts
    miss_reason: MissReason  # this and what follows: of the first prompt
    first_miss_position: int | None  # token of the prompt, from 0; where texts diverge, that in which they differ
    earlier_text: str | None  # of the token that an earlier text of the same key has there; only where they diverge
    own_text: str | None


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None  # known when every sequence has ended
    completion_tokens_details: CompletionTokensDetails | None = None
    jilju_cache: CacheUsage | None = None  # with `timings`


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
    prompt_logprobs: int | None
    return_token_ids: bool
    return_prompt_text: bool
    skip_special_tokens: bool
    tokens_as_ids: bool  # tokens of logprobs are written token_id:N
    num_choices: int  # that the answer shows of each prompt


class Renderer(Protocol):
    """One answer's shape."""

    silence: bytes  # what an open stream is sent after a time without anything

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes: ...

    def ending(self, usage: Usage, timings: Timings | None) -> bytes:
        """The last bytes of a stream. `timings` only if they did not ride on the last chunk."""
        ...

    def failure(self, error: JiljuError) -> bytes:
        """The last event of a stream that fails, so that nobody takes it for whole."""
        ...

    def add(self, delta: Delta) -> None: ...

    def whole(self, usage: Usage, timings: Timings | None) -> bytes: ...


def usage_so_far(choices: Sequence[Choice], explains_with: Tokenizer | None = None) -> Usage:
    """A prompt counts once, however many choices it has. Cached tokens are known only at the end of every sequence.

    `explains_with`: then the cache's explanation too, with tokens as texts.
    """
    firsts = [choice for choice in choices if not choice.request.sibling_of]
    num_prompt_tokens = sum(choice.request.num_prompt_tokens for choice in firsts)
    num_tokens = sum(choice.num_tokens for choice in choices)
    details = None
    if all(choice.ended for choice in choices):
        num_written = sum(_num_written(choice) for choice in firsts)
        num_cached = sum(choice.times.num_cached_tokens for choice in firsts if choice.times is not None)
        num_truncated = sum(choice.prompt.num_truncated for choice in firsts if choice.prompt is not None)
        details = PromptTokensDetails(
            cached_tokens=num_cached,
            cache_write_tokens=num_written,
            truncated_tokens=num_truncated,
        )
    explained = None if details is None or explains_with is None else _cache_usage(firsts, explains_with)
    num_reasoning = sum(choice.num_reasoning_tokens for choice in choices)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=details,
        completion_tokens_details=CompletionTokensDetails(num_reasoning) if details is not None else None,
        jilju_cache=explained,
    )


def _cache_usage(firsts: Sequence[Choice], tokenizer: Tokenizer) -> CacheUsage | None:
    """None: the first prompt was in no step."""
    times = [choice.times for choice in firsts if choice.times is not None]
    first = firsts[0].times
    if first is None or (miss := first.miss) is None:
        return None
    earlier = own = None
    if miss.earlier_id is not None and miss.position is not None:
        earlier = token_text(tokenizer.token_bytes(miss.earlier_id))
        own = token_text(tokenizer.token_bytes(firsts[0].request.prompt_ids[miss.position]))
    return CacheUsage(
        hit_tokens=sum(t.num_cached_tokens for t in times),
        miss_reason=miss.reason,
        first_miss_position=miss.position,
        earlier_text=earlier,
        own_text=own,
    )


def _num_written(choice: Choice) -> int:
    """Tokens of its prompt that were computed: of one that was in no step none were."""
    times = choice.times
    if times is not None and not times.scheduled_ns:
        return 0
    return choice.request.num_prompt_tokens - (0 if times is None else times.num_cached_tokens)


DONE = b"data: [DONE]\n\n"
WAIT = b": wait\n\n"  # a comment: clients skip it


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


def failure_event(error: JiljuError) -> bytes:
    """OpenAI's form; no `[DONE]` follows it."""
    return event({"error": error_object(error)})


def prompt_fields(head: Head, choices: Sequence[Choice], texts: "TokenTexts") -> dict[str, Any]:
    """What was asked back of the prompts. One prompt: as it is; several: a list, in their order."""
    firsts = [choice for choice in choices if not choice.request.sibling_of]
    fields: dict[str, list[Any]] = {}
    if head.return_token_ids:
        fields["prompt_token_ids"] = [choice.request.prompt_ids for choice in firsts]
    if head.return_prompt_text:
        fields["prompt_text"] = [prompt_text(choice, texts) for choice in firsts]
    if head.prompt_logprobs is not None:
        fields["prompt_logprobs"] = [_prompt_logprobs(choice, head, texts) for choice in firsts]
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}


def prompt_text(choice: Choice, texts: "TokenTexts") -> str:
    """As the call gave it or its template wrote it; else what its ids stand for."""
    return _given_text(choice) or texts.decoded(choice.request.prompt_ids, skip_special=False)


def echo_text(choice: Choice, texts: "TokenTexts") -> str:
    """The same as an answer shows it: control tokens have a text only if the answer's have."""
    return _given_text(choice) or texts.decoded(choice.request.prompt_ids)


def _given_text(choice: Choice) -> str | None:
    prompt = choice.prompt
    return None if prompt is None or prompt.num_truncated else prompt.text


def _prompt_logprobs(choice: Choice, head: Head, texts: "TokenTexts") -> list[dict[str, Any] | None]:
    """vLLM's form: null for the first token, then by id the logprob of the token that stands there and of the likeliest."""
    ids, scores = choice.request.prompt_ids, choice.scores
    places: list[dict[str, Any] | None] = [None]
    for index, logprob in enumerate(scores.logprobs):
        top = scores.tops[index][: head.prompt_logprobs]  # an echo may have asked for more
        place: dict[str, Any] = {
            str(token_id): {"logprob": finite(value), "rank": rank, "decoded_token": texts.text_of(token_id)}
            for rank, (token_id, value) in enumerate(top, 1)
        }
        own = ids[index + 1]
        own_entry = {"logprob": finite(logprob), "rank": None, "decoded_token": texts.text_of(own)}
        place.setdefault(str(own), own_entry)
        places.append(place)
    return places


def best(choices: Sequence[Choice], count: int) -> list[Choice]:
    """The `count` choices of a prompt that were likeliest by the mean logprob of their tokens, likeliest first."""
    if len(choices) <= count:
        return list(choices)
    return sorted(choices, key=lambda choice: -choice.logprob / max(1, choice.num_tokens))[:count]


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

    def __init__(self, tokenizer: Tokenizer, head: Head):
        self._tokenizer, self._skip, self._as_ids = tokenizer, head.skip_special_tokens, head.tokens_as_ids

    def shown_bytes(self, token_id: int) -> bytes:
        """What the token adds to the answer's text."""
        skipped = self._skip and token_id in self._tokenizer.special_ids
        return b"" if skipped else self._tokenizer.token_bytes(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def text_of(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else token_text(self._tokenizer.token_bytes(token_id))

    def decoded(self, ids: Sequence[int], skip_special: bool | None = None) -> str:
        skip = self._skip if skip_special is None else skip_special
        return self._tokenizer.decode(ids, skip_special_tokens=skip)
