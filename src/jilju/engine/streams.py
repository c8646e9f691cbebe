"""EventStream: the events of one request as they come, as an async iterator.

Owns the hand-over from whoever produces events to whoever reads them, within one event loop. What lies in it is bounded by
the request's max_tokens. Knows nothing of engines.
"""

import asyncio
from collections.abc import Callable

from jilju.engine.request import EngineEvent, is_terminal


class EventStream:
    """Ends after the terminal event. Closing it early aborts the request; what comes afterwards is dropped."""

    def __init__(self, request_id: str, abort: Callable[[str], None], number: int = 0):
        self.number = number  # in the log
        self._request_id = request_id
        self._abort = abort
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._is_ended = False  # the reader has the terminal event, or wants no more

    def put(self, event: EngineEvent) -> None:
        self._events.put_nowait(event)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> EngineEvent:
        if self._is_ended:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_ended = is_terminal(event)
        return event

    async def aclose(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._abort(self._request_id)
