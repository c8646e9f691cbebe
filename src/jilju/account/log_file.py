"""Event-log file: the log of steps and the records of calls, as a server writes them and a reader gives them back.

Owns the format: a head with magic and version, then entries, each a length, a kind and a msgpack body, little-endian. Entries
are only ever appended, so a file that was cut off is good up to its last whole entry. At its largest size a file is renamed and
another begun. Holds no text and no tokens; knows nothing of when it is written.
"""

import fcntl
import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from jilju.account.frame import Counts
from jilju.account.recording import Outage, Outages, Recording, Refusal, Restarts
from jilju.account.records import CallRecord
from jilju.account.step_model import make_step_model
from jilju.engine.client import EngineInfo
from jilju.engine.events import EventLog, StepRecord
from jilju.errors import ConfigError
from jilju.plan import Plan

MAGIC, VERSION = b"JILJULOG", 1
_HEAD = struct.Struct("<8sI")
_ENTRY = struct.Struct("<IB")  # bytes of the body, kind
ABOUT, INFO, STEP, CALL, REFUSAL, ENGINE, END = range(1, 8)  # kinds
MAX_ENTRY = 64 << 20  # bytes: what says it has more is no entry
UNBOUNDED = 1 << 40  # steps or rows of a ring that keeps all


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is of. `begun_ns` and `unix_ns` are one moment on two clocks."""

    model: str
    version: str  # of the server
    started_ns: int  # the server was; a file may begin later
    begun_ns: int
    unix_ns: int
    counts: Counts  # when the file was begun
    is_ready: bool  # an engine was, when the file was begun
    plan: Plan | None  # by which steps are shared out among their rows


def entry(kind: int, body: object) -> bytes:
    packed = msgspec.msgpack.encode(body)
    return _ENTRY.pack(len(packed), kind) + packed


class LogWriter:
    """One file, and the one before it as FILE.1. Raises ConfigError if it cannot be begun, OSError if it cannot be written."""

    def __init__(self, path: Path, max_bytes: int):
        self.path, self._max_bytes = path, max_bytes
        self._file: io.FileIO | None = None
        self._begin_bytes = 0

    def open(self, about: About) -> None:
        """A file of that name that is there already is an older log: it is kept as FILE.1."""
        try:
            if self.path.exists():
                self._keep_older()
            self._begin(about)
        except OSError as error:
            raise ConfigError(f"--event-log is {self.path}, which cannot be written: {error.strerror}") from error

    def write(self, data: bytes) -> bool:
        """Whole entries. True: the file is full, and `rotate` is due."""
        assert self._file is not None, "opened before it is written to"
        self._append(data)
        return self._file.tell() > max(self._max_bytes, self._begin_bytes)

    def rotate(self, about: About, info: EngineInfo | None) -> None:
        """Begin the file anew; what was in it is FILE.1 from now on."""
        self.close()
        self.path.replace(self._older)
        self._begin(about)
        if info is not None:
            self.write(entry(INFO, info))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def _keep_older(self) -> None:
        if not self.path.is_file():
            raise ConfigError(f"--event-log is {self.path}, which is no file; name another")
        with self.path.open("rb") as file:
            head = file.read(len(MAGIC))
            if head and head != MAGIC:
                raise ConfigError(f"--event-log is {self.path}, which is there and is no event log; name another")
            _lock(file, self.path)
        self.path.replace(self._older)

    def _begin(self, about: About) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(self.path, flags, 0o600)  # names of keys are in it
        self._file = io.FileIO(descriptor, "wb")
        _lock(self._file, self.path)
        self._append(_HEAD.pack(MAGIC, VERSION) + entry(ABOUT, about))
        self._begin_bytes = self._file.tell()

    def _append(self, data: bytes) -> None:
        """A file takes a part of it where the disk is about to be full."""
        assert self._file is not None, "opened before it is written to"
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def _lock(file: io.FileIO | BinaryIO, path: Path) -> None:
    """As long as it is open, and no other server has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--event-log is {path}, which another server is writing; name another") from None


