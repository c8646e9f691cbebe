"""Transport: the bounds of a connection before there is a request.

Owns size and time of heads, the number of connections, what is answered to bytes that are no HTTP, and the socket options
that find a peer which is gone. Knows nothing of routes. Everything else of HTTP/1.1 is uvicorn's protocol, which this extends.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from jilju.errors import HeadersTooLarge, InvalidRequest, JiljuError, Overloaded, RequestTimeout
from jilju.serve.errors import error_body, retry_headers
from jilju.serve.server import Server

ABORT = "jilju.abort"  # in the scope: drops the connection at once, with what it still holds unwritten
LINGER_S = 1.0
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
        self._head_timer: asyncio.TimerHandle | None = None
        self._lingering = False  # refused: the answer is out, the rest is not read
        self._refusal: JiljuError | None = None  # why the parser was stopped, if we stopped it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        for level, option, value in KEEPALIVE if sock is not None and sock.family != socket.AF_UNIX else ():
            sock.setsockopt(level, getattr(socket, option), value)
        if len(self.connections) > self._limits.connections:
            self._refuse(Overloaded(f"{self._limits.connections} connections are open, the most; try again later"))
        self._head_timer = self.loop.call_later(self._limits.head_s, self._head_too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering or self.transport.is_closing():
            return
        if self._in_head and not self._head_bytes and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_s, self._head_too_slow)
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # A head that ends within these bytes was measured header by header; one that goes on is at least this long.
        if self._in_head and self._head_bytes > self._limits.head_bytes and not self._lingering:
            self._refuse(self._head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        self._measured = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._measure(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._measure(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        if self.cycle is not None and self.scope["http_version"] == "1.0":
            _end_with_connection(self.cycle)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        """The parser has stopped: we stopped it, or it could not go on."""
        self._refuse(self._refusal or InvalidRequest("these bytes are no HTTP/1.1 request; send one"))

    def _measure(self, num_bytes: int) -> None:
        self._measured += num_bytes
        if self._measured > self._limits.head_bytes:
            self._refusal = self._head_too_large()
            raise self._refusal  # out of the parser's callback: it stops, and send_400_response is called

    def _head_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"request line and headers are over {self._limits.head_bytes} bytes, the most; send less"
        )

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if not self._head_bytes:
            self.transport.close()  # connected and said nothing
            return
        self._refuse(RequestTimeout(f"the head was not complete within {self._limits.head_s:g} s; send it faster"))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: JiljuError) -> None:
        """Answers and closes, unless another answer is on its way: then it only closes.

        What the peer still sends is dropped for a moment before the close, or the reset that it causes would overtake the answer.
        """
        self._stop_timer()
        self._server.ledger.refuse(error.code)
        if self.cycle is None or self.cycle.response_complete:
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
        else:
            self.transport.close()
