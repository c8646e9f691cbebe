"""The event log: a ring that keeps the newest records as they were, and listeners that hear each once."""

import random

import msgspec
import pytest

from jilju.engine.events import EventLog, StepRecord, StepRing


def record(rng: random.Random) -> StepRecord:
    """Each field another number, the times and costs as large as they come."""
    most = {"_ns": 1 << 60, "flops": 1 << 60, "bytes": 1 << 60, "step_id": 1 << 60}
    values = {
        name: rng.randrange(most.get(name, most.get(name[-3:], 1 << 32))) for name in StepRecord.__struct_fields__
    }
    return StepRecord(**values | {"is_rerun": rng.random() < 0.5})


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 20])
def test_the_ring_is_the_newest_records_in_order(count):
    rng = random.Random(count)
    records, ring = [record(rng) for _ in range(count)], StepRing(7)
    for each in records:
        ring.add(each)
    newest = records[-7:]
    assert len(ring) == len(newest) and list(ring) == newest and ring[:] == newest and ring[-3:] == newest[-3:]
    assert [ring[-1 - i] for i in range(len(newest))] == newest[::-1]
    assert all(type(value) in (int, bool) for each in ring for value in msgspec.structs.astuple(each))
    for index in (len(newest), -len(newest) - 1):
        with pytest.raises(IndexError):
            ring[index]


def test_a_log_that_is_cut_keeps_the_newest_and_goes_on():
    rng, heard, log = random.Random(1), [], EventLog(5)
    log.listen(heard.append)
    records = [record(rng) for _ in range(12)]
    for each in records[:8]:
        log.add_step(each)
    log.resize(2)
    assert list(log.steps) == records[6:8]
    for each in records[8:]:
        log.add_step(each)
    assert list(log.steps) == records[10:] and heard == records
