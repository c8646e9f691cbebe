"""POST /v1/completions: texts or token ids in, their continuations out.

Owns the route's own fields, the four forms of a prompt, and the shape `text_completion`. Knows nothing of how tokens are
made or sent.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from jilju.errors import EmptyPrompt, InvalidValue
from jilju.serve.answer import Head, TokenTexts, Usage, chunk_event, finite, head_fields, prompt_ids_field
from jilju.serve.context import ServerContext
from jilju.serve.fields import Rules, refuse
from jilju.serve.generation import Choice, Delta, EncodedPrompt
from jilju.serve.openai_chat import OFF_LOOP_CHARS
from jilju.serve.sampling import (
    LATER,
    MAX_SEQUENCES,
    NO_OPS,
    GenerationFields,
    TokenId,
    check_sequences,
    estimated_tokens,
    fit_max_tokens,
    take_generation_fields,
)
from jilju.serve.timings import Marks, Timings

MAX_PROMPTS = MAX_SEQUENCES
DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


class CompletionFields(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool = True


COMPLETION = Rules.of(
    CompletionFields,
    no_ops=NO_OPS,
    later=MappingProxyType(dict(LATER) | {"best_of": (1,), "suffix": (), "max_completion_tokens": ()}),
    content=frozenset({"prompt_embeds"}),
)


def parse_completion(body: Mapping[str, Any]) -> CompletionFields:
    fields = take_generation_fields(body, CompletionFields, COMPLETION)
    check_sequences(len(prompts_of(fields)), fields.n)
    return fields


def prompts_of(fields: CompletionFields) -> list[Prompt]:
    """The prompts in order, whichever of the four forms they came in."""
    given = fields.prompt
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidValue(
            "prompt mixes kinds; allowed: a string, a list of strings, a list of ids, or a list of lists of ids",
            param="prompt",
        )
    if kinds == {int}:
        return [[item for item in given if isinstance(item, int)]]
    if len(given) > MAX_PROMPTS:
        raise InvalidValue(
            f"prompt has {len(given)} entries; allowed: 1..{MAX_PROMPTS}; send several requests", param="prompt"
        )
    return [item for item in given if not isinstance(item, int)]


def check_ids(ids: Sequence[int], vocab_size: int, path: str) -> None:
    if ids and max(ids) >= vocab_size:
        index = next(index for index, token_id in enumerate(ids) if token_id >= vocab_size)
        raise refuse(f"{path}[{index}]", ids[index], f"an id of the vocabulary, 0..{vocab_size - 1}")


class CompletionApi:
    """What the generating route asks of this family."""

    path = "/v1/completions"
    id_prefix = "cmpl-"

    def parse(self, body: Mapping[str, Any]) -> CompletionFields:
        return parse_completion(body)

    def logprobs(self, fields: CompletionFields) -> int | None:
        return fields.logprobs

    async def prompts(
        self, fields: CompletionFields, context: ServerContext, marks: Marks, salt: bytes
    ) -> list[EncodedPrompt]:
        prompts = prompts_of(fields)
        begin_ns = context.clock.now_ns()
        if sum(len(prompt) for prompt in prompts) > OFF_LOOP_CHARS:
            encoded = await asyncio.to_thread(self._encode, prompts, fields, context)
        else:
            encoded = self._encode(prompts, fields, context)
        marks.tokenize_ns = context.clock.now_ns() - begin_ns
        return [EncodedPrompt(ids) for ids in encoded]

    def _encode(self, prompts: list[Prompt], fields: CompletionFields, context: ServerContext) -> list[list[int]]:
        encoded: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            path = "prompt" if isinstance(fields.prompt, str) or prompt == fields.prompt else f"prompt[{index}]"
            if isinstance(prompt, str):
                ids = context.tokenizer.encode(prompt, add_special_tokens=fields.add_special_tokens)
            else:
                check_ids(prompt, context.tokenizer.vocab_size, path)
                ids = prompt
            if not ids:
                raise EmptyPrompt(
                    f"{path} holds no token, and this model begins texts with none; send some text", param=path
                )
            encoded.append(ids)
        return encoded

    def estimates(self, fields: CompletionFields) -> list[int]:
        return [
            estimated_tokens(len(prompt.encode())) if isinstance(prompt, str) else len(prompt)
            for prompt in prompts_of(fields)
        ]

    def asked(self, fields: CompletionFields) -> int:
        return DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens

    def max_tokens(self, fields: CompletionFields, num_prompt_tokens: int, context: ServerContext) -> int:
        return fit_max_tokens(num_prompt_tokens, self.asked(fields), context.context_tokens(), prompt="prompt")

    def renderer(self, head: Head, choices: Sequence[Choice], context: ServerContext) -> "CompletionRenderer":
        return CompletionRenderer(head, choices, TokenTexts(context.tokenizer, head.skip_special_tokens))


class CompletionRenderer:
    def __init__(self, head: Head, choices: Sequence[Choice], texts: TokenTexts):
        self._head, self._choices, self._texts = head, choices, texts
        self._first = True
        self._offsets = [0] * len(choices)  # characters begun so far, of each choice
        self._text: list[list[str]] = [[] for _ in choices]
        self._token_ids: list[list[int]] = [[] for _ in choices]
        self._logprobs = [_no_logprobs() for _ in choices]

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        choice: dict[str, Any] = {
            "index": delta.choice.index,
            "text": delta.text,
            "logprobs": self._logprobs_of(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        first: dict[str, Any] = {}
        if self._head.return_token_ids:
            choice["token_ids"] = [] if delta.token is None else [delta.token.token_id]
            first = prompt_ids_field(self._choices) if self._first else {}
        self._first = False
        return chunk_event(self._head, "text_completion", [choice], usage, timings, first)

    def usage_chunk(self, usage: Usage, timings: Timings | None) -> bytes:
        return chunk_event(self._head, "text_completion", [], usage, timings, {})

    def add(self, delta: Delta) -> None:
        index = delta.choice.index
        self._text[index].append(delta.text)
        if delta.token is not None:
            self._token_ids[index].append(delta.token.token_id)
        if (logprobs := self._logprobs_of(delta)) is not None:
            for name, values in logprobs.items():
                self._logprobs[index][name] += values

    def whole(self, usage: Usage, timings: Timings | None) -> bytes:
        rendered: list[dict[str, Any]] = []
        for choice in self._choices:
            entry: dict[str, Any] = {
                "index": choice.index,
                "text": "".join(self._text[choice.index]),
                "logprobs": None if self._head.logprobs is None else self._logprobs[choice.index],
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if self._head.return_token_ids:
                entry["token_ids"] = self._token_ids[choice.index]
            rendered.append(entry)
        data = head_fields(self._head, "text_completion") | {"service_tier": "default"}
        if self._head.return_token_ids:
            data |= prompt_ids_field(self._choices)
        data |= {"choices": rendered, "usage": usage}
        if timings is not None:
            data["timings"] = timings
        return msgspec.json.encode(data)

    def _logprobs_of(self, delta: Delta) -> dict[str, list[Any]] | None:
        """`text_offset` is the character in which the token begins, counted in the answer."""
        token = delta.token
        if self._head.logprobs is None or token is None:
            return None
        index = delta.choice.index
        token_bytes = self._texts.shown_bytes(token.token_id)
        inside = bool(token_bytes) and _continues(token_bytes[0]) and self._offsets[index] > 0
        offset = self._offsets[index] - inside
        self._offsets[index] += sum(not _continues(byte) for byte in token_bytes)
        top = {self._texts.text_of(token_id): finite(logprob) for token_id, logprob in token.top or ()}
        text = self._texts.text_of(token.token_id)
        top.setdefault(text, finite(token.logprob))
        return {
            "tokens": [text],
            "token_logprobs": [finite(token.logprob)],
            "top_logprobs": [top],
            "text_offset": [offset],
        }


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _continues(byte: int) -> bool:
    """A byte inside a UTF-8 character."""
    return byte & 0xC0 == 0x80
