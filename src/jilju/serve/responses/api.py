"""POST /v1/responses: items in, items out.

Owns the translation of this family's fields into those of a chat, which it runs as, and the settings that an answer repeats.
Knows nothing of how tokens are made or sent, nor of the answer's shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jilju.errors import ConflictingParameters, JiljuError, MissingParameter, UnsupportedParameter
from jilju.serve.answer import Head, Renderer, TokenTexts
from jilju.serve.chat.api import ChatApi, ChatFields
from jilju.serve.chat.prompt import template_source
from jilju.serve.chat.tools import (
    FunctionTool,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    calls_of,
    tool_specs,
    unknown_tool,
)
from jilju.serve.context import SamplingDefaults, ServerContext
from jilju.serve.generation import Choice, EncodedPrompt
from jilju.serve.responses.fields import LOGPROBS, SEALED, FlatNamedTool, ResponseFields, TextFormat, parse_fields
from jilju.serve.responses.input import messages_of
from jilju.serve.responses.items import Output
from jilju.serve.responses.shape import ResponseRenderer
from jilju.serve.responses.types import ResponseSettings
from jilju.serve.sampling import GenerationFields, StreamOptions, fit_max_tokens
from jilju.serve.structured import JsonSchemaFormat, ResponseFormat, schema_grammar
from jilju.serve.timings import Marks
from jilju.text.reasoning import reasoning_of


class ResponseChat(ChatFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As a chat runs them, with what the caller wrote."""

    given: ResponseFields


def chat_of(given: ResponseFields) -> ResponseChat:
    """Everything is checked here, in this family's words, so that no error speaks of a chat's fields."""
    shared = {name: getattr(given, name) for name in GenerationFields.__struct_fields__}
    shared["stream_options"] = StreamOptions(include_usage=True) if given.stream else None
    tools, choice = _tools_of(given)
    allowed = calls_of(tool_specs(tools, "tools[{}]"), choice).allowed
    answer_format = _format_of(given.text.format)
    if answer_format is not None and allowed:
        raise ConflictingParameters(
            "text.format and tools each set a form for the answer; give one of them, or tool_choice none",
            param="text.format",
        )
    return ResponseChat(
        **shared | {"response_format": answer_format},
        messages=messages_of(given.input, given.instructions),
        max_completion_tokens=given.max_output_tokens,
        logprobs=LOGPROBS in given.include,
        top_logprobs=given.top_logprobs,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=given.parallel_tool_calls,
        reasoning_effort=given.reasoning.effort,
        chat_template_kwargs=given.chat_template_kwargs,
        given=given,
    )


def _tools_of(given: ResponseFields) -> tuple[list[Tool], ToolChoice | None]:
    tools = [
        Tool(
            type="function",
            function=FunctionTool(
                name=tool.name,
                description=tool.description or "",
                parameters=tool.parameters or {},
                strict=bool(tool.strict),
            ),
        )
        for tool in given.tools
    ]
    choice = given.tool_choice
    if not isinstance(choice, FlatNamedTool):
        return tools, choice
    if all(tool.name != choice.name for tool in given.tools):
        raise unknown_tool("tool_choice.name", choice.name, [tool.name for tool in given.tools])
    return tools, NamedTool(type="function", function=NamedFunction(name=choice.name))


def _format_of(given: TextFormat) -> ResponseFormat | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return ResponseFormat(type="json_object")
    if given.name is None or given.schema is None:
        where = "text.format.name" if given.name is None else "text.format.schema"
        raise MissingParameter(f"{where} is missing; it is required", param=where)
    schema_grammar(given.schema, "text.format.schema")  # for its bounds
    schema = JsonSchemaFormat(
        name=given.name, schema=given.schema, strict=bool(given.strict), description=given.description or ""
    )
    return ResponseFormat(type="json_schema", json_schema=schema)


def settings_of(given: ResponseFields, defaults: SamplingDefaults) -> ResponseSettings:
    """The settings in force, as an answer repeats them."""
    settings: ResponseSettings = {
        "instructions": given.instructions,
        "max_output_tokens": given.max_output_tokens,
        "metadata": given.metadata,
        "parallel_tool_calls": given.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": given.reasoning,
        "service_tier": "default",
        "store": False,
        "temperature": defaults.temperature if given.temperature is None else given.temperature,
        "text": {"format": given.text.format, "verbosity": "medium"},
        "tool_choice": given.tool_choice or ("auto" if given.tools else "none"),
        "tools": given.tools,
        "top_logprobs": given.top_logprobs,
        "top_p": defaults.top_p if given.top_p is None else given.top_p,
        "truncation": "disabled",
        "user": given.user,
    }
    if given.timings:
        settings["timings"] = None
    return settings


class ResponsesApi(ChatApi):
    path = "/v1/responses"
    id_prefix = "resp_"
    messages_name = "input"
    format_name = "text.format"

    def parse(self, body: Mapping[str, Any], ignored: list[str] | None) -> ResponseChat:
        return chat_of(parse_fields(body, ignored))

    async def prompts(
        self, fields: ChatFields, context: ServerContext, marks: Marks, salt: bytes
    ) -> list[EncodedPrompt]:
        try:
            _check_effort(fields, context)
            return await super().prompts(fields, context, marks, salt)
        except JiljuError as error:
            if error.param == "messages":  # the template's own refusals
                error.param = self.messages_name
            raise

    def max_tokens(self, fields: ChatFields, num_prompt_tokens: int, context: ServerContext) -> int:
        return fit_max_tokens(
            num_prompt_tokens,
            self.asked(fields),
            context.context_tokens(),
            prompt=self.messages_name,
            max_tokens_name="max_output_tokens",
        )

    def renderer(self, fields: ChatFields, head: Head, choices: Sequence[Choice], context: ServerContext) -> Renderer:
        assert isinstance(fields, ResponseChat), "parse made it"
        return ResponseRenderer(
            head,
            choices[0],
            Output(head, TokenTexts(context.tokenizer, head), is_sealed=SEALED in fields.given.include),
            settings_of(fields.given, context.defaults),
            context.unix_time,
        )


def _check_effort(fields: ChatFields, context: ServerContext) -> None:
    if fields.reasoning_effort is None:
        return
    style = reasoning_of(template_source(context))
    if style is None or style.switch is None:
        raise UnsupportedParameter(
            f"reasoning.effort is {fields.reasoning_effort} and this model has no such switch; leave it out",
            param="reasoning.effort",
        )
