"""The event log: the one record of what happened.

Owns two bounded rings, of steps and of their rows, and who listens to them, and nothing else: metrics, ledgers, traces and pages
are folds over them and over the marks of requests. Holds no text and no tokens. Records are made in the engine process and travel
with the step's frame, so they outlive an engine's death. Times are ns of the monotonic clock.
"""

import logging
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args, overload

import msgspec
import numpy as np

logger = logging.getLogger(__name__)

STEP_RING = 131_072  # steps kept: an hour of 30 ms steps, 20 MB
ROW_RING = 1_048_576  # rows kept: eight a step, 20 MB

# What kept those out of a step that wait: all rows taken, the budget of tokens or of time spent, no blocks, others first.
Closed = Literal["open", "rows", "tokens", "blocks", "order"]
CLOSED: tuple[Closed, ...] = get_args(Closed)


PackedRows = bytes  # of RowRecords


class RowRecord(NamedTuple):
    """One request's part of a step: its tokens [start, start + num_tokens) were computed. Those before its first row came from the cache."""

    number: int  # Request.number
    start: int
    num_tokens: int
    is_sampled: int  # 1: its next token was chosen


_ROW = struct.Struct("<QIII")
_ROW_ARRAY = np.dtype(list(zip(RowRecord._fields, ("<u8", "<u4", "<u4", "<u4"), strict=True)))
pack_row = _ROW.pack
iter_rows = _ROW.iter_unpack  # plain tuples in the order of RowRecord, for who looks at every step


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
    closed_by: Closed = "open"
    rows: PackedRows = b""  # its RowRecords, packed; not kept with the record but in a ring of their own


class LoggedStep(NamedTuple):
    """A step as the log keeps it. `serial` counts all that were logged, over all engines."""

    serial: int
    step: StepRecord
    rows: tuple[RowRecord, ...]  # fewer than step.num_rows where the ring of rows has dropped them: none at all


class LogArrays(NamedTuple):
    """Steps and their rows as records of numpy. They are copies: what is added to the log later does not change them."""

    first_serial: int
    steps: np.ndarray  # fields of StepRecord, closed_by as its place in CLOSED
    rows: np.ndarray  # fields of RowRecord, in the order of their steps; of steps whose rows are gone there are none
    row_steps: np.ndarray  # of each row, the index of its step


def prefill_share_ns(begin_ns: int, done_ns: int, num_prefill_tokens: int, num_decode_tokens: int) -> int:
    """What a decoding row of a step waited for the prefill of others: their share of its time, by token count."""
    return (done_ns - begin_ns) * num_prefill_tokens // (num_prefill_tokens + num_decode_tokens)


# The fields of a record in their order but for its rows, and the number of its first row. As objects a full ring would take 86 MB.
_LAYOUT = struct.Struct("<6Q14I4Q?BQ")
_END_NS = struct.Struct("<40xQ")
_FIRST_ROW = struct.Struct(f"<{_LAYOUT.size - 8}xQ")
_STEP_TYPES = ("<u8",) * 6 + ("<u4",) * 14 + ("<u8",) * 4 + ("?", "u1")
_STEP_ARRAY = np.dtype([*zip(StepRecord.__struct_fields__[:-1], _STEP_TYPES, strict=True), ("first_row", "<u8")])
assert _STEP_ARRAY.itemsize == _LAYOUT.size, "two views of the same bytes"


class StepRing(Sequence[StepRecord]):
    """The newest `size` records, the oldest first. They lie packed; one that is asked for is made anew."""

    def __init__(self, size: int, records: Sequence[StepRecord] = ()):
        self._size = size
        self._capacity = size * _LAYOUT.size
        self._bytes = bytearray()  # grows up to `size` records
        self._oldest = 0  # where it lies, once all places are taken
        for record in records[-size:]:
            self.add(record)

    def add(self, record: StepRecord, first_row: int = 0) -> None:
        fields = msgspec.structs.astuple(record)
        packed = _LAYOUT.pack(*fields[:-2], CLOSED.index(record.closed_by), first_row)
        if len(self._bytes) < self._capacity:
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
        return [self.at(place)[0] for place in places] if isinstance(places, range) else self.at(places)[0]

    @property
    def num_bytes(self) -> int:
        return len(self._bytes)

    def at(self, place: int) -> tuple[StepRecord, int]:
        """The record, and the number of its first row."""
        *fields, closed_by, first_row = _LAYOUT.unpack_from(self._bytes, self._offset(place))
        return msgspec.convert((*fields, CLOSED[closed_by]), StepRecord), first_row

    def end_ns(self, place: int) -> int:
        end: int = _END_NS.unpack_from(self._bytes, self._offset(place))[0]
        return end

    def first_row(self, place: int) -> int:
        first: int = _FIRST_ROW.unpack_from(self._bytes, self._offset(place))[0]
        return first

    def array(self, places: range) -> np.ndarray:
        """A copy of these, which follow one another."""
        if not places:
            return np.empty(0, _STEP_ARRAY)
        begin, size = self._offset(places[0]), len(places) * _LAYOUT.size
        return np.frombuffer(_around(self._bytes, begin, size), _STEP_ARRAY)

    def part(self, places: range) -> "StepRing":
        found = StepRing(max(1, len(places)))
        found._bytes += self.array(places).tobytes()
        return found

    def _offset(self, place: int) -> int:
        return (self._oldest + place) % len(self) * _LAYOUT.size


