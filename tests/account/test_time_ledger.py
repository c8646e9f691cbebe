"""The time ledger: whatever happens to a request, its intervals touch and sum to its wall time, and others are named for what is theirs."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.account.time_ledger import KINDS, TimeLedger, make_time_ledger
from jilju.backends.roofline.plans import llama_plan
from jilju.engine.events import EventLog
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


def given_up(stage, life):
    """Its caller has left: the record as the server makes it then."""
    life.ended_ns = stage.clock.now_ns()
    return check(stage, life)


def test_who_is_given_up_while_it_waits_for_blocks_again_has_not_waited_for_the_link():
    stage = Stage(make_limits(14, 4, 8, 64))
    lives = [stage.submit(f"r{i}", 20, 24, first_id=i) for i in range(3)]
    victim = None
    while victim is None:
        stage.step()
        waiting = list(stage.engine.scheduler.waiting)
        victim = next((stage.lives[s.id] for s in waiting if s.num_preemptions), None)
    for _ in range(8):
        stage.step()
    assert not victim.ended_ns and victim in lives
    for ledger in (check(stage, victim), given_up(stage, victim)):
        kinds = ledger.by_kind()
        assert kinds["stall_blocks"] > 6 * ledger.steps[-1].own_ns and kinds.get("link_out", 0) == 0


def test_who_is_given_up_between_two_engines_waited_for_the_next_one():
    stage, pause_ns = Stage(make_limits(40, 16, 4, 64)), 700_000_000
    begun = stage.submit("begun", 30, 10)
    for _ in range(4):
        stage.step()
    queued = stage.submit("queued", 30, 10, first_id=3)
    stage.die(pause_ns)
    for life, kind in ((begun, "restart"), (queued, "queue_restart")):
        kinds = given_up(stage, life).by_kind()
        assert kinds[kind] >= pause_ns and kinds.get("link_out", 0) == 0


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_prompt_whose_first_step_was_lost_waited_for_the_next_engine(num_before):
    """The engine dies in it, so that no step of the log tells of the death."""
    stage, pause_ns = Stage(make_limits(40, 16, 4, 64)), 700_000_000
    if num_before:
        stage.submit("before", 20, num_before, first_id=5)
        stage.run()
    life = stage.submit("r", 30, 4)
    stage.die(pause_ns)
    stage.run()
    kinds = check(stage, life).by_kind()
    assert kinds["queue_restart"] >= pause_ns and kinds["host"] < pause_ns / 10


@pytest.mark.parametrize(("ring", "row_ring"), [(1, 1000), (3, 1000), (7, 1000), (1000, 3), (1000, 12)])
def test_where_the_log_has_dropped_its_steps_nothing_is_made_up(ring, row_ring):
    """As it goes and afterwards. What is known of the steps that are kept stays right."""
    stage = Stage(make_limits(40, 16, 4, 64))
    stage.log = EventLog(ring, row_ring)
    stage.start()
    lives = [stage.submit(f"r{i}", 40, 12, first_id=i) for i in range(3)]
    while stage.engine.has_work():
        stage.step()
        for life in lives:
            ledger, record = stage.ledger(life), stage.record(life)
            assert ledger.is_balanced and ledger.end_ns == (record.ended_ns or stage.clock.now_ns())
            for own in ledger.steps:
                assert own.is_prefill == (own.row.start < 40) and not own.is_recompute
    by_kind = stage.ledger(lives[0]).by_kind()
    assert not any(kind.startswith(("queue_", "stall_")) for kind in by_kind) and by_kind["in_flight"] > 0
    log = stage.log.part(stage.log.serials(lives[0].received_ns, lives[0].ended_ns))
    record = stage.record(lives[0])
    of_part = make_time_ledger(record, record.sequences[0], log, stage.model, block_size=16, now_ns=0)
    assert of_part == stage.ledger(lives[0])


def test_a_part_of_the_log_that_holds_all_steps_of_a_life_hides_none():
    stage = Stage(make_limits(40, 16, 4, 64))
    for index in range(3):
        life = stage.submit(f"r{index}", 40, 4, first_id=index)
        stage.run()
    log = stage.log.part(stage.log.serials(life.received_ns, life.ended_ns))
    record = stage.record(life)
    ledger = make_time_ledger(record, record.sequences[0], log, stage.model, block_size=16, now_ns=0)
    assert ledger == stage.ledger(life) and "in_flight" not in ledger.by_kind()


def test_a_slow_reader_is_told_apart_from_the_servers_work():
    """Also of a stream, whose last tokens wait behind a write that its reader holds up."""
    stage = Stage(make_limits(40, 16, 4, 64))
    life = stage.submit("r", 20, 3)
    stage.run()
    end = life.ended_ns
    waits = [
        (end - 900, end + 4000),
        (end + 5000, end + 7500),
        (end + 7800, end + 12_000),
        (end + 13_000, end + 14_000),
    ]
    record = msgspec.structs.replace(stage.record(life), waits=waits, encoded_ns=end + 8000, ended_ns=end + 15_000)
    ledger = make_time_ledger(record, record.sequences[0], stage.log, stage.model, block_size=16, now_ns=0)
    assert ledger.is_balanced
    after = [(cut.kind, cut.ns) for cut in ledger.intervals if cut.begin_ns >= end]
    assert after == [
        ("client", 4000), ("text", 1000), ("client", 2500), ("text", 300), ("client", 200), ("client", 4000),
        ("write", 1000), ("client", 1000), ("write", 1000),
    ]  # fmt: skip


def test_what_lies_in_the_inbox_waits_for_the_step_that_runs():
    """And those in it are to blame for that, not the way between the processes."""
    stage = Stage(make_limits(40, 16, 4, 64))
    first = stage.submit("first", 30, 10)
    stage.step()
    stage.step()
    [*_, step] = stage.log.between(0, 1 << 62)
    late = stage.submit("late", 20, 2, first_id=4)
    stage.run()
    begin_ns, record = step.step.begin_ns + 5000, stage.record(late)
    record = msgspec.structs.replace(
        record, received_ns=begin_ns - 4000, body_ns=begin_ns - 3000, parsed_ns=begin_ns - 2000, submitted_ns=begin_ns
    )
    ledger = make_time_ledger(record, record.sequences[0], stage.log, stage.model, block_size=16, now_ns=0)
    [waited] = [cut for cut in ledger.intervals if cut.kind == "queue_step"]
    assert ledger.is_balanced and (waited.begin_ns, waited.end_ns) == (begin_ns, step.step.end_ns)
    assert waited.blame == {first.request.number: waited.ns}
    between = [cut.ns for cut in ledger.intervals if cut.kind == "link_in"]
    assert between == [record.sequences[0].queued_ns - step.step.end_ns]


def test_a_sequence_that_waits_for_others_of_its_call_does_not_count_as_the_servers_work():
    stage = Stage(make_limits(40, 16, 4, 64))
    short, long = stage.submit("short", 20, 2), stage.submit("long", 20, 12, first_id=3)
    stage.run()
    own = stage.record(short)
    ends = {"last_event_ns": long.ended_ns, "encoded_ns": long.ended_ns + 500, "ended_ns": long.ended_ns + 700}
    record = msgspec.structs.replace(own, sequences=[*own.sequences, *stage.record(long).sequences], **ends)
    for call in (record, msgspec.structs.replace(record, encoded_ns=0, ended_ns=0)):
        now_ns = long.ended_ns + 700
        ledger = make_time_ledger(call, call.sequences[0], stage.log, stage.model, block_size=16, now_ns=now_ns)
        kinds = ledger.by_kind()
        assert ledger.is_balanced and kinds["in_flight"] >= long.ended_ns - short.ended_ns
        assert (kinds.get("text", 0), kinds.get("write", 0)) == ((500, 200) if call.ended_ns else (0, 0))
