"""The door: hosts, origins, keys, routes, bodies, and how every refusal looks."""

import base64
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jilju.config import ApiKey
from jilju.errors import ConfigError
from jilju.serve.context import ServeLimits
from jilju.serve.door.auth import check_bind, host_name, same_origin

from .conftest import Connect
from .stub import ByteTokenizer, StubClient
from .test_answers import CHAT, COMPLETIONS, chat_body

pytestmark = pytest.mark.anyio

KEYS = (ApiKey("alice", "secret-a"), ApiKey("bob", "secret-b"))


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/", "/view/x.js", "/nowhere"])
async def test_every_route_but_livez_needs_a_key(connect: Connect, path: str) -> None:
    """What which route needs is a table of its own, in test_keys."""
    async with connect(keys=KEYS) as (http, server):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"x-api-key": "secret-c"},
            {"authorization": "Basic !!"},
        ):
            response = await http.get(path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            scheme = "Basic" if path == "/" or path.startswith("/view") else "Bearer"
            assert response.headers["www-authenticate"].startswith(scheme)
        assert (await http.get("/livez")).status_code == 200
        assert server.ledger.num_refused == {"invalid_api_key": 4}


async def test_keys_by_bearer_header_and_basic_and_their_salts_differ(connect: Connect) -> None:
    stub = StubClient()
    basic = base64.b64encode(b"anyone:secret-b").decode()
    async with connect(stub, keys=KEYS) as (http, _):
        for headers in (
            {"authorization": "Bearer secret-a"},
            {"x-api-key": "secret-a"},
            {"authorization": f"Basic {basic}"},
        ):
            assert (await http.post(CHAT, json=chat_body(max_tokens=1), headers=headers)).status_code == 200
    salts = [request.salt for request in stub.requests]
    assert salts[0] == salts[1] != salts[2] and b"secret" not in b"".join(salts) and all(salts)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:9", True), ("[::1]:8000", True), ("box.lan", True),
        ("evil.example", False), ("localhost.evil.example", False), ("", False), ("user@localhost", False), ("localhost/x", False),
    ],
)  # fmt: skip
async def test_hosts(connect: Connect, host: str, allowed: bool) -> None:
    async with connect(allowed_hosts=frozenset({"box.lan"})) as (http, _):
        response = await http.get("/livez", headers={"host": host})
    assert response.status_code == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:8000", True),
        ("http://localhost:3000", False),
        ("https://evil.example", False),
        ("null", False),
    ],
)
async def test_origins(connect: Connect, origin: str, allowed: bool) -> None:
    async with connect() as (http, _):
        response = await http.get("/version", headers={"host": "localhost:8000", "origin": origin})
    assert response.status_code == (200 if allowed else 403)
    assert "access-control-allow-origin" not in response.headers


def test_host_names() -> None:
    assert host_name("[::1]:80") == "::1" and host_name("A.b:1") == "a.b" and host_name("[::1") == ""
    assert host_name("localhost:80:1") == host_name("localhost:port") == host_name("localhost:99999") == ""
    assert same_origin("http://[::1]:80", "[::1]:80") and not same_origin("http://[", "x")


def test_a_bind_that_strangers_reach_needs_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.53"):
        check_bind(host, (), insecure=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="--api-key"):
            check_bind(host, (), insecure=False)
        check_bind(host, KEYS, insecure=False)
        check_bind(host, (), insecure=True)


async def test_every_answer_has_our_id_and_the_clients_only_as_a_cleaned_label(connect: Connect) -> None:
    async with connect() as (http, _):
        plain = await http.get("/livez")
        named = await http.post(CHAT, json={}, headers={"x-request-id": "a\x1b[31m b\tc" + "d" * 1000})
        both = await http.get("/livez", headers={"x-request-id": "one", "x-client-request-id": "two"})
    assert len(plain.headers["x-request-id"]) == 24 and "x-client-request-id" not in plain.headers
    assert named.status_code == 400 and named.headers["x-client-request-id"] == ("a[31mbc" + "d" * 1000)[:128]
    assert named.headers["x-request-id"] != plain.headers["x-request-id"]
    assert both.headers["x-client-request-id"] == "two"
    assert plain.headers["x-content-type-options"] == "nosniff"


