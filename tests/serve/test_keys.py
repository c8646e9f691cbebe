"""Keys: the file of them, what each is good for, and the table of that which the documentation has."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from jilju.config import ALL_SCOPES, ApiKey, KeyScope, ServeConfig
from jilju.errors import ConfigError, InvalidValue
from jilju.serve.app import app_of
from jilju.serve.door.auth import KeyRing, cache_salt, priority_of
from jilju.serve.door.key_file import keys_of, read_key_file
from jilju.serve.server import make_server

from .conftest import Connect
from .explore import ENDLESS
from .stub import StubClient, make_context
from .test_answers import CHAT, COMPLETIONS, chat_body
from .test_sockets import running

pytestmark = pytest.mark.anyio

FILE = """
[[key]]
name = "page"
key = "secret-of-the-page"
scopes = ["generate", "view"]
tokens_per_minute = 20
tokens_per_day = 1000
min_priority = 10

[[key]]
name = "all"
key = "secret-of-all"
"""


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_file_of_keys(tmp_path: Path) -> None:
    page, everything = read_key_file(write(tmp_path / "keys.toml", FILE))
    assert page == ApiKey("page", "secret-of-the-page", frozenset({"generate", "view"}), 20, 1000, 10)
    assert everything == ApiKey("all", "secret-of-all") and everything.scopes == ALL_SCOPES


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "all"', "", ["key[1]", "missing", "`name`"]),
        ('name = "all"', 'nam = "all"', ["key[1]"]),
        ('name = "all"', 'name = "a b"', ["key[1]", "'a b'", "1 to 64"]),
        ('name = "all"', 'name = "page"', ["['page', 'page']", "distinct"]),
        ('key = "secret-of-all"', 'key = "secret-of-the-page"', ["page and all", "the same secret"]),
        ('key = "secret-of-all"', 'key = "short"', ["key[1]", "key all", "8 printable"]),
        ('key = "secret-of-all"', "key = 12345678", ["key[1].key", "str"]),
        ("min_priority = 10", "min_priority = 101", ["key[0].min_priority", "<= 100"]),
        ("tokens_per_day = 1000", "tokens_per_day = 0", ["key[0].tokens_per_day", ">= 1"]),
        ("tokens_per_day = 1000", "tokens_per_day = 1.5", ["key[0].tokens_per_day", "int"]),
        ("tokens_per_day = 1000", "tokens_per_year = 1", ["key[0]", "`tokens_per_year`", "takes name, key, scopes"]),
        ('"view"]', '"admin"]', ["key[0]", "'admin'", "generate, metrics, tokenize, view"]),
        ('["generate", "view"]', "[]", ["key[0].scopes", ">= 1"]),
        ("[[key]]", "[key]", ["is not TOML"]),
        (FILE, "[key]\nname = 'a'", ["key: Expected `array`"]),
        (FILE, "keys = 1", ["the file", "`key"]),
        (FILE, "", ["the file", "missing", "`key`"]),
        ("20", "", ["is not TOML", "line 6"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_and_where(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write(tmp_path / "keys.toml", FILE.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        keys_of(ServeConfig(api_key_file=str(path)))
    message = refused.value.message
    assert message.startswith(str(path)) and all(word in message for word in words), message
    assert "secret-of" not in message


@pytest.mark.parametrize(
    ("mode", "is_closed"), [(0o600, True), (0o400, True), (0o644, False), (0o602, False), (0o660, False)]
)
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int, is_closed: bool) -> None:
    path = write(tmp_path / "keys.toml", FILE, mode)
    refused = (
        contextlib.nullcontext() if is_closed else pytest.raises(ConfigError, match=f"mode {mode:o}, .* chmod 600")
    )
    with refused:
        read_key_file(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, words in (("none", "cannot be read"), ("", "cannot be read"), ("pipe", "no regular file")):
        with pytest.raises(ConfigError, match=words):
            read_key_file(tmp_path / name)
    (tmp_path / "raw").write_bytes(b"\xff")
    (tmp_path / "raw").chmod(0o600)
    with pytest.raises(ConfigError, match="not UTF-8 at byte 0"):
        read_key_file(tmp_path / "raw")
    with pytest.raises(ConfigError, match="at most"):
        read_key_file(write(tmp_path / "large", "#" * (2 << 20)))


def test_keys_of_flags_and_file_are_distinct_together(tmp_path: Path) -> None:
    path = str(write(tmp_path / "keys.toml", FILE))
    own = ApiKey("own", "secret-of-mine")
    assert [key.name for key in keys_of(ServeConfig(api_key=(own,), api_key_file=path))] == ["own", "page", "all"]
    assert keys_of(ServeConfig(api_key=(own,))) == (own,)
    for key in (ApiKey("page", "secret-of-mine"), ApiKey("own", "secret-of-all")):
        with pytest.raises(ConfigError, match="--api-key"):
            keys_of(ServeConfig(api_key=(key,), api_key_file=path))


def test_a_key_is_printed_by_its_name_alone() -> None:
    assert "secret" not in repr(ApiKey("a", "secret-a")) + str([ApiKey("a", "secret-a")])


async def test_a_hangup_reads_the_file_anew_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.toml", FILE)
    config = ServeConfig(api_key_file=str(path))
    caplog.set_level("INFO", logger="jilju.serve")
    stub = StubClient(hang_at=2)

    def told(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    async def hangup(words: str) -> None:
        before = told(words)
        os.kill(os.getpid(), signal.SIGHUP)
        while told(words) == before:
            await asyncio.sleep(0.002)

    async with (
        running(stub, keys=keys_of(config), read_keys=lambda: keys_of(config)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):

        async def status(secret: str) -> int:
            return (await http.get("/version", headers={"x-api-key": secret})).status_code

        live = asyncio.create_task(
            http.post(CHAT, json=chat_body(stream=True, max_tokens=5), headers={"x-api-key": "secret-of-the-page"})
        )
        while not stub.requests:
            await asyncio.sleep(0.002)
        write(path, FILE.replace("secret-of-the-page", "a-new-secret"))
        await hangup("read anew: 2 keys (page, all)")
        assert [await status(secret) for secret in ("secret-of-the-page", "a-new-secret")] == [401, 200]
        write(path, FILE.replace("secret-of-the-page", "short"))
        await hangup("the keys stay as they were: ")
        assert [await status(secret) for secret in ("a-new-secret", "short")] == [200, 401]
        stub.abort(stub.requests[0].id)
        assert (await live).status_code == 200  # a call that runs goes on
    assert "secret-of" not in caplog.text and "a-new-secret" not in caplog.text


# ---- what a key is good for -----------------------------------------------------------------------------------------


def test_every_secret_is_compared_and_the_first_match_counts() -> None:
    keys = KeyRing((ApiKey("a", "secret-a"), ApiKey("b", "secret-b")))
    assert keys.match([]) is None and keys.match(["secret-c", ""]) is None
    for shown, name in ((["secret-b"], "b"), (["x", "secret-a"], "a"), (["secret-b", "secret-a"], "a")):
        key = keys.match(shown)
        assert key is not None and key.name == name
    assert keys and not KeyRing(())


def test_the_priority_of_a_call() -> None:
    for key, given, wanted in (
        (None, None, 0),
        (None, -5, -5),
        (ApiKey("k", "secret-1"), -100, -100),
        (ApiKey("k", "secret-1", min_priority=10), None, 10),
        (ApiKey("k", "secret-1", min_priority=10), 10, 10),
        (ApiKey("k", "secret-1", min_priority=-10), None, 0),
        (ApiKey("k", "secret-1", min_priority=-10), -10, -10),
    ):
        assert priority_of(key, given) == wanted
    with pytest.raises(InvalidValue, match=r"priority is 9; the key k allows 10 and above") as refused:
        priority_of(ApiKey("k", "secret-1", min_priority=10), 9)
    assert refused.value.param == "priority"


def test_salts_are_of_the_key_and_the_call_unless_the_cache_is_shared() -> None:
    a, b = ApiKey("a", "secret-a"), ApiKey("b", "secret-b")
    separate = {cache_salt(key, given) for key in (None, a, b) for given in (None, "", "x")}
    shared = {cache_salt(key, given, is_shared=True) for key in (None, a, b) for given in (None, "", "x")}
    assert len(separate) == 9 and shared == {cache_salt(None, given) for given in (None, "", "x")}
    assert len(shared) == 3


async def test_floor_quota_and_shared_cache_reach_the_calls(connect: Connect) -> None:
    keys = (ApiKey("slow", "secret-1", tokens_per_minute=60, min_priority=10), ApiKey("free", "secret-2"))
    stub = StubClient()
    async with connect(stub, keys=keys, shared_prefix_cache=True) as (http, server):

        async def post(secret: str, **fields: object) -> httpx.Response:
            body = {"prompt": "abc", "max_tokens": 5, **fields}
            return await http.post(COMPLETIONS, json=body, headers={"x-api-key": secret})

        refused = await post("secret-1", priority=9)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
        for secret, priority in (("secret-1", 10), ("secret-2", 0)):
            assert (await post(secret)).status_code == 200
            assert stub.requests[-1].priority == priority
        assert stub.requests[0].salt == stub.requests[1].salt
        limited = await post("secret-1", max_tokens=100)
        for _ in range(8):
            if limited.status_code == 429:
                break
            limited = await post("secret-1", max_tokens=50)
        assert limited.json()["error"]["code"] == "rate_limit_exceeded"
        assert limited.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(limited.headers["retry-after"]) <= 60 and int(limited.headers["retry-after-ms"]) >= 1000
        assert (await post("secret-2", max_tokens=100)).status_code == 200
        assert server.ledger.num_ended["failed", "rate_limit_exceeded"] == 1


# ---- the table -------------------------------------------------------------------------------------------------------

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
DOCS = Path(__file__).parents[2] / "docs" / "api.md"
SECRETS = {"bad": "secret-nobodys", "full": "secret-all", **{f"only {s}": f"secret-only-{s}" for s in ALL_SCOPES}}


def published() -> dict[tuple[str, str], str]:
    """(method, path) -> what it needs, as docs/api.md says."""
    section = DOCS.read_text(encoding="utf-8").partition("| Route | Needs |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [re.fullmatch(r"\| `(\w+) (\S+)` \| ([a-z ]+) \|", line) for line in section.splitlines()]
    assert all(rows), section
    return {(row[1], row[2]): row[3] for row in rows if row}


def test_the_table_has_every_route_and_no_other() -> None:
    app = app_of(make_server(make_context()))
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(published()) == routes
    assert set(published().values()) <= ALL_SCOPES | {"no key", "any key"}


def status_wanted(
    table: Mapping[tuple[str, str], str], method: str, path: str, scopes: frozenset[KeyScope] | None
) -> int:
    """401, 403, 405, or 0 for what the route itself answers; `scopes` None: no key that is known."""
    needs = table.get(("GET" if method == "HEAD" else method, path))
    if scopes is None and not any(need == "no key" for (_, other), need in table.items() if other == path):
        return 401
    if needs is None:
        return 405
    return 403 if needs in ALL_SCOPES and needs not in (scopes or ()) else 0


@pytest.mark.parametrize("path", sorted({path for _, path in published()} | {"/nowhere"}))
async def test_every_route_method_and_key_get_what_the_table_says(connect: Connect, path: str, tmp_path: Path) -> None:
    for name in ("chat/index.html", "engine/index.html", "run/index.html", "x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    keys: list[ApiKey] = [ApiKey("full", SECRETS["full"])]
    keys += [ApiKey(f"only-{scope}", SECRETS[f"only {scope}"], frozenset({scope})) for scope in ALL_SCOPES]
    table = published()
    async with connect(keys=tuple(keys), view_dir=tmp_path) as (http, server):
        if path == ENDLESS:
            server.drain.begin()  # then it answers with 503
        for method in METHODS:
            for secret in (None, *SECRETS.values()):
                key = server.keys.match([] if secret is None else [secret])
                url = re.sub(r"\{\w+\}", "x", path)
                headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
                answer = await http.request(method, url, headers=headers)
                code = "" if method == "HEAD" or answer.status_code < 400 else answer.json()["error"].get("code", "")
                if path == "/nowhere":
                    assert answer.status_code == (401 if key is None else 404)
                    continue
                wanted = status_wanted(table, method, path, None if key is None else key.scopes)
                if wanted:
                    assert answer.status_code == wanted, (method, path, secret)
                    if code:
                        assert code == {401: "invalid_api_key", 403: "forbidden", 405: "method_not_allowed"}[wanted]
                    if wanted == 403 and code:
                        assert (
                            f"scope {table['GET' if method == 'HEAD' else method, path]}"
                            in answer.json()["error"]["message"]
                        )
                else:
                    assert answer.status_code not in (401, 403, 405) and code != "route_not_found", (
                        method,
                        path,
                        secret,
                    )
