"""The link: frames between the server and the engine's own process, and the main loop of that process.

Owns the frame format, the messages of both directions and the child's end of the socket. Knows nothing of HTTP, of restarts
or of what a step computes.

    frame   u32 length of the body | u32 crc32 of the body | body = msgpack [epoch, number, message]      little-endian

The epoch counts engines since the server started, the number counts frames of one direction from 0. A frame with a wrong
length, sum, epoch, number or message shows that the two ends no longer agree: neither side repairs that, the engine ends.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from jilju.clock import Clock, WallClock
from jilju.engine.client import EngineInfo, EngineStatus
from jilju.engine.events import StepRecord
from jilju.engine.loop import Engine
from jilju.engine.request import EngineEvent, Request, RequestAborted, RequestFailed, RequestTimes
from jilju.engine.scheduler import Step
from jilju.errors import InternalError, JiljuError, StartupError

logger = logging.getLogger(__name__)

LINK_VERSION = 6  # raised with every change of a message: an engine of another installation is refused, not misread
MAX_FRAME_BYTES = 16 * 2**20
BEAT_S = 0.5  # a side that has said nothing for so long says that it lives
SILENCE_NS = 5 * 10**9  # a server that is silent for so long is stopped or gone: no step is begun until it speaks
MAX_SUBMITS = 8  # requests taken in a turn: each costs some time, and streams wait for it
STUCK_S = 0.5  # between two turns of an engine that has work and no step: it must not burn a core
MAKING_S = 0.002  # between two looks at grammars that are being made, while there is nothing else to do
REST_S = 1.0  # without a request, until the engine does what it has put off
EXIT_GRACE_S = 1.0  # for the step in flight when the link ends

FRAME_HEADER = struct.Struct("<II")  # length, crc32
_PR_SET_PDEATHSIG = 1


class LinkBroken(InternalError):
    """The other end sent what it must not. What came before it stands; nothing after it is read."""


# ---- messages -----------------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First frame of the server; its epoch is that of all later ones."""

    version: int


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Nothing to say, but alive. `step_age_ns`: since the step in flight began, 0 if there is none."""

    step_age_ns: int = 0


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How far a load has come, for whoever waits; loads that take no time say nothing."""

    done_bytes: int
    total_bytes: int
    text: str  # what is going on: "packing weights"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The engine cannot start; the message is for the user."""

    message: str


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """What one step brought, sent when the next is decided: its events and record, and who runs next."""

    events: list[EngineEvent]
    records: list[StepRecord]  # none: aborts only; several: the step raised and parts of it were run again
    status: EngineStatus
    next_ids: list[str]  # requests in the step about to run
    predicted_ns: int  # what it is expected to take


ToEngine = Hello | Submit | Abort | Beat
ToServer = Loading | Ready | LoadFailed | Stepped | Beat

LoadProgress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is going on
Message = TypeVar("Message")


# ---- frames -------------------------------------------------------------------------------------------------------------


class FrameWriter:
    def __init__(self, epoch: int):
        self._epoch = epoch
        self._number = 0
        self._encoder = msgspec.msgpack.Encoder()

    def frame(self, message: ToEngine | ToServer) -> bytes:
        body = self._encoder.encode((self._epoch, self._number, message))
        assert len(body) <= MAX_FRAME_BYTES, f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES} are read"
        self._number += 1
        return FRAME_HEADER.pack(len(body), zlib.crc32(body)) + body


class FrameReader(Generic[Message]):
    """Bytes in, messages out. `epoch` None: that of the first frame holds for all."""

    def __init__(self, message_type: object, epoch: int | None = None):
        self.epoch = epoch
        self._number = 0
        self._decoder = msgspec.msgpack.Decoder(tuple[int, int, message_type])  # type: ignore[valid-type]
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """All messages that are complete now. Raises LinkBroken; good messages before the bad frame are lost with it."""
        self._bytes += data
        messages: list[Message] = []
        start = 0
        while len(self._bytes) - start >= FRAME_HEADER.size:
            length, crc = FRAME_HEADER.unpack_from(self._bytes, start)
            if length > MAX_FRAME_BYTES:
                raise LinkBroken(f"a frame of {length} bytes was announced; at most {MAX_FRAME_BYTES} are read")
            end = start + FRAME_HEADER.size + length
            if end > len(self._bytes):
                break
            messages.append(self._message(bytes(self._bytes[start + FRAME_HEADER.size : end]), crc))
            start = end
        del self._bytes[:start]
        return messages

    def _message(self, body: bytes, crc: int) -> Message:
        if zlib.crc32(body) != crc:
            raise LinkBroken(f"frame {self._number}: its sum is {zlib.crc32(body):08x}, its header says {crc:08x}")
        try:
            epoch, number, message = self._decoder.decode(body)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise LinkBroken(f"frame {self._number} is not a message of this direction: {error}") from error
        if self.epoch is None:
            self.epoch = epoch
        if (epoch, number) != (self.epoch, self._number):
            raise LinkBroken(f"frame {number} of epoch {epoch} came; {self._number} of epoch {self.epoch} was next")
        self._number += 1
        return message


