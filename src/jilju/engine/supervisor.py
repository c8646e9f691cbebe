"""The supervisor: keeps an engine process alive and every stream whole.

`Supervisor` owns what must be known when an engine dies: each live request with the tokens received, the epoch, the
back-off. It does no input or output and takes time as an argument. `SupervisedClient` owns the process and the socket and
is an EngineClient. Neither knows what a step computes or what a token means.

A token is taken only if it is the next of its request and comes from the engine of the current epoch. So what a client has
is always a prefix of what is held here, and a new engine that is handed prompt and tokens goes on exactly where the old
one stopped: noise is keyed by (seed, position).
"""

import asyncio
import logging
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from jilju.clock import Clock, WallClock
from jilju.engine.client import EngineInfo, EngineState, EngineStatus
from jilju.engine.events import EventLog, prefill_share_ns
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
from jilju.engine.loop import MAX_REQUESTS, check_bound
from jilju.engine.request import (
    EngineEvent,
    PromptScored,
    Request,
    RequestAborted,
    RequestFailed,
    RequestTimes,
    TokenEvent,
    is_terminal,
)
from jilju.engine.scheduler import check_fits
from jilju.engine.streams import EventStream
from jilju.errors import EngineUnavailable, NotReady, StartupError
from jilju.plan import Limits

logger = logging.getLogger(__name__)

MAX_RESTARTS = 5  # in a row without a step between them
STABLE_NS = 60 * 10**9  # an engine that was ready for so long ends the row too
BACKOFF_S, BACKOFF_S_MAX = 0.1, 5.0
WATCHDOG_S = 30.0  # without a sign of life
STEP_S_MAX = 120.0  # a step in flight for longer hangs, ...
STEP_S_PER_TOKEN = 0.5  # ... unless it may hold more tokens than even the slowest backend computes by then
PAUSE_NS = 2 * 10**9  # a gap between two looks at the clock: this process was stopped, the engine is not to blame
STOP_S = 2.0  # from the end of the link to the end of the process

_NO_STATUS = EngineStatus(
    state="loading", num_running=0, num_waiting=0, num_blocks_free=0, num_blocks_cached=0, num_blocks_held=0,
    last_step_age_s=0.0, num_restarts=0, imbalance=0,
)  # fmt: skip


@dataclass(slots=True)
class _Live:
    """A request that has no terminal event yet, with all that another engine needs to go on with it."""

    request: Request
    queued_ns: int
    tokens: list[int]  # the whole output so far
    is_scored: bool = False  # the prompt's logprobs were received
    is_aborting: bool = False
    num_resumes: int = 0
    started: RequestTimes | None = None  # of the engine that made the first token
    stalled_ns: int = 0  # as far as the frames tell
    stalled_before_ns: int = 0  # of engines that died
    died_ns: int = 0  # a death after which no token came yet
    resume_ns: int = 0

    def resubmission(self) -> Request:
        return msgspec.structs.replace(
            self.request,
            output_ids=list(self.tokens),
            score_prompt=self.request.score_prompt and not self.is_scored,
        )

    def times(self, of_engine: RequestTimes | None) -> RequestTimes:
        """The engine's own account, or, if the request outlived an engine, one that spans all of them."""
        if of_engine is not None and self.num_resumes == 0:
            return of_engine
        times = of_engine if of_engine is not None else self.started or RequestTimes(queued_ns=self.queued_ns)
        first = self.started or times
        return msgspec.structs.replace(
            times,
            queued_ns=self.queued_ns,
            scheduled_ns=first.scheduled_ns,
            first_token_ns=first.first_token_ns,
            stalled_ns=self.stalled_before_ns + (of_engine.stalled_ns if of_engine is not None else 0),
            resume_ns=self.resume_ns,
        )


