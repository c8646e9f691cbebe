"""The time ledger: whatever happens to a request, its intervals touch and sum to its wall time, and others are named for what is theirs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.account.time_ledger import KINDS, TimeLedger
from jilju.backends.roofline.plans import llama_plan
from jilju.formats.ggml import GgmlType
from tests.account.staged import SERVER_NS, Life, Stage
from tests.backends.roofline import make_limits


def check(stage: Stage, life: Life) -> TimeLedger:
    ledger = stage.ledger(life)
    record = stage.record(life)
    assert ledger.is_balanced
    assert (ledger.begin_ns, ledger.end_ns) == (record.received_ns, record.ended_ns or stage.clock.now_ns())
    by_kind = ledger.by_kind()
    assert sum(by_kind.values()) == ledger.total_ns and set(by_kind) <= set(KINDS)
    number = life.request.number
    for interval in ledger.intervals:
        assert number not in interval.blame, "nobody is blamed for his own time"
        assert all(ns > 0 for ns in interval.blame.values())
        assert sum(interval.blame.values()) <= interval.ns * (1 + 1e-9)
    of_it = [logged.serial for logged in stage.log.between(0, 1 << 62) if number in {row.number for row in logged.rows}]
    assert [own.logged.serial for own in ledger.steps] == of_it
    assert sum(own.row.is_sampled for own in ledger.steps) == len(life.token_ids)
    for own in ledger.steps:
        assert 0 <= own.own_ns <= own.logged.step.done_ns - own.logged.step.packed_ns
    return ledger


@st.composite
def happenings(draw) -> list[tuple]:
    kinds = st.sampled_from(["submit", "submit", "step", "steps", "die", "abort"])
    return [
        (kind, draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(0, 3)))
        for kind in draw(st.lists(kinds, min_size=1, max_size=25))
    ]


@settings(max_examples=120, deadline=None)
@given(happenings(), st.integers(1, 5), st.integers(1, 24), st.sampled_from([0, 1, 20]))
def test_every_ledger_balances(happenings, max_rows, max_tokens, spare_blocks):
    """Small pools preempt, small steps stall, engines die, callers leave: at every moment and at the end."""
    stage = Stage(make_limits(14 + spare_blocks, 4, max_rows, max_tokens))
    for kind, a, b, c in happenings:
        if kind == "submit":
            stage.submit(f"r{len(stage.lives)}", a, b, first_id=c)
        elif kind in ("step", "steps"):
            for _ in range(1 if kind == "step" else a):
                stage.step()
        elif kind == "die":
            stage.die(a * 1_000_000)
        elif stage.lives:
            stage.engine.abort(f"r{a % len(stage.lives)}")
        for life in stage.lives.values():
            check(stage, life)
    stage.run()
    for life in stage.lives.values():
        assert life.ended_ns
        check(stage, life)


def test_alone_there_is_nobody_to_wait_for():
    stage = Stage(make_limits(40, 16, 4, 64))
    life = stage.submit("alone", 100, 6)
    stage.run()
    by_kind = check(stage, life).by_kind()
    assert set(by_kind) == {
        "receive", "parse", "render", "tokenize", "admit", "link_in", "host", "prefill_own", "decode_own", "link_out",
        "text", "write",
    }  # fmt: skip
    assert by_kind["receive"] == by_kind["parse"] == by_kind["render"] == by_kind["link_in"] == SERVER_NS
    assert by_kind["admit"] == 2 * SERVER_NS and by_kind["text"] == by_kind["write"] == SERVER_NS


@pytest.mark.parametrize(
    ("limits", "prompt", "kind"),
    [
        (make_limits(60, 16, 2, 64), 20, "queue_rows"),
        (make_limits(16, 16, 8, 64), 120, "queue_blocks"),
    ],
)
def test_who_waits_knows_for_what_and_for_whom(limits, prompt, kind):
    stage = Stage(limits)
    first = [stage.submit(f"first{i}", prompt, 20, first_id=i) for i in range(2)]
    for _ in range(6):
        stage.step()
    late = stage.submit("late", prompt, 2, first_id=9)
    stage.run()
    ledger = check(stage, late)
    waited = ledger.by_kind()[kind]
    blamed = {n: sum(i.blame.get(n, 0) for i in ledger.intervals if i.kind == kind) for n in (1, 2)}
    assert waited > 0.2 * ledger.total_ns and sum(blamed.values()) == pytest.approx(waited)
    assert all(life.request.number in ledger.blame() for life in first)


def test_a_long_prompt_is_blamed_for_what_it_does_to_streams():
    """Of the time that short answers lose to others while a long prompt is computed, nine tenths and more are its own."""
    plan = llama_plan(30, 576, 9, 3, 1536, 512, body=GgmlType.Q4_1)
    stage = Stage(make_limits(400, 16, 16, 256, 4096), plan)
    short = [stage.submit(f"short{i}", 24, 60, first_id=i) for i in range(8)]
    for _ in range(10):
        stage.step()
    long = stage.submit("long", 3000, 1, first_id=30)
    stage.run()
    begin = check(stage, long).steps[0].logged.serial
    end = stage.ledger(long).steps[-1].logged.serial
    for life in short:
        ledger = check(stage, life)
        stalled = [i for i in ledger.intervals if i.kind == "decode_others" and i.serial and begin <= i.serial <= end]
        lost = sum(i.ns for i in stalled)
        assert len(stalled) >= 8 and sum(i.blame[long.request.number] for i in stalled) >= 0.9 * lost


def test_a_preemption_and_what_it_costs_are_told_apart():
    stage = Stage(make_limits(14, 4, 8, 64))
    lives = [stage.submit(f"r{i}", 20, 24, first_id=i) for i in range(3)]
    stage.run()
    preempted = [life for life in lives if life.times.num_preemptions]
    assert preempted, "the pool is too large for this test"
    for life in preempted:
        by_kind = check(stage, life).by_kind()
        assert by_kind["stall_preempted"] > 0 and by_kind["recompute"] > 0


def test_the_death_of_an_engine_is_a_restart_and_what_is_computed_again_too():
    stage = Stage(make_limits(40, 16, 4, 64))
    life, late = stage.submit("r", 30, 10), None
    for _ in range(4):
        stage.step()
    pause_ns = 700_000_000
    stage.die(pause_ns)
    late = stage.submit("late", 30, 3, first_id=5)
    stage.run()
    by_kind = check(stage, life).by_kind()
    assert pause_ns <= by_kind["restart"] <= pause_ns + 30 * SERVER_NS and by_kind["recompute"] > 0
    assert "restart" not in check(stage, late).by_kind()
