"""POST /v1/chat/completions: messages in, an assistant's message out.

Owns the chat's own fields and what the generating route asks of every family that is a chat. Knows nothing of how tokens are
made or sent, nor of the answer's shape.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.errors import ConflictingParameters, InvalidValue, UnsupportedParameter
from jilju.serve.answer import Head, Renderer, TokenTexts
from jilju.serve.chat.messages import (
    MAX_MESSAGES,
    Message,
    check_messages,
    num_bytes_of,
    num_texts,
    take_messages,
    template_messages,
)
from jilju.serve.chat.prompt import check_variables, encode_chat_prompt, template_for, template_source
from jilju.serve.chat.shape import ChatRenderer
from jilju.serve.chat.tools import Calls, ToolChoice, Tools, calls_of, take_choice, take_tools, tool_specs
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.fields import Rules
from jilju.serve.generation import Choice, EncodedPrompt
from jilju.serve.sampling import (
    NO_OPS,
    UNSUPPORTED,
    Count,
    GenerationFields,
    estimated_tokens,
    fit_max_tokens,
    take_generation_fields,
    truncated,
)
from jilju.serve.structured import format_grammar, only_one, outputs_grammar
from jilju.serve.timings import Marks
from jilju.text.grammar import GrammarSource
from jilju.text.message import MessageParser, PlainText
from jilju.text.reasoning import ReasoningStyle, reasoning_of
from jilju.text.template import ChatTemplate, RenderOptions
from jilju.text.tools import ToolFamily, ToolSpec, family_of, held_tools, make_parser

MAX_DOCUMENTS = 128
MANY_TEXTS = 1000  # of messages: to join them takes some 0.2 ms

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatFields(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    add_special_tokens: bool = False
    tools: Tools = msgspec.field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    chat_template: str | None = None
    documents: Annotated[list[dict[str, str]], Meta(max_length=MAX_DOCUMENTS)] = msgspec.field(default_factory=list)

    @cached_property
    def calls(self) -> Calls:
        """What may and must be made of the tools. Checked once: their schemas may be large."""
        return calls_of(tool_specs(self.tools), self.tool_choice)

    @property
    def told(self) -> tuple[ToolSpec, ...]:
        """The tools that the model is told of."""
        return self.calls.specs if self.tool_choice != "none" else ()


CHAT = Rules.of(
    ChatFields,
    no_ops=NO_OPS,
    later=MappingProxyType(
        dict(UNSUPPORTED)
        | {
            "echo": (False,),
            "functions": ([],),
            "function_call": ("none", "auto"),
            "thinking_token_budget": (),
            "audio": (),
            "prediction": (),
            "web_search_options": (),
        }
    ),
    content=frozenset({"prompt_embeds"}),
)


def parse_chat(body: Mapping[str, Any], ignored: list[str] | None = None) -> ChatFields:
    taken = dict(body)
    if isinstance(messages := taken.get("messages"), list):
        taken["messages"] = take_messages(messages, ignored)
    if isinstance(tools := taken.get("tools"), list):
        taken["tools"] = take_tools(tools, ignored)
    if "tool_choice" in taken:
        taken["tool_choice"] = take_choice(taken["tool_choice"], ignored)
    fields = take_generation_fields(taken, ChatFields, CHAT, ignored)
    check_messages(fields.messages)
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
    if fields.add_generation_prompt and fields.continue_final_message:
        raise ConflictingParameters(
            "add_generation_prompt and continue_final_message are both true; give one of them",
            param="continue_final_message",
        )
    _ = fields.calls  # checked
    return fields


def render_options(fields: ChatFields, template: ChatTemplate) -> RenderOptions:
    """Checked against what the template reads: nothing that is given has no effect."""
    check_variables(fields.chat_template_kwargs, template)
    if fields.documents and "documents" not in template.variables:
        raise UnsupportedParameter(
            "documents are given and the model's template reads none; write them into a message", param="documents"
        )
    variables = dict(fields.chat_template_kwargs)
    if (switch := _thinking_switch(fields, template)) is not None:
        thinks = fields.reasoning_effort != "none"
        if bool(variables.setdefault(switch, thinks)) != thinks:
            where = f"chat_template_kwargs.{switch}"
            raise ConflictingParameters(
                f"{where} is {shown(variables[switch])}, and thinking is asked for otherwise besides; give one of them",
                param=where,
            )
    options: RenderOptions = {"variables": variables, "documents": fields.documents or None}
    if fields.continue_final_message:
        options["continue_final_message"] = True
    elif fields.add_generation_prompt is not None:
        options["add_generation_prompt"] = fields.add_generation_prompt
    return options


def _thinking_switch(fields: ChatFields, template: ChatTemplate) -> str | None:
    """The template's variable that `reasoning_effort` sets, if it is given: models at hand think or do not, by no degrees."""
    if fields.reasoning_effort is None:
        return None
    style = reasoning_of(template.source)
    if style is None or style.switch is None:
        raise UnsupportedParameter(
            f"reasoning_effort is {fields.reasoning_effort} and this model has no such switch; leave it out",
            param="reasoning_effort",
        )
    return style.switch