async def test_unknown_routes_and_methods(connect: Connect) -> None:
    async with connect() as (http, _):
        for path in ("/v1/nothing", "/v1/chat/completions/", "/view/../app.py", "/view/none.js"):
            response = await http.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "route_not_found")
        wrong = await http.get(CHAT)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        assert (await http.options("/v1/models")).status_code == 405
        gone = await http.get("/v1/models/other")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"x"', 400, "invalid_json"),
        (b"{} x", 400, "invalid_json"),
        (b"\xef\xbb\xbf{}", 400, "invalid_json"),
        ('{"model":"x"}'.encode("utf-16"), 400, "invalid_json"),
        (b'{"model":"\xff"}', 400, "invalid_json"),
        (b'{"model":"stub","model":"stub"}', 400, "invalid_json"),
        (b'{"messages":[{"role":"user","role":"user","content":""}]}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, 400, "invalid_json"),
        (b'{"metadata":"' + b"[" * 100 + b'"}', 400, "missing_parameter"),
        (b'{"seed":' + b"9" * 1_000_000 + b"}", 400, "invalid_value"),
        (b'{"temperature":1e400}', 400, "invalid_value"),
        (b'{"temperature":0.' + b"1" * 50 + b"}", 400, "invalid_value"),
        (b'{"a":[' + b"[]," * 200_000 + b"1]}", 400, "invalid_json"),
        (b"{" + b",".join(b'"%d":1' % index for index in range(200_001)) + b"}", 400, "invalid_json"),
        (b'{"temperature":NaN}', 400, "invalid_value"),
        (b'{"temperature":-Infinity}', 400, "invalid_value"),
        (b'{"metadata":{"a":[1e999]}}', 400, "invalid_value"),
        (b'{"user":"\\ud800"}', 400, "invalid_value"),
        (b'{"user\\udfff":1}', 400, "invalid_value"),
        (b'{"\\"' + b'\\"' * 100_000, 400, "invalid_json"),
        (b'"' + b"\\" * 100_001, 400, "invalid_json"),
    ],
)
async def test_bodies_that_are_not_good_json(connect: Connect, body: bytes, status: int, code: str) -> None:
    async with connect() as (http, server):
        response = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert server.ledger.num_ended.total() == 1
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert len(response.json()["error"]["message"]) < 400


async def test_the_param_of_a_bad_number_is_its_path(connect: Connect) -> None:
    async with connect() as (http, _):
        for body, param in (('{"a":{"b":[1,1e999]}}', "a.b[1]"), ('{"stop":["x","\\udc00"]}', "stop[1]")):
            response = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert response.json()["error"]["param"] == param


async def test_media_types_and_encodings(connect: Connect) -> None:
    good = json.dumps(chat_body(max_tokens=1)).encode()
    async with connect() as (http, _):

        async def status(**headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return (await http.post(CHAT, content=good, headers=named)).status_code

        assert await status(content_type="application/json") == 200
        assert await status(content_type="application/JSON; charset=UTF-8") == 200
        assert await status(content_type="application/json;charset=UTF8") == 200
        assert await status(content_type="application/json; charset=latin-1") == 415
        assert await status(content_type="text/plain") == 415
        assert await status(content_type="application/json", content_encoding="identity") == 200
        for encoding in ("gzip", "deflate", "br"):
            assert await status(content_type="application/json", content_encoding=encoding) == 415
        packed = await http.post(CHAT, content=gzip.compress(good))
        assert packed.status_code == 415 and packed.json()["error"]["code"] == "unsupported_media_type"


async def test_bodies_are_bounded_in_size_declared_or_not_and_in_time(connect: Connect) -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    async with connect(limits=ServeLimits(body_bytes=10_000)) as (http, server):
        declared = await http.post(CHAT, content=b" " * 10_001, headers=headers)
        streamed = await http.post(CHAT, content=chunks(1000), headers=headers)
        fits = await http.post(CHAT, content=chunks(10), headers=headers)
        assert server.ledger.num_ended == {("failed", "body_too_large"): 2, ("failed", "invalid_json"): 1}
    for response in (declared, streamed):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert response.headers["connection"] == "close"
    assert fits.json()["error"]["code"] == "invalid_json"


async def test_errors_inside_are_logged_and_not_told(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ByteTokenizer):
        def encode(self, text: str, **flags: Any) -> list[int]:
            raise RuntimeError("the secret path /root/x")

    async with connect(tokenizer=Broken()) as (http, server):
        for path, body in ((COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            response = await http.post(path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
            assert "secret" not in response.text and response.headers["x-request-id"] in response.text
        assert server.ledger.num_ended == {("failed", "internal"): 1}
    assert sum("the secret path" in str(record.exc_info) for record in caplog.records) == 2


async def test_overload_and_not_ready_say_when_to_come_back(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, limits=ServeLimits(queue_requests=2)) as (http, server):
        many = await http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]})
        assert (many.status_code, many.json()["error"]["code"]) == (429, "overloaded")
        assert many.json()["error"]["type"] == "rate_limit_error"
        stub.state = "restarting"
        waiting = await http.post(CHAT, json=chat_body())
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "not_ready")
        for response in (many, waiting):
            seconds, ms = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
            assert 1 <= seconds <= 60 and (seconds - 1) * 1000 < ms <= seconds * 1000
        assert server.ledger.num_ended == {("shed", "overloaded"): 1, ("shed", "not_ready"): 1}
    assert not stub.requests


