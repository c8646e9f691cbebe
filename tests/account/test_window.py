"""Windows: sums add up, a moment looks the same whenever it is asked for, and nobody sees the runs of others."""

from collections import defaultdict
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from jilju.account.frame import Frame
from jilju.account.recording import Viewer
from jilju.account.sequence_rows import MINUTE_NS, SequenceRows
from jilju.account.tiles import SLO_GAP_MS, SLO_TTFT_MS
from jilju.account.time_ledger import KINDS, make_time_ledger
from jilju.account.waterfalls import Waterfalls, make_waterfall
from jilju.account.window import make_fold, make_frame, seen_by
from tests.account.recorded import KEYS, Recorder, recorders, scripts
from tests.account.staged import Stage
from tests.backends.roofline import make_limits

ALL = Viewer(sees_all=True)


def check(frame: Frame) -> None:
    blocks, counts = frame.blocks, frame.counts
    assert blocks.held + blocks.cached + blocks.free == blocks.total
    assert all(0 <= held.cached <= held.blocks for held in blocks.holders)
    ended = counts.completed + counts.cancelled + counts.deadline + counts.shed + counts.failed
    assert counts.accepted == ended + counts.live and min(msgspec.to_builtins(counts).values()) >= 0
    assert frame.tiles.streams == len(frame.running) and frame.tiles.waiting >= len(frame.waiting)
    assert sum(row.blocks for row in frame.running) == sum(held.blocks for held in blocks.holders)
    for bar in frame.slowest:
        assert sum(part.ms for part in bar.parts) == pytest.approx(bar.total_ms, abs=1e-6)
    for row in frame.waiting:
        assert sum(share.share for share in row.holders) == pytest.approx(1.0) or not row.holders
    lengths = {len(column) for column in msgspec.to_builtins(frame.steps).values()}
    assert len(lengths) == 1
    assert frame.steps.serial == sorted(set(frame.steps.serial))


def without_now(frame: Frame) -> Frame:
    """What only a living server can say is not looked at."""
    return msgspec.structs.replace(frame, is_live=True, memory=None, cost=None, energy=None)


@settings(max_examples=120, deadline=None)
@given(recorders(), scripts())
def test_the_past_looks_as_it_did_when_it_was_live(recorder, script):
    """Each frame of a live view, with what it left out of steps and marks put together, is the window of the past that ends there."""
    live, cursor, bars, rows = [], None, Waterfalls(), SequenceRows()
    steps, marks = defaultdict(list), []
    for happening in script:
        recorder.play(*happening)
        source = recorder.recording()
        fold = make_fold(source, source.now_ns - MINUTE_NS, source.now_ns, since=cursor, waterfalls=bars, rows=rows)
        cursor = fold.cursor
        check(fold.frame)
        for name, values in msgspec.to_builtins(fold.frame.steps).items():
            steps[name] += values
        marks += fold.frame.marks
        live.append((source.now_ns, fold.frame, dict(steps), list(marks)))
    recorder.finish()
    source, bars = recorder.recording(), Waterfalls()
    for end_ns, frame, _, _ in live:
        past = make_frame(source, end_ns - MINUTE_NS, end_ns, ALL, waterfalls=bars)
        check(past)
        same = msgspec.structs.replace(past, steps=frame.steps, marks=frame.marks)
        assert without_now(same) == without_now(frame)
    whole = make_frame(source, 0, live[-1][0], ALL, waterfalls=bars)
    assert msgspec.to_builtins(whole.steps) == live[-1][2]
    assert whole.marks == live[-1][3]
    num_restarts = sum(mark.kind == "restart" for mark in whole.marks)
    assert num_restarts == whole.counts.restarts
    assert sum(mark.kind == "refused" for mark in whole.marks) == whole.counts.refused