class ChatApi:
    """What the generating route asks of this family, and of those that translate into it."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"
    messages_name = "messages"  # how this family names the prompt, for errors
    format_name = "response_format"  # and the form of the answer

    def parse(self, body: Mapping[str, Any], ignored: list[str] | None) -> ChatFields:
        return parse_chat(body, ignored)

    def logprobs(self, fields: ChatFields) -> int | None:
        return fields.top_logprobs if fields.logprobs else None

    def shown_logprobs(self, fields: ChatFields) -> int | None:
        return self.logprobs(fields)

    def prompt_logprobs(self, fields: ChatFields) -> int | None:
        return fields.prompt_logprobs

    def num_sampled(self, fields: ChatFields) -> int:
        """Sequences of each prompt."""
        return fields.n

    def is_named(self, fields: ChatFields) -> bool:
        return fields.calls.is_named

    async def prompts(
        self, fields: ChatFields, context: ServerContext, marks: Marks, salt: bytes
    ) -> list[EncodedPrompt]:
        template = await template_for(context, fields.chat_template)
        make = partial(template_messages, fields.messages)
        prompt = await encode_chat_prompt(
            await asyncio.to_thread(make) if num_texts(fields.messages) > MANY_TEXTS else make(),
            fields.told,
            context,
            render_options(fields, template),
            marks,
            template=template,
            add_special_tokens=fields.add_special_tokens,
            salt=salt,
        )
        kept = truncated(prompt.ids, fields, self.asked(fields), context.context_tokens())
        return [prompt._replace(ids=kept, num_truncated=len(prompt.ids) - len(kept))]

    def estimates(self, fields: ChatFields) -> list[int]:
        tools = len(msgspec.json.encode(fields.tools)) if fields.tools else 0
        return [estimated_tokens(num_bytes_of(fields.messages) + tools)]

    def asked(self, fields: ChatFields) -> int | None:
        return fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens

    def max_tokens(self, fields: ChatFields, num_prompt_tokens: int, context: ServerContext) -> int:
        asked = self.asked(fields)
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        return fit_max_tokens(
            num_prompt_tokens, asked, context.context_tokens(), prompt=self.messages_name, max_tokens_name=name
        )

    def has_form(self, fields: ChatFields) -> bool:
        return _has_format(fields) or bool(fields.calls.allowed)

    def grammar(self, fields: ChatFields, prompt: EncodedPrompt, context: ServerContext) -> GrammarSource | None:
        calls, tools = fields.calls, None
        if calls.allowed:
            family, style = _styles(fields, prompt, context)
            text = family.grammar(
                held_tools(calls.allowed),
                choice="required" if calls.is_required else "auto",
                parallel=fields.parallel_tool_calls and not calls.is_named,
                reasoning=style,
                special_ids=context.tokenizer.special_texts,
            )
            tools = GrammarSource(kind="lark", text=text)
        return only_one(
            response_format=format_grammar(fields.response_format),
            structured_outputs=outputs_grammar(fields.structured_outputs),
            tools=tools,
        )

    def form_name(self, fields: ChatFields) -> str:
        if fields.structured_outputs is not None:
            return "structured_outputs"
        return "tools" if fields.calls.allowed else self.format_name

    def parser(self, fields: ChatFields, prompt: EncodedPrompt, context: ServerContext) -> MessageParser:
        if _has_format(fields):  # the answer has the form from its beginning, so it has no thoughts
            return PlainText()
        family, style = _styles(fields, prompt, context)
        return make_parser(family, fields.calls.allowed, style)

    def shown_ids(self, fields: ChatFields, context: ServerContext) -> frozenset[int]:
        source = template_source(context, fields.chat_template)
        style = reasoning_of(source)
        of_calls = family_of(source).shown_specials if fields.calls.allowed else ()
        texts = of_calls + (style.shown_specials if style else ())
        specials = context.tokenizer.special_texts
        return frozenset(specials[text] for text in texts if text in specials)

    def renderer(self, fields: ChatFields, head: Head, choices: Sequence[Choice], context: ServerContext) -> Renderer:
        return ChatRenderer(head, choices, TokenTexts(context.tokenizer, head), fields.include_reasoning)


def _has_format(fields: ChatFields) -> bool:
    given = fields.response_format
    return fields.structured_outputs is not None or (given is not None and given.type != "text")


def _styles(
    fields: ChatFields, prompt: EncodedPrompt, context: ServerContext
) -> tuple[ToolFamily, ReasoningStyle | None]:
    """How the model writes calls, and thoughts if it has any: the end of the prompt says whether they are open."""
    source = template_source(context, fields.chat_template)
    style = reasoning_of(source)
    return family_of(source), None if style is None else style.after(prompt.text or "")
