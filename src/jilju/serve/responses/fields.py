"""Fields of POST /v1/responses, as a caller writes them.

Owns their types and rules at every depth, and what one says of another. Knows nothing of the input's items but their names,
nor of what becomes of the fields.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.errors import InvalidValue, UnsupportedParameter
from jilju.serve.chat.api import Effort
from jilju.serve.chat.messages import CACHE_MARKS
from jilju.serve.chat.tools import MAX_TOOLS, check_type
from jilju.serve.errors import shown
from jilju.serve.fields import Rules, convert, refuse, take_fields
from jilju.serve.responses.input import Items, take_items
from jilju.serve.sampling import NO_OPS, UNSUPPORTED, Count, GenerationFields, take_generation_fields

LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
OTHER_INCLUDES = frozenset({"file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
                            "message.input_image.image_url", "computer_call_output.output.image_url",
                            "code_interpreter_call.outputs"})  # fmt: skip
CHOICES = ("none", "auto", "required")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class FlatTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`name` and `schema` with json_schema alone, which needs both."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None  # every schema is held to strictly
    description: str | None = None


class TextFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat = TextFormat(type="text")


class ReasoningFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: Literal["auto"] | None = None  # none is made: an answer shows the thoughts themselves


class ResponseFields(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As a caller writes them. Of the shared ones only those of `RESPONSE` can be given."""

    input: str | Items
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool = True
    text: TextFields = TextFields()
    reasoning: ReasoningFields = ReasoningFields()
    include: list[str] = msgspec.field(default_factory=list)
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    user: str | None = None


OF_OTHER_ROUTES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "messages": (),
        "max_tokens": (),
        "max_completion_tokens": (),
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (False,),
        "prompt_logprobs": (),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "reasoning_effort": (),
        "thinking_token_budget": (),
        "include_reasoning": (True,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "chat_template": (),
        "documents": ([],),
        "truncate_prompt_tokens": (),
        "truncation_side": ("left",),
        "stream_interval": (1,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "return_prompt_text": (False,),
        "return_token_offsets": (False,),
    }
)
RESPONSE = Rules(
    frozenset(ResponseFields.__struct_encode_fields__) - frozenset(OF_OTHER_ROUTES),
    no_ops=MappingProxyType(
        {name: values for name, values in NO_OPS.items() if name not in ("user", "metadata")}
        | {"truncation": ("disabled",)}
    ),
    later=MappingProxyType(
        {
            **UNSUPPORTED,
            **OF_OTHER_ROUTES,
            "background": (False,),
            "background_options": (),
            "previous_response_id": (),
            "conversation": (),
            "prompt": (),
            "context_management": ([],),
            "max_tool_calls": (),
            "access_programs": (),
            "image": (),
        }
    ),
    content=frozenset({"prompt_embeds"}),
)
FLAT_TOOL = Rules.of(
    FlatTool,
    no_ops=CACHE_MARKS,
    later=MappingProxyType(
        {"async": (False,), "defer_loading": (False,), "allowed_callers": (["direct"],), "output_schema": ()}
    ),
)
FLAT_NAMED_TOOL = Rules.of(FlatNamedTool)
TEXT = Rules.of(TextFields, no_ops=MappingProxyType({"verbosity": ("medium",)}))
TEXT_FORMAT = Rules(frozenset({"type"}))
SCHEMA_FORMAT = Rules.of(TextFormat)
REASONING = Rules.of(
    ReasoningFields,
    later=MappingProxyType({"generate_summary": (), "context": ("auto",), "mode": ("standard",)}),
)
STREAM_OPTIONS = Rules(
    frozenset(),
    later=MappingProxyType(
        {"include_obfuscation": (False,), "include_usage": (False,), "continuous_usage_stats": (False,)}
    ),
)


def parse_fields(body: Mapping[str, Any], ignored: list[str] | None = None) -> ResponseFields:
    taken = dict(body)
    if isinstance(items := taken.get("input"), list):
        taken["input"] = take_items(items, ignored)
    if isinstance(tools := taken.get("tools"), list):
        taken["tools"] = [_take_tool(tool, f"tools[{index}]", ignored) for index, tool in enumerate(tools)]
    for name, take in (("tool_choice", _take_choice), ("text", _take_text), ("reasoning", _take_reasoning)):
        if taken.get(name) is not None:
            taken[name] = take(taken[name], ignored)
    if isinstance(options := taken.get("stream_options"), dict):
        taken["stream_options"] = take_fields(options, STREAM_OPTIONS, "stream_options", ignored)
    fields = take_generation_fields(taken, ResponseFields, RESPONSE, ignored)
    _check_include(fields)
    return fields


def _take_tool(tool: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(tool, dict):
        return tool
    check_type(tool, path)
    return take_fields(tool, FLAT_TOOL, path, ignored)


def _take_choice(choice: Any, ignored: list[str] | None) -> Any:
    if isinstance(choice, str) and choice not in CHOICES:
        raise refuse("tool_choice", choice, f"{', '.join(CHOICES)}, or {{type: function, name}}")
    if not isinstance(choice, dict):
        return choice
    check_type(choice, "tool_choice")
    taken = take_fields(choice, FLAT_NAMED_TOOL, "tool_choice", ignored)
    convert({"tool_choice": taken}, _Chosen)  # here, for an error that names the path
    return taken


class _Chosen(msgspec.Struct):
    tool_choice: FlatNamedTool


def _take_text(text: Any, ignored: list[str] | None) -> Any:
    if not isinstance(text, dict):
        return text
    taken = take_fields(text, TEXT, "text", ignored)
    if isinstance(given := taken.get("format"), dict):
        rules = SCHEMA_FORMAT if given.get("type") == "json_schema" else TEXT_FORMAT
        taken["format"] = take_fields(given, rules, "text.format", ignored)
    return taken


def _take_reasoning(reasoning: Any, ignored: list[str] | None) -> Any:
    if not isinstance(reasoning, dict):
        return reasoning
    taken = take_fields(reasoning, REASONING, "reasoning", ignored)
    if isinstance(effort := taken.get("effort"), str) and effort not in EFFORTS:
        raise refuse("reasoning.effort", effort, ", ".join(EFFORTS))
    if isinstance(summary := taken.get("summary"), str) and summary != "auto":
        raise UnsupportedParameter(
            f"reasoning.summary is {shown(summary)}; this server takes only auto or null", param="reasoning.summary"
        )
    return taken


def _check_include(given: ResponseFields) -> None:
    for index, name in enumerate(given.include):
        if name in OTHER_INCLUDES:
            raise UnsupportedParameter(
                f"include[{index}] is {shown(name)}; this server includes only {LOGPROBS} and {SEALED}",
                param=f"include[{index}]",
            )
        if name not in (LOGPROBS, SEALED):
            raise refuse(f"include[{index}]", name, f"{LOGPROBS} or {SEALED}")
    if given.top_logprobs and LOGPROBS not in given.include:
        raise InvalidValue(
            f"top_logprobs is {given.top_logprobs} without {LOGPROBS} in include; add that or leave it out",
            param="top_logprobs",
        )
