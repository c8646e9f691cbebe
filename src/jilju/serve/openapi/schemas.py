"""Schemas of the OpenAPI description: those of bodies and answers, from the types and the rules that the routes themselves use.

Owns how a type and what may stand beside it (fields without effect, fields that are refused) become one schema, and the few
places where a schema says more than its type. Knows nothing of routes.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from jilju.engine.request import MAX_BIAS
from jilju.plan.batch import MAX_BIASES
from jilju.serve.chat.api import CHAT
from jilju.serve.chat.messages import (
    CALLED_FUNCTION,
    MESSAGE,
    PART,
    REFUSAL_PART,
    TOOL_CALL,
    RefusalPart,
    TextPart,
)
from jilju.serve.chat.tools import FUNCTION_TOOL, NAME, NAMED_FUNCTION, NAMED_TOOL, TOOL
from jilju.serve.embeddings import EMBEDDING
from jilju.serve.fields import ANY, Rules
from jilju.serve.messages import api as messages
from jilju.serve.messages.blocks import BLOCKS, TURN
from jilju.serve.openai_completions import COMPLETION
from jilju.serve.openapi.texts import FIELD_TEXTS
from jilju.serve.responses.fields import (
    FLAT_NAMED_TOOL,
    FLAT_TOOL,
    LOGPROBS,
    REASONING,
    RESPONSE,
    SCHEMA_FORMAT,
    SEALED,
    TEXT,
)
from jilju.serve.responses.fields import STREAM_OPTIONS as RESPONSE_STREAM_OPTIONS
from jilju.serve.responses.input import ITEM_RULES, PART_RULES
from jilju.serve.sampling import LOOP_FIELDS, STREAM_OPTIONS, TOKEN_KEY
from jilju.serve.structured import JSON_SCHEMA_FORMAT, RESPONSE_FORMAT, STRUCTURED_OUTPUTS
from jilju.serve.tokenize import DETOKENIZE, TOKENIZE

REF = "#/components/schemas/{name}"
Schema = dict[str, Any]
BIASES: Schema = {
    "type": "object",
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": f"^({TOKEN_KEY.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}


class Composed(NamedTuple):
    """A body that is not one type: the fields of OwnFields, and of SharedFields those that SHARED names."""

    name: str
    required: tuple[str, ...]


MESSAGES_BODY = Composed("MessagesFields", ("messages", "max_tokens"))
COUNT_BODY = Composed("CountTokensFields", ("messages",))

# What may stand in an object besides the fields of its type.
RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "ChatFields": CHAT,
        "CompletionFields": COMPLETION,
        "ResponseFields": RESPONSE,
        "MessagesFields": messages.MESSAGES,
        "CountTokensFields": messages.MESSAGES,
        "EmbeddingFields": EMBEDDING,
        "TokenizeFields": TOKENIZE,
        "DetokenizeFields": DETOKENIZE,
        "Message": MESSAGE,
        "TextPart": PART,
        "RefusalPart": REFUSAL_PART,
        "ToolCall": TOOL_CALL,
        "CalledFunction": CALLED_FUNCTION,
        "Tool": TOOL,
        "FunctionTool": FUNCTION_TOOL,
        "NamedTool": NAMED_TOOL,
        "NamedFunction": NAMED_FUNCTION,
        "StreamOptions": STREAM_OPTIONS,
        "LoopFields": LOOP_FIELDS,
        "ResponseFormat": RESPONSE_FORMAT,
        "JsonSchemaFormat": JSON_SCHEMA_FORMAT,
        "StructuredOutputs": STRUCTURED_OUTPUTS,
        "FlatTool": FLAT_TOOL,
        "FlatNamedTool": FLAT_NAMED_TOOL,
        "TextFields": TEXT,
        "TextFormat": SCHEMA_FORMAT,
        "ReasoningFields": REASONING,
        "MessageItem": ITEM_RULES["message"],
        "CallItem": ITEM_RULES["function_call"],
        "ResultItem": ITEM_RULES["function_call_output"],
        "ReasoningItem": ITEM_RULES["reasoning"],
        "InputText": PART_RULES["input_text"],
        "OutputText": PART_RULES["output_text"],
        "RefusalText": PART_RULES["refusal"],
        "ReasoningText": PART_RULES["reasoning_text"],
        "Turn": TURN,
        "TextBlock": BLOCKS["text"],
        "ToolUse": BLOCKS["tool_use"],
        "ToolResult": BLOCKS["tool_result"],
        "ThinkingBlock": BLOCKS["thinking"],
        "ToolFields": messages.TOOL,
        "ChoiceFields": messages.CHOICE,
        "ThinkingFields": messages.THINKING,
        "OutputConfig": messages.OUTPUT_CONFIG,
        "JsonFormat": messages.JSON_FORMAT,
    }
)
# Lists that hold objects of several kinds: their types say less.
KINDS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("ResponseAnswer", "output"): ("OutputMessage", "OutputReasoning", "OutputCall"),
        ("MessageAnswer", "content"): ("AnsweredText", "AnsweredThinking", "AnsweredToolUse"),
    }
)


def make_schemas(bodies: Sequence[Any], answers: Sequence[Any], *, model: str, lenient: bool) -> dict[str, Schema]:
    """All schemas by name. `model` is the one that is served. `lenient`: bodies may hold more fields, which are dropped."""
    composed = [body for body in bodies if isinstance(body, Composed)]
    types = [body for body in bodies if not isinstance(body, Composed)]
    asked = _components([*types, messages.OwnFields, messages.SharedFields, TextPart, RefusalPart])
    own, shared = asked.pop("OwnFields"), asked.pop("SharedFields")
    asked |= {body.name: _composed(body, own, shared) for body in composed}
    for name, schema in asked.items():
        _finish_body(name, schema, lenient=lenient)
    _say_more(asked, model, lenient=lenient)
    told = _components(answers)
    for (name, field), kinds in KINDS.items():
        told[name]["properties"][field] = {"type": "array", "items": {"anyOf": [ref(kind) for kind in kinds]}}
    return dict(sorted((told | asked).items()))  # what is in both comes back as it was sent: the wider one holds


def schema_of(kind: Any) -> Schema:
    """Of a body or an answer, where it is used."""
    if isinstance(kind, Composed):
        return ref(kind.name)
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REF)
    return schema


def ref(name: str) -> Schema:
    return {"$ref": REF.format(name=name)}


def _components(types: Sequence[Any]) -> dict[str, Schema]:
    """Without the names of classes and what their docstrings tell programmers."""
    _, schemas = msgspec.json.schema_components(types, ref_template=REF)
    return {name: _without(schema, "title", "description") for name, schema in schemas.items()}


def _composed(body: Composed, own: Schema, shared: Schema) -> Schema:
    properties = own["properties"] | {name: shared["properties"][name] for name in sorted(messages.SHARED)}
    properties = {name: dict(schema) for name, schema in properties.items()}
    edits = {"type": "array", "items": {"enum": list(messages.NO_EDITS)}}
    properties["context_management"] = {
        "type": "object", "properties": {"edits": or_null(edits)}, "additionalProperties": False
    }  # fmt: skip
    for name in body.required:
        properties[name] = _not_null(properties[name])
    return {"type": "object", "properties": properties, "required": list(body.required)}


def _finish_body(name: str, schema: Schema, *, lenient: bool) -> None:
    """A null means that a field is left out, wherever it may be left out."""
    properties, rules = schema["properties"], RULES[name]
    for field, inner in properties.items():
        if field not in schema["required"]:
            properties[field] = or_null(inner)
        if (text := FIELD_TEXTS.get(f"{name}.{field}") or FIELD_TEXTS.get(field)) is not None:
            properties[field] = {"description": text} | properties[field]
    for field, values in rules.no_ops.items():
        properties[field] = {"description": "has no effect"} | ({} if values is ANY else {"enum": [*values, None]})
    for field, off in rules.later.items():
        properties[field] = {"description": "not supported", "enum": [*off, None]}
    for field in rules.content:
        properties[field] = {"description": "not supported", "enum": [None]}
    schema["additionalProperties"] = lenient


def _say_more(schemas: dict[str, Schema], model: str, *, lenient: bool) -> None:
    """What routes check themselves."""
    for name, schema in schemas.items():
        if "model" in schema["properties"]:
            _set(schemas, name, "model", or_null({"enum": [model]}))
        if "logit_bias" in schema["properties"]:
            _set(schemas, name, "logit_bias", or_null(BIASES))
    for name in ("FunctionTool", "FlatTool", "ToolFields"):
        _set(schemas, name, "name", {"type": "string", "pattern": f"^{NAME.pattern}$"})
    _say_more_of_texts(schemas)
    _say_more_of_responses(schemas, lenient=lenient)


def _say_more_of_texts(schemas: dict[str, Schema]) -> None:
    """Content of messages: there is some, and parts of some kinds."""
    parts = {"type": "array", "minItems": 1, "items": {"anyOf": [ref("TextPart"), ref("RefusalPart")]}}
    _set(schemas, "Message", "content", {"anyOf": [{"type": "string"}, parts, {"type": "null"}]})
    for name in ("MessageItem", "Turn"):
        schemas[name]["properties"]["content"]["anyOf"][1]["minItems"] = 1
    _set(schemas, "MessageItem", "type", or_null(schemas["MessageItem"]["properties"]["type"]))  # a message needs none
    schemas["MessageItem"]["required"].remove("type")
    (items,) = (form for form in schemas["ResponseFields"]["properties"]["input"]["anyOf"] if form["type"] == "array")
    del items["items"]["discriminator"]


def _say_more_of_responses(schemas: dict[str, Schema], *, lenient: bool) -> None:
    """What /v1/responses takes of a field that other routes have too, and forms of answers, by their type."""
    include = {"type": "array", "items": {"enum": [LOGPROBS, SEALED]}}
    _set(schemas, "ResponseFields", "include", or_null(include))
    options = {field: {"enum": [*off, None]} for field, off in RESPONSE_STREAM_OPTIONS.later.items()}
    schemas["ResponseStreamOptions"] = {"type": "object", "properties": options, "additionalProperties": lenient}
    _set(schemas, "ResponseFields", "stream_options", or_null(ref("ResponseStreamOptions")))
    for name, of_schemas in (("TextFormat", ("name", "schema")), ("ResponseFormat", ("json_schema",))):
        schemas[name] = {
            "anyOf": [_plain_form(schemas[name], lenient=lenient), _schema_form(schemas[name], of_schemas)]
        }


def _plain_form(form: Schema, *, lenient: bool) -> Schema:
    properties: Schema = {"type": {"enum": ["text", "json_object"]}}
    if "json_schema" in form["properties"]:
        properties["json_schema"] = {"type": "null"}
    return {"type": "object", "properties": properties, "required": ["type"], "additionalProperties": lenient}


def _schema_form(form: Schema, required: Sequence[str]) -> Schema:
    properties = form["properties"] | {"type": {"enum": ["json_schema"]}}
    properties |= {name: _not_null(properties[name]) for name in required}
    return form | {"properties": properties, "required": ["type", *required]}


def _set(schemas: dict[str, Schema], name: str, field: str, schema: Schema) -> None:
    """In place of what the type says; the description stays."""
    properties = schemas[name]["properties"]
    properties[field] = {key: text for key, text in properties[field].items() if key == "description"} | schema


def or_null(schema: Schema) -> Schema:
    default = {"default": schema["default"]} if schema.get("default") is not None else {}
    bare = _without(schema, "default")
    forms = bare["anyOf"] if set(bare) == {"anyOf"} else [bare]
    return {"anyOf": forms if {"type": "null"} in forms else [*forms, {"type": "null"}]} | default


def _not_null(schema: Schema) -> Schema:
    """A field that may be left out, as one that must be given."""
    forms = [form for form in schema.get("anyOf", [_without(schema, "default")]) if form != {"type": "null"}]
    told = {"description": schema["description"]} if "description" in schema else {}
    return told | (forms[0] if len(forms) == 1 else {"anyOf": forms})


def _without(schema: Schema, *names: str) -> Schema:
    return {name: value for name, value in schema.items() if name not in names}
