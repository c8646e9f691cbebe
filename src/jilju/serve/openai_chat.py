"""POST /v1/chat/completions: messages in, an assistant's message out.

Owns the chat's own fields, messages and parts, and the shapes `chat.completion` and `chat.completion.chunk`. Knows nothing
of how tokens are made or sent.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.clock import Clock
from jilju.errors import ConflictingParameters, EmptyPrompt, InvalidValue, TemplateFailed, UnsupportedContent
from jilju.serve.answer import (
    Head,
    TokenTexts,
    Usage,
    chunk_event,
    finite,
    head_fields,
    prompt_ids_field,
)
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, refuse, take_fields
from jilju.serve.generation import Choice, Delta, EncodedPrompt
from jilju.serve.sampling import (
    LATER,
    NO_OPS,
    Count,
    GenerationFields,
    estimated_tokens,
    fit_max_tokens,
    take_generation_fields,
)
from jilju.serve.timings import Marks, Timings
from jilju.text.template import chat_pieces, encode_chat
from jilju.text.tokenizer import Tokenizer

CHUNK = "chat.completion.chunk"
MAX_MESSAGES = 2048
OFF_LOOP_CHARS = 4096  # longer texts are rendered and tokenized in a thread: about 1 ms of work


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatFields(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    add_special_tokens: bool = False


MESSAGE = Rules.of(
    Message,
    no_ops=MappingProxyType({"cache_control": ANY, "prompt_cache_breakpoint": ANY}),
    later=MappingProxyType(
        {
            "tool_calls": ([],),
            "tool_call_id": (),
            "reasoning": ("",),
            "reasoning_content": ("",),
            "refusal": (),
            "function_call": (),
            "annotations": ([],),
        }
    ),
    content=frozenset({"audio"}),
)
PART = Rules.of(TextPart, no_ops=MappingProxyType({"cache_control": ANY, "prompt_cache_breakpoint": ANY}))
MEDIA_PARTS = frozenset({"image_url", "input_image", "image", "input_audio", "audio", "audio_url", "video", "video_url", "file",
                         "input_file", "image_embeds", "image_pil"})  # fmt: skip
CHAT = Rules.of(
    ChatFields,
    no_ops=NO_OPS,
    later=MappingProxyType(
        dict(LATER)
        | {
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
            "functions": ([],),
            "function_call": ("none", "auto"),
            "reasoning_effort": (),
            "thinking_token_budget": (),
            "include_reasoning": (True,),
            "add_generation_prompt": (True,),
            "continue_final_message": (False,),
            "chat_template_kwargs": ({},),
            "chat_template": (),
            "documents": ([],),
            "audio": (),
            "prediction": (),
            "web_search_options": (),
        }
    ),
    content=frozenset({"prompt_embeds"}),
)


def parse_chat(body: Mapping[str, Any]) -> ChatFields:
    taken = dict(body)
    if isinstance(messages := taken.get("messages"), list):
        taken["messages"] = take_messages(messages)
    fields = take_generation_fields(taken, ChatFields, CHAT)
    for index, message in enumerate(fields.messages):
        text_of(message, f"messages[{index}]")
    if fields.top_logprobs and not fields.logprobs:
        raise InvalidValue(
            f"top_logprobs is {fields.top_logprobs} without logprobs: true; add that or leave it out",
            param="top_logprobs",
        )
    if (
        None not in (fields.max_tokens, fields.max_completion_tokens)
        and fields.max_tokens != fields.max_completion_tokens
    ):
        raise ConflictingParameters(
            f"max_tokens is {fields.max_tokens} and max_completion_tokens {fields.max_completion_tokens}; give one of them",
            param="max_tokens",
        )
    return fields


def take_messages(messages: list[Any]) -> list[Any]:
    """Messages reduced to what is taken, at every depth; types are checked by the conversion that follows."""
    if len(messages) > MAX_MESSAGES:
        raise InvalidValue(f"messages has {len(messages)} entries; allowed: 1..{MAX_MESSAGES}", param="messages")
    taken: list[Any] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if isinstance(message, dict):
            if message.get("role") in ("tool", "function"):
                raise refuse(
                    f"{path}.role", message["role"], "system, developer, user or assistant; tools are not supported"
                )
            message = take_fields(message, MESSAGE, path)
            if isinstance(message.get("content"), list):
                message["content"] = [
                    _take_part(part, f"{path}.content[{number}]") for number, part in enumerate(message["content"])
                ]
        taken.append(message)
    return taken


def _take_part(part: Any, path: str) -> Any:
    if not isinstance(part, dict):
        return part
    if isinstance(part.get("type"), str) and part["type"] in MEDIA_PARTS:
        raise UnsupportedContent(f"{path} is of type {shown(part['type'])}; this server takes text only", param=path)
    taken = take_fields(part, PART, path)
    for name, allowed in (("type", "text"), ("text", "a string")):
        if name not in taken:
            raise refuse(f"{path}.{name}", None, allowed)
    if taken["type"] != "text":
        raise refuse(f"{path}.type", taken["type"], "text")
    if not isinstance(taken["text"], str):
        raise refuse(f"{path}.text", taken["text"], "a string")
    return taken


def text_of(message: Message, path: str) -> str:
    """Parts are joined by line ends."""
    if isinstance(message.content, str):
        return message.content
    if not message.content:
        raise refuse(f"{path}.content", [], "a string, or a list of at least one text part")
    return "\n".join(part["text"] for part in message.content)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As templates know them: `developer` is the newer name of `system`."""
    rendered: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": text_of(message, f"messages[{index}]")}
        if message.name is not None:
            entry["name"] = message.name
        rendered.append(entry)
    return rendered


