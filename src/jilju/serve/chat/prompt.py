"""The prompt of a chat: messages and tools rendered by the model's template, as token ids.

Owns what a template is given, when it runs beside the event loop or in a worker, and what its ids are. Knows nothing of wire
forms or of answers.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from jilju.clock import Clock
from jilju.errors import EmptyPrompt, InvalidValue, TemplateFailed, UnsupportedParameter
from jilju.serve.context import ServerContext
from jilju.serve.fields import refuse
from jilju.serve.generation import EncodedPrompt
from jilju.serve.timings import Marks
from jilju.text.template import (
    MAX_RENDER_NS,
    RESERVED,
    ChatTemplate,
    GuardedChat,
    RenderOptions,
    TemplateOverrun,
    encode_piece,
    guard_chat,
)
from jilju.text.tokenizer import Tokenizer
from jilju.text.tools import ToolSpec, family_of, template_tools

OFF_LOOP_CHARS = 4096  # longer texts are rendered and tokenized in a thread: about 1 ms of work
MESSAGE_CHARS = 256  # what a message costs beside its text, in characters
MAX_VARIABLE_CHARS = 1024
MAX_REQUEST_TEMPLATE_CHARS = 32 << 10  # of a call's own template, which is compiled for it alone: up to a second
INLINE_RENDER_NS = 50_000_000  # what takes longer is rendered by a worker, from the beginning


class TimedTokenizer:
    """A tokenizer that adds up the time its encoding takes, for rendering and encoding a chat are one call."""

    def __init__(self, tokenizer: Tokenizer, clock: Clock):
        self._tokenizer, self._clock = tokenizer, clock
        self.vocab_size, self.bos_id, self.eos_ids = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids
        self.add_bos, self.special_ids = tokenizer.add_bos, tokenizer.special_ids
        self.special_texts = tokenizer.special_texts
        self.token_bytes, self.token_text, self.decode = tokenizer.token_bytes, tokenizer.token_text, tokenizer.decode
        self.encode_ns = 0

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False, after_special: bool = False
    ) -> list[int]:
        begin_ns = self._clock.now_ns()
        ids = self._tokenizer.encode(
            text, add_special_tokens=add_special_tokens, parse_special=parse_special, after_special=after_special
        )
        self.encode_ns += self._clock.now_ns() - begin_ns
        return ids


def template_source(context: ServerContext, source: str | None = None) -> str:
    """The text of the model's own template, or of the one that a call brings, where that is allowed."""
    if source is None:
        return template_of(context).source
    if not context.allow_request_template:
        raise UnsupportedParameter(
            "chat_template is given and this server uses the model's own; start it with --allow-request-template",
            param="chat_template",
        )
    if len(source) > MAX_REQUEST_TEMPLATE_CHARS:
        given = f"a text of {len(source)} characters"
        raise refuse("chat_template", given, f"at most {MAX_REQUEST_TEMPLATE_CHARS}")
    return source


async def template_for(context: ServerContext, source: str | None) -> ChatTemplate:
    """The same, compiled."""
    given = template_source(context, source)
    return template_of(context) if source is None else await asyncio.to_thread(_compiled, given, context.tokenizer)


