"""The engine's process: started, spoken to over the link, seen out, started again.

Owns the process and the socket and is an EngineClient; whatever must be decided, `Supervisor` decides. Knows nothing of what a
step computes or what a token means.
"""

import asyncio
import logging
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jilju.clock import Clock, WallClock
from jilju.engine.client import EngineInfo, EngineStatus
from jilju.engine.events import EventLog
from jilju.engine.link import (
    BEAT_S,
    LINK_VERSION,
    Abort,
    Beat,
    FrameReader,
    FrameWriter,
    Hello,
    LinkBroken,
    LoadFailed,
    Loading,
    LoadProgress,
    Ready,
    Stepped,
    Submit,
    ToEngine,
    ToServer,
)
from jilju.engine.loop import MAX_REQUESTS
from jilju.engine.request import EngineEvent, Request, is_terminal
from jilju.engine.streams import EventStream
from jilju.engine.supervisor import DeathCause, Supervisor
from jilju.errors import NotReady, StartupError

logger = logging.getLogger(__name__)

STOP_S = 2.0  # from the end of the link to the end of the process
# What the work of a step can bring about. A process that ends by itself with an error was brought to it by its work too.
WORK_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT})


@dataclass(frozen=True, slots=True)
class _Launched:
    """An engine's process and our end of its link, to which nobody listens yet."""

    epoch: int
    process: subprocess.Popen[bytes]
    sock: socket.socket
    frames: FrameWriter


