"""The event log: the one record of what happened.

Owns a bounded ring of step records and who listens to them, and nothing else: metrics and the time ledger are folds over them
and over the marks of requests. Holds no text and no tokens. Records are made in the engine process and travel with the step's
frame, so they outlive an engine's death. Times are ns of the monotonic clock.
"""

import struct
from collections.abc import Callable, Sequence
from typing import overload

import msgspec

STEP_RING = 131_072  # steps kept: an hour of 30 ms steps, 18 MB


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step: schedule from begin to scheduled, pack to packed, backend to done, commit to end."""

    step_id: int
    begin_ns: int
    scheduled_ns: int
    packed_ns: int
    done_ns: int
    end_ns: int
    num_rows: int
    num_prefill_tokens: int  # tokens of rows that compute more than the newest token of a decoding sequence
    num_decode_tokens: int
    num_cached_tokens: int  # prompt tokens that rows of this step found in the prefix cache
    num_recomputed_tokens: int  # tokens computed again after a preemption or a restart
    num_logits: int
    num_running: int
    num_waiting: int
    num_blocks_held: int
    num_blocks_cached: int
    num_blocks_free: int
    num_preempted: int
    num_finished: int
    num_aborted: int
    flops: int
    bytes: int
    predicted_ns: int  # what it was expected to take
    bound_ns: int  # what it might be expected to take at most, for the streams that wait for it; 0: none does
    is_rerun: bool  # part of a step that raised


def prefill_share_ns(begin_ns: int, done_ns: int, num_prefill_tokens: int, num_decode_tokens: int) -> int:
    """What a decoding row of a step waited for the prefill of others: their share of its time, by token count."""
    return (done_ns - begin_ns) * num_prefill_tokens // (num_prefill_tokens + num_decode_tokens)


# The fields of a record in their order. As objects a full ring would take 86 MB.
_LAYOUT = struct.Struct("<6Q14I4Q?")


class StepRing(Sequence[StepRecord]):
    """The newest `size` records, the oldest first. They lie packed; one that is asked for is made anew."""

    def __init__(self, size: int, records: Sequence[StepRecord] = ()):
        self._size = size
        self._bytes = bytearray()  # grows up to `size` records
        self._oldest = 0  # where it lies, once all places are taken
        for record in records[-size:]:
            self.add(record)

    def add(self, record: StepRecord) -> None:
        packed = _LAYOUT.pack(*msgspec.structs.astuple(record))
        if len(self) < self._size:
            self._bytes += packed
        else:
            begin = self._oldest * _LAYOUT.size
            self._bytes[begin : begin + _LAYOUT.size] = packed
            self._oldest = (self._oldest + 1) % self._size

    def __len__(self) -> int:
        return len(self._bytes) // _LAYOUT.size

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...

    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        places = range(len(self))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)

    def _at(self, place: int) -> StepRecord:
        fields = _LAYOUT.unpack_from(self._bytes, (self._oldest + place) % len(self) * _LAYOUT.size)
        return msgspec.convert(fields, StepRecord)


class EventLog:
    """A bounded ring of step records and a list of listeners, called once for each record as it is added."""

    def __init__(self, ring: int = STEP_RING):
        self.steps = StepRing(ring)
        self._listeners: list[Callable[[StepRecord], None]] = []

    def add_step(self, record: StepRecord) -> None:
        self.steps.add(record)
        for listener in self._listeners:
            listener(record)

    def resize(self, ring: int) -> None:
        """Keep the newest `ring` records from now on."""
        self.steps = StepRing(ring, self.steps)

    def listen(self, listener: Callable[[StepRecord], None]) -> None:
        self._listeners.append(listener)