async def test_pages(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "index.html").write_text("<!doctype html>")
    (tmp_path / "chat" / "chat.js").write_text("export {}")
    (tmp_path / "__init__.py").write_text("")
    async with connect(view_dir=tmp_path) as (http, _):
        page = await http.get("/")
        script = await http.get("/view/chat/chat.js")
        again = await http.get("/view/chat/chat.js", headers={"if-none-match": f'"x", W/{script.headers["etag"]}'})
        for path in (
            "/view/__init__.py",
            "/view/chat",
            "/view/../chat/index.html",
            "/view/%2e%2e/chat/index.html",
            "/view//etc/passwd",
            "/engine",  # a page that this directory lacks
            "/runs/chatcmpl-1",
        ):
            assert (await http.get(path)).status_code == 404
    assert (page.text, page.headers["content-type"]) == ("<!doctype html>", "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert (again.status_code, again.content) == (304, b"")


async def test_a_host_that_is_refused_is_told_the_flag(connect: Connect) -> None:
    async with connect() as (http, _):
        answer = await http.get("/livez", headers={"host": "Box.lan:8000"})
        assert "--allow-host box.lan" in answer.json()["error"]["message"]
        assert "--allow-host NAME" in (await http.get("/livez", headers={"host": ""})).json()["error"]["message"]


USER = {"role": "user", "content": "x"}
UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat_body(max_tokens=1), ""),
    (CHAT, chat_body(max_tokens=1, nonsense=None), "nonsense"),
    (CHAT, chat_body(max_tokens=1, stream=True, a=1, stream_options={"b": {"c": 1}}), "a, stream_options.b"),
    (CHAT, {"max_tokens": 1, "messages": [USER, USER | {"x": 1}]}, "messages[1].x"),
    (
        CHAT,
        {"max_tokens": 1, "messages": [USER | {"content": [{"type": "text", "text": "t", "y": [1]}]}]},
        "messages[0].content[0].y",
    ),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1, "a, b\r\nc: d": 1, "키": 2}, "a%2C%20b%0D%0Ac%3A%20d, %ED%82%A4"),
    ("/tokenize", {"prompt": "x", "z": 1}, "z"),
    ("/detokenize", {"tokens": [1], "z": 1}, "z"),
]


@pytest.mark.parametrize(("path", "body", "wanted"), UNKNOWN)
async def test_unknown_fields_are_named_and_dropped_where_that_is_wanted(
    connect: Connect, path: str, body: dict[str, Any], wanted: str
) -> None:
    async with connect() as (http, _):
        strict = await http.post(path, json=body)
    assert strict.status_code == (400 if wanted else 200) and "x-jilju-ignored" not in strict.headers
    async with connect(lenient=True) as (http, server):
        answer = await http.post(path, json=body)
        assert (answer.status_code, answer.headers.get("x-jilju-ignored", "")) == (200, wanted)
        count = len(wanted.split(", ")) if wanted else 0
        assert server.ledger.num_ignored_fields == count
        assert f'jilju_ignored_fields_total{{model="stub"}} {count}.0' in (await http.get("/metrics")).text


async def test_lenience_is_for_unknown_fields_alone_and_its_header_is_bounded(connect: Connect) -> None:
    async with connect(lenient=True) as (http, _):
        refused: list[dict[str, Any]] = [
            {"functions": [{}]},
            {"temperature": 9},
            {"prompt_embeds": "x"},
            {"store": True},
        ]
        for field in refused:
            answer = await http.post(CHAT, json=chat_body(**field, unknown=1))
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in field
        many = await http.post(CHAT, json=chat_body(max_tokens=1) | {f"{number:0200}": 1 for number in range(1000)})
    assert many.status_code == 200
    named = many.headers["x-jilju-ignored"]
    assert named.endswith(", ...") and len(named) <= 1030 and named.startswith("0" * 200)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/v1/embeddings"])
async def test_a_name_of_a_model_is_that_name_and_nothing_else(connect: Connect, path: str) -> None:
    """No path, no other case, no letter that looks like another."""
    fields: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [USER]},
        "/detokenize": {"tokens": [1]},
        "/v1/embeddings": {"input": "x"},
    }
    async with connect() as (http, _):
        for name in (
            "../../etc/passwd",
            "/etc/passwd",
            "",
            "x" * 10_240,
            "STUB",
            "\u0455tub",
            "stub ",
            "stub\0",
            "stub/",
        ):
            answer = await http.post(path, json=fields.get(path, {"prompt": "x"}) | {"model": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name
            assert len(answer.json()["error"]["message"]) < 500
        for name in ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "STUB", "x" * 10_240, "stub/"):
            assert (await http.get(f"/v1/models/{name}")).status_code == 404
