"""Chrome trace: a stretch of a recording in the trace-event format that Perfetto and chrome://tracing open.

Owns the events: the engine's steps as slices and counters, each sequence's rows as slices of a thread of its own with a flow to
the step they are a part of, and its time ledger as nested async slices. Written piece by piece, so no trace is ever whole in
memory. Times are microseconds from the first thing in it. Knows nothing of where it is written to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from jilju.account.recording import Recording, Viewer
from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.time_ledger import Interval, make_time_ledger
from jilju.engine.events import LoggedStep, RowRecord

ENGINE, REQUESTS = 1, 2  # "processes" of the trace
STEPS = 1  # the engine's "thread"
PIECE_BYTES = 64 << 10
FLOWS_PER_STEP = 1 << 10  # more than rows that a step may have
SEES_ALL = Viewer(sees_all=True)

Event = dict[str, Any]
Microseconds = Callable[[int], float]


def write_trace(
    recording: Recording, begin_ns: int, end_ns: int, run: str | None = None, *, viewer: Viewer = SEES_ALL
) -> Iterator[bytes]:
    """JSON of what was under way in [begin_ns, end_ns): every step, and the calls that `viewer` may see, or `run` alone."""
    steps = recording.log.between(begin_ns, end_ns)
    calls = [call for call in calls_in(recording, begin_ns, end_ns) if viewer.sees(call.key_name)]
    calls = [call for call in calls if run is None or run in (call.run_id, call.id)]
    origin_ns = min([begin_ns, *(logged.step.begin_ns for logged in steps[:1])])
    now_ns = min(end_ns, recording.now_ns)

    def us(at_ns: int) -> float:
        return (at_ns - origin_ns) / 1e3

    yield _head(recording, origin_ns)
    yield from _pieces(_events(recording, steps, calls, (origin_ns, now_ns), us))
    yield b"]}\n"


def calls_in(recording: Recording, begin_ns: int, end_ns: int) -> list[CallRecord]:
    """Calls that were under way at some moment of it, in the order of their heads."""
    found = [*recording.live()]
    for call in reversed(recording.calls):
        if call.ended_ns < begin_ns:
            break
        found.append(call)
    return sorted((call for call in found if call.received_ns < end_ns), key=lambda call: (call.received_ns, call.id))


def find_call(recording: Recording, run: str) -> CallRecord | None:
    """By the id of its answer or by that of the call."""
    calls = (*recording.live(), *reversed(recording.calls))
    return next((call for call in calls if run in (call.run_id, call.id)), None)


def span_of(call: CallRecord, now_ns: int) -> tuple[int, int]:
    return call.received_ns, (call.ended_ns or now_ns) + 1


def _events(
    recording: Recording, steps: list[LoggedStep], calls: list[CallRecord], span: tuple[int, int], us: Microseconds
) -> Iterator[Event]:
    yield from _names(calls)
    names = {sequence.number: _track(call, sequence) for call in calls for sequence in call.sequences}
    for logged in steps:
        yield from _step_events(logged, us)
        yield from _row_events(logged, names, us)
    for call in calls:
        sequences: list[SequenceRecord | None] = [*call.sequences]
        for sequence in sequences or [None]:
            yield from _call_events(recording, call, sequence, span, us)


def _pieces(events: Iterable[Event]) -> Iterator[bytes]:
    piece = bytearray()
    is_first = True
    for event in events:
        piece += (b"\n" if is_first else b",\n") + msgspec.json.encode(event)
        is_first = False
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _head(recording: Recording, origin_ns: int) -> bytes:
    about = {
        "model": recording.model,
        "version": recording.version,
        "kernel_set": recording.info.kernel_set if recording.info is not None else "",
        "unix_ms": recording.unix_ms(origin_ns),
    }
    head = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": []}
    return msgspec.json.encode(head).removesuffix(b"]}")


def _names(calls: list[CallRecord]) -> Iterator[Event]:
    for pid, name in ((ENGINE, "engine"), (REQUESTS, "requests")):
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    yield {"ph": "M", "pid": ENGINE, "tid": STEPS, "name": "thread_name", "args": {"name": "steps"}}
    for call in calls:
        for sequence in call.sequences:
            args = {"name": f"{_track(call, sequence)} rows"}
            yield {"ph": "M", "pid": REQUESTS, "tid": sequence.number, "name": "thread_name", "args": args}


def _track(call: CallRecord, sequence: SequenceRecord | None) -> str:
    return call.run_id if sequence is None or len(call.sequences) == 1 else f"{call.run_id}/{sequence.index}"


# ---- the engine ----------------------------------------------------------------------------------------------------


def _step_events(logged: LoggedStep, us: Microseconds) -> Iterator[Event]:
    step = logged.step
    took_ns = step.end_ns - step.begin_ns
    args: Event = {
        "serial": logged.serial,
        "rows": step.num_rows,
        "tokens": step.num_prefill_tokens + step.num_decode_tokens,
        "prefill_tokens": step.num_prefill_tokens,
        "decode_tokens": step.num_decode_tokens,
        "cached_tokens": step.num_cached_tokens,
        "predicted_ms": step.predicted_ns / 1e6,
        "error": (step.predicted_ns - took_ns) / took_ns if took_ns else None,
        "closed_by": step.closed_by,
        "flops": step.flops,
        "bytes": step.bytes,
    }
    yield _slice(ENGINE, STEPS, f"step {step.step_id}", us, step.begin_ns, step.end_ns, args)
    marks = (step.begin_ns, step.scheduled_ns, step.packed_ns, step.done_ns, step.end_ns)
    for name, begin_ns, end_ns in zip(("schedule", "pack", "run", "commit"), marks, marks[1:], strict=False):
        yield _slice(ENGINE, STEPS, name, us, begin_ns, end_ns)
    for name, values in (
        ("waiting", {"sequences": step.num_waiting}),
        ("blocks", {"held": step.num_blocks_held, "cached": step.num_blocks_cached, "free": step.num_blocks_free}),
        ("tokens a step", {"prefill": step.num_prefill_tokens, "decode": step.num_decode_tokens}),
    ):
        yield {"ph": "C", "pid": ENGINE, "name": name, "ts": us(step.end_ns), "args": values}


def _slice(
    pid: int, tid: int, name: str, us: Microseconds, begin_ns: int, end_ns: int, args: Event | None = None
) -> Event:
    event = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": us(begin_ns), "dur": (end_ns - begin_ns) / 1e3}
    return event if args is None else event | {"args": args}


# ---- requests ------------------------------------------------------------------------------------------------------


def _row_events(logged: LoggedStep, names: Mapping[int, str], us: Microseconds) -> Iterator[Event]:
    """What a sequence did in the step, and an arrow to the step. An arrow binds to the slices that are open at its ends."""
    step = logged.step
    for index, row in enumerate(logged.rows):
        if row.number not in names:
            continue
        args = {"start": row.start, "tokens": row.num_tokens, "step": logged.serial}
        yield _slice(REQUESTS, row.number, _row_name(row), us, step.packed_ns, step.done_ns, args)
        flow = {"cat": "step", "name": "row", "id": logged.serial * FLOWS_PER_STEP + index, "ts": us(step.packed_ns)}
        yield {"ph": "s", "pid": REQUESTS, "tid": row.number, **flow}
        yield {"ph": "f", "bp": "e", "pid": ENGINE, "tid": STEPS, **flow}


def _row_name(row: RowRecord) -> str:
    return "decode" if row.num_tokens == 1 and row.is_sampled else f"prefill {row.num_tokens}"


def _call_events(
    recording: Recording, call: CallRecord, sequence: SequenceRecord | None, span: tuple[int, int], us: Microseconds
) -> Iterator[Event]:
    """The ledger of a sequence, nested in its call; what lies outside of the span is cut off."""
    begin_ns, end_ns = span
    track: Event = {"cat": "request", "id": _track(call, sequence), "pid": REQUESTS, "tid": 0}
    ledger = make_time_ledger(
        call, sequence, recording.log, recording.step_model, block_size=recording.block_size or 1,
        now_ns=max(end_ns, call.received_ns), names_blame=False,
    )  # fmt: skip
    first_ns, last_ns = max(begin_ns, ledger.begin_ns), min(end_ns, ledger.end_ns)
    if last_ns < first_ns:
        return
    yield {"ph": "b", **track, "name": call.run_id, "ts": us(first_ns), "args": _about(call, sequence)}
    for interval in _joined(ledger.intervals):
        cut = max(first_ns, interval.begin_ns), min(last_ns, interval.end_ns)
        if cut[0] < cut[1]:
            yield {"ph": "b", **track, "name": interval.kind, "ts": us(cut[0])}
            yield {"ph": "e", **track, "name": interval.kind, "ts": us(cut[1])}
    yield {"ph": "e", **track, "name": call.run_id, "ts": us(last_ns)}


def _about(call: CallRecord, sequence: SequenceRecord | None) -> Event:
    return {
        "route": call.route,
        "state": call.state or "running",
        "status": call.status,
        "prompt_tokens": call.num_prompt_tokens,
        "cached_tokens": call.num_cached_tokens,
        "output_tokens": sequence.num_output_tokens if sequence is not None else 0,
        "finish_reason": sequence.finish_reason if sequence is not None else None,
    }


def _joined(intervals: Iterable[Interval]) -> Iterator[Interval]:
    """Neighbours of one kind are one."""
    last: Interval | None = None
    for interval in intervals:
        if last is not None and last.kind == interval.kind:
            last = Interval(last.kind, last.begin_ns, interval.end_ns)
            continue
        if last is not None:
            yield last
        last = interval
    if last is not None:
        yield last