class Supervisor:
    def __init__(self, now_ns: int, max_requests: int = MAX_REQUESTS):
        self.state: EngineState = "loading"
        self.info: EngineInfo | None = None
        self.epoch = 0
        self.num_restarts = 0
        self.num_resumed = 0
        self.suspects: list[str] = []  # requests in the step that was about to run
        self._max_requests = max_requests
        self._live: dict[str, _Live] = {}  # in order of arrival
        self._status = _NO_STATUS
        self._imbalance = 0  # of engines that died
        self._num_failures = 0  # deaths in a row without a step
        self._ready_ns = self._heard_ns = self._ticked_ns = self._stepped_ns = now_ns
        self._step_age_ns = 0

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(self, request: Request, now_ns: int) -> None:
        """Take a request into care, or raise. The caller hands it to the engine."""
        if self.state == "gone":
            raise EngineUnavailable("the engine ended and was given up; start the server again")
        if self.state != "ready" or self.info is None:
            again_s = BACKOFF_S + (self.info.load_ms / 1e3 if self.info is not None else 1.0)
            raise NotReady(f"the engine is {self.state}; try again in {again_s:.1f} s", retry_after_s=again_s)
        check_bound(len(self._live), self._max_requests)
        check_fits(request, _limits_of(self.info))
        assert request.id not in self._live, f"request {request.id} is live already"
        self._live[request.id] = _Live(request, now_ns, list(request.output_ids))

    def abort(self, request_id: str) -> tuple[bool, list[EngineEvent]]:
        """True: the engine is to be told. Otherwise the events say it all."""
        live = self._live.get(request_id)
        if live is None or live.is_aborting:
            return False, []
        if self.state == "ready":
            live.is_aborting = True
            return True, []
        return False, [self._aborted(live)]

    def fail_all(self, code: str, message: str) -> list[EngineEvent]:
        self.state = "gone"
        live, self._live = self._live, {}
        return [RequestFailed(request_id=request_id, code=code, message=message) for request_id in live]

    # ---- an engine's life ------------------------------------------------------------------------------------------

    def launched(self, now_ns: int) -> int:
        """A new process is started; returns its epoch."""
        if self.epoch > 0:
            self.state = "restarting"
            self.num_restarts += 1
        self.epoch += 1
        self.suspects = []
        self._heard_ns = self._ticked_ns = now_ns
        self._step_age_ns = 0
        return self.epoch

    def receive(self, epoch: int, message: ToServer, now_ns: int) -> list[EngineEvent]:
        """What a frame means for the requests. Raises LinkBroken if it cannot be true."""
        if epoch != self.epoch:
            return []
        self._heard_ns = now_ns
        if isinstance(message, Stepped):
            self._step_age_ns = 0
            return self._stepped(message, now_ns)
        if isinstance(message, Ready):
            self.state, self.info = "ready", message.info
            self._ready_ns = self._stepped_ns = now_ns
        elif isinstance(message, Beat):
            self._step_age_ns = message.step_age_ns
        return []

    def resubmissions(self) -> list[Request]:
        """What a new engine is handed, in the old order."""
        self.num_resumed += sum(bool(live.tokens) for live in self._live.values())
        return [live.resubmission() for live in self._live.values()]

    def ended(self, now_ns: int) -> tuple[float | None, list[EngineEvent]]:
        """The engine is dead. Seconds to wait before the next one, or None: it is given up, and so is every request."""
        if self.state == "ready" and now_ns - self._ready_ns > STABLE_NS:
            self._num_failures = 0
        self._num_failures += 1
        self._imbalance += self._status.imbalance
        self._status = _NO_STATUS
        self.state = "restarting"
        events: list[EngineEvent] = []
        for live in list(self._live.values()):
            live.num_resumes += 1
            live.stalled_before_ns = live.stalled_ns
            if live.is_aborting:
                events.append(self._aborted(live))
            elif live.started is not None and not live.died_ns:
                live.died_ns = now_ns
        if self._num_failures > MAX_RESTARTS:
            message = f"the engine died {self._num_failures} times in a row without a step and was given up"
            return None, events + self.fail_all(EngineUnavailable.code, message)
        return min(BACKOFF_S * 2 ** (self._num_failures - 1), BACKOFF_S_MAX), events

    def tick(self, now_ns: int) -> str | None:
        """To be called twice a second while a process lives; the reason to kill it, if there is one."""
        if now_ns - self._ticked_ns > PAUSE_NS:  # its frames lie unread
            self._heard_ns = now_ns
        self._ticked_ns = now_ns
        silent_s = (now_ns - self._heard_ns) / 1e9
        if silent_s > WATCHDOG_S:
            return f"no sign of life for {silent_s:.0f} s"
        step_tokens = self.info.step_tokens if self.info is not None else 0
        if self._step_age_ns > max(STEP_S_MAX, STEP_S_PER_TOKEN * step_tokens) * 1e9:
            return f"a step is in flight for {self._step_age_ns / 1e9:.0f} s"
        return None

    def status(self, now_ns: int) -> EngineStatus:
        return msgspec.structs.replace(
            self._status,
            state=self.state,
            num_waiting=self._status.num_waiting if self.state == "ready" else len(self._live),
            last_step_age_s=(now_ns - self._stepped_ns) / 1e9,
            num_restarts=self.num_restarts,
            num_resumed=self.num_resumed,
            imbalance=self._imbalance + self._status.imbalance,
        )

    # ---- events ----------------------------------------------------------------------------------------------------

    def _stepped(self, message: Stepped, now_ns: int) -> list[EngineEvent]:
        self._check(message.events)
        self._status = message.status
        self.suspects = message.next_ids
        stalled_ns = 0
        if (record := message.record) is not None:
            self._num_failures = 0
            self._stepped_ns = now_ns
            stalled_ns = prefill_share_ns(
                record.begin_ns, record.done_ns, record.num_prefill_tokens, record.num_decode_tokens
            )
        for request_id, times in message.started:
            if request_id in self._live:
                self._live[request_id].started = times
        return [self._taken(event, stalled_ns, now_ns) for event in message.events]

    def _check(self, events: list[EngineEvent]) -> None:
        """Each event must be the next of a live request; a frame counts whole or not at all."""
        next_index: dict[str, int] = {}
        ended: set[str] = set()
        for event in events:
            request_id = event.request_id
            live = self._live.get(request_id)
            if live is None or request_id in ended:
                raise LinkBroken(f"an event of request {request_id} came, which is not live")
            if isinstance(event, TokenEvent):
                index = next_index.get(request_id, len(live.tokens))
                if event.index != index:
                    raise LinkBroken(f"token {event.index} of {request_id} came, {index} was next")
                next_index[request_id] = index + 1
            elif isinstance(event, PromptScored) and live.is_scored:
                raise LinkBroken(f"the prompt of {request_id} was scored twice")
            if is_terminal(event):
                ended.add(request_id)

    def _taken(self, event: EngineEvent, stalled_ns: int, now_ns: int) -> EngineEvent:
        live = self._live[event.request_id]
        if isinstance(event, TokenEvent):
            live.tokens.append(event.token_id)
            if live.died_ns:
                live.resume_ns += now_ns - live.died_ns
                live.died_ns = 0
            elif event.index > 0:
                live.stalled_ns += stalled_ns
        elif isinstance(event, PromptScored):
            live.is_scored = True
        if is_terminal(event):
            del self._live[event.request_id]
            if live.num_resumes and not isinstance(event, RequestFailed | PromptScored):
                event = msgspec.structs.replace(event, times=live.times(event.times))
        return event

    def _aborted(self, live: _Live) -> EngineEvent:
        del self._live[live.request.id]
        return RequestAborted(request_id=live.request.id, num_tokens=len(live.tokens), times=live.times(None))


