"""Tools of a call: which functions a model may call, and whether it must.

Owns the fields `tools`, `tool_choice` and `parallel_tool_calls` in OpenAI's form. Knows nothing of how a model writes a call.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from jilju.errors import InvalidValue, UnsupportedParameter
from jilju.serve.chat.messages import CACHE_MARKS
from jilju.serve.errors import MAX_ECHO, shown
from jilju.serve.fields import Rules, convert, refuse, take_fields
from jilju.text.tools import ToolSpec

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 64 << 10
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: FunctionTool
    type: Literal["function"]


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"]


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]

TOOL = Rules.of(Tool, no_ops=CACHE_MARKS)
FUNCTION_TOOL = Rules.of(FunctionTool)
NAMED_TOOL = Rules.of(NamedTool)
NAMED_FUNCTION = Rules.of(NamedFunction)


def take_tools(tools: list[Any], ignored: list[str] | None) -> list[Any]:
    """Tools reduced to what is taken; the schemas inside are free."""
    if len(tools) > MAX_TOOLS:
        raise InvalidValue(f"tools has {len(tools)} entries; allowed: 0..{MAX_TOOLS}", param="tools")
    taken: list[Any] = []
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        if isinstance(tool, dict):
            check_type(tool, path)
            tool = take_fields(tool, TOOL, path, ignored)
            if isinstance(function := tool.get("function"), dict):
                tool["function"] = take_fields(function, FUNCTION_TOOL, f"{path}.function", ignored)
        taken.append(tool)
    return taken


def check_type(tool: Mapping[str, Any], path: str) -> None:
    if isinstance(kind := tool.get("type"), str) and kind != "function":
        raise UnsupportedParameter(
            f"{path}.type is {shown(kind)}; this server takes only function; leave it out", param=f"{path}.type"
        )


def take_choice(choice: Any, ignored: list[str] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    check_type(choice, "tool_choice")
    taken = take_fields(choice, NAMED_TOOL, "tool_choice", ignored)
    if isinstance(function := taken.get("function"), dict):
        taken["function"] = take_fields(function, NAMED_FUNCTION, "tool_choice.function", ignored)
    return convert({"tool_choice": taken}, _Chosen).tool_choice  # here, for an error that names the path


class _Chosen(msgspec.Struct):
    tool_choice: NamedTool


def tool_specs(tools: Sequence[Tool], path: str = "tools[{}].function") -> list[ToolSpec]:
    """Checked: names as models can write them, each once; schemas of objects, of bounded size. `path` is for errors."""
    specs: list[ToolSpec] = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        function, where = tool.function, path.format(index)
        if not NAME.fullmatch(function.name):
            raise refuse(f"{where}.name", function.name, "1..64 letters, digits, _, . and -")
        if function.name in names:
            raise refuse(f"{where}.name", function.name, "a name that no other tool has")
        names.add(function.name)
        check_parameters(function.parameters, f"{where}.parameters")
        specs.append(
            ToolSpec(
                name=function.name,
                description=function.description,
                parameters=function.parameters,
                strict=function.strict,
            )
        )
    return specs


def check_parameters(schema: Mapping[str, Any], path: str) -> None:
    if (size := len(msgspec.json.encode(schema))) > MAX_SCHEMA_BYTES:
        raise refuse(path, f"a schema of {size} bytes", f"at most {MAX_SCHEMA_BYTES}")
    if schema.get("type", "object") != "object":
        raise refuse(f"{path}.type", schema["type"], "object: arguments are an object")


def unknown_tool(path: str, given: str, names: Sequence[str]) -> InvalidValue:
    """Given and allowed are both the caller's words: half of what may be repeated for each."""
    half = MAX_ECHO // 2
    known = ", ".join(names)[:half] or "none is given"
    return refuse(path, given[:half], f"the name of one of the tools ({known})")


class Calls(NamedTuple):
    """What a call may and must make of its tools."""

    specs: tuple[ToolSpec, ...] = ()  # that the model is told of
    allowed: tuple[ToolSpec, ...] = ()  # that it may call
    is_required: bool = False
    is_named: bool = False  # one function was named, which must be called once


def calls_of(specs: Sequence[ToolSpec], choice: ToolChoice | None) -> Calls:
    """The choice, checked against the tools; without one the model may call what it likes."""
    told = tuple(specs)
    if isinstance(choice, NamedTool):
        named = tuple(spec for spec in told if spec.name == choice.function.name)
        if not named:
            raise unknown_tool("tool_choice.function.name", choice.function.name, [spec.name for spec in told])
        return Calls(told, named, is_required=True, is_named=True)
    if choice == "none":
        return Calls(told)
    if choice == "required" and not told:
        raise refuse("tool_choice", choice, "none or auto, as long as no tools are given")
    return Calls(told, told, is_required=choice == "required")
