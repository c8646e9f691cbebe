"""The event log: rings that keep the newest records as they were, listeners that hear each once, and steps found by their time."""

import random
import threading
from typing import get_args

import msgspec
import pytest

from jilju.engine.events import Closed, EventLog, LoggedStep, RowRecord, RowRing, StepRecord, StepRing, pack_row


def record(rng: random.Random, **changes) -> StepRecord:
    """Each field another number, the times and costs as large as they come."""
    most = {"_ns": 1 << 60, "flops": 1 << 60, "bytes": 1 << 60, "step_id": 1 << 60}
    values = {
        name: rng.randrange(most.get(name, most.get(name[-3:], 1 << 32))) for name in StepRecord.__struct_fields__
    }
    others = {"is_rerun": rng.random() < 0.5, "closed_by": rng.choice(get_args(Closed)), "rows": b""}
    return StepRecord(**values | others | changes)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 20])
def test_the_ring_is_the_newest_records_in_order(count):
    rng = random.Random(count)
    records, ring = [record(rng) for _ in range(count)], StepRing(7)
    for each in records:
        ring.add(each)
    newest = records[-7:]
    assert len(ring) == len(newest) and list(ring) == newest and ring[:] == newest and ring[-3:] == newest[-3:]
    assert [ring[-1 - i] for i in range(len(newest))] == newest[::-1]
    assert all(type(value) in (int, bool, str, bytes) for each in ring for value in msgspec.structs.astuple(each))
    for index in (len(newest), -len(newest) - 1):
        with pytest.raises(IndexError):
            ring[index]


def test_a_log_that_keeps_nothing_hands_on():
    rng, heard, log = random.Random(1), [], EventLog(5)
    log.listen(heard.append)
    records = [record(rng) for _ in range(12)]
    for each in records[:8]:
        log.add_step(each)
    log.keep_none()
    for each in records[8:]:
        log.add_step(each)
    assert list(log.steps) == [] and heard == records


@pytest.mark.parametrize("size", [1, 7, 64])
def test_rows_are_found_until_others_took_their_place(size):
    rng, ring, rows = random.Random(size), RowRing(size), list[RowRecord]()
    for _ in range(200):
        fresh = [
            RowRecord(rng.randrange(1 << 64), rng.randrange(1 << 32), rng.randrange(1 << 32), rng.randrange(2))
            for _ in range(rng.randrange(min(size, 9) + 1))
        ]
        ring.add(b"".join(pack_row(*row) for row in fresh))
        rows += fresh
        for _ in range(5):
            first = rng.randrange(len(rows) + 1)
            count = rng.randrange(len(rows) - first + 1)
            wanted = tuple(rows[first : first + count]) if first >= len(rows) - size else ()
            assert ring.rows(first, count) == wanted
    assert ring.num_added == len(rows)


def test_steps_are_found_by_time_and_by_serial():
    """Against a plain list, with rings that drop steps and rows at different moments."""
    rng, log, kept = random.Random(3), EventLog(40, 100), list[LoggedStep]()
    now = 1000
    for serial in range(120):
        begin = now + rng.randrange(20)
        now = begin + rng.randrange(1, 30)
        rows = tuple(RowRecord(rng.randrange(9), rng.randrange(99), 1, 1) for _ in range(rng.randrange(1, 5)))
        step = record(
            rng, begin_ns=begin, end_ns=now, num_rows=len(rows), rows=b"".join(pack_row(*row) for row in rows)
        )
        log.add_step(step)
        kept.append(LoggedStep(serial, msgspec.structs.replace(step, rows=b""), rows))
    kept = kept[-40:]
    dropped = log.rows.num_added - 100
    number = log.rows.num_added
    for place in reversed(range(len(kept))):  # those whose rows are gone are found without them
        number -= len(kept[place].rows)
        if number < dropped:
            kept[place] = kept[place]._replace(rows=())
    for each in kept:
        assert log.step(each.serial) == each
    assert log.step(kept[0].serial - 1) is None and log.step(120) is None and log.step(-1) is None
    assert log.oldest_ns == kept[0].step.begin_ns
    for _ in range(200):
        begin, end = sorted(rng.randrange(900, now + 100) for _ in range(2))
        assert log.between(begin, end) == [each for each in kept if begin <= each.step.end_ns < end]
        under_way = [each for each in kept if each.step.end_ns > begin and each.step.begin_ns < end]
        assert log.overlapping(begin, end) == under_way
    assert EventLog().between(0, 1 << 60) == [] and EventLog().overlapping(0, 1 << 60) == []