class TimedTokenizer:
    """A tokenizer that adds up the time its encoding takes, for rendering and encoding a chat are one call."""

    def __init__(self, tokenizer: Tokenizer, clock: Clock):
        self._tokenizer, self._clock = tokenizer, clock
        self.vocab_size, self.bos_id, self.eos_ids = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids
        self.add_bos, self.special_ids = tokenizer.add_bos, tokenizer.special_ids
        self.special_texts = tokenizer.special_texts
        self.token_bytes, self.token_text, self.decode = tokenizer.token_bytes, tokenizer.token_text, tokenizer.decode
        self.encode_ns = 0

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        begin_ns = self._clock.now_ns()
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)
        self.encode_ns += self._clock.now_ns() - begin_ns
        return ids


async def encode_messages(
    messages: Sequence[Message],
    context: ServerContext,
    marks: Marks | None = None,
    *,
    add_special_tokens: bool = False,
    salt: bytes | None = None,
) -> EncodedPrompt:
    """With a salt, answers that are remembered under it keep their ids; without, all ids are the plain ones."""
    template = context.template
    if template is None:
        raise TemplateFailed(
            f"{context.model_name} has no chat template: it continues text; send a prompt to /v1/completions instead, or serve a model "
            "made for chat",
            param="messages",
        )
    entries = template_messages(messages)
    tokenizer = TimedTokenizer(context.tokenizer, context.clock)

    def encode() -> EncodedPrompt:
        if salt is None or context.history is None:
            return EncodedPrompt(encode_chat(template, tokenizer, entries))
        return EncodedPrompt(*context.history.encode(salt, chat_pieces(template, tokenizer, entries), tokenizer))

    begin_ns = context.clock.now_ns()
    if sum(len(entry["content"]) for entry in entries) > OFF_LOOP_CHARS:
        ids, opening = await asyncio.to_thread(encode)
    else:
        ids, opening = encode()
    if marks is not None:
        marks.tokenize_ns = tokenizer.encode_ns
        marks.render_ns = context.clock.now_ns() - begin_ns - tokenizer.encode_ns
    if add_special_tokens and tokenizer.add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise EmptyPrompt("the messages render to no token at all; send some content", param="messages")
    return EncodedPrompt(ids, opening)


