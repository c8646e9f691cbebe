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

from jilju.errors import ConflictingParameters, EmptyPrompt, InvalidValue, JiljuError
from jilju.serve.answer import (
    DONE,
    WAIT,
    Head,
    Renderer,
    TokenTexts,
    Usage,
    best,
    chunk_event,
    echo_text,
    failure_event,
    finite,
    head_fields,
    prompt_fields,
)
from jilju.serve.answer_types import TextChoice, TextLogprobs
from jilju.serve.chat.prompt import OFF_LOOP_CHARS
from jilju.serve.context import ServerContext
from jilju.serve.fields import Rules, refuse
from jilju.serve.generation import Choice, Delta, EncodedPrompt
from jilju.serve.sampling import (
    MAX_CHOICES,
    MAX_SEQUENCES,
    NO_OPS,
    UNSUPPORTED,
    GenerationFields,
    TokenId,
    check_sequences,
    estimated_tokens,
    fit_max_tokens,
    take_generation_fields,
    truncated,
)
from jilju.serve.structured import format_grammar, only_one, outputs_grammar
from jilju.serve.timings import Marks, Timings
from jilju.text.grammar import GrammarSource
from jilju.text.message import MessageParser, PlainText

MAX_PROMPTS = MAX_SEQUENCES
DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


