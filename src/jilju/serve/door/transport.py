"""Transport: the bounds of a connection before there is a request, and beside it.

Owns size and time of heads, the time and the pieces of bodies, the number of connections, what is held for a reader that is
slow and how long, what is answered to bytes that are no HTTP, and the socket options that find a peer which is gone. Knows
nothing of routes. Everything else of HTTP/1.1 is uvicorn's protocol, which this extends.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from jilju.errors import BodyTooLarge, HeadersTooLarge, InvalidRequest, JiljuError, Overloaded, RequestTimeout
from jilju.serve.errors import error_body, retry_headers, shown
from jilju.serve.server import Server

ABORT = "jilju.abort"  # in the scope: drops the connection at once, with what it still holds unwritten
TimerName = Literal["head", "body", "reader"]
LINGER_S = 1.0
MAX_CHUNKS = 1 << 16  # of a body: each costs half a microsecond or two, and 8 MiB need but 128 bytes a chunk
PIECE_BYTES = (
    64 << 10
)  # written at once; as much again is what asyncio and uvloop hold before a writer waits: half of 256 KiB
KEEPALIVE = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 15),  # s of silence before the first probe
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 30_000),  # ms that written bytes may stay unacknowledged
)


def protocol_factory(server: Server) -> Callable[..., HttpToolsProtocol]:
    """What uvicorn calls for each connection."""

    def make(
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> HttpToolsProtocol:
        return Transport(server, config, server_state, app_state, _loop)

    return make


def _in_pieces(cycle: RequestResponseCycle) -> None:
    """A long body is written piece by piece, each when the reader has taken most of those before it."""
    send = cycle.send

    async def pieces(message: Any) -> None:
        body = memoryview(message.get("body", b""))
        if len(body) <= PIECE_BYTES:
            await send(message)
            return
        for begin in range(0, len(body), PIECE_BYTES):
            end = begin + PIECE_BYTES
            more = end < len(body) or message.get("more_body", False)
            piece: Any = {"type": "http.response.body", "body": body[begin:end], "more_body": more}
            await send(piece)

    cycle.send = pieces  # type: ignore[method-assign]


def _end_with_connection(cycle: RequestResponseCycle) -> None:
    """HTTP/1.0 knows no chunks: a body whose length is not told ends with the connection."""
    send = cycle.send
    is_told = True

    async def framed(message: Any) -> None:
        nonlocal is_told
        if message["type"] == "http.response.start":
            is_told = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not is_told:
                cycle.chunked_encoding = cycle.keep_alive = False
        elif not is_told:
            cycle.expected_content_length = len(message.get("body", b""))  # as long as it is
        await send(message)

    cycle.send = framed  # type: ignore[method-assign]


class Transport(HttpToolsProtocol):
    def __init__(
        self,
        server: Server,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None,
    ):
        super().__init__(config, server_state, app_state, loop)
        self._server = server
        self._limits = server.context.limits
        self._in_head = True  # of the message that comes next
        self._head_bytes = 0
        self._timers: dict[TimerName, asyncio.TimerHandle] = {}
        self._lingering = False  # refused: the answer is out, the rest is not read
        self._refusal: JiljuError | None = None  # why the parser was stopped, if we stopped it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        for level, option, value in KEEPALIVE if sock is not None and sock.family != socket.AF_UNIX else ():
            sock.setsockopt(level, getattr(socket, option), value)
        if len(self.connections) > self._limits.connections:
            self._refuse(Overloaded(f"{self._limits.connections} connections are open, the most; try again later"))
        self._start_timer("head", self._limits.head_s, self._head_too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering or self.transport.is_closing():
            return
        if self._in_head and not self._head_bytes and "head" not in self._timers:
            self._start_timer("head", self._limits.head_s, self._head_too_slow)
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # A head that ends within these bytes was measured header by header; one that goes on is at least this long.
        if self._in_head and self._head_bytes > self._limits.head_bytes and not self._lingering:
            self._refuse(self._head_too_large())
        if not self._in_head and "body" not in self._timers and not self._lingering:
            self._wait_for_body()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        self._measured = self._num_chunks = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._measure(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._measure(len(name) + len(value) + 4)
        if not self._in_head:
            return  # a trailer, behind the body: what checks headers has done so
        if not value.isascii():
            self._stop(
                InvalidRequest(f"the header {shown(name.decode('latin-1'))} is not ASCII; leave it out or encode it")
            )
        if name.lower() == b"expect" and value.lower() != b"100-continue":
            self._stop(InvalidRequest("the header Expect asks for something unknown; allowed: 100-continue"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._stop(InvalidRequest("this server speaks HTTP/1.1 and 1.0; send one of them"))
        if self.parser.should_upgrade():
            self._stop(InvalidRequest("the connection stays HTTP/1.1; leave out the header Upgrade, and CONNECT"))
        self._in_head = False
        self._stop_timer("head")
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _end_with_connection(self.cycle)
        _in_pieces(self.cycle)

    def on_chunk_header(self) -> None:
        self._num_chunks += 1
        if self._num_chunks > MAX_CHUNKS:
            self._stop(BodyTooLarge(f"the body comes in more than {MAX_CHUNKS} chunks, the most; send larger ones"))

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._body_bytes += len(body)
        if self.cycle.response_complete and self._body_bytes > self._limits.body_bytes:
            self.transport.close()  # of a route that does not read it

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer("body")
        self._in_head, self._head_bytes = True, 0
        if self.cycle.response_complete:  # an answer that was faster than its body: the connection is idle from now on
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_timer("reader")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """The parser has stopped: we stopped it, or it could not go on."""
        self._refuse(self._refusal or InvalidRequest("these bytes are no HTTP/1.1 request; send one"))

    def _measure(self, num_bytes: int) -> None:
        self._measured += num_bytes
        if self._measured > self._limits.head_bytes:
            self._stop(self._head_too_large())

    def _stop(self, error: JiljuError) -> NoReturn:
        """Out of a callback of the parser: it stops, and send_400_response is called."""
        self._refusal = error
        raise error

    def _head_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"request line and headers are over {self._limits.head_bytes} bytes, the most; send less"
        )

    def _head_too_slow(self) -> None:
        if not self._head_bytes:
            self.transport.close()  # connected and said nothing
            return
        self._refuse(RequestTimeout(f"the head was not complete within {self._limits.head_s:g} s; send it faster"))

    def _wait_for_body(self) -> None:
        """Longer than a route that reads it waits, which then says so itself."""
        self._start_timer("body", self._limits.body_s + LINGER_S, self._body_too_slow)

    def _body_too_slow(self) -> None:
        if self.flow.read_paused:  # it is us who are slow
            self._wait_for_body()
        elif self.cycle.response_complete:
            self.transport.close()
        else:
            self._refuse(RequestTimeout(f"the body was not complete within {self._limits.body_s:g} s; send it faster"))

    def _watch_reader(self) -> None:
        held = self.transport.get_write_buffer_size()
        self._start_timer("reader", self._limits.stall_s, self._look_at_reader, held)

    def _look_at_reader(self, held_before: int) -> None:
        """Slow is allowed; a reader that has taken nothing has left."""
        if self.transport.get_write_buffer_size() < held_before:
            self._watch_reader()
        else:
            self.transport.abort()

    def _start_timer(self, name: TimerName, seconds: float, act: Callable[..., None], *args: object) -> None:
        self._timers[name] = self.loop.call_later(seconds, self._timed_out, name, act, *args)

    def _timed_out(self, name: TimerName, act: Callable[..., None], *args: object) -> None:
        del self._timers[name]
        act(*args)

    def _stop_timer(self, name: TimerName) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def _stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _refuse(self, error: JiljuError) -> None:
        """Answers and closes. Behind calls that are not answered yet it is these that are, and nothing is read any more.

        What the peer still sends is dropped for a moment before the close, or the reset that it causes would overtake the answer.
        """
        self._stop_timers()
        self._server.ledger.refuse(error.code, error.status)
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._answer(error)
        elif self._in_head:
            cycle.keep_alive = False
            self._lingering = True
        elif cycle.response_started or self.pipeline:
            self.transport.close()
        else:  # the call's own body is broken: we answer in place of its route, which sees a peer that has left
            cycle.disconnected = True
            cycle.scope[ABORT] = lambda: None  # type: ignore[literal-required]
            cycle.message_event.set()
            self._answer(error)

    def _answer(self, error: JiljuError) -> None:
        body = error_body(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", self._server.context.mint_id().encode()),
            *retry_headers(error, self._server.context.random_bytes),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
        self.transport.write_eof()
        self._lingering = True
        self.loop.call_later(LINGER_S, self.transport.close)
