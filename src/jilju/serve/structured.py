"""Structured output: the form that a call asks its answer to have.

Owns `response_format` and `structured_outputs`, and the rule that a request has at most one grammar. Knows nothing of how a
grammar is compiled or kept to.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.errors import ConflictingParameters, MissingParameter
from jilju.serve.fields import Rules, refuse, take_fields
from jilju.text.grammar import GrammarSource

MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 1024


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any] = {}
    strict: bool = False  # every schema is held to strictly
    description: str = ""


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


RESPONSE_FORMAT = Rules.of(ResponseFormat)
JSON_SCHEMA_FORMAT = Rules.of(JsonSchemaFormat)
STRUCTURED_OUTPUTS = Rules.of(
    StructuredOutputs,
    later={
        "structural_tag": (),
        "whitespace_pattern": (),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "disable_fallback": (False,),
    },
)


def take_response_format(given: Any, ignored: list[str] | None) -> Any:
    if not isinstance(given, dict):
        return given
    taken = take_fields(given, RESPONSE_FORMAT, "response_format", ignored)
    if isinstance(schema := taken.get("json_schema"), dict):
        if taken.get("type") in ("text", "json_object"):
            raise refuse("response_format.json_schema", schema, "a schema only with the type json_schema")
        taken["json_schema"] = take_fields(schema, JSON_SCHEMA_FORMAT, "response_format.json_schema", ignored)
    return taken


def take_structured_outputs(given: Any, ignored: list[str] | None) -> Any:
    return take_fields(given, STRUCTURED_OUTPUTS, "structured_outputs", ignored) if isinstance(given, dict) else given


def format_grammar(given: ResponseFormat | None) -> GrammarSource | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return GrammarSource(kind="json_object")
    if given.json_schema is None:
        raise MissingParameter(
            "response_format.json_schema is missing; give {name, schema}", param="response_format.json_schema"
        )
    return schema_grammar(given.json_schema.schema, "response_format.json_schema.schema")


def outputs_grammar(given: StructuredOutputs | None) -> GrammarSource | None:
    if given is None:
        return None
    values = {name: getattr(given, name) for name in StructuredOutputs.__struct_fields__}
    names = [name for name, value in values.items() if value is not None and value is not False]
    if len(names) != 1:
        shown = ", ".join(names) or "none of them"
        raise ConflictingParameters(
            f"structured_outputs has {shown}; give exactly one of {', '.join(values)}", param="structured_outputs"
        )
    name, path = names[0], f"structured_outputs.{names[0]}"
    if name == "json_object":
        return GrammarSource(kind="json_object")
    if name == "json":
        return schema_grammar(_schema_of(given.json, path), path)
    if name == "choice":
        return _bounded(GrammarSource(kind="choice", text=msgspec.json.encode(given.choice).decode()), path)
    kind: Literal["regex", "lark"] = "regex" if name == "regex" else "lark"
    return _bounded(GrammarSource(kind=kind, text=values[name]), path)


def schema_grammar(schema: dict[str, Any], path: str) -> GrammarSource:
    """Equal schemas give equal texts, whatever the order of the body's bytes was."""
    return _bounded(GrammarSource(kind="json_schema", text=msgspec.json.encode(schema).decode()), path)


def _schema_of(given: Any, path: str) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except (msgspec.DecodeError, RecursionError):
            raise refuse(path, given, "a JSON schema, as an object or as its text") from None
    if not isinstance(given, dict):
        raise refuse(path, given, "a JSON schema, as an object or as its text")
    return given


def _bounded(source: GrammarSource, path: str) -> GrammarSource:
    if (size := len(source.text.encode())) > MAX_GRAMMAR_BYTES:
        raise refuse(path, f"a grammar of {size} bytes", f"at most {MAX_GRAMMAR_BYTES}")
    return source


def only_one(**sources: GrammarSource | None) -> GrammarSource | None:
    """The one that is given, by the name of its field; two are refused."""
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        raise ConflictingParameters(
            f"{' and '.join(given)} each set a form for the answer; give one of them", param=given[1]
        )
    return sources[given[0]] if given else None
