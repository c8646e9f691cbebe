"""Chrome traces: JSON that a viewer can open, whose slices nest, whose arrows bind, and whose ledgers are those of the calls."""

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings

from jilju.account.chrome_trace import ENGINE, REQUESTS, find_call, span_of, write_trace
from jilju.account.recording import Recording, Viewer
from jilju.account.time_ledger import make_time_ledger
from tests.account.recorded import KEYS, Recorder, recorders, scripts
from tests.account.staged import Stage
from tests.backends.roofline import make_limits

ROUND_US = 1e-6  # of doubles


def trace_of(source: Recording, begin_ns: int, end_ns: int, run: str | None = None, **options) -> list[dict]:
    pieces = list(write_trace(source, begin_ns, end_ns, run, **options))
    trace = json.loads(b"".join(pieces))
    assert trace["displayTimeUnit"] == "ms" and trace["otherData"]["model"] == source.model
    return trace["traceEvents"]


def check(events: list[dict]) -> None:
    slices, open_, flows = defaultdict(list), defaultdict(list), defaultdict(list)
    last = defaultdict(float)
    for event in events:
        phase = event["ph"]
        assert phase in "XbesfCM" and event["pid"] in (ENGINE, REQUESTS)
        if phase == "M":
            continue
        assert event["ts"] >= 0
        if phase == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
        elif phase in "be":
            track = event["cat"], event["id"]
            assert event["ts"] >= last[track], "of one track they come in the order of their times"
            last[track] = event["ts"]
            if phase == "b":
                open_[track].append(event["name"])
                assert len(open_[track]) <= 2
            else:
                assert open_[track].pop() == event["name"], "what was begun last ends first"
        elif phase in "sf":
            flows[event["id"]].append(event)
        else:
            assert all(value >= 0 for value in event["args"].values())
    assert not any(open_.values())
    for spans in slices.values():
        stack: list[float] = []
        for begin, end, _ in sorted(spans, key=lambda span: (span[0], -span[1])):
            while stack and stack[-1] <= begin + ROUND_US:
                stack.pop()
            assert not stack or end <= stack[-1] + ROUND_US, "slices of one thread nest"
            stack.append(end)
    for flow in flows.values():
        start, finish = flow
        assert (start["ph"], finish["ph"], finish["bp"]) == ("s", "f", "e") and finish["ts"] >= start["ts"]
        for end in flow:
            spans = slices[end["pid"], end["tid"]]
            assert any(begin <= end["ts"] <= last for begin, last, _ in spans), "it binds to a slice that is open then"


@settings(max_examples=60, deadline=None)
@given(recorders(), scripts())
def test_traces_of_any_stretch_are_well_formed(recorder, script):
    for happening in script:
        recorder.play(*happening)
    source = recorder.recording()
    half = (source.first_ns + source.now_ns) // 2
    for span in ((0, source.now_ns), (half, source.now_ns), (0, half)):
        events = trace_of(source, *span)
        check(events)
        steps = source.log.between(*span)
        for name in ("schedule", "pack", "run", "commit"):
            assert sum(event["name"] == name and event["ph"] == "X" for event in events) == len(steps)
        rows = [event for event in events if event["ph"] == "X" and event["pid"] == REQUESTS]
        assert len(rows) == sum(len(logged.rows) for logged in steps)
        assert sum(event["ph"] == "s" for event in events) == len(rows)


@settings(max_examples=40, deadline=None)
@given(recorders(), scripts())
def test_the_trace_of_a_run_is_its_ledger(recorder, script):
    for happening in script:
        recorder.play(*happening)
    recorder.finish()
    source = recorder.recording()
    for call in source.calls:
        assert find_call(source, call.run_id) == find_call(source, call.id) == call
        events = trace_of(source, *span_of(call, source.now_ns), call.run_id)
        check(events)
        assert {event["id"] for event in events if event["ph"] in "be"} == {call.run_id}
        ledger = make_time_ledger(call, call.sequences[0], source.log, source.step_model, block_size=4, now_ns=0)
        sums, begun = defaultdict(float), {}
        for event in events:
            if event["ph"] == "b":
                begun[event["name"]] = event["ts"]
            elif event["ph"] == "e":
                sums[event["name"]] += event["ts"] - begun[event["name"]]
        assert sums.pop(call.run_id) == pytest.approx(ledger.total_ns / 1e3)
        assert sums == pytest.approx({kind: ns / 1e3 for kind, ns in ledger.by_kind().items()})
        number = call.sequences[0].number
        assert {event["tid"] for event in events if event["ph"] == "s"} <= {number}


def test_who_may_not_see_a_run_sees_the_steps_alone():
    recorder = Recorder(Stage(make_limits(64, 4, 4, 16)))
    for happening in [("submit", 9, 5, 0), ("submit", 9, 5, 1), ("steps", 9, 0, 0)]:
        recorder.play(*happening)
    source = recorder.recording()
    for key in (*KEYS, "nobody"):
        events = trace_of(source, 0, source.now_ns, viewer=Viewer(key))
        own = {call.run_id for call in (*source.calls, *source.live()) if call.key_name == key}
        assert {event["id"] for event in events if event["ph"] in "be"} == own
        assert sum(event["ph"] == "X" and event["name"] == "run" for event in events) == len(source.log.steps)
    assert find_call(source, "chatcmpl-none") is None


def test_a_long_trace_comes_in_pieces():
    recorder = Recorder(Stage(make_limits(64, 4, 4, 16)))
    recorder.play("submit", 9, 12, 0)
    for number in range(40):
        recorder.play("submit", 20, 12, number)
        recorder.play("steps", 12, 0, 0)
    source = recorder.recording()
    pieces = list(write_trace(source, 0, source.now_ns))
    assert len(pieces) > 4 and max(map(len, pieces)) < 70_000
