"""POST /v1/messages: Anthropic's form of a chat.

Owns the fields of that form, their errors, and the way from them to the fields of a chat, which this family is from then on.
What a chat's own code would refuse is refused here before, so that errors name what the caller wrote. Knows nothing of how
turns become messages, nor of the answer's shape.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.errors import ConflictingParameters, MissingParameter, UnsupportedParameter
from jilju.serve.answer import Head, Renderer
from jilju.serve.chat.api import MAX_DOCUMENTS, ChatApi, ChatFields, Effort
from jilju.serve.chat.prompt import template_source
from jilju.serve.chat.tools import (
    MAX_TOOLS,
    FunctionTool,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    check_parameters,
    tool_specs,
    unknown_tool,
)
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.fields import Rules, convert, refuse, take_fields
from jilju.serve.generation import Choice, EncodedPrompt
from jilju.serve.messages.blocks import CACHE_MARK, System, Turn, conversation_of, take_blocks, take_turns
from jilju.serve.messages.shape import MessagesRenderer
from jilju.serve.sampling import (
    MAX_STOPS,
    NO_OPS,
    UNSUPPORTED,
    GenerationFields,
    StopString,
    StreamOptions,
    fit_max_tokens,
    take_generation_fields,
)
from jilju.serve.structured import JsonSchemaFormat, ResponseFormat, schema_grammar
from jilju.serve.timings import Marks
from jilju.text.reasoning import reasoning_of


class ToolFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False
    type: Literal["custom"] = "custom"


class ChoiceFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    display: Literal["summarized", "omitted"] = "summarized"  # no summary is made: all thoughts are shown, or none


class JsonFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class OwnFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What Anthropic's form has and the other routes do not, or not so."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: System | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] = []
    tools: Annotated[list[ToolFields], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: ChoiceFields | None = None
    thinking: ThinkingFields | None = None
    output_config: OutputConfig | None = None


class SharedFields(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it shares with chat, as far as SHARED names it."""

    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    chat_template: str | None = None
    documents: Annotated[list[dict[str, str]], Meta(max_length=MAX_DOCUMENTS)] = msgspec.field(default_factory=list)


