"""Held: what of a tool's schema a grammar holds its arguments to.

Owns the difference between strict tools and others: a strict one is held to every word of its schema, or refused by the keyword
that cannot be enforced; of others a property that cannot be is left to the model. Knows nothing of how a grammar is written.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.json_schema import translate_schema
from jilju.text.tools.spec import ToolSpec

AROUND = ("$defs", "definitions")  # what properties refer to


def held_tools(tools: Iterable[ToolSpec]) -> list[ToolSpec]:
    """The tools with the schemas that are enforced, words for the model left out. Raises InvalidGrammar or GrammarTooComplex for
    a strict tool."""
    return [ToolSpec(name=tool.name, parameters=_held(tool), strict=tool.strict) for tool in tools]


def _held(tool: ToolSpec) -> dict[str, Any]:
    try:
        return _translated(tool.schema)
    except (InvalidGrammar, GrammarTooComplex) as error:
        if tool.strict:
            raise type(error)(f"tool {tool.name}: {error.message}", param="tools") from None
    return _loosened(tool.schema)


def _loosened(schema: dict[str, Any]) -> dict[str, Any]:
    """Each property that can be held as it is, any value for the others; any object if that is not enough."""
    given = schema.get("properties")
    around = {name: schema[name] for name in AROUND if name in schema}
    properties = {name: _property(value, around) for name, value in given.items()} if isinstance(given, dict) else {}
    kept: dict[str, Any] = {name: schema[name] for name in ("required", "additionalProperties") if name in schema}
    try:
        return _translated({"type": "object", "properties": properties, **kept, **around})
    except (InvalidGrammar, GrammarTooComplex):
        return {"type": "object"}


def _property(schema: Any, around: dict[str, Any]) -> Any:
    try:
        _translated({"type": "object", "properties": {"it": schema}, **around})
    except (InvalidGrammar, GrammarTooComplex):
        return {}
    return schema


def _translated(schema: dict[str, Any]) -> dict[str, Any]:
    return translate_schema(msgspec.json.encode(schema))
