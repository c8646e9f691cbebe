"""Event file: what the server writes with --event-log, beside the streams.

Owns the buffer between the log and the file, and when it is written: once a second while there is something, sooner when it is
much, by a thread. A file that cannot be written any more is given up with one warning, and serving goes on. Knows nothing of
the format.
"""

import asyncio
import logging
from pathlib import Path

from jilju.account.log_file import CALL, END, ENGINE, INFO, REFUSAL, STEP, LogWriter, entry
from jilju.account.recording import Refusal
from jilju.engine.client import EngineInfo
from jilju.engine.events import StepRecord, Watcher
from jilju.errors import ConfigError
from jilju.serve.ledger import Call, LedgerListener
from jilju.serve.recordings import Recordings

logger = logging.getLogger("jilju.serve")

FLUSH_S = 1.0
FLUSH_BYTES = 64 << 10
LEAST_BYTES = 1 << 20  # that a file may be let grow to
MAX_BYTES = 16 << 20  # that may wait for a disk


class EventFile(LedgerListener, Watcher):
    """`open` before the first call, `run` until the end, then `close`. A listener of the ledger and of the log of steps."""

    def __init__(self, recordings: Recordings, writer: LogWriter):
        self._recordings, self._writer = recordings, writer
        self._buffer = bytearray()
        self._has_some, self._is_much = asyncio.Event(), asyncio.Event()
        self._is_given_up = False
        self._info: EngineInfo | None = None  # as the file has it
        self._num_refused = 0  # in the file
        self._flushing: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Raises ConfigError."""
        self._writer.open(self._recordings.about(is_first=True))
        self._recordings.log.listen(self.on_step)
        self._recordings.log.watch(self)
        self._recordings.ledger.listen(self)

    def on_step(self, step: StepRecord) -> None:
        self._put(entry(STEP, step))

    def on_engine(self, is_ready: bool, at_ns: int) -> None:
        self._put(entry(ENGINE, (is_ready, at_ns)))

    def on_end(self, call: Call) -> None:
        self._put(entry(CALL, call.record()))

    async def run(self) -> None:
        """Until it is cancelled, or the file is given up."""
        while not self._is_given_up:
            await self._has_some.wait()
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._is_much.wait()
            except TimeoutError:
                pass
            self._flushing = asyncio.create_task(self._flush())
            await asyncio.shield(self._flushing)  # one write after the other, whenever this ends

    async def close(self) -> None:
        """What is left, and the end."""
        if self._flushing is not None:
            await self._flushing
        if not self._is_given_up:
            self._put(entry(END, self._recordings.now_ns()))
            await self._flush()
        self._writer.close()

    def _put(self, data: bytes) -> None:
        if self._is_given_up:
            return
        self._buffer += data
        self._has_some.set()
        if len(self._buffer) >= FLUSH_BYTES:
            self._is_much.set()
        if len(self._buffer) > MAX_BYTES:
            self._give_up(f"{MAX_BYTES >> 20} MiB wait to be written")

    async def _flush(self) -> None:
        data = self._news() + bytes(self._buffer)
        self._buffer.clear()
        self._has_some.clear()
        self._is_much.clear()
        try:
            if await asyncio.to_thread(self._writer.write, data):
                await asyncio.to_thread(self._writer.rotate, self._recordings.about(is_first=False), self._info)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _news(self) -> bytes:
        """What nobody tells of as it happens."""
        found = b""
        info = self._recordings.info
        if info is not None and info != self._info:
            self._info = info
            found = entry(INFO, info)
        ledger = self._recordings.ledger
        num_new = ledger.num_refused.total() - self._num_refused
        self._num_refused += num_new
        refusals: list[Refusal] = list(ledger.refusals)[-num_new:] if num_new else []
        return found + b"".join([entry(REFUSAL, refusal) for refusal in refusals])

    def _give_up(self, why: str) -> None:
        self._is_given_up = True
        self._buffer.clear()
        self._has_some.set()
        self._is_much.set()
        logger.warning("the event log ends here, serving goes on: %s: %s", self._writer.path, why)


def make_event_file(path: str | None, max_bytes: int, recordings: Recordings) -> EventFile | None:
    """None: nobody wants it. Raises ConfigError."""
    if path is None:
        return None
    if max_bytes < LEAST_BYTES:
        raise ConfigError(f"--event-log-max is {max_bytes} bytes; allowed: {LEAST_BYTES >> 20}MiB and above")
    return EventFile(recordings, LogWriter(Path(path), max_bytes))