class MessagesFields(ChatFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chat's, and how thinking was asked for: only the model's template says what becomes of that."""

    thinking: ThinkingFields | None = None
    effort: Effort | None = None


SHARED = frozenset({
    "model", "temperature", "top_p", "top_k", "stream",
    "min_tokens", "ignore_eos", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "allowed_token_ids", "seed", "stop_token_ids", "bad_words", "repetition_detection", "structured_outputs",
    "include_stop_str_in_output", "skip_special_tokens", "stream_interval", "timings", "cache_salt", "priority", "deadline_ms",
    "max_queue_ms", "request_id", "session_id", "add_special_tokens", "chat_template_kwargs", "chat_template", "documents",
})  # fmt: skip
# Fields of chat that the answer has no place for, or that have another name here; with the values that mean "off".
OF_CHAT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "stop": ([],),
        "max_completion_tokens": (),
        "stream_options": (),
        "response_format": ({"type": "text"},),
        "parallel_tool_calls": (True,),
        "reasoning_effort": (),
        "thinking_token_budget": (),
        "include_reasoning": (True,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "logprob_token_ids": ([],),
        "prompt_logprobs": (),
        "truncate_prompt_tokens": (),
        "truncation_side": ("left",),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "return_prompt_text": (False,),
        "return_token_offsets": (False,),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }
)
OF_ANTHROPIC: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "container": (),
        "mcp_servers": ([],),
        "diagnostics": (),
        "inference_geo": (),
        "output_format": (),
        "speed": ("standard",),
    }
)
OWN = frozenset(OwnFields.__struct_fields__)
MESSAGES = Rules(
    OWN | SHARED | {"context_management"},
    no_ops=MappingProxyType({**NO_OPS, **CACHE_MARK}),
    later=MappingProxyType({**UNSUPPORTED, **OF_CHAT, **OF_ANTHROPIC}),
    content=frozenset({"prompt_embeds"}),
)
SHARED_FIELDS = Rules(SHARED)
TOOL = Rules.of(
    ToolFields,
    no_ops=CACHE_MARK | {"eager_input_streaming": (True,)},  # what else: an input is streamed as it is made
    later=MappingProxyType({"defer_loading": (False,), "input_examples": ([],), "allowed_callers": (["direct"],)}),
)
CHOICE = Rules.of(ChoiceFields)
THINKING = Rules.of(ThinkingFields)
OUTPUT_CONFIG = Rules.of(OutputConfig, later=MappingProxyType({"task_budget": ()}))
JSON_FORMAT = Rules.of(JsonFormat)
NO_EDITS = (
    {"type": "clear_thinking_20251015", "keep": "all"},
    {"type": "clear_thinking_20251015", "keep": {"type": "all"}},
)


def parse_messages(
    body: Mapping[str, Any], ignored: list[str] | None = None, *, needs_max_tokens: bool = True
) -> MessagesFields:
    taken = take_fields(body, MESSAGES, ignored=ignored)
    _check_context_management(taken.pop("context_management", None))
    own = convert(_take_own({name: taken.pop(name) for name in OWN & taken.keys()}, ignored), OwnFields)
    shared = take_generation_fields(taken, SharedFields, SHARED_FIELDS, ignored)
    if own.max_tokens is None and needs_max_tokens:
        raise MissingParameter("max_tokens is missing; it is required", param="max_tokens")
    conversation = conversation_of(own.system, own.messages)
    tools = _tools(own.tools)
    output = own.output_config or OutputConfig()
    fields = MessagesFields(
        **msgspec.structs.asdict(shared)
        | {
            "messages": conversation.messages,
            "continue_final_message": conversation.is_prefilled or None,
            "max_tokens": own.max_tokens,
            "stop": own.stop_sequences,
            "tools": tools,
            "tool_choice": _tool_choice(own.tool_choice, tools),
            "parallel_tool_calls": own.tool_choice is None or not own.tool_choice.disable_parallel_tool_use,
            "response_format": _response_format(output.format),
            "stream_options": StreamOptions(include_usage=True) if shared.stream else None,  # the last event has both
            "include_reasoning": own.thinking is None or own.thinking.display != "omitted",
            "thinking": own.thinking,
            "effort": output.effort,
        }
    )
    _check_thinking(fields)
    _check_forms(fields)
    return fields


def _take_own(own: dict[str, Any], ignored: list[str] | None) -> dict[str, Any]:
    """Objects at every depth reduced to what is taken."""
    if isinstance(turns := own.get("messages"), list):
        own["messages"] = take_turns(turns, ignored)
    if isinstance(system := own.get("system"), list):
        own["system"] = take_blocks(system, ("text",), "system", ignored)
    if isinstance(tools := own.get("tools"), list):
        own["tools"] = [_take_tool(tool, f"tools[{index}]", ignored) for index, tool in enumerate(tools)]
    if isinstance(thinking := own.get("thinking"), dict) and thinking.get("type") == "between_tools":
        raise UnsupportedParameter(
            'thinking.type is "between_tools"; allowed: disabled, adaptive or enabled', param="thinking.type"
        )
    for name, rules in (("tool_choice", CHOICE), ("thinking", THINKING), ("output_config", OUTPUT_CONFIG)):
        if isinstance(value := own.get(name), dict):
            own[name] = take_fields(value, rules, name, ignored)
    if isinstance(output := own.get("output_config"), dict) and isinstance(form := output.get("format"), dict):
        output["format"] = take_fields(form, JSON_FORMAT, "output_config.format", ignored)
    return own


def _take_tool(tool: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(tool, dict):
        return tool
    if isinstance(kind := tool.get("type"), str) and kind != "custom":
        raise UnsupportedParameter(
            f"{path}.type is {shown(kind)}; this server runs no tools of its own: give name and input_schema, and run the "
            "calls yourself",
            param=f"{path}.type",
        )
    return take_fields(tool, TOOL, path, ignored)


def _check_context_management(given: Any) -> None:
    """Edits of the conversation are not made here; those that would change nothing are none."""
    if given is None:
        return
    path = "context_management"
    if not isinstance(given, dict) or given.keys() - {"edits"}:
        raise UnsupportedParameter(f"{path} is {shown(given)}; this server takes only {{edits}}", param=path)
    edits = given.get("edits")
    if not isinstance(edits, list | None):
        raise refuse(f"{path}.edits", edits, "a list")
    for index, edit in enumerate(edits or []):
        if edit not in NO_EDITS:
            where = f"{path}.edits[{index}]"
            raise UnsupportedParameter(
                f"{where} is {shown(edit)}; this server edits no conversation; leave out what you want to be left out",
                param=where,
            )


def _tools(given: Sequence[ToolFields]) -> list[Tool]:
    tools: list[Tool] = []
    for index, tool in enumerate(given):
        check_parameters(tool.input_schema, f"tools[{index}].input_schema")
        function = FunctionTool(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        tools.append(Tool(type="function", function=function))
    tool_specs(tools, "tools[{}]")
    return tools


def _tool_choice(given: ChoiceFields | None, tools: Sequence[Tool]) -> ToolChoice | None:
    if given is None:
        return None
    if given.type == "tool":
        if given.name is None:
            raise MissingParameter("tool_choice.name is missing; name the tool", param="tool_choice.name")
        names = [tool.function.name for tool in tools]
        if given.name not in names:
            raise unknown_tool("tool_choice.name", given.name, names)
        return NamedTool(type="function", function=NamedFunction(name=given.name))
    if given.name is not None:
        raise refuse("tool_choice.name", given.name, "a name only with the type tool")
    if given.type == "any":
        if not tools:
            raise refuse("tool_choice.type", "any", "none or auto, as long as no tools are given")
        return "required"
    return given.type


def _response_format(given: JsonFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    schema_grammar(given.schema, "output_config.format.schema")  # for its bound
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(name="answer", schema=given.schema))


def _check_thinking(fields: MessagesFields) -> None:
    thinking = fields.thinking
    if thinking is None:
        return
    budget, path = thinking.budget_tokens, "thinking.budget_tokens"
    if thinking.type != "enabled":
        if budget is not None:
            raise refuse(path, budget, "a budget only with the type enabled")
    elif budget is None:
        raise MissingParameter(f"{path} is missing; it is required with the type enabled", param=path)
    elif fields.max_tokens is not None and budget >= fields.max_tokens:
        raise refuse(path, budget, f"less than max_tokens, {fields.max_tokens}")
    if thinking.type != "disabled" and fields.continue_final_message:
        raise ConflictingParameters(
            f"thinking is {thinking.type} and the final message is the assistant's: its answer has begun; leave one out",
            param="thinking",
        )


def _check_forms(fields: MessagesFields) -> None:
    """An answer has one form at most, from its beginning."""
    forms = ["output_config.format"] if fields.response_format is not None else []
    forms += ["structured_outputs"] if fields.structured_outputs is not None else []
    if forms and fields.tools and fields.tool_choice != "none":
        forms.append("tools")
    if len(forms) > 1:
        raise ConflictingParameters(
            f"{' and '.join(forms)} each set a form for the answer; give one of them", param=forms[1]
        )
    if forms and fields.continue_final_message:
        raise ConflictingParameters(
            f"{forms[0]} sets a form for the whole answer and the final message is its beginning; leave one out",
            param=forms[0],
        )


def settled(fields: MessagesFields, source: str) -> MessagesFields:
    """Thinking as this template knows it: a switch, if it has one. `thinking` decides; an effort alone asks for thoughts."""
    thinking = fields.thinking
    style = reasoning_of(source)
    if style is None or style.switch is None:
        asked = ["output_config.effort"] if fields.effort is not None else []
        asked += ["thinking"] if thinking is not None and thinking.type != "disabled" else []
        if asked:
            raise UnsupportedParameter(
                f"{asked[-1]} is given and this model has no switch for its thinking; leave it out", param=asked[-1]
            )
        return fields
    if thinking is None:
        return msgspec.structs.replace(fields, reasoning_effort=fields.effort)
    effort: Effort = "none" if thinking.type == "disabled" else fields.effort or "medium"
    return msgspec.structs.replace(fields, reasoning_effort=effort)


class MessagesApi(ChatApi):
    path = "/v1/messages"
    id_prefix = "msg_"
    format_name = "output_config.format"

    def parse(self, body: Mapping[str, Any], ignored: list[str] | None) -> MessagesFields:
        return parse_messages(body, ignored)

    async def prompts(
        self, fields: ChatFields, context: ServerContext, marks: Marks, salt: bytes
    ) -> list[EncodedPrompt]:
        assert isinstance(fields, MessagesFields), "this family's own parse made them"
        return await super().prompts(
            settled(fields, template_source(context, fields.chat_template)), context, marks, salt
        )

    def max_tokens(self, fields: ChatFields, num_prompt_tokens: int, context: ServerContext) -> int:
        """As asked, or what is left of the context: clients of this API ask for as much as a model may ever write, and are
        told by the stop reason if it was the context that ended the answer."""
        left = fit_max_tokens(num_prompt_tokens, None, context.context_tokens(), prompt=self.messages_name)
        return left if fields.max_tokens is None else min(fields.max_tokens, left)

    def renderer(self, fields: ChatFields, head: Head, choices: Sequence[Choice], context: ServerContext) -> Renderer:
        return MessagesRenderer(head, choices, fields.max_tokens, fields.include_reasoning)