def test_steps_and_rows_as_arrays_and_parts_are_those_of_the_log():
    """Through rings that drop steps and rows at different moments."""
    rng, log = random.Random(5), EventLog(40, 100)
    now = 1000
    for step_id in range(120):
        begin, now = now, now + rng.randrange(1, 30)
        rows = [RowRecord(rng.randrange(1 << 64), rng.randrange(99), 1, 1) for _ in range(rng.randrange(5))]
        packed = b"".join(pack_row(*row) for row in rows)
        log.add_step(record(rng, step_id=step_id, begin_ns=begin, end_ns=now, num_rows=len(rows), rows=packed))
        for _ in range(3):
            first, last = sorted(rng.randrange(step_id + 3) for _ in range(2))
            wanted = [found for serial in range(first, last) if (found := log.step(serial)) is not None]
            arrays, part = log.arrays(range(first, last)), log.part(range(first, last))
            for place, each in enumerate(wanted):
                assert arrays.first_serial + place == each.serial
                step = arrays.steps[place]
                same = {name: getattr(each.step, name) for name in StepRecord.__struct_fields__[:-2]}
                assert {name: step[name] for name in same} == same
                assert get_args(Closed)[step["closed_by"]] == each.step.closed_by
                assert [tuple(row) for row in arrays.rows[arrays.row_steps == place]] == list(each.rows)
                assert part.step(each.serial) == each
            assert len(arrays.steps) == len(wanted) and len(arrays.rows) == len(arrays.row_steps)
            oldest, begin = log.num_steps - len(log.steps), min(first, log.num_steps)
            assert len(part.steps) == len(wanted) + (begin > oldest), "and the one before, where it is kept"
            assert part.between(0, now + 1)[len(part.steps) - len(wanted) :] == wanted
        begin, end = sorted(rng.randrange(900, now + 50) for _ in range(2))
        assert list(log.serials(begin, end)) == [each.serial for each in log.between(begin, end)]


def test_a_listener_that_fails_hurts_nobody_else(caplog):
    log, heard = EventLog(), []

    def fail(*what):
        raise ValueError("a fold is wrong")

    class Broken:
        on_enter = on_leave = on_engine = fail

    log.listen(fail)
    log.watch(Broken())
    log.listen(heard.append)
    records = [record(random.Random(1), step_id=i, num_rows=0, rows=b"") for i in range(5)]
    for each in records:
        log.add_step(each)
        log.enter(1, "", 0)
        log.leave(1, 0)
        log.engine(True, 0)
    assert heard == records and log.num_steps == len(log.steps) == 5
    assert log.num_failures == 20 and len(caplog.records) == 5, "told the 1st, 2nd, 4th, 8th, 16th time"


def test_a_thread_that_reads_does_not_keep_the_log_from_growing():
    log, rng = EventLog(), random.Random(1)
    rows = b"".join(pack_row(n, 1, 1, 1) for n in range(16))
    one = record(rng, num_rows=16, rows=rows, begin_ns=0, end_ns=1)
    for _ in range(2000):
        log.add_step(one)
    is_over = threading.Event()

    def read():
        while not is_over.is_set():
            log.part(range(1000))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20_000):
            log.add_step(one)  # BufferError where a view of the ring is held meanwhile
    finally:
        is_over.set()
        reader.join()
