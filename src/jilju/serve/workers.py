"""Workers: a few processes for what callers shape and what can overrun: grammars and chat templates.

Owns the processes, started on first use and killed when a job overruns, the queue in front of them, and the cache of compiled
grammars. A job that takes too long, too much memory or its worker's life costs its own caller a 400 and nobody else anything.
Knows nothing of llguidance, templates or model files: `assemble` hands it the command that starts a worker.
"""

import asyncio
import hashlib
import logging
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from jilju.clock import Clock, WallClock
from jilju.errors import GrammarTooComplex, InternalError, JiljuError, NotReady, Overloaded, TemplateFailed
from jilju.serve.errors import error_of
from jilju.serve.worker_link import LENGTH, MAX_FRAME_BYTES, Begun, Compile, Done, Job, Refused, Render, Reply, frame
from jilju.text.grammar import GrammarSource

logger = logging.getLogger(__name__)

TEMPLATE_GRACE_S = 0.25  # a template's own deadline comes first: its error says more
KEPT_S = 60.0  # an overrun is told again for so long: a busy machine may have had its part in it
ENTRY_BYTES = 256  # of a cached grammar besides its text


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    num_processes: int = 2
    num_waiting: int = 64  # jobs without a worker; above: 429
    grammar_s: float = 1.8  # so that its caller is told within 2 s
    template_s: float = 1.0
    start_s: float = 60.0  # until a worker has loaded what a job needs
    cache_bytes: int = 32 << 20


class Overran(msgspec.Struct, frozen=True):
    """What a job ended its worker with."""

    how: Literal["time", "death"]


class Workers:
    """`command` starts a worker; the number of its link's file descriptor is appended."""

    def __init__(self, command: Sequence[str], *, limits: WorkerLimits | None = None, clock: Clock | None = None):
        self.limits = limits or WorkerLimits()
        self._command = tuple(command)
        self._clock = clock or WallClock()
        self._cache = _Cache(self.limits.cache_bytes)
        self._compiling: dict[bytes, asyncio.Task[_Compiled]] = {}
        self._turns = asyncio.Semaphore(self.limits.num_processes)
        self._num_waiting = 0
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._jobs: set[asyncio.Task[Done | Refused | Overran]] = set()
        self._is_closed = False

    @property
    def compile_cache_bytes(self) -> int:
        """What the compiled grammars and the refusals take that are kept."""
        return self._cache.num_bytes

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that run now."""
        return [worker.process.pid for worker in (*self._idle, *self._busy)]

    async def compile(self, source: GrammarSource, *, param: str | None = None) -> str:
        """The grammar as engines take it, compiled within its limits by a worker or remembered. Equal sources that come together
        are compiled once. Raises InvalidGrammar or GrammarTooComplex, which name `param`, Overloaded, NotReady or InternalError."""
        key = hashlib.sha256(f"{source.kind}\0{source.text}".encode("utf-8", "surrogatepass")).digest()
        compiled = self._cache.get(key, self._clock.now_ns())
        if compiled is None:
            task = self._compiling.get(key)
            if task is None:
                task = self._compiling[key] = asyncio.create_task(self._compile(key, source))
                task.add_done_callback(lambda _: self._compiling.pop(key, None))
            compiled = await asyncio.shield(task)  # others may wait for it, and it is kept for the next caller
        if compiled.code:
            error = error_of(compiled.code, compiled.text)
            error.param = param
            raise error
        return compiled.text

    async def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, template: str | None = None
    ) -> str:
        """What `ChatTemplate.render(messages, **options)` gives, in a worker: for what inline rendering had no time for. With
        `template` it renders that source in place of the model's. Raises TemplateFailed and whatever render raises, Overloaded,
        NotReady or InternalError."""
        job = Render([dict(message) for message in messages], dict(options), template)
        outcome = await self._run(job, self.limits.template_s + TEMPLATE_GRACE_S)
        match outcome:
            case Done(text):
                return text
            case Refused(code, message, param):
                error = error_of(code, message)
                error.param = param
                raise error
        how = f"takes longer than {self.limits.template_s:g} s" if outcome.how == "time" else "takes too much memory"
        raise TemplateFailed(f"the chat template {how} on these messages; send less", param="messages")

    async def close(self) -> None:
        """End every worker; whoever waits for one gets NotReady."""
        self._is_closed = True
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, *self._compiling.values(), return_exceptions=True)
        for worker in self._idle:
            await worker.end()
        self._idle.clear()

    async def _compile(self, key: bytes, source: GrammarSource) -> "_Compiled":
        outcome = await self._run(Compile(source), self.limits.grammar_s)
        match outcome:
            case Done(text):
                compiled = _Compiled(text)
            case Refused(code, message) if code == InternalError.code:
                raise InternalError(message)
            case Refused(code, message):
                compiled = _Compiled(message, code)
            case Overran(how):
                what = f"longer than {self.limits.grammar_s:g} s" if how == "time" else "too much memory"
                until_ns = self._clock.now_ns() + int(KEPT_S * 1e9)
                compiled = _Compiled(
                    f"the grammar takes {what} to compile; make it simpler", GrammarTooComplex.code, until_ns
                )
        self._cache.put(key, compiled)
        return compiled

    async def _run(self, job: Job, limit_s: float) -> Done | Refused | Overran:
        """Wait for a worker and have it do the job, which goes on if the caller leaves."""
        self._refuse_if_closed()
        if self._turns.locked() and self._num_waiting >= self.limits.num_waiting:
            raise Overloaded(
                f"{self._num_waiting} grammars and templates wait for a worker; allowed: {self.limits.num_waiting}; try again later",
                retry_after_s=self.limits.num_waiting * limit_s / self.limits.num_processes,
            )
        self._num_waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._num_waiting -= 1
        try:
            self._refuse_if_closed()
        except NotReady:
            self._turns.release()
            raise
        task = asyncio.create_task(self._perform(job, limit_s))
        self._jobs.add(task)
        task.add_done_callback(self._performed)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise NotReady("the server is stopping") from None
            raise

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise NotReady("the server is stopping")

    def _performed(self, task: "asyncio.Task[Done | Refused | Overran]") -> None:
        self._jobs.discard(task)
        self._turns.release()
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, JiljuError):
            logger.error("a worker's job failed", exc_info=error)

    async def _perform(self, job: Job, limit_s: float) -> Done | Refused | Overran:
        """In a worker that is there, or a new one. One that has ended meanwhile costs nothing."""
        message = frame(job)
        while True:
            is_new = not self._idle
            worker = await _Worker.start(self._command) if is_new else self._idle.pop()
            self._busy.add(worker)
            try:
                has_begun = await worker.begin(message, self.limits.start_s)
                outcome = await worker.outcome(limit_s) if has_begun else Overran("death")
                if isinstance(outcome, Done | Refused):
                    self._idle.append(worker)
                    return outcome
            finally:
                self._busy.discard(worker)
                if worker not in self._idle:
                    await worker.end()
            if has_begun:
                logger.warning("a worker was ended by its job: %s", outcome.how)
                return outcome
            if is_new:
                raise InternalError("a worker process does not start; what it wrote to the log says why")


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar; or where there is a code, what is wrong with it."""

    text: str
    code: str = ""
    until_ns: int | None = None


