"""Rows of the last minute of steps, by sequence: the newest of each, and the gaps between its tokens.

Owns a fold that goes on from where it was, so that a live view reads each row once. What it says of a minute depends on that minute's
rows alone, wherever it began. Knows nothing of calls.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jilju.engine.events import EventLog

MINUTE_NS = 60 * 10**9


@dataclass(slots=True)
class Newest:
    """Of a sequence's rows. Times are the ends of their steps."""

    at_ns: int
    serial: int  # of the step
    computed: int  # tokens, with those of this row
    is_sampled: bool
    stay_start: int  # where it began when it was last let in: what is before that was cached
    before_stay_ns: int  # of the last row before that; 0: there was none
    sampled_ns: int = 0  # of the newest row that chose a token
    sampled_computed: int = 0


class _Batch(NamedTuple):
    """Of the steps that were read at once."""

    last_ns: int
    sampled_ns: np.ndarray  # of each token that was chosen
    before_ns: np.ndarray  # of the sequence's token before it; 0: there was none


class SequenceRows:
    def __init__(self) -> None:
        self.begin_ns = 0  # of the minute
        self._serial = 0  # of the next step to be read
        self._newest: dict[int, Newest] = {}
        self._batches: deque[_Batch] = deque()
        self._last_preempting = -1  # serial of a step

    def advance(self, log: EventLog, end_ns: int) -> None:
        """Up to that moment, which is not before that of the last time: of the minute up to the last step that had ended."""
        last = log.step(log.serials(0, end_ns).stop - 1)
        if last is None:
            return
        begin_ns = self.begin_ns = last.step.end_ns - MINUTE_NS
        first = log.serials(begin_ns, end_ns).start
        self._read(log, range(max(first, self._serial), last.serial + 1))
        while self._batches and self._batches[0].last_ns < begin_ns:
            self._batches.popleft()
        self._newest = {number: newest for number, newest in self._newest.items() if newest.at_ns >= begin_ns}

    def newest(self, number: int) -> Newest | None:
        """None: it had no row in the last minute."""
        return self._newest.get(number)

    def was_preempted_after(self, newest: Newest) -> bool:
        """Whether somebody was, in a later step."""
        return self._last_preempting > newest.serial

    def gaps_ns(self, begin_ns: int) -> np.ndarray:
        """Between the ends of steps in which consecutive tokens of a sequence were chosen, from a moment on."""
        if not self._batches:
            return np.empty(0, np.int64)
        sampled_ns = np.concatenate([batch.sampled_ns for batch in self._batches])
        before_ns = np.concatenate([batch.before_ns for batch in self._batches])
        gaps: np.ndarray = (sampled_ns - before_ns)[before_ns >= begin_ns]
        return gaps

    def num_sampled(self, begin_ns: int) -> int:
        return sum(int(np.count_nonzero(batch.sampled_ns >= begin_ns)) for batch in self._batches)

    def _read(self, log: EventLog, serials: range) -> None:
        if not serials:
            return
        arrays = log.arrays(serials)
        self._serial = serials.stop
        preempting = np.flatnonzero(arrays.steps["num_preempted"])
        if len(preempting):
            self._last_preempting = arrays.first_serial + int(preempting[-1])
        ends: list[int] = arrays.steps["end_ns"].tolist()
        sampled: list[int] = []
        before: list[int] = []
        for (number, start, count, is_sampled), place in zip(
            arrays.rows.tolist(), arrays.row_steps.tolist(), strict=True
        ):
            at_ns, newest = ends[place], self._newest.get(number)
            if newest is None:
                newest = self._newest[number] = Newest(at_ns, 0, 0, False, start, 0)
            elif start != newest.computed:
                newest.stay_start, newest.before_stay_ns = start, newest.at_ns
            newest.at_ns, newest.serial, newest.computed = at_ns, arrays.first_serial + place, start + count
            newest.is_sampled = is_sampled == 1
            if is_sampled:
                sampled.append(at_ns)
                before.append(newest.sampled_ns)
                newest.sampled_ns, newest.sampled_computed = at_ns, newest.computed
        self._batches.append(_Batch(ends[-1], np.array(sampled, np.int64), np.array(before, np.int64)))