def _compiled(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    def text_of(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_bytes(token_id).decode(errors="replace")

    bos_token, eos_token = text_of(tokenizer.bos_id), text_of(next(iter(tokenizer.eos_ids), None))
    try:
        return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token, file="the request")
    except Exception as error:
        raise InvalidValue(f"chat_template is no template: {str(error)[:200]}", param="chat_template") from None


def template_of(context: ServerContext) -> ChatTemplate:
    """The model's own."""
    if context.template is None:
        raise TemplateFailed(
            f"{context.model_name} has no chat template: it continues text; send a prompt to /v1/completions instead, or serve a model "
            "made for chat",
            param="messages",
        )
    return context.template


def check_variables(given: Mapping[str, Any], template: ChatTemplate) -> None:
    """Only what the template reads, and nothing that a rendering itself decides."""
    readable = sorted(template.variables - RESERVED)
    for name, value in given.items():
        path = f"chat_template_kwargs.{name[:200]}"
        if name in RESERVED or name not in template.variables:
            raise refuse("chat_template_kwargs", name, f"what the template reads: {', '.join(readable) or 'nothing'}")
        if not isinstance(value, str | int | float | bool | None) or len(str(value)) > MAX_VARIABLE_CHARS:
            raise refuse(path, value, f"a text, a number or a truth value of at most {MAX_VARIABLE_CHARS} characters")


def conversation(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[ToolSpec], options: RenderOptions, template: ChatTemplate
) -> tuple[list[dict[str, Any]], RenderOptions]:
    """What the template is given. Where it reads no tools, they and their calls are written into the messages."""
    family = family_of(template.source)
    entries = family.messages_for_template(messages, tools)
    if family.reads_tools and tools:
        given: RenderOptions = {**options, "tools": template_tools(tools)}
        return entries, given
    return entries, options


async def encode_chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[ToolSpec],
    context: ServerContext,
    options: RenderOptions,
    marks: Marks | None = None,
    *,
    template: ChatTemplate | None = None,
    add_special_tokens: bool = False,
    salt: bytes | None = None,
) -> EncodedPrompt:
    """With a salt, answers that are remembered under it keep their ids; without, all ids are the plain ones."""
    template = template or template_of(context)
    tokenizer = TimedTokenizer(context.tokenizer, context.clock)

    def render() -> tuple[GuardedChat, str | None]:
        """None: it takes longer than the loop can wait."""
        entries, given = conversation(messages, tools, options, template)
        chat = guard_chat(template, tokenizer, entries, **given)
        try:
            return chat, template.render(chat.messages, budget_ns=budget_ns, **chat.options)
        except TemplateOverrun:
            if context.workers is None:
                raise
            return chat, None

    def encode(chat: GuardedChat, rendered: str) -> EncodedPrompt:
        pieces = chat.pieces(rendered)
        text = "".join(pieces)
        if salt is None or context.history is None:
            ids = [id_ for index, piece in enumerate(pieces) for id_ in encode_piece(tokenizer, index, piece)]
            return EncodedPrompt(ids, None, text, messages=messages)
        return EncodedPrompt(*context.history.encode(salt, pieces, tokenizer), text, messages=messages)

    budget_ns = MAX_RENDER_NS if context.workers is None else INLINE_RENDER_NS
    is_long = template is not context.template or bool(tools) or _is_long(messages, options)
    begin_ns = context.clock.now_ns()
    chat, rendered = await asyncio.to_thread(render) if is_long else render()
    if rendered is None:
        assert context.workers is not None, "an overrun is told, where nobody else can render"
        source = None if template is context.template else template.source
        rendered = await context.workers.render(chat.messages, chat.options, template=source)
    prompt = await asyncio.to_thread(encode, chat, rendered) if is_long else encode(chat, rendered)
    if marks is not None:
        marks.tokenize_ns = tokenizer.encode_ns
        marks.render_ns = context.clock.now_ns() - begin_ns - tokenizer.encode_ns
    if add_special_tokens and tokenizer.add_bos and tokenizer.bos_id is not None:
        prompt = prompt._replace(ids=[tokenizer.bos_id, *prompt.ids])
    if not prompt.ids:
        raise EmptyPrompt("the messages render to no token at all; send some content", param="messages")
    return prompt


def _is_long(messages: Sequence[Mapping[str, Any]], options: RenderOptions) -> bool:
    """Whether it may take more than a moment."""
    if options.get("documents") or any("tool_calls" in message for message in messages):
        return True
    num_chars = sum(len(value) for message in messages for value in message.values() if isinstance(value, str))
    return num_chars + MESSAGE_CHARS * len(messages) > OFF_LOOP_CHARS