class _Cache:
    """What sources were compiled to, by the hash of the source: the least recently used go first. Only in memory."""

    def __init__(self, max_bytes: int):
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, _Compiled] = OrderedDict()

    def get(self, key: bytes, now_ns: int) -> _Compiled | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.until_ns is not None and now_ns >= entry.until_ns:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: _Compiled) -> None:
        if key in self._entries:
            self._drop(key)
        self._entries[key] = entry
        self.num_bytes += _bytes_of(entry)
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        self.num_bytes -= _bytes_of(self._entries.pop(key))


def _bytes_of(entry: _Compiled) -> int:
    return ENTRY_BYTES + sys.getsizeof(entry.text)


class _Worker:
    """A worker's process and our end of its link."""

    def __init__(self, process: "subprocess.Popen[bytes]", reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, command: Sequence[str]) -> "_Worker":
        ours, its = socket.socketpair()
        with its:  # open in the child only, so that each side sees the other's end
            try:
                process = subprocess.Popen(
                    [*command, str(its.fileno())], pass_fds=(its.fileno(),), stdin=subprocess.DEVNULL, stdout=2
                )
            except OSError as error:
                ours.close()
                raise InternalError(f"a worker process cannot be started: {error}") from error
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    async def begin(self, message: bytes, start_s: float) -> bool:
        """Hand over a job; False if the worker is not there to begin it."""
        try:
            async with asyncio.timeout(start_s):
                self._writer.write(message)
                await self._writer.drain()
                return isinstance(await self._read(), Begun)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            return False

    async def outcome(self, limit_s: float) -> Done | Refused | Overran:
        try:
            async with asyncio.timeout(limit_s):
                reply = await self._read()
        except TimeoutError:
            return Overran("time")
        except (ConnectionError, asyncio.IncompleteReadError):
            return Overran("death")
        if isinstance(reply, Begun):
            raise InternalError("a worker began a job twice")
        return reply

    async def _read(self) -> Reply:
        length = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))[0]
        if length > MAX_FRAME_BYTES:
            raise InternalError(f"a worker sends a message of {length} bytes; allowed: {MAX_FRAME_BYTES}")
        reply: Reply = msgspec.msgpack.decode(await self._reader.readexactly(length), type=Reply)
        return reply

    async def end(self) -> None:
        self._writer.close()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
