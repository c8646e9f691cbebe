"""Faults: an executor that fails as the script says, around one that does not; frames that are bent or forged.

Owns what goes wrong inside a step: exceptions before and after the cache was written, steps that never end, rows that are not
finite or out of range, and the death of the process; and what becomes of frames on their way. Knows nothing of the link or of clocks but that they can be moved.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from jilju.clock import VirtualClock
from jilju.engine.link import FRAME_HEADER
from jilju.engine.request import EngineEvent, PromptScored, TokenEvent, is_terminal
from jilju.plan import Batch, Executor, StepResult
from jilju.simulation.script import SPECIAL_IDS, DeathCause, Fault, Script

FRAME_LENGTH_BYTES = 4  # at the head of a frame
STUCK_NS = 3600 * 10**9


class EngineDied(BaseException):
    """The process is gone in the middle of a step. Nothing catches it on the way."""

    def __init__(self, cause: DeathCause):
        super().__init__(cause)
        self.cause = cause


class BackendFault(Exception):
    """What a backend raises when the script says so."""


class FaultyExecutor:
    """`launches`: calls so far, over all engines of a run; the script's faults are counted by it."""

    def __init__(self, inner: Executor, script: Script, clock: VirtualClock, launches: "Launches"):
        self.inner = inner
        self.name, self.kernel_set, self.invariant = inner.name, inner.kernel_set, inner.invariant
        self.weight_bytes, self.workspace_bytes = inner.weight_bytes, inner.workspace_bytes
        self.kv_bytes_per_token, self.load, self.free = inner.kv_bytes_per_token, inner.load, inner.free
        self._clock = clock
        self._launches = launches
        vocab_size = script.settings.vocab_size
        self._has_special = any(request.fault for request in script.requests)
        self._special = {name: vocab_size + offset for name, offset in SPECIAL_IDS.items()}
        self._vocab_size = vocab_size
        self._fault: str | None = None
        self._batch: Batch | None = None

    def poison(self, block_ids: Sequence[int]) -> None:
        poison = getattr(self.inner, "poison", None)
        if poison is not None:
            poison(block_ids)

    def launch(self, batch: Batch) -> None:
        self._fault = self._launches.next_fault()
        if self._fault == "raise_before":
            raise BackendFault("before the step")
        self._batch = batch
        self.inner.launch(batch)

    def wait(self) -> StepResult:
        batch, self._batch = self._batch, None
        assert batch is not None, "wait comes after launch"
        result = self.inner.wait()
        if self._fault == "stuck":
            self._clock.advance_ns(STUCK_NS)
        if self._fault == "raise_after":
            raise BackendFault("after the step, its keys and values are written")
        return self._special_rows(batch, result) if self._has_special else result

    def _special_rows(self, batch: Batch, result: StepResult) -> StepResult:
        special = batch.token_ids >= self._vocab_size
        if not special.any():
            return result
        if (batch.token_ids == self._special["crash"]).any():
            raise EngineDied("work")
        if (batch.token_ids == self._special["oom"]).any():
            raise EngineDied("pressure")
        if (batch.token_ids == self._special["raise"]).any():
            raise BackendFault("a token of this step")
        ids = batch.token_ids[batch.logit_tokens]
        return replace(
            result,
            finite=result.finite & (ids != self._special["nan"]),
            token_ids=np.where(ids == self._special["bad_id"], self._vocab_size, result.token_ids),
        )


class Launches:
    """Counts calls of the backend and says which fault the script has for the next."""

    def __init__(self, script: Script):
        self._faults = {f.at: f.kind for f in script.faults if f.kind in ("raise_before", "raise_after", "stuck")}
        self.num = 0

    def next_fault(self) -> str | None:
        self.num += 1
        return self._faults.get(self.num)


def bent(frame: bytes, fault: Fault, number: int) -> list[tuple[bytes, bool]]:
    """What arrives in place of a frame, and whether it must be refused at once."""
    if fault.kind == "drop":
        return []
    if fault.kind == "double":
        return [(frame, False), (frame, True)]
    if fault.kind == "foreign":
        epoch, frame_number, message = msgspec.msgpack.decode(frame[FRAME_HEADER.size :])
        body = msgspec.msgpack.encode((epoch + 7, frame_number, message))
        return [(FRAME_HEADER.pack(len(body), zlib.crc32(body)) + body, True)]
    assert fault.kind == "corrupt", f"{fault.kind} bends no frame"
    place = number * 7919 % len(frame)
    changed = frame[:place] + bytes([frame[place] ^ 0x10]) + frame[place + 1 :]
    return [(changed, place >= FRAME_LENGTH_BYTES)]  # a wrong length may wait for more first


def forged(events: list[EngineEvent], choice: int) -> list[EngineEvent]:
    """Events that cannot be: a token or a score that is not the next, an event of nobody, one after the last."""
    first = events[0]
    if choice % 3 == 0 and isinstance(first, TokenEvent):
        return [msgspec.structs.replace(first, index=first.index + 1), *events[1:]]
    if choice % 3 == 0 and isinstance(first, PromptScored):
        return [msgspec.structs.replace(first, start=first.start + 1), *events[1:]]
    if choice % 3 == 1:
        return [*events, msgspec.structs.replace(first, request_id="nobody")]
    return [*events, next((event for event in events if is_terminal(event)), first)]