# ---- reading -------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> Recording:
    """All that a file holds. Raises ConfigError naming the file; an entry that was cut off at its end is left out."""
    try:
        with path.open("rb") as file:
            return _recording(path, file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _recording(path: Path, file: BinaryIO) -> Recording:
    _check_head(path, file.read(_HEAD.size))
    log, info, about = EventLog(UNBOUNDED, UNBOUNDED), None, None
    restarts = Restarts(log)
    calls: list[CallRecord] = []
    refusals: list[Refusal] = []
    outages: Sequence[Outage] = ()
    end_ns = 0
    for at, kind, body in _entries(path, file):
        try:
            if kind == ABOUT:
                about = msgspec.msgpack.decode(body, type=About)
                outages = Outages(log, about.begun_ns, is_ready=about.is_ready).found
            elif kind == INFO:
                info = msgspec.msgpack.decode(body, type=EngineInfo)
            elif kind == STEP:
                step = msgspec.msgpack.decode(body, type=StepRecord)
                log.add_step(step)
                end_ns = max(end_ns, step.end_ns)
            elif kind == CALL:
                calls.append(msgspec.msgpack.decode(body, type=CallRecord))
                end_ns = max(end_ns, calls[-1].ended_ns)
            elif kind == REFUSAL:
                refusals.append(msgspec.msgpack.decode(body, type=Refusal))
            elif kind == ENGINE:
                log.engine(*msgspec.msgpack.decode(body, type=tuple[bool, int]))
            elif kind == END:
                end_ns = max(end_ns, msgspec.msgpack.decode(body, type=int))
            else:
                raise msgspec.ValidationError(f"kind {kind} is unknown")
        except msgspec.DecodeError as error:
            raise _damaged(path, at, str(error)) from error
    if about is None:
        raise ConfigError(f"{path} is an event log that ends before it says what it is of")
    end_ns = max(end_ns, about.begun_ns)
    return Recording(
        model=about.model,
        version=about.version,
        log=log,
        calls=calls,
        live=tuple,
        refusals=refusals,
        restarts=restarts.found,
        outages=outages,
        info=info,
        step_model=make_step_model(about.plan, info),
        counts=_counts(about.counts, calls, refusals, restarts),
        started_ns=about.started_ns,
        first_ns=about.begun_ns,
        now_ns=end_ns + 1,
        unix_ns=about.unix_ns + end_ns + 1 - about.begun_ns,
    )


def _check_head(path: Path, head: bytes) -> None:
    magic, version = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0)
    if magic != MAGIC:
        raise ConfigError(f"{path} is no event log: its first bytes are {head[:8]!r}; allowed: a file of --event-log")
    if version != VERSION:
        raise ConfigError(
            f"{path} is an event log of version {version}; this jilju reads version {VERSION}; use the jilju that wrote it"
        )


def _entries(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Where each entry lies, its kind and body."""
    at = _HEAD.size
    while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
        size, kind = _ENTRY.unpack(head)
        if size > MAX_ENTRY:
            raise _damaged(path, at, f"an entry of {size} bytes; allowed: up to {MAX_ENTRY}")
        body = file.read(size)
        if len(body) < size:
            return
        yield at, kind, body
        at += _ENTRY.size + size


def _damaged(path: Path, at: int, what: str) -> ConfigError:
    return ConfigError(f"{path} is damaged at byte {at}: {what[:200]}; take a copy of it that is not")


def _counts(begun: Counts, calls: list[CallRecord], refusals: list[Refusal], restarts: Restarts) -> Counts:
    """At the end of the file. Of calls that had not ended by then it knows nothing."""
    ended = {name: getattr(begun, name) for name in ("completed", "cancelled", "deadline", "shed", "failed")}
    for call in calls:
        ended["cancelled" if call.state == "client_cancelled" else call.state or "failed"] += 1
    refused, restarted = begun.refused + len(refusals), begun.restarts + len(restarts.found)
    return Counts(accepted=sum(ended.values()), live=0, refused=refused, restarts=restarted, **ended)
