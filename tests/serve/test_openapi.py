"""The OpenAPI description: valid, complete, and true of the server, in generated calls of all its routes."""

import asyncio
from typing import Any

import jsonschema
import msgspec
import pytest
import schemathesis
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jilju.serve.app import app_of
from jilju.serve.door.gate import OPEN_PATHS
from jilju.serve.openapi.route import describe
from jilju.serve.openapi.schemas import RULES
from jilju.serve.openapi.texts import FIELD_TEXTS
from jilju.serve.server import make_server

from .conftest import Connect
from .explore import Findings, explore
from .stub import StubClient, make_context

CALL_S = 30  # of a call in this process: only one that hangs takes so long
FORMS = {"TextFormat", "ResponseFormat"}  # the schema of each is one of two


def described(*, lenient: bool = False) -> dict[str, Any]:
    found = msgspec.to_builtins(describe("0.0.test", model="stub", lenient=lenient))
    assert isinstance(found, dict)
    return found


def test_it_is_valid() -> None:
    description = described()
    schemathesis.openapi.from_dict(description).validate()
    for name, schema in description["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "title" not in schema, f"{name} is known by its name, and its docstring is for programmers"


def test_every_reference_leads_somewhere_and_every_part_is_used() -> None:
    description = described()
    parts = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "headers")
        for name in description["components"][kind]
    }
    assert set(references(description)) == parts


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for inner in value.values() for found in references(inner)]
    return [found for inner in value for found in references(inner)] if isinstance(value, list) else []


def test_its_routes_are_those_of_the_app() -> None:
    app = app_of(make_server(make_context()))
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    paths = described()["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == routes
    open_paths = {
        path for path, methods in paths.items() for operation in methods.values() if not operation["security"]
    }
    assert open_paths == OPEN_PATHS
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_bodies_have_the_fields_that_their_rules_know() -> None:
    schemas = described()["components"]["schemas"]
    bodies = {name for name, schema in schemas.items() if schema.get("additionalProperties") is False}
    assert bodies | FORMS == set(RULES) | {"ResponseStreamOptions"}
    for name, rules in RULES.items():
        (*_, schema) = schemas[name].get("anyOf", [schemas[name]])
        known = rules.fields | set(rules.no_ops) | set(rules.later) | rules.content
        assert set(schema["properties"]) == known, name
        for field in known - set(schema["required"]):
            assert takes_null(schema["properties"][field]), f"{name}.{field} may be left out, so null means that it is"


def takes_null(schema: dict[str, Any]) -> bool:
    return (
        "type" not in schema
        and ({"type": "null"} in schema.get("anyOf", [{"type": "null"}]))
        and None in schema.get("enum", [None])
    )


def test_every_field_of_a_body_has_a_word_said_of_it() -> None:
    description = described()
    schemas = description["components"]["schemas"]
    bodies = {ref.rpartition("/")[2] for ref in references([
        operation["requestBody"] for methods in description["paths"].values() for operation in methods.values() if "requestBody" in operation
    ])}  # fmt: skip
    assert len(bodies) == 8
    for name in bodies:
        silent = [field for field, schema in schemas[name]["properties"].items() if not schema.get("description")]
        assert not silent, (name, silent)
    used = {
        schema["description"]
        for told in schemas.values()
        for schema in told.get("properties", {}).values()
        if "description" in schema
    }
    assert {text for text in FIELD_TEXTS.values() if text not in used} == set(), "texts of fields that are gone"


def test_a_lenient_server_says_so() -> None:
    strict, lenient = (described(lenient=lenient)["components"]["schemas"] for lenient in (False, True))
    for name in RULES.keys() - FORMS:
        assert (strict[name]["additionalProperties"], lenient[name]["additionalProperties"]) == (False, True), name
    assert not [name for name, schema in lenient.items() if schema.get("additionalProperties") is False]


@pytest.mark.anyio
async def test_the_route_gives_it(connect: Connect) -> None:
    async with connect() as (http, _):
        first, second = await http.get("/openapi.json"), await http.get("/openapi.json")
    assert first.json() == described()
    assert first.content == second.content


def explored(stub: StubClient, **settings: Any) -> Findings:
    """Against the app in this process; a call that hangs is an error of the exploration."""
    server = make_server(make_context(stub, allowed_hosts=frozenset({"testserver"})))
    findings = explore(described(), app=within(app_of(server), CALL_S), vocab_size=259, **settings)
    assert server.ledger.imbalance() == 0
    assert not server.ledger.live
    assert not stub.live
    return findings


def within(app: ASGIApp, seconds: float) -> ASGIApp:
    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(seconds):
            await app(scope, receive, send)

    return limited


def test_generated_calls_of_all_routes() -> None:
    findings = explored(StubClient(), phases=["fuzzing"], num_examples=24)
    assert not findings.failures and not findings.errors, findings.text()
    assert findings.num_calls >= 300
    answered = {route for route, status in findings.statuses if status == "200"}
    assert {f"POST /v1/{name}" for name in ("chat/completions", "completions", "responses", "messages")} <= answered


def test_the_bounds_of_every_field_of_the_smaller_routes() -> None:
    """Of all routes in `make soak-api`."""
    routes = r"^/v1/completions$|^/v1/embeddings$|tokenize$|^/v1/models|cancel$|^/[a-z]*$|openapi|view"
    findings = explored(StubClient(), phases=["coverage"], routes=routes, num_examples=1)
    assert not findings.failures and not findings.errors, findings.text()
    assert findings.num_calls > 1000
