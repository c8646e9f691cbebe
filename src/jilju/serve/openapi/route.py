"""GET /openapi.json: the routes in OpenAPI 3.1, made from the types that the routes themselves use.

Owns the description around the schemas: paths, answers by status, errors by code, headers, keys. Knows nothing of what a route
does, nor of how a type becomes a schema.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jilju.serve.answer_types import ErrorAnswer
from jilju.serve.deadlines import DEADLINE_HEADER, MAX_QUEUE_HEADER
from jilju.serve.door.gate import MESSAGES_PATH
from jilju.serve.errors import BY_CODE
from jilju.serve.messages.types import AnsweredText, AnsweredThinking, AnsweredToolUse, MessageErrorAnswer
from jilju.serve.openapi.routes import ROUTES, Described
from jilju.serve.openapi.schemas import Schema, make_schemas, schema_of
from jilju.serve.responses.types import OutputCall, OutputMessage, OutputReasoning
from jilju.serve.sampling import MAX_DEADLINE_MS
from jilju.serve.server import Server

OF_ALL = (400, 401, 403, 408, 429, 431, 500)  # connection, head and key, and our own faults
OF_KIND = {"generates": (404, 413, 415, 499, 503, 504), "reads": (404, 413, 415), "ends": (404,), "looks": ()}
PARTS_OF_ANSWERS = (
    AnsweredText, AnsweredThinking, AnsweredToolUse, OutputCall, OutputMessage, OutputReasoning, ErrorAnswer, MessageErrorAnswer
)  # fmt: skip
ABOUT = (
    "A null means that a field is left out. A field that is unknown is %s, one that is described as having no effect is not "
    "looked at, and one that is described as not supported takes only the values that mean off."
)


class OpenapiRoute:
    """Made once, when somebody first asks."""

    def __init__(self, server: Server):
        self._server = server
        self._body = b""

    async def get(self, request: Request) -> Response:
        context = self._server.context
        if not self._body:
            description = describe(context.version, model=context.model_name, lenient=context.lenient)
            self._body = msgspec.json.encode(description)
        return Response(self._body, media_type="application/json")


def describe(version: str, routes: Sequence[Described] = ROUTES, *, model: str, lenient: bool) -> dict[str, Any]:
    """The whole description. `lenient`: of a server that drops fields that it does not know."""
    bodies = [route.body for route in routes if route.body is not None]
    answers = [route.answer for route in routes if not isinstance(route.answer, str | None)]
    about = ABOUT % ("dropped and named in a header" if lenient else "refused")
    return {
        "openapi": "3.1.0",
        "info": {"title": "jilju", "version": version, "description": about},
        "paths": _paths(routes),
        "components": {
            "schemas": make_schemas(bodies, [*answers, *PARTS_OF_ANSWERS], model=model, lenient=lenient),
            "responses": _errors(),
            "headers": _headers(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic", "description": "the key as password"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _paths(routes: Sequence[Described]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in routes:
        words = [word.strip("{}") for word in route.path.split("/") if word]
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": "_".join([route.method, *words]).replace(".", "_"),
            # the empty one: of a server without keys
            "security": [] if route.no_key else [{}, {"bearer": []}, {"basic": []}, {"key": []}],
            "parameters": _parameters(route),
            "responses": _answers(route),
        }
        if route.body is not None:
            content = {"application/json": {"schema": schema_of(route.body)}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(route.path, {})[route.method] = operation
    return paths


def _parameters(route: Described) -> list[dict[str, Any]]:
    names = [word[1:-1] for word in route.path.split("/") if word.startswith("{")]
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    if route.kind == "generates":
        times = {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS}
        for name, what in ((DEADLINE_HEADER, "deadline_ms"), (MAX_QUEUE_HEADER, "max_queue_ms")):
            told = f"as the field {what}; the smaller of both holds"
            found.append({"name": name, "in": "header", "description": told, "schema": times})
    found += [{"name": q.name, "in": "query", "description": q.text, "schema": q.schema} for q in route.query]
    return found


def _answers(route: Described) -> dict[str, Any]:
    """By status. An answer that comes with 503 too is no error."""
    answers: dict[str, Any] = {}
    if (good := _good(route)) is not None:
        answers["200"] = good
        if route.also_503:
            answers["503"] = good | {"description": "the answer, if it is not so"}
    if route.also_304:
        answers["304"] = {"description": "it has not changed", "headers": _carried("x-request-id")}
    prefix = "message_error" if route.path.startswith(MESSAGES_PATH) else "error"
    has_key = [status for status in OF_ALL if not (route.no_key and status == 401)]
    by_path = [404] if "{" in route.path or route.also_304 else []
    for status in sorted({*has_key, *by_path, *OF_KIND[route.kind], *route.errors}):
        answers.setdefault(str(status), {"$ref": f"#/components/responses/{prefix}_{status}"})
    return answers


def _good(route: Described) -> dict[str, Any] | None:
    if route.answer is None:
        return None
    if isinstance(route.answer, str):
        content: dict[str, Any] = {route.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schema_of(route.answer)}}
    text = "the answer"
    if route.events:
        content["text/event-stream"] = {}  # events have no schema in this version of OpenAPI
        text += f"; with stream: true, {route.events}"
    return {"description": text, "headers": _carried("x-request-id", "x-jilju-ignored"), "content": content}


def _errors() -> dict[str, Any]:
    """One of each status and form, with the codes that it may have."""
    codes: dict[int, list[str]] = {}
    for code, error in BY_CODE.items():
        codes.setdefault(error.status, []).append(code)
    statuses = sorted({*OF_ALL, *(status for some in OF_KIND.values() for status in some)})
    found: dict[str, Any] = {}
    for prefix, kind in (("error", ErrorAnswer), ("message_error", MessageErrorAnswer)):
        for status in statuses:
            reason = "cancelled" if status == 499 else HTTPStatus(status).phrase
            waits = ("retry-after", "retry-after-ms") if status in (429, 503) else ()
            final = ("x-should-retry",) if status >= 500 else ()
            found[f"{prefix}_{status}"] = {
                "description": f"{reason}: {', '.join(codes[status])}",
                "headers": _carried("x-request-id", *waits, *final),
                "content": {"application/json": {"schema": schema_of(kind)}},
            }
    return found


def _headers() -> dict[str, Any]:
    def header(text: str, schema: Schema, *, required: bool = False) -> dict[str, Any]:
        return {"description": text, "schema": schema} | ({"required": True} if required else {})

    return {
        "x-request-id": header("the call's id: it is in the log, and the end of an answer's id", {"type": "string"}, required=True),
        "x-jilju-ignored": header("with --lenient: paths of the fields that were dropped", {"type": "string"}),
        "retry-after": header("whole seconds to wait", {"type": "integer", "minimum": 1, "maximum": 60}),
        "retry-after-ms": header("the same wait exactly", {"type": "integer", "minimum": 1, "maximum": 60_000}),
        "x-should-retry": header("false: the same call would fail again", {"enum": ["false"]}),
    }  # fmt: skip


def _carried(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
