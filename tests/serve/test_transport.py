"""The transport's bounds, over real sockets: heads that are too large, too slow or no HTTP, and too many connections."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from jilju.serve.context import ServeLimits

from .stub import StubClient
from .test_answers import CHAT, chat_body
from .test_sockets import head, running

pytestmark = pytest.mark.anyio


async def exchange(port: int, *parts: bytes, pause_s: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back until the server closes; (0, {}, b"") for nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause_s)
    raw = await reader.read()
    writer.close()
    if not raw:
        return 0, {}, b""
    top, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status.split()[1]), headers, body


@pytest.mark.parametrize(
    "sent",
    [
        [b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 40_000 + b"\r\n\r\n"],
        [b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 1_000_000],
        [b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\n"],
        [b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"] + [b"X-A: " + b"c" * 9_000 + b"\r\n"] * 4,
    ],
)
async def test_a_head_that_is_too_large(sent: list[bytes]) -> None:
    async with running(StubClient()) as (port, _):
        status, headers, body = await exchange(port, *sent, pause_s=0.01)
    assert (status, json.loads(body)["error"]["code"]) == (431, "headers_too_large")
    assert headers["connection"] == "close" and len(headers["x-request-id"]) == 24


async def test_a_head_of_30_kib_passes_and_a_body_is_not_counted_to_it() -> None:
    body = json.dumps(chat_body("x" * 100) | {"user": "u" * 100_000}).encode()
    large = head(CHAT, body).replace(b"\r\n\r\n", b"\r\nX-A: " + b"a" * 30_000 + b"\r\nConnection: close\r\n\r\n")
    async with running(StubClient()) as (port, _):
        status, _, _ = await exchange(port, large + body)
    assert status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHos"])
async def test_a_head_that_is_too_slow(sent: bytes) -> None:
    async with running(StubClient(), limits=ServeLimits(head_s=0.1)) as (port, _):
        status, _, body = await exchange(port, sent)
    assert status == (408 if sent else 0)
    if sent:
        assert json.loads(body)["error"]["code"] == "request_timeout"


async def test_a_body_that_is_too_slow() -> None:
    async with running(StubClient(), limits=ServeLimits(body_s=0.1)) as (port, _):
        status, headers, body = await exchange(port, head(CHAT, b"x" * 100) + b"{")
    assert (status, json.loads(body)["error"]["code"], headers["connection"]) == (408, "request_timeout", "close")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -3\r\n\r\nabcd",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    ],
)
async def test_bytes_that_are_no_good_http(sent: bytes) -> None:
    async with running(StubClient(), limits=ServeLimits(body_s=0.2, head_s=0.2)) as (port, _):
        status, _, body = await exchange(port, sent)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/livez")).status_code == 200
    assert status in (400, 0) and (not body or json.loads(body)["error"]["type"] == "invalid_request_error")


async def test_connections_are_bounded() -> None:
    async with running(StubClient(), limits=ServeLimits(connections=2)) as (port, _):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        status, headers, body = await exchange(port)
        assert (status, json.loads(body)["error"]["code"]) == (429, "overloaded")
        assert "retry-after" in headers
        for _, writer in idle:
            writer.close()


async def test_many_calls_on_one_connection_each_have_their_own_time_for_the_head() -> None:
    async with (
        running(StubClient(), limits=ServeLimits(head_s=0.15)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        for _ in range(3):
            assert (await http.get("/livez")).status_code == 200
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("declared", [True, False])
async def test_a_client_that_sends_too_much_reads_why(declared: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100_000

    async with (
        running(StubClient(), limits=ServeLimits(body_bytes=1_000_000)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        content = b" " * 3_000_000 if declared else body()
        response = await http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("stream", [True, False])
async def test_http_1_0_gets_no_chunks(stream: bool) -> None:
    """What it gets is what HTTP/1.1 gets, ended by its length or with the connection."""
    body = json.dumps(chat_body(stream=stream, seed=7)).encode()  # the same answer twice
    old = head(CHAT, body).replace(b"HTTP/1.1", b"HTTP/1.0")
    async with running(StubClient()) as (port, _):
        status, headers, answer = await exchange(port, old + body)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            whole = (await http.post(CHAT, content=body, headers={"content-type": "application/json"})).text
    assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
    assert ("content-length" in headers) is not stream
    lines = answer.decode().splitlines()
    assert len(lines) == len(whole.splitlines())
    assert all(line == "" or line.startswith("data: ") for line in lines) if stream else json.loads(answer)
