"""Recording: what folds over an engine's life read, the same of one that runs and of a file.

Owns the type, and who may see which runs. A fold reads nothing but this, so live view, past and file show the same. Holds no
text and no tokens; knows nothing of servers.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jilju.account.frame import Cost, Counts, Energy, Owned
from jilju.account.records import CallRecord
from jilju.account.step_model import StepModel
from jilju.engine.client import EngineInfo
from jilju.engine.events import EventLog, StepRecord, Watcher

MAX_RESTARTS = 1024  # that are remembered


class Refusal(NamedTuple):
    """A call that was turned away before it was accepted."""

    at_ns: int
    status: int
    code: str


class Restart(NamedTuple):
    """The first step of an engine that came after another."""

    serial: int
    at_ns: int  # when it began


class Restarts:
    """Found as steps are logged: the ids of an engine's steps only grow, and the next engine counts anew."""

    def __init__(self, log: EventLog):
        self.found: deque[Restart] = deque(maxlen=MAX_RESTARTS)
        self._log = log
        self._last_id = -1
        log.listen(self._on_step)

    def _on_step(self, step: StepRecord) -> None:
        if step.step_id <= self._last_id and not step.is_rerun:
            self.found.append(Restart(self._log.num_steps - 1, step.begin_ns))
        self._last_id = step.step_id


class Outage(NamedTuple):
    """No engine was ready."""

    begin_ns: int
    end_ns: int  # 0: it goes on
    state: str  # "loading" before the first engine, "restarting" later


class Outages(Watcher):
    """A watcher of the log."""

    def __init__(self, log: EventLog, now_ns: int, *, is_ready: bool):
        self.found: deque[Outage] = deque(maxlen=MAX_RESTARTS)
        if not is_ready:
            self.found.append(Outage(now_ns, 0, "loading"))
        log.watch(self)

    def on_engine(self, is_ready: bool, at_ns: int) -> None:
        is_out = bool(self.found) and not self.found[-1].end_ns
        if is_ready and is_out:
            self.found[-1] = self.found[-1]._replace(end_ns=at_ns)
        elif not is_ready and not is_out:
            self.found.append(Outage(at_ns, 0, "restarting"))


class BlockCounts(NamedTuple):
    held: int
    cached: int
    free: int


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks. A key sees the runs of its own; without keys everybody sees all."""

    key_name: str | None = None
    sees_all: bool = False  # who has the file

    def sees(self, key_name: str | None) -> bool:
        return self.sees_all or self.key_name == key_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What only a living server can say, of this moment."""

    state: str
    imbalance: int
    blocks: BlockCounts
    predicted_starts: Mapping[int, int]  # of those that wait: ns by the sequence's number
    memory: Callable[[], list[Owned]]
    cost: Cost | None = None
    energy: Energy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """`calls` are those that ended, in the order of their ends; `live` makes records of those that run."""

    model: str
    version: str
    log: EventLog
    calls: Sequence[CallRecord]
    live: Callable[[], Sequence[CallRecord]]
    refusals: Sequence[Refusal]
    restarts: Sequence[Restart]
    outages: Sequence[Outage]
    info: EngineInfo | None  # None: no engine was ready yet
    step_model: StepModel
    counts: Counts  # at now_ns
    started_ns: int
    first_ns: int  # oldest moment that the log and the calls reach back to
    now_ns: int  # its end
    unix_ns: int  # wall clock at now_ns
    now: Now | None = field(default=None)  # None: of a file

    @property
    def block_size(self) -> int:
        return self.info.block_size if self.info is not None else 0

    def state_at(self, at_ns: int) -> str:
        """Of the engine."""
        if self.now is not None and at_ns >= self.now_ns:
            return self.now.state
        out = (outage.state for outage in self.outages if outage.begin_ns < at_ns <= (outage.end_ns or at_ns))
        return next(out, "ready")

    def unix_ms(self, at_ns: int) -> float:
        return (self.unix_ns - self.now_ns + at_ns) / 1e6


def first_moment(log: EventLog, started_ns: int, dropped_ns: int) -> int:
    """From when on steps, rows and ended calls are all kept. `dropped_ns`: the last end of a call that is not; 0: there is none."""
    first_ns = max(started_ns, dropped_ns + 1 if dropped_ns else 0)
    places = range(len(log.steps))
    first = bisect_left(places, log.rows.oldest, key=log.steps.first_row)
    if (first == 0 and log.num_steps == len(log.steps)) or first == len(places):
        return first_ns
    return max(first_ns, log.steps.at(first)[0].begin_ns)