# ---- the engine's end ---------------------------------------------------------------------------------------------------


def serve_engine(engine_factory: Callable[[LoadProgress], Engine], sock: socket.socket) -> None:
    """Main function of the engine's process: load, telling how far it is, run steps until the link ends.

    A StartupError of the factory is told to the server; anything else it raises ends the process with a traceback.
    """
    belong_to_the_server()
    server = _ServerEnd(sock, WallClock())
    try:
        if not server.greet():
            return
        try:
            engine = engine_factory(lambda done, total, text: server.send(Loading(done, total, text)))
        except StartupError as error:
            server.send(LoadFailed(error.message))
            return
        try:
            server.send(Ready(engine.info))
            _run_steps(engine, server)
        finally:
            engine.close()
    except (BrokenPipeError, ConnectionResetError):
        return  # the server is gone; so nobody waits for what could not be sent
    finally:
        server.close()


def _run_steps(engine: Engine, server: "_ServerEnd") -> None:
    turns = EngineTurns(engine)
    while True:
        messages = server.receive(wait=turns.is_idle and not engine.puts_off, timeout_s=turns.wait_s)
        if messages is None:
            return
        if turns.is_idle and not messages:
            engine.rest()
            continue
        with server.step_in_flight():
            told = turns.begin(messages)
            if told is not None:
                server.send(told)
            turns.run()


