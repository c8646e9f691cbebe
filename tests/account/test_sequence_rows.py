"""Rows by sequence: a fold that goes on says of a minute what one that begins with it says."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.account.sequence_rows import MINUTE_NS, SequenceRows
from jilju.engine.events import EventLog, pack_row
from tests.serve.stub import step_record

NUMBERS = range(1, 6)


def seen(rows: SequenceRows, end_ns: int) -> dict:
    """All that folds read of it."""
    newest = {number: found for number in NUMBERS if (found := rows.newest(number)) is not None}
    return {
        "newest": {n: (f.at_ns, f.serial, f.computed, f.is_sampled) for n, f in newest.items()},
        "output": {n: f.sampled_computed for n, f in newest.items() if f.sampled_ns >= rows.begin_ns},
        "stays": {n: f.stay_start for n, f in newest.items() if f.before_stay_ns >= rows.begin_ns},
        "preempted": {n: rows.was_preempted_after(f) for n, f in newest.items()},
        "gaps": sorted(rows.gaps_ns(end_ns - MINUTE_NS).tolist()),
        "sampled": rows.num_sampled(end_ns - MINUTE_NS),
    }


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([10**9, 7 * 10**9, 25 * 10**9]))
def test_a_fold_that_goes_on_is_one_that_begins(seed, longest_ns):
    rng, log, going_on = random.Random(seed), EventLog(), SequenceRows()
    now, computed = 10 * MINUTE_NS, dict.fromkeys(NUMBERS, 0)
    for step_id in range(1, 80):
        now += rng.randrange(1, longest_ns)
        rows = b""
        for number in rng.sample(NUMBERS, rng.randrange(4)):
            start = rng.choice([0, 16]) if rng.random() < 0.1 else computed[number]
            count = rng.choice([1, 1, 1, 9])
            computed[number] = start + count
            rows += pack_row(number, start, count, rng.random() < 0.8)
        log.add_step(
            step_record(
                step_id=step_id, begin_ns=now - 1, end_ns=now, num_rows=len(rows) // 20, rows=rows, is_rerun=False,
                num_preempted=rng.random() < 0.1,
            )
        )  # fmt: skip
        if rng.random() < 0.4:
            end_ns = now + rng.choice([1, 1, 10**9, 90 * 10**9])
            begun = SequenceRows()
            begun.advance(log, end_ns)
            going_on.advance(log, end_ns)
            assert seen(going_on, end_ns) == seen(begun, end_ns)
            now = end_ns
