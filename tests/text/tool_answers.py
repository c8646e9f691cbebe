"""What the tests of tools share: tools, answers written by each family's format, and how an answer's parts are read."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from jilju.text.message import MessageParser
from jilju.text.tools import ToolFamily, ToolSpec
from jilju.text.tools.family import Gemma, Generic, Hermes, Llama, Mistral, NamedMistral

Call = tuple[str, dict[str, Any]]
Dumps = Callable[[Any], str]
SPACE = " \t\r\n"


def dumped(value: Any) -> str:
    """As chat templates write JSON."""
    return json.dumps(value, ensure_ascii=False)


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (
    ToolSpec("get", "Gets what there is."),
    ToolSpec("get_weather", "The weather of the next days.", WEATHER),
    ToolSpec("set.alarm-2", parameters={"properties": {"at": {"type": "number"}}, "required": ["at"]}),
)
VALID: dict[str, Sequence[dict[str, Any]]] = {
    "get": [{}, {"a": [1, {"b": None}], "한글": "é\n"}],
    "get_weather": [{"city": "Seoul"}, {"city": '"[<{ 한글\\\n', "days": 3, "unit": "f"}],
    "set.alarm-2": [{"at": 7.5}, {"at": 1, "more": True}],
}
INVALID: dict[str, Sequence[Any]] = {
    "get": [[], "x", 1, None],
    "get_weather": [{}, {"city": 1}, {"city": "x", "unit": "k"}, {"city": "x", "other": 1}],
    "set.alarm-2": [{}, {"at": "7"}],
}


def tagged(calls: Sequence[Call], dumps: Dumps = dumped) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def bare(calls: Sequence[Call], dumps: Dumps = dumped) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {dumps(arguments)}}}' for name, arguments in calls)


def fenced(calls: Sequence[Call], dumps: Dumps = dumped) -> str:
    return "```tool_code\n" + bare(calls, dumps).replace("; {", "\n{") + "\n```"


def listed(calls: Sequence[Call], dumps: Dumps = dumped) -> str:
    objects = (f'{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}' for name, arguments in calls)
    return f"[TOOL_CALLS] [{', '.join(objects)}]"


def named(calls: Sequence[Call], dumps: Dumps = dumped) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}" for name, arguments in calls)


class Format(NamedTuple):
    """A family, how it writes calls, and what begins one in free text."""

    family: ToolFamily
    write: Callable[..., str]
    begins: re.Pattern[str]
    takes_text_around: bool = True


NAMES = "|".join(re.escape(tool.name) for tool in TOOLS)
OBJECT = rf'[ \t\r\n]*\{{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*"(?:{NAMES})"'
FIRST = rf"\A[ \t\r\n]*```(?:json)?{OBJECT}|\A{OBJECT}"  # at the beginning of an answer
FORMATS = {
    "hermes": Format(Hermes(), tagged, re.compile(rf"<tool_call>|{FIRST}")),
    "generic": Format(Generic(), tagged, re.compile(rf"<tool_call>|{FIRST}")),
    "llama": Format(Llama(parallel=True), bare, re.compile(rf"<\|python_tag\|>|\A{OBJECT}"), takes_text_around=False),
    "gemma": Format(Gemma(), fenced, re.compile(rf"```tool_code|{FIRST}")),
    "mistral": Format(Mistral(), listed, re.compile(r"\[TOOL_CALLS\]")),
    "named mistral": Format(NamedMistral(), named, re.compile(r"\[TOOL_CALLS\]")),
}


def parse(parser: MessageParser, text: str, places: Sequence[int] = ()) -> list[tuple[str, int, str]]:
    """(kind, call, text) of an answer pushed in pieces, pieces of one part joined."""
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    parts = [part for start, end in pairwise(edges) for part in parser.push(text[start:end])]
    joined: list[tuple[str, int, str]] = []
    for kind, piece, call in [*parts, *parser.finish()]:
        if joined and kind != "call" and joined[-1][:2] == (kind, call):
            joined[-1] = (kind, call, joined[-1][2] + piece)
        else:
            joined.append((kind, call, piece))
    return joined


def text_of(parts: Sequence[tuple[str, int, str]]) -> str:
    return "".join(text for kind, _, text in parts if kind == "text")


def calls_of(parts: Sequence[tuple[str, int, str]]) -> list[tuple[str, str]]:
    """(name, text of the arguments) of each call; they are numbered from 0 in the order of the answer."""
    calls: list[tuple[str, str]] = []
    for kind, call, text in parts:
        if kind == "call":
            assert call == len(calls), f"call {call} follows {len(calls)} calls"
            calls.append((text, ""))
        elif kind == "arguments":
            assert call == len(calls) - 1, f"arguments of call {call} after {len(calls)} calls"
            calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return calls
