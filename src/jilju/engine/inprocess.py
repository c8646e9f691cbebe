"""InProcessClient: an engine in this process behind the EngineClient protocol.

Owns one thread that runs the engine's steps, and the hand-over of requests to it and of events back to the event loop.
Knows nothing of processes: if the engine fails here, it has failed.
"""

import asyncio
import logging
import threading
from collections import deque

import msgspec

from jilju.engine.client import EngineInfo, EngineState, EngineStatus
from jilju.engine.events import EventLog, StepRecord
from jilju.engine.loop import Engine
from jilju.engine.request import EngineEvent, Request, RequestFailed, is_terminal
from jilju.engine.streams import EventStream
from jilju.errors import EngineUnavailable, NotReady

logger = logging.getLogger(__name__)


class InProcessClient:
    def __init__(self, engine: Engine):
        self.info: EngineInfo | None = None
        self.log = EventLog()  # filled on the event loop, unlike the engine's own
        self._engine = engine
        self._state: EngineState = "loading"
        self._streams: dict[str, EventStream] = {}
        self._inbox: deque[Request | str] = deque()  # a request, or the id of one to abort
        self._records: list[StepRecord] = []
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="jilju-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.log.listen(self._records.append)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.info = self._engine.info
        self._state = "ready"
        self.log.engine(True, self._engine.now_ns())
        self._thread.start()

    def submit(self, request: Request) -> EventStream:
        if self._state == "loading":
            raise NotReady("the engine is not started yet", retry_after_s=1.0)
        if self._state != "ready":
            raise EngineUnavailable("the engine has ended; start the server again")
        self._engine.check(request, num_live=len(self._streams))
        stream = EventStream(request.id, self.abort, request.number)
        self._streams[request.id] = stream
        self.log.enter(request.number, request.tenant, self._engine.now_ns())
        self._tell(request)
        return stream

    def abort(self, request_id: str) -> None:
        if request_id in self._streams:
            self._tell(request_id)

    def status(self) -> EngineStatus:
        return msgspec.structs.replace(self._engine.status(), state=self._state)

    async def stop(self) -> None:
        if self._thread.is_alive():
            with self._wake:
                self._is_stopping = True
                self._wake.notify()
            await asyncio.to_thread(self._thread.join)
        self._end("not_ready", "the engine was stopped")

    def _tell(self, message: Request | str) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    # ---- in the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_inbox():
                events = self._engine.step()
                records = list(self._records)
                self._records.clear()
                self._call(self._deliver, events, records)
        except Exception:  # a defect of the engine itself: its requests must still end
            logger.exception("the engine failed")
            self._call(self._end, "internal", "the engine failed; its log says why")

    def _take_inbox(self) -> bool:
        """Hand what came in to the engine; waits while there is nothing to do. False: the client stops."""
        with self._wake:
            while not (self._inbox or self._is_stopping or self._engine.has_work()):
                self._wake.wait()
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            if isinstance(message, str):
                self._engine.abort(message)
            else:
                self._engine.submit(message)
        return not self._is_stopping

    def _call(self, function: object, *arguments: object) -> None:
        assert self._loop is not None, "the thread runs before start()"
        self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]

    # ---- on the event loop -----------------------------------------------------------------------------------------

    def _deliver(self, events: list[EngineEvent], records: list[StepRecord]) -> None:
        for record in records:
            self.log.add_step(record)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.put(event)
                if is_terminal(event):
                    del self._streams[event.request_id]
                    self.log.leave(stream.number, self._engine.now_ns())

    def _end(self, code: str, message: str) -> None:
        self._state = "gone"
        now_ns = self._engine.now_ns()
        self.log.engine(False, now_ns)
        for request_id, stream in self._streams.items():
            stream.put(RequestFailed(request_id=request_id, code=code, message=message))
            self.log.leave(stream.number, now_ns)
        self._streams = {}
