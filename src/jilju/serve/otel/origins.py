"""Origins: where a call that is under way came from, as its head said.

Owns a trace context and the address that was called, from a call's head to its end. A middleware behind the gate; part of an
app only where telemetry is on. Knows nothing of OpenTelemetry.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

TRACE_HEADERS = ("traceparent", "tracestate")
MAX_HEADER = 512  # characters; the conventions' own bound of tracestate


@dataclass(frozen=True, slots=True)
class Origin:
    trace: Mapping[str, str]  # headers of a trace that the call is part of
    address: str | None = None
    port: int | None = None


class Origins:
    def __init__(self) -> None:
        self._by_call: dict[str, Origin] = {}

    def find(self, call_id: str) -> Origin:
        return self._by_call.get(call_id, Origin({}))

    def put(self, call_id: str, origin: Origin) -> None:
        self._by_call[call_id] = origin

    def remove(self, call_id: str) -> None:
        del self._by_call[call_id]

    def __len__(self) -> int:
        return len(self._by_call)


class NotesOrigin:
    """The middleware. A call's record ends before its route returns."""

    def __init__(self, app: ASGIApp, origins: Origins):
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call_id, headers = scope["jilju.arrival"].id, Headers(scope=scope)
        trace = {name: headers[name] for name in TRACE_HEADERS if len(headers.get(name, "")) in range(1, MAX_HEADER)}
        self._origins.put(call_id, Origin(trace, *(scope.get("server") or ())))
        try:
            await self._app(scope, receive, send)
        finally:
            self._origins.remove(call_id)