class CompletionFields(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool = True
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool = False


COMPLETION = Rules.of(
    CompletionFields,
    no_ops=NO_OPS,
    later=MappingProxyType(dict(UNSUPPORTED) | {"suffix": ("",), "max_completion_tokens": ()}),
    content=frozenset({"prompt_embeds"}),
)


def parse_completion(body: Mapping[str, Any], ignored: list[str] | None = None) -> CompletionFields:
    fields = take_generation_fields(body, CompletionFields, COMPLETION, ignored)
    if fields.best_of is not None:
        if fields.best_of < fields.n:
            raise refuse("best_of", fields.best_of, f"{fields.n}..{MAX_CHOICES}: at least n")
        if fields.best_of > fields.n and fields.stream:
            raise ConflictingParameters(
                f"best_of is {fields.best_of} with stream: true; the best are known at the end: ask for the whole answer",
                param="best_of",
            )
    check_sequences(len(prompts_of(fields)), num_sampled(fields), "n" if fields.best_of is None else "best_of")
    return fields


def num_sampled(fields: CompletionFields) -> int:
    return fields.n if fields.best_of is None else fields.best_of


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

    def parse(self, body: Mapping[str, Any], ignored: list[str] | None) -> CompletionFields:
        return parse_completion(body, ignored)

    def logprobs(self, fields: CompletionFields) -> int | None:
        """The best of several are found by the logprobs of their tokens."""
        return 0 if fields.logprobs is None and num_sampled(fields) > fields.n else fields.logprobs

    def shown_logprobs(self, fields: CompletionFields) -> int | None:
        return fields.logprobs

    def prompt_logprobs(self, fields: CompletionFields) -> int | None:
        """An echo shows those of the prompt with those of the answer."""
        echoed = fields.logprobs if fields.echo else None
        return echoed if fields.prompt_logprobs is None else max(fields.prompt_logprobs, echoed or 0)

    def num_sampled(self, fields: CompletionFields) -> int:
        return num_sampled(fields)

    def is_named(self, fields: CompletionFields) -> bool:
        return False

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
        found: list[EncodedPrompt] = []
        for prompt, ids in zip(prompts, encoded, strict=True):
            kept = truncated(ids, fields, self.asked(fields), context.context_tokens())
            text = prompt if isinstance(prompt, str) else None
            found.append(EncodedPrompt(kept, None, text, len(ids) - len(kept)))
        return found

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

    def has_form(self, fields: CompletionFields) -> bool:
        return fields.response_format is not None or fields.structured_outputs is not None

    def grammar(self, fields: CompletionFields, prompt: EncodedPrompt, context: ServerContext) -> GrammarSource | None:
        return only_one(
            response_format=format_grammar(fields.response_format),
            structured_outputs=outputs_grammar(fields.structured_outputs),
        )

    def form_name(self, fields: CompletionFields) -> str:
        return "response_format" if fields.structured_outputs is None else "structured_outputs"

    def parser(self, fields: CompletionFields, prompt: EncodedPrompt, context: ServerContext) -> MessageParser:
        return PlainText()

    def shown_ids(self, fields: CompletionFields, context: ServerContext) -> frozenset[int]:
        return frozenset()

    def renderer(
        self, fields: CompletionFields, head: Head, choices: Sequence[Choice], context: ServerContext
    ) -> Renderer:
        return CompletionRenderer(head, choices, TokenTexts(context.tokenizer, head), fields)


class CompletionRenderer:
    silence = WAIT

    def __init__(self, head: Head, choices: Sequence[Choice], texts: TokenTexts, fields: CompletionFields):
        self._head, self._choices, self._texts = head, choices, texts
        self._is_echoed = fields.echo
        self._num_sampled = num_sampled(fields)
        self._first = True
        self._opened: set[int] = set()  # choices whose echo was given
        self._offsets = [0] * len(choices)  # characters begun so far, of each choice
        self._text: list[list[str]] = [[] for _ in choices]
        self._token_ids: list[list[int]] = [[] for _ in choices]
        self._logprobs = [_no_logprobs() for _ in choices]

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        text, logprobs = self._content(delta)
        choice: dict[str, Any] = {
            "index": delta.choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._head.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
        first = prompt_fields(self._head, self._choices, self._texts) if self._first else {}
        self._first = False
        return chunk_event(self._head, "text_completion", [choice], usage, timings, first)

    def ending(self, usage: Usage, timings: Timings | None) -> bytes:
        if not self._head.include_usage:
            return DONE
        return chunk_event(self._head, "text_completion", [], usage, timings, {}) + DONE

    def failure(self, error: JiljuError) -> bytes:
        return failure_event(error)

    def add(self, delta: Delta) -> None:
        index = delta.choice.index
        text, logprobs = self._content(delta)
        self._text[index].append(text)
        self._token_ids[index] += [token.token_id for token in delta.tokens]
        if logprobs is not None:
            kept = self._logprobs[index]
            kept["tokens"] += logprobs["tokens"]
            kept["token_logprobs"] += logprobs["token_logprobs"]
            kept["top_logprobs"] += logprobs["top_logprobs"]
            kept["text_offset"] += logprobs["text_offset"]

    def whole(self, usage: Usage, timings: Timings | None) -> bytes:
        rendered: list[TextChoice] = []
        for choice in self._shown_choices():
            assert choice.finish_reason is not None, "a whole answer has ended"
            entry: TextChoice = {
                "index": len(rendered),
                "text": "".join(self._text[choice.index]),
                "logprobs": None if self._head.logprobs is None else self._logprobs[choice.index],
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if self._head.return_token_ids:
                entry["token_ids"] = self._token_ids[choice.index]
            rendered.append(entry)
        data = head_fields(self._head, "text_completion") | {"service_tier": "default"}
        data |= prompt_fields(self._head, self._choices, self._texts)
        data |= {"choices": rendered, "usage": usage}
        if timings is not None:
            data["timings"] = timings
        return msgspec.json.encode(data)

    def _shown_choices(self) -> list[Choice]:
        """Of each prompt the best, where more were sampled than are shown."""
        size = self._num_sampled
        prompts = [self._choices[start : start + size] for start in range(0, len(self._choices), size)]
        return [choice for prompt in prompts for choice in best(prompt, self._head.num_choices)]

    def _content(self, delta: Delta) -> tuple[str, TextLogprobs | None]:
        """Text and logprobs of a delta; in front of a choice's first its prompt, if that is echoed."""
        choice = delta.choice
        text = delta.joined("text")
        logprobs = None if self._head.logprobs is None else _no_logprobs()
        if self._is_echoed and choice.index not in self._opened:
            text = echo_text(choice, self._texts) + text
            if logprobs is not None:
                self._add_prompt(logprobs, choice)
        self._opened.add(choice.index)
        if logprobs is None or not (delta.tokens or logprobs["tokens"]):
            return text, None
        for token in delta.tokens:
            top = list(token.top or ())
            if token.logprob is not None and token.token_id not in dict(top):
                top.append((token.token_id, token.logprob))
            self._add_token(logprobs, choice.index, token.token_id, finite(token.logprob), top)
        return text, logprobs

    def _add_prompt(self, logprobs: TextLogprobs, choice: Choice) -> None:
        ids, scores = choice.request.prompt_ids, self._choices[choice.index - choice.index % self._num_sampled].scores
        self._add_token(logprobs, choice.index, ids[0], None, None)
        for place, token_id in enumerate(ids[1:]):
            top = scores.tops[place][: self._head.logprobs]  # more of them if prompt_logprobs asks for that
            if token_id not in dict(top):
                top.append((token_id, scores.logprobs[place]))
            self._add_token(logprobs, choice.index, token_id, finite(scores.logprobs[place]), top)

    def _add_token(
        self,
        logprobs: TextLogprobs,
        index: int,
        token_id: int,
        logprob: float | None,
        top: list[tuple[int, float]] | None,
    ) -> None:
        """`text_offset` is the character in which the token begins, counted in the choice's text."""
        token_bytes = self._texts.shown_bytes(token_id)
        inside = bool(token_bytes) and _continues(token_bytes[0]) and self._offsets[index] > 0
        logprobs["tokens"].append(self._texts.text_of(token_id))
        logprobs["token_logprobs"].append(logprob)
        logprobs["top_logprobs"].append(
            None if top is None else {self._texts.text_of(id_): finite(value) for id_, value in top}
        )
        logprobs["text_offset"].append(self._offsets[index] - inside)
        self._offsets[index] += sum(not _continues(byte) for byte in token_bytes)


def _no_logprobs() -> TextLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _continues(byte: int) -> bool:
    """A byte inside a UTF-8 character."""
    return byte & 0xC0 == 0x80
