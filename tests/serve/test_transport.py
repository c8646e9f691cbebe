"""The transport's bounds, over real sockets: heads and bodies that are too large, too slow or no HTTP, readers that are slow,
and too many connections.
"""

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from jilju.serve.context import ServeLimits
from jilju.serve.door.transport import MAX_CHUNKS, Transport

from .stub import ByteTokenizer, StubClient
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


GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = b'{"prompt":"x"}'
BAD_BYTES = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 by preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 by name": b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "HTTP/1.2": b"GET /livez HTTP/1.2\r\nHost: localhost\r\n\r\n",
    "bare LF": b"GET /livez HTTP/1.1\nHost: localhost\n\n",
    "a folded header": GET + b"X-A: b\r\n c\r\n\r\n",
    "NUL": GET + b"X: a\0b\r\n\r\n",
    "a value that is not ASCII": GET + b"X: \xc3\xa9\r\n\r\n",
    "a name that is not ASCII": GET + b"X\xe9: a\r\n\r\n",
    "a space before the colon": GET + b"X : a\r\n\r\n",
    "Expect of something else": GET + b"Expect: 200-ok\r\n\r\n",
    "Upgrade to a web socket": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "Upgrade to h2c": POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 14\r\n\r\n" + BODY,
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": POST + b"Content-Length: 14\r\nContent-Length: 14\r\n\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: 14, 14\r\n\r\n" + BODY,
    "a length below 0": POST + b"Content-Length: -3\r\n\r\nabcd",
    "a length with a sign": POST + b"Content-Length: +14\r\n\r\n" + BODY,
    "a length in hex": POST + b"Content-Length: 0xe\r\n\r\n" + BODY,
    "a length beyond 64 bits": POST + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "a length and chunks": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked is not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk of no size": CHUNKED + b"zz\r\n",
    "a chunk below 0": CHUNKED + b"-1\r\n",
    "a chunk beyond 64 bits": CHUNKED + b"f" * 17 + b"\r\n",
    "a chunk that goes on": CHUNKED + b"3\r\nabcd\r\n",
}


async def test_bytes_that_are_no_good_http() -> None:
    async with running(StubClient()) as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        for number, (what, sent) in enumerate(BAD_BYTES.items(), 1):
            status, headers, body = await exchange(port, sent)
            assert (what, status) == (what, 400)
            assert (what, json.loads(body)["error"]["type"]) == (what, "invalid_request_error")
            assert headers["connection"] == "close" and len(headers["x-request-id"]) == 24
            told = f'jilju_requests_refused_total{{code="invalid_value",model="stub"}} {number}.0'
            assert told in (await http.get("/metrics")).text, what


@pytest.mark.parametrize("path", ["/tokenize", CHAT])
@pytest.mark.parametrize("is_endless", [True, False])
async def test_a_body_in_many_chunks(path: str, is_endless: bool) -> None:
    """65,536 at most, the last and empty one too; the peer that goes on reads why nobody listens."""
    content = BODY if path == "/tokenize" else json.dumps(chat_body(max_tokens=1)).encode()
    few = MAX_CHUNKS - 3
    sent = CHUNKED.replace(b"/tokenize", path.encode()).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    sent += b"1\r\n \r\n" * (2 * MAX_CHUNKS if is_endless else few) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    async with running(StubClient()) as (port, _):
        status, _, body = await exchange(port, sent)
    assert status == (413 if is_endless else 200)
    assert not is_endless or json.loads(body)["error"]["code"] == "body_too_large"


async def test_trailers_are_read_and_mean_nothing() -> None:
    trailers = b"Host: evil\r\nContent-Type: text/plain\r\nX-Client-Request-Id: evil\r\nContent-Encoding: gzip\r\n"
    start = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"e\r\n%b\r\n0\r\n" % BODY
    async with running(StubClient()) as (port, _):
        status, headers, _ = await exchange(port, start + trailers + b"\r\n")
        assert status == 200 and "x-client-request-id" not in headers
        status, _, body = await exchange(port, start + b"X: y\r\n" * 10_000 + b"\r\n")
        assert (status, json.loads(body)["error"]["code"]) == (431, "headers_too_large")