class EngineTurns:
    """The engine's half of the conversation, turn by turn: messages in, what there is to tell out, then a step."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._records: list[StepRecord] = []  # not sent yet
        self._submits: deque[Request] = deque()  # not taken yet
        self._is_stuck = False  # as it was told
        self.events: list[EngineEvent] = []  # of the last step, not sent yet
        self.step: Step | None = None  # decided and not run yet
        engine.log.listen(self._records.append)
        engine.log.keep_none()  # the server keeps them

    @property
    def has_work(self) -> bool:
        return self._engine.has_work() or self._has_news

    @property
    def _has_news(self) -> bool:
        return bool(self.events or self._submits)

    @property
    def is_idle(self) -> bool:
        return not self.has_work

    @property
    def wait_s(self) -> float | None:
        """How long the next turn may wait for messages; None: it need not, or there is nothing to do but to wait."""
        engine = self._engine
        if engine.is_stuck:
            return STUCK_S
        if engine.only_makes_grammars and not self._has_news:
            return MAKING_S
        return REST_S if self.is_idle and engine.puts_off else None

    def begin(self, messages: list[Submit | Abort]) -> Stepped | None:
        engine = self._engine
        events, self.events = self.events, []
        self._submits.extend(message.request for message in messages if isinstance(message, Submit))
        for _ in range(min(MAX_SUBMITS, len(self._submits))):
            request = self._submits.popleft()
            try:
                engine.submit(request)
            except JiljuError as error:
                events.append(_refused(request, error))
            except Exception as error:  # a defect, which must not cost the others their engine
                logger.exception("request %s could not be taken", request.id)
                events.append(_refused(request, InternalError(f"the engine could not take this request: {error}")))
        aborted = [message.request_id for message in messages if isinstance(message, Abort)]
        events += self._abort(aborted)
        step, settled = engine.begin()
        self.step = step
        events += settled
        if not (events or self._records or step.rows) and engine.is_stuck == self._is_stuck:
            return None
        self._is_stuck = engine.is_stuck
        next_ids = [row.sequence.id for row in step.rows]
        records = list(self._records)
        self._records.clear()
        return Stepped(events, records, engine.status(), next_ids, step.predicted_ns)

    def _abort(self, request_ids: list[str]) -> list[EngineEvent]:
        """Those that were not taken yet end here, all others with the next step."""
        events: list[EngineEvent] = []
        for request_id in request_ids:
            request = next((request for request in self._submits if request.id == request_id), None)
            if request is None:
                self._engine.abort(request_id)
            else:
                self._submits.remove(request)
                times = RequestTimes(queued_ns=request.arrival_ns)
                events.append(RequestAborted(request_id=request_id, num_tokens=len(request.output_ids), times=times))
        return events

    def run(self) -> None:
        """Run the step that was decided; what it brings is told with the next turn."""
        step, self.step = self.step, None
        assert step is not None, "a turn runs before it begins"
        self.events = self._engine.run(step)


def _refused(request: Request, error: JiljuError) -> RequestFailed:
    return RequestFailed(request_id=request.id, code=error.code, message=error.message)


def belong_to_the_server() -> None:
    """Die with the server, even while loading or in a long call, and leave signals from the terminal to it.

    The end of the link ends this process; a SIGTERM that a service manager sends to all must not cut off the drain.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _ServerEnd:
    """The socket as the engine sees it: one thread reads and says that we live, the loop takes and sends.

    A blocked send blocks the loop, so a server that does not read pauses the schedule; the bound is the socket's buffer.
    """

    def __init__(self, sock: socket.socket, clock: Clock):
        self._sock = sock
        self._clock = clock
        self._inbox: deque[Submit | Abort] = deque()
        self._changed = threading.Condition()
        self._writer: FrameWriter | None = None  # from the server's first frame on
        self._write = threading.Lock()
        self._is_ended = False
        self._is_closed = threading.Event()
        self._heard_ns = self._sent_ns = clock.now_ns()
        self._step_begin_ns = 0
        self._reader = threading.Thread(target=self._read, name="jilju-link", daemon=True)
        self._reader.start()

    def greet(self) -> bool:
        """Wait for the server's first frame; False if there is none to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._writer is not None or self._is_ended)
            return not self._is_ended

    def receive(self, wait: bool, timeout_s: float | None = None) -> list[Submit | Abort] | None:
        """What came since the last call; None at the end of the link. With a timeout it waits so long for something."""
        with self._changed:
            if timeout_s is not None:
                self._changed.wait_for(lambda: self._inbox or self._is_ended, timeout_s)
            while not self._is_ended and (self._is_silent() or (wait and not self._inbox)):
                self._changed.wait()
            if self._is_ended:
                return None
            messages = list(self._inbox)
            self._inbox.clear()
            return messages

    def send(self, message: ToServer) -> None:
        assert self._writer is not None, "nothing is sent before the server's first frame"
        with self._write:
            self._sock.sendall(self._writer.frame(message))
            self._sent_ns = self._clock.now_ns()

    def step_in_flight(self) -> "_StepInFlight":
        return _StepInFlight(self)

    def close(self) -> None:
        self._is_closed.set()

    def mark_step(self, is_running: bool) -> None:
        self._step_begin_ns = self._clock.now_ns() if is_running else 0

    def _is_silent(self) -> bool:
        return self._clock.now_ns() - self._heard_ns > SILENCE_NS

    # ---- in the reader's thread --------------------------------------------------------------------------------------

    def _read(self) -> None:
        frames: FrameReader[ToEngine] = FrameReader(ToEngine)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            while True:
                if poll.poll(BEAT_S * 1000):
                    data = self._sock.recv(65536)
                    if not data:
                        break
                    self._take(frames.feed(data), frames)
                self._beat()
        except ConnectionError:
            logger.info("the server closed the link while frames were under way")
        except LinkBroken as error:
            logger.error("the link from the server cannot be trusted, the engine ends: %s", error)
        with self._changed:
            self._is_ended = True
            self._changed.notify()
        if not self._is_closed.wait(EXIT_GRACE_S):
            os._exit(0)  # the loop sits in a long step or in a load, for nobody

    def _take(self, messages: list[ToEngine], frames: FrameReader[ToEngine]) -> None:
        with self._changed:
            self._heard_ns = self._clock.now_ns()
            for message in messages:
                if isinstance(message, Hello):
                    if message.version != LINK_VERSION:
                        raise LinkBroken(
                            f"the server speaks version {message.version} of the link, this is {LINK_VERSION}"
                        )
                    assert frames.epoch is not None, "a frame was read, so its epoch is known"
                    self._writer = FrameWriter(frames.epoch)
                elif not isinstance(message, Beat):
                    self._inbox.append(message)
            self._changed.notify()

    def _beat(self) -> None:
        """Say that we live, unless the loop is saying something or the server does not read."""
        now_ns = self._clock.now_ns()
        if self._writer is None or now_ns - self._sent_ns < BEAT_S * 1e9 or not self._write.acquire(blocking=False):
            return
        try:
            poll = select.poll()
            poll.register(self._sock, select.POLLOUT)
            if poll.poll(0):  # then there is room for so small a frame
                begin_ns = self._step_begin_ns
                self._sock.sendall(self._writer.frame(Beat(now_ns - begin_ns if begin_ns else 0)))
                self._sent_ns = now_ns
        finally:
            self._write.release()


class _StepInFlight:
    def __init__(self, server: _ServerEnd):
        self._server = server

    def __enter__(self) -> None:
        self._server.mark_step(True)

    def __exit__(self, *exc: object) -> None:
        self._server.mark_step(False)