@settings(max_examples=60, deadline=None)
@given(recorders(), scripts())
def test_tiles_are_what_a_count_by_hand_gives(recorder, script):
    for happening in script:
        recorder.play(*happening)
    recorder.finish()
    source = recorder.recording()
    for begin_ns, end_ns in ((0, source.now_ns), (source.now_ns - 10**9, source.now_ns), (0, source.now_ns // 2)):
        begin_ns = max(begin_ns, source.first_ns)
        tiles = make_frame(source, begin_ns, end_ns, ALL).tiles
        begin_ns = max(begin_ns, end_ns - MINUTE_NS)
        seconds = max(1, end_ns - begin_ns) / 1e9
        logged = source.log.between(begin_ns, end_ns)
        last, gaps, num_sampled = {}, [], 0
        for step, row in ((each.step, row) for each in logged for row in each.rows if row.is_sampled):
            num_sampled += 1
            if row.number in last:
                gaps.append(step.end_ns - last[row.number])
            last[row.number] = step.end_ns
        assert tiles.seconds == seconds and tiles.output_tokens_per_s == num_sampled / seconds
        computed = sum(each.step.num_prefill_tokens - each.step.num_recomputed_tokens for each in logged)
        assert tiles.prompt_tokens_per_s == max(0, computed) / seconds
        ended = [call for call in source.calls if begin_ns <= call.ended_ns < end_ns]
        first = [call.first_sent_ns - call.received_ns for call in ended if call.first_sent_ns]
        for found, values in ((tiles.gap_ms, gaps), (tiles.ttft_ms, first)):
            assert (found is None) == (not values)
            if found is not None:
                assert (found.p50, found.p99) == pytest.approx(
                    np.percentile(np.array(values) / 1e6, (50, 99)), abs=1e-3
                )
        good = 0
        for call in ended:
            tokens = call.sequences[0].num_output_tokens
            mean_ms = (call.last_event_ns - call.first_sent_ns) / 1e6 / max(1, tokens - 1)
            first_ms = (call.first_sent_ns - call.received_ns) / 1e6
            good += call.state == "completed" and first_ms <= SLO_TTFT_MS and (tokens < 2 or mean_ms <= SLO_GAP_MS)
        assert tiles.goodput_per_s == good / seconds
        errors = [
            (each.step.predicted_ns - (each.step.end_ns - each.step.begin_ns)) / (each.step.end_ns - each.step.begin_ns)
            for each in logged
            if each.step.predicted_ns and each.step.end_ns > each.step.begin_ns
        ]
        assert (tiles.prediction_bias is None) == (not errors)
        if errors:
            assert tiles.prediction_bias == pytest.approx(np.mean(errors))
            assert tiles.prediction_error == pytest.approx(np.median(np.abs(errors)))


@settings(max_examples=60, deadline=None)
@given(recorders(), scripts())
def test_who_runs_and_waits_is_what_the_scheduler_says(recorder, script):
    for happening in script:
        recorder.play(*happening)
        scheduler = recorder.stage.engine.scheduler
        if recorder.is_away or not len(recorder.stage.log.steps):
            continue
        source = recorder.recording()
        frame = make_frame(source, source.now_ns - MINUTE_NS, source.now_ns, ALL)
        ids = {"chatcmpl-" + sequence.id: sequence for sequence in scheduler.running}
        shown = {row.run: row for row in frame.running}
        has_rows = {run for run, sequence in ids.items() if sequence.num_steps}
        assert set(shown) == has_rows
        assert len(frame.waiting) == scheduler.num_live - len(has_rows)
        for run, row in shown.items():
            sequence = ids[run]
            assert (row.computed_tokens, row.blocks) == (sequence.num_computed, len(sequence.block_ids))
            if row.phase == "decode":
                assert (row.computed_tokens + 1, row.output_tokens) == (sequence.num_tokens, sequence.num_output)


@settings(max_examples=60, deadline=None)
@given(recorders(), scripts())
def test_runs_of_other_keys_are_not_named(recorder, script):
    for happening in script:
        recorder.play(*happening)
    source = recorder.recording()
    fold = make_fold(source, 0, source.now_ns)
    for viewer in (*map(Viewer, KEYS), Viewer("nobody")):
        told = msgspec.json.encode(seen_by(fold, viewer)).decode()
        named = {"chatcmpl-" + life.request.id for life in recorder.stage.lives.values()}
        own = {
            "chatcmpl-" + life.request.id
            for life in recorder.stage.lives.values()
            if KEYS[life.request.number % 2] == viewer.key_name
        }
        mine = {run for run in named if f'"{run}"' in told}
        assert mine <= own
        assert mine == {run for run in own if f'"{run}"' in msgspec.json.encode(fold.frame).decode()}
        frame = seen_by(fold, viewer)
        assert [bar.total_ms for bar in frame.slowest] == [bar.total_ms for bar in fold.frame.slowest]
        assert frame.tiles == fold.frame.tiles


@settings(max_examples=40, deadline=None)
@given(recorders(), scripts())
def test_a_bar_is_its_ledger_in_few_parts(recorder, script):
    for happening in script:
        recorder.play(*happening)
    recorder.finish()
    source = recorder.recording()
    for call in source.calls:
        bar = make_waterfall(call, source)
        ledger = make_time_ledger(call, call.sequences[0], source.log, source.step_model, block_size=4, now_ns=0)
        sums = defaultdict(float)
        for part in bar.parts:
            sums[part.kind] += part.ms
        assert sums == pytest.approx({kind: ns / 1e6 for kind, ns in ledger.by_kind().items()})
        kinds = [part.kind for part in bar.parts]
        assert all(one != other for one, other in pairwise(kinds))
        if not {"recompute", "restart", "stall_preempted", "queue_restart"} & set(kinds):
            assert len(kinds) <= 2 * len(KINDS), "not two for each step"


def test_what_one_waits_for_and_who_has_it():
    """One row only: the second call waits for it, and the first has it all."""
    recorder = Recorder(Stage(make_limits(64, 4, 1, 64)))
    recorder.play("submit", 8, 9, 0)
    recorder.play("step", 0, 0, 0)
    recorder.play("submit", 8, 9, 0)
    source = recorder.recording()
    (row,) = make_frame(source, 0, source.now_ns, ALL).waiting
    assert (row.run, row.cause) == ("chatcmpl-r1", "step")
    recorder.play("step", 0, 0, 0)
    source = recorder.recording()
    frame = make_frame(source, 0, source.now_ns, ALL)
    (row,) = frame.waiting
    assert row.cause == "rows" and [(share.run, share.share) for share in row.holders] == [("chatcmpl-r0", 1.0)]
    assert [(running.run, running.phase) for running in frame.running] == [("chatcmpl-r0", "decode")]
    hidden = make_frame(source, 0, source.now_ns, Viewer(KEYS[0])).waiting[0]
    assert hidden.run == "chatcmpl-r1" and [share.run for share in hidden.holders] == [None]


def test_one_whose_blocks_were_taken_waits_for_blocks():
    """Two that fit until both have grown: the junior one is put back."""
    recorder = Recorder(Stage(make_limits(8, 4, 2, 64)))
    recorder.play("submit", 11, 18, 0)
    recorder.play("submit", 11, 18, 1)
    causes = set()
    for _ in range(30):
        recorder.play("step", 0, 0, 0)
        source = recorder.recording()
        frame = make_frame(source, 0, source.now_ns, ALL)
        check(frame)
        causes |= {(row.run, row.cause) for row in frame.waiting if len(frame.running) == 1}
    assert causes == {("chatcmpl-r1", "blocks")}
    assert [mark.kind for mark in frame.marks].count("preempted") == 1