@dataclass(slots=True)
class _Process:
    """A running engine process that is spoken to."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    frames: FrameWriter

    def send(self, message: ToEngine) -> None:
        if not self.writer.is_closing():
            self.writer.write(self.frames.frame(message))

    async def end(self, grace_s: float) -> int:
        """Close the link and see the process out, by force after a while. Returns its exit status."""
        self.writer.close()
        return await _see_out(self.process, grace_s)


async def _see_out(process: subprocess.Popen[bytes], grace_s: float) -> int:
    try:
        return await asyncio.to_thread(process.wait, grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return await asyncio.to_thread(process.wait)


class SupervisedClient:
    """An engine in a process of its own. `command` starts it; the number of its link's file descriptor is appended.

    `on_loading` hears how far the first engine's load has come.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        max_requests: int = MAX_REQUESTS,
        on_loading: LoadProgress | None = None,
    ):
        self.log = EventLog()
        self._on_loading = on_loading
        self._command = tuple(command)
        self._env = dict(env) if env is not None else None
        self._clock = clock or WallClock()
        self._core = Supervisor(self._clock.now_ns(), max_requests)
        self._streams: dict[str, EventStream] = {}
        self._launched: _Launched | None = None  # ahead of `start`
        self._process: _Process | None = None  # while it can be spoken to
        self._life: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._is_loaded: asyncio.Future[None] | None = None

    @property
    def info(self) -> EngineInfo | None:
        return self._core.info

    @property
    def process_id(self) -> int | None:
        """Of the engine that runs now."""
        return self._process.process.pid if self._process is not None else None

    def launch(self) -> None:
        """Start the engine's process now, without a loop: it loads while the caller makes the rest. `start` waits for it.

        Raises StartupError if there can be no process.
        """
        assert self._life is None and self._launched is None, "launched twice"
        try:
            self._launched = self._spawn()
        except OSError as error:
            raise StartupError(f"the engine's process cannot be started: {error}") from error

    async def start(self) -> None:
        assert self._life is None, "started twice"
        self._is_loaded = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._supervise(), name="jilju-supervisor")
        self._watch = asyncio.create_task(self._expire(), name="jilju-deadlines")
        await self._is_loaded

    def submit(self, request: Request) -> EventStream:
        now_ns = self._clock.now_ns()
        self._core.submit(request, now_ns)
        stream = EventStream(request.id, self.abort, request.number)
        self._streams[request.id] = stream
        self.log.enter(request.number, request.tenant, now_ns)
        self._send(Submit(request))
        return stream

    def abort(self, request_id: str) -> None:
        tell_engine, events = self._core.abort(request_id)
        if tell_engine:
            self._send(Abort(request_id))
        self._deliver(events)

    def status(self) -> EngineStatus:
        return self._core.status(self._clock.now_ns())

    async def stop(self) -> None:
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._launched is not None:  # and nobody came to listen
            self._launched.sock.close()
            await _see_out(self._launched.process, STOP_S)
            self._launched = None
        if self._is_loaded is not None and not self._is_loaded.done():
            self._is_loaded.set_exception(StartupError("the engine was stopped before it was loaded"))
        self._deliver(self._core.fail_all(NotReady.code, "the engine was stopped"))

    def _send(self, message: ToEngine) -> None:
        """What cannot be said to a dying engine is said to the next one, in its resubmissions."""
        if self._process is not None:
            self._process.send(message)

    def _deliver(self, events: list[EngineEvent]) -> None:
        for event in events:
            self._streams[event.request_id].put(event)
            if is_terminal(event):
                self.log.leave(self._streams.pop(event.request_id).number, self._clock.now_ns())

    async def _expire(self) -> None:
        """Deadlines pass while no engine is there to see to them, too."""
        while True:
            await asyncio.sleep(BEAT_S / 2)
            events = self._core.expired(self._clock.now_ns())
            self._deliver(events)
            for event in events:  # an engine that hangs is told when it wakes
                self._send(Abort(event.request_id))

    # ---- the process -----------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """One engine after another, until it is given up or stopped."""
        assert self._is_loaded is not None, "supervised before start()"
        try:
            while True:
                cause, kind = await self._live_once()
                suspects = self._core.suspects
                now_ns = self._clock.now_ns()
                self.log.engine(False, now_ns)
                wait_s, events = self._core.ended(now_ns, kind)
                if not self._is_loaded.done():
                    self._core.state = "gone"
                    self._is_loaded.set_exception(StartupError(cause))
                    return
                self._deliver(events)
                if wait_s is None:
                    logger.critical("%s; the engine is given up", cause)
                    return
                logger.error(
                    "%s; in its step: %s; %d requests wait, the next engine starts in %.1f s",
                    cause,
                    ", ".join(suspects) or "nothing",
                    self._core.num_live,
                    wait_s,
                )
                await asyncio.sleep(wait_s)
        except Exception as error:  # a defect of the supervisor: nobody may wait for ever
            logger.exception("the supervisor failed")
            self._deliver(self._core.fail_all("internal", f"the supervisor failed: {error}"))
            if not self._is_loaded.done():
                self._is_loaded.set_exception(error)

    async def _live_once(self) -> tuple[str, DeathCause]:
        """Start an engine and read what it says until it ends; returns why it did."""
        try:
            launched = self._launched = self._launched or self._spawn()
        except OSError as error:
            return f"the engine's process cannot be started: {error}", "other"
        epoch = launched.epoch
        reader, writer = await asyncio.open_unix_connection(sock=launched.sock)
        engine, self._launched = _Process(launched.process, reader, writer, launched.frames), None
        self._process = engine
        reasons: list[tuple[str, DeathCause]] = []
        pulse = asyncio.create_task(self._pulse(engine, reasons))
        grace_s = STOP_S
        try:
            frames: FrameReader[ToServer] = FrameReader(ToServer, epoch)
            while data := await engine.reader.read(65536):
                for message in frames.feed(data):
                    self._take(epoch, message, reasons)
        except ConnectionError:
            pass  # it ended before it read all; its exit status says more
        except LinkBroken as error:
            reasons.append((f"the link from the engine cannot be trusted: {error}", "other"))
            grace_s = 0.0
        finally:
            self._process = None
            pulse.cancel()
            status = await engine.end(grace_s)
        return reasons[0] if reasons else (_describe_exit(status), cause_of_exit(status))

    def _take(self, epoch: int, message: ToServer, reasons: list[tuple[str, DeathCause]]) -> None:
        events = self._core.receive(epoch, message, self._clock.now_ns())
        if isinstance(message, Stepped):
            for record in message.records:
                self.log.add_step(record)
        self._deliver(events)
        assert self._is_loaded is not None, "an engine speaks before start()"
        if isinstance(message, Loading):
            if self._on_loading is not None and not self._is_loaded.done():
                self._on_loading(message.done_bytes, message.total_bytes, message.text)
        elif isinstance(message, LoadFailed):
            reasons.append((message.message, "other"))
        elif isinstance(message, Ready):
            self.log.engine(True, self._clock.now_ns())
            for request in self._core.resubmissions():
                self._send(Submit(request))
            if not self._is_loaded.done():
                self._is_loaded.set_result(None)

    def _spawn(self) -> _Launched:
        """A new process, greeted: it loads from here on."""
        epoch = self._core.launched(self._clock.now_ns())
        frames = FrameWriter(epoch)
        ours, its = socket.socketpair()
        with its:  # open in the child only, so that each side sees the other's end
            ours.sendall(frames.frame(Hello(LINK_VERSION)))  # alone in the buffer, it fits
            try:
                process = subprocess.Popen(
                    [*self._command, str(its.fileno())],
                    pass_fds=(its.fileno(),),
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard output belongs to the server
                )
            except BaseException:
                ours.close()
                raise
        return _Launched(epoch, process, ours, frames)

    async def _pulse(self, engine: _Process, reasons: list[tuple[str, DeathCause]]) -> None:
        while True:
            engine.send(Beat())
            reason = self._core.tick(self._clock.now_ns())
            if reason is not None:
                reasons.append((f"the engine was killed: {reason}", "work"))
                engine.process.kill()
                return
            await asyncio.sleep(BEAT_S)


def cause_of_exit(status: int) -> DeathCause:
    if status < 0:
        return "work" if -status in WORK_SIGNALS else "pressure" if -status == signal.SIGKILL else "other"
    return "work" if status else "other"


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"the engine's process was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"the engine's process ended with exit status {status}; what it wrote before says why"
