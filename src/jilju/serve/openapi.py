"""GET /openapi.json: the routes in OpenAPI 3.1, made from the types that the routes themselves use.

Owns how types and the rules beside them (fields without effect, fields that are refused) become schemas. Knows nothing of what
a route does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jilju.serve.answer_types import (
    ChatCompletion,
    Detokenized,
    ErrorAnswer,
    ModelList,
    Rendered,
    TextCompletion,
    Tokenized,
)
from jilju.serve.chat_messages import MESSAGE, PART, REFUSAL_PART, TOOL_CALL, Message, RefusalPart, TextPart, ToolCall
from jilju.serve.embeddings import EMBEDDING, EmbeddingFields
from jilju.serve.fields import ANY, Rules
from jilju.serve.health import json_response
from jilju.serve.openai_chat import CHAT, ChatFields
from jilju.serve.openai_completions import COMPLETION, CompletionFields
from jilju.serve.response_fields import FLAT_TOOL, RESPONSE, ResponseFields
from jilju.serve.server import Server
from jilju.serve.tokenize import DETOKENIZE, TOKENIZE, DetokenizeFields, TokenizeFields
from jilju.serve.tool_fields import TOOL, Tool

REF = "#/components/schemas/{name}"
ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "431", "499", "500", "503", "504")


@dataclass(frozen=True, slots=True)
class Described:
    """One route. `body` and `answer` are types that msgspec knows, or None; `answer` of a text route is its media type."""

    method: str
    path: str
    summary: str
    body: Any = None
    answer: Any = None
    streams: bool = False
    is_open: bool = False  # needs no key


ROUTES: tuple[Described, ...] = (
    Described("post", "/v1/chat/completions", "Answer a conversation", ChatFields, ChatCompletion, streams=True),
    Described("post", "/v1/completions", "Continue texts", CompletionFields, TextCompletion, streams=True),
    Described("post", "/v1/responses", "OpenAI's newer shape", ResponseFields, dict[str, Any], streams=True),
    Described("post", "/v1/chat/completions/render", "The prompt of a chat, not run", ChatFields, Rendered),
    Described(
        "post", "/v1/completions/render", "The prompts of a completion, not run", CompletionFields, list[Rendered]
    ),
    Described("post", "/v1/embeddings", "Vectors of texts, of models that have them", EmbeddingFields, dict[str, Any]),
    Described("post", "/v1/requests/{id}/cancel", "End a call", None, dict[str, Any]),
    Described("post", "/tokenize", "Tokens of a text or a conversation", TokenizeFields, Tokenized),
    Described("post", "/detokenize", "Text of tokens", DetokenizeFields, Detokenized),
    Described("get", "/v1/models", "The model that is served", None, ModelList),
    Described("get", "/v1/models/{model}", "One model", None, dict[str, Any]),
    Described("get", "/livez", "Whether the server answers at all", None, dict[str, Any], is_open=True),
    Described("get", "/readyz", "Whether new calls are taken", None, dict[str, Any]),
    Described("get", "/health", "Whether work goes on", None, dict[str, Any]),
    Described("get", "/version", "The version", None, dict[str, str]),
    Described("get", "/openapi.json", "This description", None, dict[str, Any]),
    Described("get", "/metrics", "Metrics for Prometheus", None, "text/plain"),
)

# What may stand in an object besides the fields of its type.
RULES: tuple[tuple[str, Rules], ...] = (
    ("ChatFields", CHAT),
    ("CompletionFields", COMPLETION),
    ("TokenizeFields", TOKENIZE),
    ("DetokenizeFields", DETOKENIZE),
    ("ResponseFields", RESPONSE),
    ("FlatTool", FLAT_TOOL),
    ("EmbeddingFields", EMBEDDING),
    ("Message", MESSAGE),
    ("TextPart", PART),
    ("RefusalPart", REFUSAL_PART),
    ("ToolCall", TOOL_CALL),
    ("Tool", TOOL),
)


async def openapi_json(server: Server, request: Request) -> Response:
    return json_response(describe(server.context.version, ROUTES, dict(RULES)))


def describe(version: str, routes: Sequence[Described], rules: Mapping[str, Rules]) -> dict[str, Any]:
    """The whole description."""
    types = [t for route in routes for t in (route.body, route.answer) if t is not None and not isinstance(t, str)]
    types += [Message, TextPart, RefusalPart, ToolCall, Tool, ErrorAnswer]
    _, schemas = msgspec.json.schema_components(types, ref_template=REF)
    for name, schema in schemas.items():
        _allow_null(schema)
        if name in rules:
            _add_rules(schema, rules[name])
    schemas["Message"]["properties"]["content"] = {
        "anyOf": [
            {"type": "string"},
            {"type": "null"},
            {"type": "array", "minItems": 1, "items": {"anyOf": [_ref("TextPart"), _ref("RefusalPart")]}},
        ]
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jilju", "version": version},
        "paths": _paths(routes, types),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _paths(routes: Sequence[Described], types: Sequence[Any]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": f"{route.method}_{route.path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}",
            "security": [] if route.is_open else [{}, {"bearer": []}, {"key": []}],
            "responses": {"200": _answer(route)},
        }
        if route.path in ("/readyz", "/health"):
            operation["responses"]["503"] = {
                "description": "it is not so", "content": {"application/json": {"schema": {"type": "object"}}},
            }  # fmt: skip
        for status in ERRORS:
            content = {"application/json": {"schema": _ref("ErrorAnswer")}}
            operation["responses"].setdefault(status, {"description": "an error", "content": content})
        if route.body is not None:
            schema = _schema_of(route.body)
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in names
            ]
        paths.setdefault(route.path, {})[route.method] = operation
    return paths


def _answer(route: Described) -> dict[str, Any]:
    if isinstance(route.answer, str):
        return {"description": "the answer", "content": {route.answer: {"schema": {"type": "string"}}}}
    content: dict[str, Any] = {"application/json": {"schema": _schema_of(route.answer)}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": "the answer", "content": content}


def _schema_of(answer: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([answer], ref_template=REF)
    return schema


def _ref(name: str) -> dict[str, str]:
    return {"$ref": REF.format(name=name)}


def _allow_null(schema: dict[str, Any]) -> None:
    """A null means that a field is left out, wherever it may be left out."""
    required = set(schema.get("required", ()))
    properties = schema.get("properties", {})
    for name, inner in properties.items():
        if name not in required and {"type": "null"} not in inner.get("anyOf", ()):
            default = {"default": inner.pop("default")} if "default" in inner else {}
            properties[name] = {"anyOf": [inner, {"type": "null"}], **default}


def _add_rules(schema: dict[str, Any], rules: Rules) -> None:
    """Fields without effect take any value or a few; refused ones only what means off."""
    properties = schema["properties"]
    for name, allowed in rules.no_ops.items():
        what = "has no effect"
        properties[name] = {"description": what} | ({} if allowed is ANY else {"enum": [*allowed, None]})
    for name, off in rules.later.items():
        properties[name] = {"description": "not supported", "enum": [*off, None]}
    for name in rules.content:
        properties[name] = {"description": "not supported", "enum": [None]}