class ChatApi:
    """What the generating route asks of this family."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"

    def parse(self, body: Mapping[str, Any]) -> ChatFields:
        return parse_chat(body)

    def logprobs(self, fields: ChatFields) -> int | None:
        return fields.top_logprobs if fields.logprobs else None

    async def prompts(
        self, fields: ChatFields, context: ServerContext, marks: Marks, salt: bytes
    ) -> list[EncodedPrompt]:
        add = fields.add_special_tokens
        return [await encode_messages(fields.messages, context, marks, add_special_tokens=add, salt=salt)]

    def estimates(self, fields: ChatFields) -> list[int]:
        texts = (text_of(message, "messages") for message in fields.messages)
        return [estimated_tokens(sum(len(text.encode()) for text in texts))]

    def asked(self, fields: ChatFields) -> int | None:
        return fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens

    def max_tokens(self, fields: ChatFields, num_prompt_tokens: int, context: ServerContext) -> int:
        asked = self.asked(fields)
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        return fit_max_tokens(
            num_prompt_tokens, asked, context.context_tokens(), prompt="messages", max_tokens_name=name
        )

    def renderer(self, head: Head, choices: Sequence[Choice], context: ServerContext) -> "ChatRenderer":
        return ChatRenderer(head, choices, TokenTexts(context.tokenizer, head.skip_special_tokens))


class ChatRenderer:
    def __init__(self, head: Head, choices: Sequence[Choice], texts: TokenTexts):
        self._head, self._choices, self._texts = head, choices, texts
        self._opened: set[int] = set()  # choices whose role was sent
        self._content: list[list[str]] = [[] for _ in choices]
        self._entries: list[list[dict[str, Any]]] = [[] for _ in choices]
        self._token_ids: list[list[int]] = [[] for _ in choices]

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        """A choice's role goes out with its first token, the ids of the prompt with the first chunk of all."""
        index = delta.choice.index
        opening = b""
        if index not in self._opened:
            first = prompt_ids_field(self._choices) if self._head.return_token_ids and not self._opened else {}
            role = self._choice(index, {"role": "assistant", "content": ""})
            opening = chunk_event(self._head, CHUNK, [role], usage, None, first)
            self._opened.add(index)
        return opening + self._token_chunk(delta, usage, timings)

    def _token_chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        ended = delta.finish_reason is not None
        choice = self._choice(delta.choice.index, {} if ended and not delta.text else {"content": delta.text})
        choice |= {
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._head.return_token_ids and delta.token is not None:
            choice["token_ids"] = [delta.token.token_id]
        return chunk_event(self._head, CHUNK, [choice], usage, timings, {})

    def _choice(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
        return choice | ({"token_ids": []} if self._head.return_token_ids else {})

    def usage_chunk(self, usage: Usage, timings: Timings | None) -> bytes:
        return chunk_event(self._head, CHUNK, [], usage, timings, {})

    def add(self, delta: Delta) -> None:
        index = delta.choice.index
        self._content[index].append(delta.text)
        if delta.token is not None:
            self._token_ids[index].append(delta.token.token_id)
        if (logprobs := self._logprobs(delta)) is not None:
            self._entries[index] += logprobs["content"]

    def whole(self, usage: Usage, timings: Timings | None) -> bytes:
        data = head_fields(self._head, "chat.completion") | {"service_tier": "default"}
        if self._head.return_token_ids:
            data |= prompt_ids_field(self._choices)
        data |= {"choices": [self._whole_choice(choice) for choice in self._choices], "usage": usage}
        if timings is not None:
            data["timings"] = timings
        return msgspec.json.encode(data)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        index = choice.index
        rendered: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(self._content[index]), "refusal": None},
            "logprobs": None if self._head.logprobs is None else {"content": self._entries[index], "refusal": None},
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return rendered | ({"token_ids": self._token_ids[index]} if self._head.return_token_ids else {})

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        token = delta.token
        if self._head.logprobs is None or token is None:
            return None
        entry = self._entry(token.token_id, token.logprob)
        entry["top_logprobs"] = [self._entry(token_id, logprob) for token_id, logprob in token.top or ()]
        return {"content": [entry], "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._texts.text_of(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._texts.bytes_of(token_id)),
        }
