"""Streams: deltas to server-sent events on a socket, in time.

Owns when bytes leave: status and headers with the first token. Knows nothing of shapes (a renderer's), of the engine, or of how
long a reader may take nothing (the transport's).
"""

from collections.abc import Callable

from starlette.types import Send

from jilju.clock import Clock
from jilju.errors import JiljuError
from jilju.serve.answer import failure_event
from jilju.serve.body import ClientLeft

EVENT_STREAM = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies: pass each event on at once
)


class Writer:
    """One answer's way to the socket."""

    def __init__(self, send: Send, clock: Clock, note: Callable[[int, int], None]):
        self._send, self._clock, self._note = send, clock, note
        self.started = False
        self.failure: Callable[[JiljuError], bytes] = failure_event  # the shape of a stream's last event when it fails

    async def events(self, data: bytes) -> None:
        """Opens the stream if it is not open."""
        if not self.started:
            await self._told({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            self.started = True
        await self._body(data, more=True)

    async def end(self, data: bytes) -> None:
        await self._body(data, more=False)

    async def whole(self, data: bytes) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await self._told({"type": "http.response.start", "status": 200, "headers": headers})
        self.started = True
        await self._body(data, more=False)

    async def _body(self, data: bytes, *, more: bool) -> None:
        begin_ns = self._clock.now_ns()
        await self._told({"type": "http.response.body", "body": data, "more_body": more})
        self._note(begin_ns, self._clock.now_ns())

    async def _told(self, message: dict[str, object]) -> None:
        """The transport drops a reader that takes nothing for too long."""
        try:
            await self._send(message)
        except OSError as error:
            raise ClientLeft(str(error)) from error