def _limits_of(info: EngineInfo) -> Limits:
    return Limits(
        num_blocks=info.num_blocks, block_size=info.block_size, max_rows=info.max_rows, max_tokens=info.step_tokens,
        max_context=info.max_context, num_threads=info.num_threads,
    )  # fmt: skip


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
        await self._is_loaded

    def submit(self, request: Request) -> EventStream:
        self._core.submit(request, self._clock.now_ns())
        stream = EventStream(request.id, self.abort)
        self._streams[request.id] = stream
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
                del self._streams[event.request_id]

    # ---- the process -----------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """One engine after another, until it is given up or stopped."""
        assert self._is_loaded is not None, "supervised before start()"
        try:
            while True:
                cause = await self._live_once()
                wait_s, events = self._core.ended(self._clock.now_ns())
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
                    ", ".join(self._core.suspects) or "nothing",
                    self._core.num_live,
                    wait_s,
                )
                await asyncio.sleep(wait_s)
        except Exception as error:  # a defect of the supervisor: nobody may wait for ever
            logger.exception("the supervisor failed")
            self._deliver(self._core.fail_all("internal", f"the supervisor failed: {error}"))
            if not self._is_loaded.done():
                self._is_loaded.set_exception(error)

    async def _live_once(self) -> str:
        """Start an engine and read what it says until it ends; returns why it did."""
        try:
            launched = self._launched = self._launched or self._spawn()
        except OSError as error:
            return f"the engine's process cannot be started: {error}"
        epoch = launched.epoch
        reader, writer = await asyncio.open_unix_connection(sock=launched.sock)
        engine, self._launched = _Process(launched.process, reader, writer, launched.frames), None
        self._process = engine
        reasons: list[str] = []
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
            reasons.append(f"the link from the engine cannot be trusted: {error}")
            grace_s = 0.0
        finally:
            self._process = None
            pulse.cancel()
            status = await engine.end(grace_s)
        return reasons[0] if reasons else _describe_exit(status)

    def _take(self, epoch: int, message: ToServer, reasons: list[str]) -> None:
        events = self._core.receive(epoch, message, self._clock.now_ns())
        if isinstance(message, Stepped) and message.record is not None:
            self.log.add_step(message.record)
        self._deliver(events)
        assert self._is_loaded is not None, "an engine speaks before start()"
        if isinstance(message, Loading):
            if self._on_loading is not None and not self._is_loaded.done():
                self._on_loading(message.done_bytes, message.total_bytes, message.text)
        elif isinstance(message, LoadFailed):
            reasons.append(message.message)
        elif isinstance(message, Ready):
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

    async def _pulse(self, engine: _Process, reasons: list[str]) -> None:
        while True:
            engine.send(Beat())
            reason = self._core.tick(self._clock.now_ns())
            if reason is not None:
                reasons.append(f"the engine was killed: {reason}")
                engine.process.kill()
                return
            await asyncio.sleep(BEAT_S)


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"the engine's process was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"the engine's process ended with exit status {status}; what it wrote before says why"