def _around(ring: bytearray, begin: int, size: int) -> bytes:
    """A copy of so many bytes, which may go on at the ring's begin. No view of it is held, or a ring could not grow meanwhile."""
    return bytes(ring[begin : begin + size]) + ring[: max(0, begin + size - len(ring))]


class RowRing:
    """The newest `size` rows, which are counted from 0 over all that were added."""

    def __init__(self, size: int, num_before: int = 0):
        self._size, self._num_before = size, num_before
        self._bytes = bytearray()  # grows up to `size` rows
        self.num_added = num_before

    def add(self, packed: bytes) -> None:
        """Whole rows, fewer than fit."""
        capacity = self._size * _ROW.size
        if len(self._bytes) < capacity:
            self._bytes += packed
            over = len(self._bytes) - capacity
            if over > 0:
                self._bytes[:over] = self._bytes[capacity:]
                del self._bytes[capacity:]
        else:
            begin = (self.num_added - self._num_before) % self._size * _ROW.size
            head = min(len(packed), capacity - begin)
            self._bytes[begin : begin + head] = packed[:head]
            self._bytes[: len(packed) - head] = packed[head:]
        self.num_added += len(packed) // _ROW.size

    def rows(self, first: int, count: int) -> tuple[RowRecord, ...]:
        """Rows [first, first + count); none if the first of them was dropped."""
        if first < self.oldest:
            return ()
        return tuple(map(RowRecord._make, _ROW.iter_unpack(self.packed(first, count))))

    @property
    def num_bytes(self) -> int:
        return len(self._bytes)

    @property
    def oldest(self) -> int:
        """The number of the oldest that is kept."""
        return self.num_added - len(self._bytes) // _ROW.size

    def packed(self, first: int, count: int) -> bytes:
        """A copy of kept rows [first, first + count)."""
        begin, size = (first - self._num_before) % self._size * _ROW.size, count * _ROW.size
        return _around(self._bytes, begin, size)

    def part(self, first: int, count: int) -> "RowRing":
        found = RowRing(max(1, count), first)
        found.add(self.packed(first, count))
        return found


class Watcher(Protocol):
    """Who is told what happens between steps, as it happens: when there is work, and when there is an
    engine. One that names this as its base says only what it wants to hear."""

    def on_enter(self, number: int, tenant: str, at_ns: int) -> None:
        """A request is in the engine's care."""
        return

    def on_leave(self, number: int, at_ns: int) -> None:
        """Its terminal event is at hand, whoever reads it; the records of its steps came before."""
        return

    def on_engine(self, is_ready: bool, at_ns: int) -> None:
        """An engine has loaded, or has died: the records of its steps came before."""
        return


class Guard:
    """Between what happens and those who only look on: one that raises is logged, and hurts nobody else."""

    def __init__(self, whose: str):
        self._whose = whose
        self.num_failures = 0

    def tell(self, listener: Callable[..., None], *what: object) -> None:
        try:
            listener(*what)
        except Exception:
            self.num_failures += 1
            if self.num_failures & (self.num_failures - 1) == 0:  # the 1st, 2nd, 4th, ...
                logger.exception(
                    "listeners of %s failed %d times, their sums are wrong from here on", self._whose, self.num_failures
                )


