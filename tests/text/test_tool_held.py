"""What of a tool's schema is held: all of a strict one's, what can be of others."""

import msgspec
import pytest

from jilju.errors import InvalidGrammar
from jilju.text.grammar import GrammarSource, to_llguidance
from jilju.text.json_schema import translate_schema
from jilju.text.tools import ToolSpec, family_of, held_tools

ODD = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "description": "x" * 3000,
    "properties": {
        "good": {"type": "integer", "minimum": 3, "description": "kept as it is"},
        "odd": {"type": "object", "propertyNames": {"pattern": "^a"}},
        "shared": {"$ref": "#/$defs/colour"},
    },
    "required": ["good"],
    "additionalProperties": False,
    "$defs": {"colour": {"enum": ["red", "blue"]}},
}


def test_a_property_that_cannot_be_held_is_left_to_the_model() -> None:
    (tool,) = held_tools([ToolSpec(name="f", parameters=ODD)])
    properties = tool.parameters["properties"]
    assert properties["good"] == {"type": "integer", "minimum": 3}
    assert "propertyNames" not in msgspec.json.encode(tool.parameters).decode()
    assert tool.parameters["required"] == ["good"] and "red" in str(tool.parameters)
    assert "xxx" not in str(tool.parameters), "words for the model are no part of a grammar"


def test_a_strict_tool_is_refused_by_the_keyword() -> None:
    with pytest.raises(InvalidGrammar, match="propertyNames"):
        held_tools([ToolSpec(name="f", parameters=ODD, strict=True)])


def test_what_cannot_be_held_at_all_is_any_object() -> None:
    odd = {
        "type": "object",
        "properties": {"a": {"$ref": "https://example.org/a.json"}},
        "additionalProperties": {"not": {}},
    }
    (tool,) = held_tools([ToolSpec(name="f", parameters=odd)])
    assert tool.parameters == {"type": "object"}


@pytest.mark.parametrize("template", ["tools <tool_call>", "tools <|python_tag|>", "plain"])
def test_held_schemas_compile_in_a_family_s_grammar(template: str) -> None:
    tools = held_tools([ToolSpec(name=f"tool_{index}", parameters=ODD) for index in range(128)])
    assert translate_schema(msgspec.json.encode(tools[0].parameters)) == tools[0].parameters
    text = family_of(template).grammar(tools, choice="auto", parallel=True)
    assert to_llguidance(GrammarSource("lark", text))


def test_what_nests_too_deep_is_any_value() -> None:
    deep: dict[str, object] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    schema = {"type": "object", "properties": {"deep": deep, "good": {"type": "integer"}}}
    (tool,) = held_tools([ToolSpec(name="f", parameters=schema)])
    assert tool.parameters["properties"] == {"deep": {}, "good": {"type": "integer"}}
