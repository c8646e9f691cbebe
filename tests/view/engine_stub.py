"""A server for tests of the engine page: frames of a made-up engine, live, of the past and of a file.

Owns the two routes of frames and the one of a step's operations, and tells when streams open and close. A test moves time on
with `advance`, so none waits for a clock. Knows nothing of what the page does with a frame.
"""

import contextlib
import json
import queue
import select
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from jilju.account.frame import Frame

from .frame_data import FIRST_MS, World, step_ops
from .stub_server import Front, StubServer

WAIT_S = 20.0  # for what the page must do; longer is a broken test
POLL_S = 0.02


class EngineStub(StubServer):
    """`now_ms` is the present; `status` what the events route answers, 404 for a recorded file; `changes` overrides a frame's fields."""

    def __init__(self, front: Front, world: World) -> None:
        self.world = world
        self.now_ms = world.until_ms
        self.first_ms = FIRST_MS  # what the ring still has
        self.status = 200
        self.window_status = 200
        self.changes: dict[str, Any] = {}
        self.asked: list[str] = []  # paths with their queries
        self.told: queue.Queue[str] = queue.Queue()  # "opened" and "closed", for each stream
        self._streams: list[queue.Queue[Frame | None]] = []
        super().__init__(front)

    def advance(self, ms: float = 1000.0, **changes: Any) -> None:
        """Time goes on, and every open stream gets what is new."""
        self.changes |= changes
        before, self.now_ms = self.now_ms, self.now_ms + ms
        for stream in list(self._streams):
            stream.put(self.world.frame(self.now_ms, since_ms=before, **self.changes))

    def send(self, frame: Frame) -> None:
        for stream in list(self._streams):
            stream.put(frame)

    def drop(self) -> None:
        """Every open stream ends, as when the server goes."""
        for stream in list(self._streams):
            stream.put(None)

    def wait_for(self, what: str) -> None:
        assert self.told.get(timeout=WAIT_S) == what

    def windows(self) -> list[dict[str, str]]:
        """The queries that the window route was asked, in order."""
        found = [urlsplit(path) for path in self.asked if path.startswith("/v1/jilju/window")]
        return [{name: values[0] for name, values in parse_qs(parts.query).items()} for parts in found]

    def close(self) -> None:
        self.drop()
        super().close()

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        if not parts.path.startswith("/v1/jilju/"):
            super()._get(handler)
            return
        self.asked.append(handler.path)
        if not self._allowed(handler):
            return
        if parts.path == "/v1/jilju/events":
            self._events(handler)
        elif parts.path == "/v1/jilju/window":
            self._window(handler, {name: values[0] for name, values in parse_qs(parts.query).items()})
        elif parts.path.startswith("/v1/jilju/steps/"):
            self._answer(handler, step_ops(int(parts.path.rpartition("/")[2])))

    def _window(self, handler: BaseHTTPRequestHandler, query: dict[str, str]) -> None:
        if self.window_status != 200:
            self._refuse(handler, self.window_status)
            return
        end_ms = float(query["end_ms"]) if "end_ms" in query else self.now_ms
        if not self.first_ms <= end_ms <= self.now_ms:  # as the real route
            self._refuse(handler, 400)
            return
        self._answer(handler, self.world.frame(end_ms, **(self.changes | {"first_ms": self.first_ms})))

    def _events(self, handler: BaseHTTPRequestHandler) -> None:
        if self.status != 200:
            self._refuse(handler, self.status)
            return
        stream: queue.Queue[Frame | None] = queue.Queue()
        stream.put(self.world.frame(self.now_ms, **self.changes))
        self._streams.append(stream)
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        self.told.put("opened")
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # the page has gone, which is what "closed" says
            self._follow(handler, stream)
        self._streams.remove(stream)
        self.told.put("closed")

    def _follow(self, handler: BaseHTTPRequestHandler, stream: queue.Queue[Frame | None]) -> None:
        while True:
            try:
                frame = stream.get(timeout=POLL_S)
            except queue.Empty:
                if select.select([handler.connection], [], [], 0)[0]:
                    return  # readable without a request under way: the other side has closed
                continue
            if frame is None:
                return
            handler.wfile.write(b"data: " + msgspec.json.encode(frame) + b"\n\n")
            handler.wfile.flush()

    def _answer(self, handler: BaseHTTPRequestHandler, value: msgspec.Struct) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.end_headers()
        handler.wfile.write(msgspec.json.encode(value))

    def _refuse(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        error = {"message": "scripted", "type": "server_error", "param": None, "code": f"http_{status}"}
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.end_headers()
        handler.wfile.write(json.dumps({"error": error}).encode())