class EventLog:
    """A bounded ring of step records, one of their rows, and listeners, called once for each record as it is added.

    It belongs to one thread: another one reads a `part` of it.
    """

    def __init__(self, ring: int = STEP_RING, row_ring: int = ROW_RING):
        self.steps = StepRing(ring)
        self.rows = RowRing(row_ring)
        self.num_steps = 0  # ever added
        self._is_kept = True
        self._guard = Guard("the log")
        self._listeners: list[Callable[[StepRecord], None]] = []
        self._watchers: list[Watcher] = []

    def add_step(self, record: StepRecord) -> None:
        if self._is_kept:
            self.steps.add(record, self.rows.num_added)
            self.rows.add(record.rows)
        self.num_steps += 1
        for listener in self._listeners:
            self._guard.tell(listener, record)

    @property
    def num_failures(self) -> int:
        """Of listeners; each leaves some sum wrong."""
        return self._guard.num_failures

    def keep_none(self) -> None:
        """From now on: for who only hands records on."""
        self.steps, self._is_kept = StepRing(1), False

    def listen(self, listener: Callable[[StepRecord], None]) -> None:
        self._listeners.append(listener)

    def watch(self, watcher: Watcher) -> None:
        self._watchers.append(watcher)

    def enter(self, number: int, tenant: str, at_ns: int) -> None:
        for watcher in self._watchers:
            self._guard.tell(watcher.on_enter, number, tenant, at_ns)

    def leave(self, number: int, at_ns: int) -> None:
        for watcher in self._watchers:
            self._guard.tell(watcher.on_leave, number, at_ns)

    def engine(self, is_ready: bool, at_ns: int) -> None:
        for watcher in self._watchers:
            self._guard.tell(watcher.on_engine, is_ready, at_ns)

    @property
    def num_bytes(self) -> int:
        """Of both rings."""
        return self.steps.num_bytes + self.rows.num_bytes

    @property
    def oldest_ns(self) -> int | None:
        """When the oldest step that is kept began."""
        return self.steps[0].begin_ns if len(self.steps) else None

    def between(self, begin_ns: int, end_ns: int) -> list[LoggedStep]:
        """The steps that ended in [begin_ns, end_ns), the oldest first."""
        places = range(len(self.steps))
        first = bisect_left(places, begin_ns, key=self.steps.end_ns)
        last = bisect_left(places, end_ns, key=self.steps.end_ns)
        return [self._logged(place) for place in places[first:last]]

    def overlapping(self, begin_ns: int, end_ns: int) -> list[LoggedStep]:
        """The steps that were under way at some moment of (begin_ns, end_ns), the oldest first."""
        places = range(len(self.steps))
        found: list[LoggedStep] = []
        for place in places[bisect_right(places, begin_ns, key=self.steps.end_ns) :]:
            logged = self._logged(place)
            if logged.step.begin_ns >= end_ns:
                break
            found.append(logged)
        return found

    def step(self, serial: int) -> LoggedStep | None:
        """None: it is not kept any more, or never was."""
        place = serial - (self.num_steps - len(self.steps))
        return self._logged(place) if 0 <= place < len(self.steps) else None

    def serials(self, begin_ns: int, end_ns: int) -> range:
        """Of the steps that ended in [begin_ns, end_ns)."""
        places, dropped = range(len(self.steps)), self.num_steps - len(self.steps)
        first = bisect_left(places, begin_ns, key=self.steps.end_ns)
        return range(dropped + first, dropped + bisect_left(places, end_ns, lo=first, key=self.steps.end_ns))

    def step_array(self, serials: range) -> np.ndarray:
        """Those of them that are kept, as records of numpy, copied."""
        return self.steps.array(self._places(serials))

    def arrays(self, serials: range) -> LogArrays:
        """The same with their rows."""
        places, steps = self._places(serials), self.step_array(serials)
        first_row, num_rows = self._rows_of(places)
        ends = np.append(steps["first_row"][1:], first_row + num_rows).astype(np.int64)
        counts = np.where(steps["first_row"] >= self.rows.oldest, ends - steps["first_row"].astype(np.int64), 0)
        total = int(counts.sum())
        rows = np.frombuffer(self.rows.packed(first_row + num_rows - total, total), _ROW_ARRAY)
        row_steps = np.repeat(np.arange(len(steps)), counts)
        return LogArrays(self.num_steps - len(self.steps) + places.start, steps, rows, row_steps)

    def has_dropped(self, at_ns: int) -> bool:
        """Whether steps that were under way at that moment, or later, may not be kept any more."""
        is_full = self.num_steps > len(self.steps)
        return is_full and (not len(self.steps) or self.steps.end_ns(0) > at_ns)

    def part(self, serials: range) -> "EventLog":
        """A log of its own with those of them that are kept and the one before, under the same serials, for a thread to read."""
        places = self._places(serials)
        places = range(max(0, places.start - 1), places.stop)
        found = EventLog()
        found.steps, found.rows = self.steps.part(places), self.rows.part(*self._rows_of(places))
        found.num_steps = self.num_steps - len(self.steps) + places.stop
        return found

    def _places(self, serials: range) -> range:
        dropped, kept = self.num_steps - len(self.steps), len(self.steps)
        stop = min(max(serials.stop - dropped, 0), kept)
        return range(min(max(serials.start - dropped, 0), stop), stop)

    def _rows_of(self, places: range) -> tuple[int, int]:
        """The first row of these steps that is kept, and how many there are."""
        if not places:
            return self.rows.oldest, 0
        end = self.rows.num_added if places.stop == len(self.steps) else self.steps.first_row(places.stop)
        first = max(self.steps.first_row(places.start), self.rows.oldest)
        return first, max(0, end - first)

    def _logged(self, place: int) -> LoggedStep:
        step, first_row = self.steps.at(place)
        serial = self.num_steps - len(self.steps) + place
        return LoggedStep(serial, step, self.rows.rows(first_row, step.num_rows))