async def test_what_follows_a_body_that_is_longer_than_it_said_is_not_answered() -> None:
    """The call is, by the bytes that it said it has; then the connection ends."""
    async with running(StubClient()) as (port, _):
        status, headers, body = await exchange(port, POST + b"Content-Length: 14\r\n\r\n" + BODY + b"}}}}")
    assert (status, headers["connection"]) == (200, "close") and json.loads(body)["count"] == 1


async def test_garbage_behind_calls_ends_the_connection_after_their_answers() -> None:
    body = json.dumps(chat_body(stream=True, max_tokens=3)).encode()
    async with running(StubClient(delay_s=0.01)) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(CHAT, body) + body + GET + b"\r\n" + b"\0\0\0\0")
        answers = (await reader.read()).split(b"HTTP/1.1 ")[1:]
        writer.close()
    assert [answer[:3] for answer in answers] == [b"200", b"200"]
    assert b"data: [DONE]" in answers[0] and b"connection: close" in answers[1]


async def test_continue_is_said_to_who_asks_and_a_range_is_not_served() -> None:
    async with running(StubClient()) as (port, _):
        expecting = POST + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 14\r\n\r\n"
        status, _, rest = await exchange(port, expecting, BODY, pause_s=0.01)
        assert status == 100 and rest.startswith(b"HTTP/1.1 200 ")
        status, headers, body = await exchange(port, GET + b"Range: bytes=0-1\r\nConnection: close\r\n\r\n")
        assert (status, json.loads(body)) == (200, {"status": "ok"}) and "content-range" not in headers


@pytest.mark.parametrize("sent", [b"x" * 10, b""])
async def test_a_body_that_nobody_reads_has_its_time_too(sent: bytes) -> None:
    """A route that takes none has answered; the connection is not kept for the rest, however it trickles."""
    limits = ServeLimits(body_s=0.1)
    async with running(StubClient(), limits=limits) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"Content-Length: 1000\r\n\r\n" + sent)
        answer = await reader.read()  # to the end
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" not in answer


async def test_a_body_that_nobody_reads_is_bounded() -> None:
    async with running(StubClient(), limits=ServeLimits(body_bytes=10_000)) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"Content-Length: 1000000\r\n\r\n")
        await reader.readuntil(b"}")
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                writer.write(b"x" * 2000)
                await writer.drain()
                await asyncio.sleep(0.01)
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("is_stalled", [True, False])
async def test_a_long_answer_waits_for_a_slow_reader_and_not_for_one_that_stalls(is_stalled: bool) -> None:
    """12 MB are more than the system's buffers take; of the rest the server writes a piece or two ahead."""

    class Long(ByteTokenizer):
        def encode(self, text: str, **flags: Any) -> list[int]:
            return [97] * 4_000_000

    def held() -> int:
        found = [item for item in gc.get_objects() if isinstance(item, Transport) and item in item.connections]
        return max((connection.transport.get_write_buffer_size() for connection in found), default=0)

    loop = asyncio.get_running_loop()
    async with running(StubClient(), limits=ServeLimits(stall_s=0.5 if is_stalled else 20), tokenizer=Long()) as (
        port,
        _,
    ):
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await loop.sock_connect(slow, ("127.0.0.1", port))
        await loop.sock_sendall(slow, POST + b"Connection: close\r\nContent-Length: 14\r\n\r\n" + BODY)
        received = 0
        with contextlib.suppress(ConnectionError):
            while not held():
                await asyncio.sleep(0.02)
            assert held() <= 256 << 10
            while is_stalled and held():
                await asyncio.sleep(0.1)
            while part := await loop.sock_recv(slow, 1 << 16):
                received += len(part)
        slow.close()
    assert received > 12_000_000 or is_stalled
    assert received < 12_000_000 or not is_stalled


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
