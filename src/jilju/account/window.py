"""Window: the frame of a stretch of time, the one fold behind the live view, its past and a recorded file.

Owns what of a recording falls into the window, the marks in it, the counts as they were at its end, and what a viewer may see
of it. Depends on the recording up to the window's end alone, but for what only a living server can say of now.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from jilju.account.frame import (
    Cost,
    Counts,
    Frame,
    HeldBlocks,
    Mark,
    RunningRow,
    Share,
    StepColumns,
    WaitingRow,
    Waterfall,
)
from jilju.account.moment import make_moment
from jilju.account.recording import Recording, Viewer
from jilju.account.records import CallRecord
from jilju.account.sequence_rows import MINUTE_NS, SequenceRows
from jilju.account.tiles import make_tiles
from jilju.account.waterfalls import Waterfalls
from jilju.engine.events import CLOSED

MAX_STEPS = 16_384  # of a frame, the newest: a window may be an hour
MAX_MARKS = 1024  # likewise
NUM_SLOWEST = 20
MARK_KINDS = (("client_cancelled", "cancelled"), ("deadline", "deadline"), ("shed", "shed"), ("failed", "failed"))

_Named = TypeVar("_Named", Mark, RunningRow, WaitingRow, Share, HeldBlocks, Waterfall)


class Cursor(NamedTuple):
    """How far a reader of consecutive frames has come: steps from this serial on and marks from this moment on are new to it."""

    serial: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Fold:
    """A frame with every run named, and whose each run is."""

    frame: Frame
    owners: dict[str, str | None]  # key's name by run
    cursor: Cursor  # for the frame that comes next


def make_frame(
    source: Recording,
    begin_ns: int,
    end_ns: int,
    viewer: Viewer,
    *,
    since: Cursor | None = None,
    waterfalls: Waterfalls | None = None,
) -> Frame:
    """The window [begin_ns, end_ns) as `viewer` may see it. With `since` only what is new of steps and marks."""
    return seen_by(make_fold(source, begin_ns, end_ns, since=since, waterfalls=waterfalls), viewer)


def make_fold(
    source: Recording,
    begin_ns: int,
    end_ns: int,
    *,
    since: Cursor | None = None,
    waterfalls: Waterfalls | None = None,
    rows: SequenceRows | None = None,
) -> Fold:
    """`waterfalls` and `rows` are what an earlier fold has left for later ones; that of `rows` ended no later."""
    log = source.log
    begin_ns = max(begin_ns, source.first_ns)
    serials = log.serials(begin_ns, end_ns)
    ended, live = ended_in(source, begin_ns, end_ns), _live_at(source, end_ns)
    rows = rows if rows is not None else SequenceRows()
    rows.advance(log, end_ns)
    moment = make_moment(source, rows, live, end_ns)
    tiles_ns = max(begin_ns, end_ns - MINUTE_NS)
    steps = log.step_array(log.serials(tiles_ns, end_ns))
    held = moment.blocks.held / moment.blocks.total if moment.blocks.total else 0.0
    tiles = make_tiles(
        steps, rows, tiles_ns, end_ns, [call for call in ended if call.ended_ns >= tiles_ns], source.step_model,
        streams=len(moment.running), waiting=moment.num_waiting, kv_used_share=held,
        imbalance=_imbalance(source, steps),
    )  # fmt: skip
    new = serials if since is None else range(min(max(serials.start, since.serial), serials.stop), serials.stop)
    marks_ns = begin_ns if since is None else max(begin_ns, since.at_ns)
    bars = waterfalls if waterfalls is not None else Waterfalls()
    info, now = source.info, source.now
    frame = Frame(
        model=source.model,
        version=source.version,
        kernel_set=info.kernel_set if info is not None else "",
        num_threads=info.num_threads if info is not None else 0,
        unix_ms=source.unix_ms(end_ns),
        begin_ms=begin_ns / 1e6,
        end_ms=end_ns / 1e6,
        first_ms=source.first_ns / 1e6,
        is_live=now is not None,
        uptime_s=(end_ns - source.started_ns) / 1e9,
        state=moment.state,
        read_bytes_per_s=info.read_bytes_per_s if info is not None else None,
        flops_per_s=info.flops_per_s if info is not None else None,
        tiles=tiles,
        steps=_columns(source, new),
        marks=_marks(source, new, ended, marks_ns, end_ns),
        running=moment.running,
        waiting=moment.waiting,
        blocks=moment.blocks,
        slowest=[bars.bar(call, source) for call in slowest(ended)],
        memory=now.memory() if now is not None else None,
        cost=now.cost if now is not None else None,
        energy=now.energy if now is not None else None,
        counts=_counts(source, end_ns),
    )
    owners = {call.run_id: call.key_name for call in (*ended, *live)}
    return Fold(frame, owners, Cursor(serials.stop, end_ns))


def seen_by(fold: Fold, viewer: Viewer) -> Frame:
    """Runs of others have no name."""
    frame = fold.frame
    hidden = {run for run, key_name in fold.owners.items() if not viewer.sees(key_name)}
    cost = _own_cost(frame.cost, viewer)
    if not hidden:
        return frame if cost is frame.cost else msgspec.structs.replace(frame, cost=cost)

    def named(part: _Named) -> _Named:
        return part if part.run not in hidden else msgspec.structs.replace(part, run=None)

    waiting = [
        msgspec.structs.replace(named(row), holders=[named(share) for share in row.holders]) for row in frame.waiting
    ]
    holders = [named(held) for held in frame.blocks.holders]
    return msgspec.structs.replace(
        frame,
        marks=[named(mark) for mark in frame.marks],
        running=[named(row) for row in frame.running],
        waiting=waiting,
        blocks=msgspec.structs.replace(frame.blocks, holders=holders),
        slowest=[named(bar) for bar in frame.slowest],
        cost=cost,
    )


def _own_cost(cost: Cost | None, viewer: Viewer) -> Cost | None:
    if cost is None or viewer.sees_all or viewer.key_name is None:
        return cost
    own = {name: amount for name, amount in cost.by_key.items() if name == viewer.key_name}
    own_s = {name: amount for name, amount in cost.machine_s.by_key.items() if name == viewer.key_name}
    return msgspec.structs.replace(cost, by_key=own, machine_s=msgspec.structs.replace(cost.machine_s, by_key=own_s))


# ---- calls ---------------------------------------------------------------------------------------------------------


def ended_in(source: Recording, begin_ns: int, end_ns: int) -> list[CallRecord]:
    found: list[CallRecord] = []
    for call in reversed(source.calls):
        if call.ended_ns < begin_ns:
            break
        if call.ended_ns < end_ns:
            found.append(call)
    return found[::-1]


def slowest(ended: Sequence[CallRecord]) -> list[CallRecord]:
    return heapq.nsmallest(NUM_SLOWEST, ended, key=lambda call: (call.received_ns - call.ended_ns, call.id))


def _ended_after(source: Recording, end_ns: int) -> list[CallRecord]:
    """From that moment on."""
    found: list[CallRecord] = []
    for call in reversed(source.calls):
        if call.ended_ns < end_ns:
            break
        found.append(call)
    return found


def _live_at(source: Recording, end_ns: int) -> list[CallRecord]:
    """The longest running first."""
    found = [call for call in (*source.live(), *_ended_after(source, end_ns)) if call.received_ns < end_ns]
    return sorted(found, key=lambda call: (call.received_ns, call.id))


def _counts(source: Recording, end_ns: int) -> Counts:
    """Those of now without what came later."""
    now, later = source.counts, _ended_after(source, end_ns)
    num_later = dict.fromkeys(("completed", "cancelled", "deadline", "shed", "failed"), 0)
    for call in later:
        num_later["cancelled" if call.state == "client_cancelled" else call.state or "failed"] += 1
    num_accepted_later = sum(call.received_ns >= end_ns for call in (*source.live(), *later))
    first_later = source.log.serials(0, end_ns).stop
    return Counts(
        accepted=now.accepted - num_accepted_later,
        live=now.live + len(later) - num_accepted_later,
        completed=now.completed - num_later["completed"],
        cancelled=now.cancelled - num_later["cancelled"],
        deadline=now.deadline - num_later["deadline"],
        shed=now.shed - num_later["shed"],
        failed=now.failed - num_later["failed"],
        refused=now.refused - sum(refusal.at_ns >= end_ns for refusal in source.refusals),
        restarts=now.restarts - sum(restart.serial >= first_later for restart in source.restarts),
    )


# ---- steps ---------------------------------------------------------------------------------------------------------


def _columns(source: Recording, serials: range) -> StepColumns:
    serials = serials[-MAX_STEPS:]
    steps = source.log.step_array(serials)

    def ms(ns: np.ndarray) -> list[float]:
        rounded: list[float] = np.round(ns / 1e6, 3).tolist()
        return rounded

    def between(begin: str, end: str) -> np.ndarray:
        return steps[end].astype(np.int64) - steps[begin].astype(np.int64)

    names = ("", *CLOSED[1:])
    return StepColumns(
        serial=list(serials),
        begin_ms=ms(steps["begin_ns"]),
        ms=ms(between("begin_ns", "end_ns")),
        host_ms=ms(between("begin_ns", "packed_ns") + between("done_ns", "end_ns")),
        predicted_ms=ms(steps["predicted_ns"]),
        bound_ms=ms(steps["bound_ns"]),
        rows=steps["num_rows"].tolist(),
        prefill_tokens=steps["num_prefill_tokens"].tolist(),
        decode_tokens=steps["num_decode_tokens"].tolist(),
        waiting=steps["num_waiting"].tolist(),
        closed_by=[names[closed] for closed in steps["closed_by"].tolist()],
        flops=steps["flops"].tolist(),
        bytes=steps["bytes"].tolist(),
    )


def _marks(source: Recording, serials: range, ended: Sequence[CallRecord], begin_ns: int, end_ns: int) -> list[Mark]:
    kinds = dict(MARK_KINDS)
    marks = [
        Mark(at_ms=at_ns / 1e6, kind="restart", run=None, text="the engine was started again")
        for serial, at_ns in source.restarts
        if serial in serials
    ]
    steps = source.log.step_array(serials)
    for step in steps[steps["num_preempted"] > 0]:
        text = f"{step['num_preempted']} put back to wait, for blocks"
        marks.append(Mark(at_ms=float(step["begin_ns"]) / 1e6, kind="preempted", run=None, text=text))
    for call in ended:
        if call.ended_ns >= begin_ns and call.state in kinds:
            text = f"{call.status} {call.code}" if call.code is not None else "the client left"
            marks.append(Mark(at_ms=call.ended_ns / 1e6, kind=kinds[call.state], run=call.run_id, text=text))
    for refusal in reversed(source.refusals):
        if refusal.at_ns < begin_ns:
            break
        if refusal.at_ns < end_ns:
            text = f"{refusal.status} {refusal.code}"
            marks.append(Mark(at_ms=refusal.at_ns / 1e6, kind="refused", run=None, text=text))
    return sorted(marks, key=lambda mark: (mark.at_ms, mark.kind, mark.run or ""))[-MAX_MARKS:]


def _imbalance(source: Recording, steps: np.ndarray) -> int:
    """Broken laws that the server has seen; of a file, steps after which the blocks did not add up."""
    if source.now is not None:
        return source.now.imbalance
    if source.info is None:
        return 0
    sums = steps["num_blocks_held"] + steps["num_blocks_cached"] + steps["num_blocks_free"]
    return int(np.count_nonzero(sums != source.info.num_blocks))
