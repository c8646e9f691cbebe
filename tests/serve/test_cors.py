"""Pages of other origins: who may call, what a browser is told, and that nothing is when nobody may."""

import pytest

from jilju.config import ApiKey, resolve_serve_config
from jilju.errors import ConfigError

from .conftest import Connect
from .test_answers import CHAT, chat_body

pytestmark = pytest.mark.anyio

PAGE = "https://chat.example.org"
KEYS = (ApiKey("alice", "secret-a"),)
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


def cors_of(headers: object) -> dict[str, str]:
    return {name: value for name, value in dict(headers).items() if name.startswith("access-control")}  # type: ignore[call-overload]


@pytest.mark.parametrize(("allowed", "told"), [({PAGE}, PAGE), ({"*"}, "*"), ({PAGE, "*"}, "*")])
async def test_a_page_that_may_call_reads_the_answer_and_every_refusal(
    connect: Connect, allowed: set[str], told: str
) -> None:
    key = {"authorization": "Bearer secret-a"}
    async with connect(keys=KEYS, allowed_origins=frozenset(allowed)) as (http, _):
        answers = [
            (200, await http.post(CHAT, json=chat_body(max_tokens=1), headers=key | {"origin": PAGE})),
            (200, await http.post(CHAT, json=chat_body(max_tokens=1, stream=True), headers=key | {"origin": PAGE})),
            (200, await http.get("/livez", headers={"origin": "HTTPS://Chat.example.org"})),
            (401, await http.get("/v1/models", headers={"origin": PAGE})),
            (400, await http.post(CHAT, json={}, headers=key | {"origin": PAGE})),
            (404, await http.get("/nowhere", headers=key | {"origin": PAGE})),
            (405, await http.options("/v1/models", headers=key | {"origin": PAGE})),
        ]
        plain = await http.get("/livez")
        own = await http.get("/livez", headers={"origin": "http://localhost"})
    for status, answer in answers:
        assert answer.status_code == status
        cors = cors_of(answer.headers)
        assert cors.keys() == {"access-control-allow-origin", "access-control-expose-headers"}
        assert cors["access-control-allow-origin"] in (
            told,
            told.upper().replace("CHAT", "Chat").replace("EXAMPLE.ORG", "example.org"),
        )
        exposed = cors["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "retry-after-ms", "x-jilju-ignored"} <= set(exposed)
    for answer in (plain, own, *(answer for _, answer in answers)):
        assert answer.headers["vary"] == "Origin"
    assert not cors_of(plain.headers) and not cors_of(own.headers)


async def test_a_preflight_needs_no_key_and_allows_what_was_asked_for(connect: Connect) -> None:
    async with connect(keys=KEYS, allowed_origins=frozenset({PAGE})) as (http, server):
        for path in (CHAT, "/metrics", "/nowhere"):
            answer = await http.options(path, headers={"origin": PAGE, **ASKS})
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["access-control-allow-methods"] == "GET, POST"
            assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
            assert answer.headers["access-control-max-age"] == "600"
            assert (
                "access-control-allow-credentials" not in answer.headers and len(answer.headers["x-request-id"]) == 24
            )
        for odd in ("a b", "x:y", "n\x7f", "x," * 100, ""):
            named = {"origin": PAGE, **ASKS, "access-control-request-headers": odd}
            answer = await http.options(CHAT, headers=named)
            assert answer.headers["access-control-allow-headers"] == "authorization, content-type, x-api-key"
        assert not server.ledger.num_refused


@pytest.mark.parametrize("allowed", [frozenset(), frozenset({PAGE})])
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://chat.example.org", f"{PAGE}.evil.example", f"{PAGE}:444"]
)
async def test_a_page_that_may_not_call_is_told_nothing(connect: Connect, allowed: frozenset[str], origin: str) -> None:
    async with connect(keys=KEYS, allowed_origins=allowed) as (http, _):
        preflight = await http.options(CHAT, headers={"origin": origin, **ASKS})
        call = await http.post(CHAT, json={}, headers={"origin": origin, "x-api-key": "secret-a"})
        twice = await http.get("/livez", headers=[("origin", PAGE), ("origin", origin)])
    for answer in (preflight, call, twice):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert "--allow-origin" in answer.json()["error"]["message"] and not cors_of(answer.headers)


async def test_without_the_flag_there_is_nothing_of_it(connect: Connect) -> None:
    async with connect() as (http, _):
        own = await http.get("/livez", headers={"origin": "http://localhost"})
        asked = await http.options("/v1/models", headers={"origin": "http://localhost", **ASKS})
    assert own.status_code == 200 and asked.status_code == 405
    assert not cors_of(own.headers) and "vary" not in own.headers


async def test_a_wrong_host_is_refused_before_any_page_is_let_in(connect: Connect) -> None:
    async with connect(allowed_origins=frozenset({"*"})) as (http, _):
        answer = await http.options(CHAT, headers={"host": "evil.example", "origin": PAGE, **ASKS})
    assert answer.status_code == 403 and not cors_of(answer.headers)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("https://Chat.Example.org", PAGE), ("https://chat.example.org:443", PAGE), ("http://a:80", "http://a"),
        ("http://a:8080", "http://a:8080"), ("http://[::1]:3000", "http://[::1]:3000"), ("tauri://localhost", "tauri://localhost"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"), ("*", "*"),
    ],
)  # fmt: skip
def test_origins_are_kept_as_browsers_send_them(given: str, wanted: str) -> None:
    assert resolve_serve_config(None, {"allow_origin": (given,)}, {}).allow_origin == (wanted,)


@pytest.mark.parametrize(
    "given", ["null", "chat.example.org", "https://", "https://a/", "https://a/x", "https://*.a", "https://a:b"]
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--allow-origin is .* scheme://host"):
        resolve_serve_config(None, {"allow_origin": (given,)}, {})
