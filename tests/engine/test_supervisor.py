"""The supervisor: streams outlive the engine, exactly; what cannot go on ends once, with a reason."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import pytest

from jilju.engine.client import EngineInfo, EngineStatus
from jilju.engine.events import StepRecord
from jilju.engine.link import Beat, LinkBroken, Ready, Stepped
from jilju.engine.process import SupervisedClient
from jilju.engine.request import (
    PromptScored,
    Request,
    RequestAborted,
    RequestFailed,
    RequestTimes,
    TokenEvent,
    is_terminal,
)
from jilju.engine.supervisor import MAX_RESTARTS, NUM_PROBATION_STEPS, STEP_S_MAX, WATCHDOG_S, Supervisor
from jilju.errors import ContextLengthExceeded, EngineUnavailable, NotReady, Overloaded, StartupError

from .fakes import joined_scores, oracle, oracle_scores, request

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.engine.engine_process"]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
SECOND = 10**9

# ---- the core, without processes --------------------------------------------------------------------------------------

INFO = EngineInfo(
    kernel_set="fake", invariant=True, num_threads=1, max_context=100, block_size=4, num_blocks=40, max_rows=8, step_tokens=16,
    token_gap_ms=100.0, score_work=0.3, weight_bytes=1, kv_bytes=1, workspace_bytes=1, load_ms=500.0,
)  # fmt: skip
STATUS = EngineStatus(
    state="ready", num_running=1, num_waiting=0, num_blocks_free=1, num_blocks_cached=2, num_blocks_held=3,
    last_step_age_s=0, num_restarts=0, imbalance=0,
)  # fmt: skip


def record(**fields) -> StepRecord:
    values = dict.fromkeys(StepRecord.__struct_fields__, 0) | {"num_decode_tokens": 1} | fields
    return StepRecord(**values)


def stepped(*events, next_ids=(), predicted_ns=0, **fields) -> Stepped:
    return Stepped(list(events), [record(**fields)], STATUS, list(next_ids), predicted_ns)


def scored(request_id: str, start: int, count: int) -> PromptScored:
    return PromptScored(request_id=request_id, start=start, logprobs=[-1.0] * count)


def token(request_id: str, index: int, **fields) -> TokenEvent:
    return TokenEvent(request_id=request_id, index=index, token_id=index + 10, **fields)


def ready_core(now_ns: int = 0, **options) -> Supervisor:
    core = Supervisor(now_ns, **options)
    core.receive(core.launched(now_ns), Ready(INFO), now_ns)
    return core


def test_a_frame_counts_whole_or_not_at_all():
    core = ready_core()
    core.submit(request("a", [1]), 1)
    core.submit(request("b", [1]), 1)
    for bad in (token("b", 1), token("nobody", 0), RequestFailed(request_id="nobody", code="x", message="")):
        with pytest.raises(LinkBroken):
            core.receive(1, stepped(token("a", 0), bad), 2)
    core.receive(1, stepped(token("a", 0)), 2)
    assert [r.output_ids for r in core.resubmissions()] == [[10], []]


def test_frames_of_an_older_epoch_are_dropped():
    core = ready_core()
    core.submit(request("a", [1]), 1)
    core.ended(2)
    core.receive(core.launched(3), Ready(INFO), 3)
    assert core.receive(1, stepped(token("a", 0)), 4) == []
    assert core.resubmissions()[0].output_ids == []


def test_a_resubmission_carries_on_where_the_stream_is():
    core = ready_core()
    core.submit(request("a", [1, 2], prompt_logprobs=0), 1)
    core.submit(request("b", [3]), 2)
    core.submit(request("c", [1, 2, 3, 4, 5, 6], prompt_logprobs=1), 2)
    core.receive(1, stepped(scored("a", 1, 1), token("a", 0), token("b", 0), scored("c", 1, 2)), 3)
    core.receive(1, stepped(token("b", 1), scored("c", 3, 1)), 4)
    core.ended(5)
    a, b, c = core.resubmissions()
    assert (a.id, a.output_ids, a.num_scored, a.num_prompt_tokens) == ("a", [10], 1, 2)
    assert (b.id, b.output_ids) == ("b", [10, 11])
    assert (c.id, c.output_ids, c.prompt_logprobs, c.num_scored) == ("c", [], 1, 3)


@pytest.mark.parametrize(
    "pieces", [[(2, 1)], [(1, 0)], [(1, 3)], [(1, 1), (1, 1)], [(1, 1), (3, 1)], [(1, 2), (3, 1)], [(0, 1)]]
)
def test_scores_that_are_not_the_next_break_the_link(pieces):
    core = ready_core()
    core.submit(request("a", [1, 2, 3], prompt_logprobs=0), 1)
    with pytest.raises(LinkBroken, match=r"scores .* of a came"):
        core.receive(1, stepped(*(scored("a", *piece) for piece in pieces)), 3)
    assert core.resubmissions()[0].num_scored == 0, "a frame counts whole or not at all"


def test_scores_that_nobody_asked_for_break_the_link():
    core = ready_core()
    core.submit(request("a", [1, 2, 3]), 1)
    with pytest.raises(LinkBroken, match="scores 1 to 2 of a came"):
        core.receive(1, stepped(scored("a", 1, 1)), 3)


def test_times_span_engines_and_resume_is_the_gap():
    core = ready_core()
    core.submit(request("a", [1]), 1)
    first = RequestTimes(queued_ns=2, scheduled_ns=3, first_token_ns=10)
    core.receive(1, stepped(token("a", 0, times=first)), 11)
    share = {"begin_ns": 11, "done_ns": 31, "num_prefill_tokens": 3, "num_decode_tokens": 1}
    core.receive(1, stepped(token("a", 1), **share), 32)
    core.ended(40)
    core.receive(core.launched(50), Ready(INFO), 60)
    core.ended(70)
    core.receive(core.launched(80), Ready(INFO), 90)
    core.receive(3, stepped(token("a", 2), begin_ns=100, done_ns=140, num_prefill_tokens=3), 140)
    of_engine = RequestTimes(
        queued_ns=90, scheduled_ns=100, first_token_ns=140, last_token_ns=200, stalled_ns=7, num_steps=2
    )
    (event,) = core.receive(3, stepped(token("a", 3, finish_reason="length", times=of_engine)), 201)
    assert event.times == msgspec.structs.replace(
        of_engine, queued_ns=1, scheduled_ns=3, first_token_ns=10, stalled_ns=15 + 7, resume_ns=100
    )


def test_a_request_that_had_no_token_takes_the_times_of_the_new_engine():
    core = ready_core()
    core.submit(request("a", [1]), 1)
    core.ended(5)
    core.receive(core.launched(6), Ready(INFO), 7)
    of_engine = RequestTimes(queued_ns=7, scheduled_ns=8, first_token_ns=9, last_token_ns=9)
    (event,) = core.receive(2, stepped(token("a", 0, finish_reason="stop", times=of_engine)), 10)
    assert event.times == msgspec.structs.replace(of_engine, queued_ns=1)


def test_so_does_one_that_goes_on():
    """Who is given up after its first token has no other times."""
    core = ready_core()
    core.submit(request("a", [1]), 1)
    core.ended(5)
    core.receive(core.launched(6), Ready(INFO), 7)
    of_engine = RequestTimes(queued_ns=7, scheduled_ns=8, first_token_ns=9, last_token_ns=9)
    (event,) = core.receive(2, stepped(token("a", 0, times=of_engine)), 10)
    assert event.times == msgspec.structs.replace(of_engine, queued_ns=1)


def test_back_off_and_giving_up():
    core = ready_core()
    core.submit(request("a", [1]), 1)
    waits = []
    for _ in range(MAX_RESTARTS):
        wait_s, events = core.ended(2)
        assert events == []
        waits.append(wait_s)
        with pytest.raises(NotReady) as refusal:
            core.submit(request("b", [1]), 2)
        assert refusal.value.retry_after_s >= 0.5
        core.launched(3)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6]
    wait_s, events = core.ended(4)
    assert wait_s is None and [(e.request_id, e.code) for e in events] == [("a", "engine_unavailable")]
    with pytest.raises(EngineUnavailable):
        core.submit(request("c", [1]), 5)


@pytest.mark.parametrize("recovery", ["a step", "a stable minute"])
def test_a_sign_of_health_ends_the_row(recovery):
    core = ready_core()
    core.submit(request("a", [1]), 1)
    now = 0
    for _ in range(4 * MAX_RESTARTS):
        now += 61 * SECOND if recovery == "a stable minute" else 1
        if recovery == "a step":
            core.receive(core.epoch, stepped(), now)
        wait_s, _ = core.ended(now)
        assert wait_s == 0.1
        core.receive(core.launched(now), Ready(INFO), now)


def test_abort_in_every_state():
    core = ready_core()
    for id in ("told", "dying", "away"):
        core.submit(request(id, [1]), 1)
    assert core.abort("told") == (True, []) and core.abort("told") == (False, [])
    assert core.abort("nobody") == (False, [])
    aborted = RequestAborted(request_id="told", num_tokens=0, times=RequestTimes(queued_ns=1))
    assert core.receive(1, stepped(aborted), 2) == [aborted]
    core.abort("dying")
    _, events = core.ended(3)
    assert [(type(e), e.request_id) for e in events] == [(RequestAborted, "dying")]
    told, events = core.abort("away")
    assert not told and [(type(e), e.request_id) for e in events] == [(RequestAborted, "away")]
    assert core.resubmissions() == [] and core.num_live == 0


def test_refusals_come_at_submit():
    core = ready_core(max_requests=1)
    with pytest.raises(ContextLengthExceeded):
        core.submit(request("a", [1] * 100, 1), 1)
    core.submit(request("b", [1]), 1)
    with pytest.raises(Overloaded):
        core.submit(request("c", [1]), 1)
    with pytest.raises(NotReady):
        Supervisor(0).submit(request("d", [1]), 1)


def test_the_watchdog_sees_silence_and_hung_steps_but_not_its_own_sleep():
    def ticks(core, start_s, end_s):
        return [r for s in range(start_s, end_s) if (r := core.tick(s * SECOND))]

    core = ready_core()
    assert ticks(core, 0, int(WATCHDOG_S)) == []
    assert "no sign of life" in ticks(core, int(WATCHDOG_S), int(WATCHDOG_S) + 2)[0]

    core = ready_core()
    assert core.tick(0) is None and core.tick(100 * SECOND) is None  # it was we who stood still
    core.receive(1, Beat(int(100 + STEP_S_MAX - 1) * SECOND), 100 * SECOND)  # perhaps the engine stood still too
    assert core.tick(100 * SECOND) is None
    core.receive(1, Beat(int(100 + STEP_S_MAX + 1) * SECOND), 100 * SECOND)
    assert "a step is in flight" in core.tick(100 * SECOND)
    core.receive(1, stepped(), 100 * SECOND)
    core.receive(1, Beat(int(STEP_S_MAX + 1) * SECOND), 100 * SECOND)
    assert "a step is in flight" in core.tick(100 * SECOND)

    core = ready_core()
    core.receive(1, msgspec.structs.replace(stepped(), status=msgspec.structs.replace(STATUS, is_stuck=True)), SECOND)
    assert "it runs none" in core.tick(SECOND)

    core = ready_core()  # a step that is expected to take long is given its time
    core.receive(1, stepped(predicted_ns=5 * SECOND), SECOND)
    core.receive(1, Beat(int(STEP_S_MAX + 1) * SECOND), SECOND)
    assert core.tick(SECOND) is None
    core.receive(1, Beat(51 * SECOND), SECOND)
    assert "a step is in flight" in core.tick(SECOND)


def restarted(core: Supervisor) -> list[Request]:
    core.receive(core.launched(0), Ready(INFO), 0)
    return core.resubmissions()


def test_who_is_in_two_deaths_the_second_alone_is_quarantined():
    core = ready_core()
    for id in ("a", "b", "c"):
        core.submit(request(id, [1]), 0)
    core.receive(1, stepped(next_ids=["a", "b"]), 0)
    assert core.ended(0, "work")[1] == []
    assert [r.num_probation_steps for r in restarted(core)] == [NUM_PROBATION_STEPS, NUM_PROBATION_STEPS, 0]
    core.receive(2, stepped(next_ids=["a"]), 0)
    (event,) = core.ended(0, "work")[1]
    assert event.request_id == "a" and event.code == "request_quarantined"
    assert [(r.id, r.num_probation_steps) for r in restarted(core)] == [("b", NUM_PROBATION_STEPS), ("c", 0)]
    assert core.status(0).num_quarantined == 1


def test_deaths_that_no_suspect_repeats_alone_end_nobody():
    core = ready_core()
    for id in ("a", "b"):
        core.submit(request(id, [1]), 0)
    for epoch in range(1, 6):
        core.receive(epoch, stepped(next_ids=["a", "b"]), 0)
        assert core.ended(0, "work")[1] == []
        assert len(restarted(core)) == 2


@pytest.mark.parametrize(("cause", "num_deaths"), [("work", 2), ("pressure", 3), ("other", None)])
def test_what_a_death_counts_depends_on_its_cause(cause, num_deaths):
    core = ready_core()
    core.submit(request("a", [1]), 0)
    for epoch in range(1, 6):
        core.receive(epoch, stepped(next_ids=["a"]), 0)
        events = core.ended(0, cause)[1]
        assert bool(events) == (epoch == num_deaths)
        if events:
            return
        restarted(core)
    assert num_deaths is None


def test_crashes_whose_culprits_are_found_do_not_give_the_engine_up():
    core = ready_core()
    for index in range(2 * MAX_RESTARTS):
        core.submit(request(f"bad{index}", [1]), 0)
    for index in range(2 * MAX_RESTARTS):
        for _ in range(2):
            core.receive(core.epoch, msgspec.structs.replace(stepped(next_ids=[f"bad{index}"]), records=[]), 0)
            assert core.ended(0, "work")[0] is not None
            restarted(core)
    assert core.num_live == 0 and core.status(0).num_quarantined == 2 * MAX_RESTARTS


def test_a_kill_alone_is_not_held_against_who_was_in_deaths_of_others():
    core = ready_core()
    for id in ("a", "b"):
        core.submit(request(id, [1]), 0)
    for _ in range(2):
        core.receive(core.epoch, stepped(next_ids=["a", "b"]), 0)
        core.ended(0, "work")
        restarted(core)
    core.receive(core.epoch, stepped(next_ids=["a"]), 0)
    assert core.ended(0, "pressure")[1] == []


def test_a_suspect_stays_one_until_it_has_made_a_token():
    core = ready_core()
    for id in ("a", "b"):
        core.submit(request(id, [1]), 0)
    core.receive(1, stepped(next_ids=["a", "b"]), 0)
    core.ended(0, "work")
    restarted(core)
    core.receive(2, stepped(next_ids=["a"]), 0)
    core.ended(0, "other")  # b had no turn yet
    assert [r.num_probation_steps for r in restarted(core)] == [NUM_PROBATION_STEPS, NUM_PROBATION_STEPS]
    core.receive(3, stepped(token("a", 0), next_ids=["b"]), 0)
    core.ended(0, "other")
    assert [r.num_probation_steps for r in restarted(core)] == [0, NUM_PROBATION_STEPS]


def test_a_hung_engine_does_not_keep_who_waits_from_a_deadline():
    core = ready_core()
    core.submit(msgspec.structs.replace(request("a", [1]), queue_deadline_ns=10), 0)
    core.submit(msgspec.structs.replace(request("b", [1]), queue_deadline_ns=10), 0)
    assert core.expired(SECOND) == []  # the engine has its time to say so
    assert [e.request_id for e in core.expired(2 * SECOND)] == ["a", "b"]
    assert core.expired(3 * SECOND) == [], "once"
    late = RequestFailed(request_id="a", code="deadline_exceeded", message="")
    assert core.receive(1, stepped(token("a", 0), late), 0) == [], "what it says when it wakes is dropped"
    core.ended(0)
    assert restarted(core) == [] and core.num_live == 0


def test_deadlines_pass_while_the_engine_is_gone():
    core = ready_core()
    late = {"deadline_ns": 10}
    unstarted = {"queue_deadline_ns": 10}
    for id, fields in {"late": late, "waits": unstarted, "runs": unstarted, "ran": unstarted, "patient": {}}.items():
        core.submit(msgspec.structs.replace(request(id, [1]), **fields), 0)
    core.receive(1, stepped(token("runs", 0), next_ids=["ran", "runs"]), 0)
    assert core.expired(11) == []  # the engine sees to it
    core.ended(11)
    assert core.expired(9) == []
    assert [(e.request_id, e.code) for e in core.expired(11)] == [
        ("late", "deadline_exceeded"), ("waits", "deadline_exceeded")
    ]  # fmt: skip
    assert [(r.id, r.queue_deadline_ns) for r in restarted(core)] == [("runs", 0), ("ran", 0), ("patient", 0)]


# ---- with real processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def make_client(folder: Path, step_ms: float = 1.0) -> SupervisedClient:
    return SupervisedClient([*COMMAND, str(folder), str(step_ms)], env=ENV)


async def collect(stream) -> list:
    return [event async for event in stream]


def assert_like_alone(r: Request, events: list) -> None:
    assert [is_terminal(e) for e in events] == [False] * (len(events) - 1) + [True]
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    assert [e.token_id for e in tokens] == oracle(r)[0]
    assert [e.index for e in tokens] == list(range(len(tokens)))


async def wait_until(condition, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_streams_outlive_kills_at_random_moments(folder):
    async def main():
        rng = random.Random(7)
        client = make_client(folder, step_ms=2)
        await client.start()
        requests = [
            request(
                f"r{i}", [i] * (3 + 2 * i), 120, seed=i, repetition_penalty=1.1, prompt_logprobs=2 if i == 3 else None
            )
            for i in range(8)
        ]
        answers = [asyncio.create_task(collect(client.submit(r))) for r in requests]
        num_kills = 0
        while not all(a.done() for a in answers) and num_kills < 5:
            num_steps = len(client.log.steps) + rng.randrange(30)
            await wait_until(lambda: len(client.log.steps) > num_steps or all(a.done() for a in answers))
            pid, epoch = client.process_id, client.status().num_restarts
            if pid is not None and client.status().state == "ready":
                os.kill(pid, signal.SIGKILL)
                num_kills += 1
                await wait_until(lambda: client.status().state == "ready" and client.status().num_restarts > epoch)
        for r, events in zip(requests, await asyncio.gather(*answers), strict=True):
            assert_like_alone(r, events)
            times = events[-1].times
            assert times.queued_ns < times.scheduled_ns < times.first_token_ns < times.last_token_ns
            assert 0 < times.resume_ns < times.last_token_ns - times.first_token_ns
            assert joined_scores(events) == (oracle_scores(r) if r.prompt_logprobs is not None else ([], []))
        status = client.status()
        assert status.num_restarts == num_kills == 5 and status.num_resumed >= 8 and status.imbalance == 0
        assert status.num_blocks_held == 0
        await client.stop()

    asyncio.run(main())


def test_damage_on_the_link_restarts_the_engine_and_loses_nothing(folder):
    async def main():
        client = make_client(folder, step_ms=2)
        await client.start()
        r = request("a", [1, 2], 60)
        stream = client.submit(r)
        events = [await anext(stream)]
        client._process.writer.write(b"\xff" * 8)  # the engine cannot trust that, and ends
        events += await collect(stream)
        assert_like_alone(r, events)
        assert client.status().num_restarts == 1
        await client.stop()

    asyncio.run(main())


def test_a_load_says_how_far_it_is_the_first_time_only(folder):
    (folder / "tell_load").touch()
    told = []

    async def main():
        client = SupervisedClient([*COMMAND, str(folder), "1"], env=ENV, on_loading=lambda *far: told.append(far))
        await client.start()
        os.kill(client.process_id, signal.SIGKILL)
        await wait_until(lambda: client.status().num_restarts == 1 and client.status().state == "ready")
        await client.stop()

    asyncio.run(main())
    assert told == [(1, 2, "packing weights"), (2, 2, "packing weights")]


def test_an_engine_launched_ahead_loads_before_there_is_a_loop_and_is_the_one_that_serves(folder):
    client = make_client(folder)
    client.launch()
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.005)

    async def main():
        await client.start()
        assert client.process_id == int((folder / "pid").read_text()) and client.status().num_restarts == 0
        r = request("a", [1, 2], 20)
        assert_like_alone(r, await collect(client.submit(r)))
        os.kill(client.process_id, signal.SIGKILL)
        await wait_until(lambda: client.status().num_restarts == 1 and client.status().state == "ready")
        await client.stop()

    asyncio.run(main())


def test_an_engine_launched_ahead_for_nothing_is_ended(folder):
    (folder / "slow_load").touch()
    client = make_client(folder)
    client.launch()
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.005)
    asyncio.run(client.stop())
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_a_launch_that_cannot_be_is_a_startup_error():
    with pytest.raises(StartupError, match=r"the engine's process cannot be started: .*/nowhere/python"):
        SupervisedClient(["/nowhere/python"]).launch()


def test_a_load_failure_is_told_in_the_engines_own_words(folder):
    (folder / "load_error").write_text("model.gguf: 3 blocks are missing")

    async def main():
        client = make_client(folder)
        with pytest.raises(StartupError, match=r"^model.gguf: 3 blocks are missing$"):
            await client.start()
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("command", [["/nowhere/python"], [sys.executable, "-c", "raise SystemExit(3)"]])
def test_a_command_that_fails_is_a_startup_error(command):
    async def main():
        client = SupervisedClient(command)
        with pytest.raises(StartupError, match=r"the engine's process (cannot be started|ended with exit status 3)"):
            await client.start()
        await client.stop()

    asyncio.run(main())


def test_an_engine_that_cannot_come_back_is_given_up(folder, monkeypatch):
    monkeypatch.setattr("jilju.engine.supervisor.BACKOFF_S", 0.01)

    async def main():
        client = make_client(folder, step_ms=20)
        await client.start()
        stream = client.submit(request("a", [1], 150))
        await anext(stream)
        (folder / "crash_at_load").touch()
        os.kill(client.process_id, signal.SIGKILL)
        await wait_until(lambda: client.status().state == "restarting")
        with pytest.raises(NotReady):
            client.submit(request("b", [1]))
        last = (await collect(stream))[-1]
        assert isinstance(last, RequestFailed) and last.code == "engine_unavailable"
        assert client.status().state == "gone" and client.status().num_restarts == MAX_RESTARTS
        with pytest.raises(EngineUnavailable):
            client.submit(request("c", [1]))
        await client.stop()

    asyncio.run(main())


def test_abort_running_restarting_and_by_leaving(folder):
    async def main():
        client = make_client(folder, step_ms=2)
        await client.start()
        running, away, left = (client.submit(request(id, [1], 40)) for id in ("running", "away", "left"))
        await anext(running)
        client.abort("running")
        assert isinstance((await collect(running))[-1], RequestAborted)
        await left.aclose()
        os.kill(client.process_id, signal.SIGKILL)
        await wait_until(lambda: client.status().state == "restarting")
        client.abort("away")
        assert isinstance((await collect(away))[-1], RequestAborted)
        await wait_until(lambda: client.status().state == "ready")
        r = request("after", [5, 6], 10)
        assert_like_alone(r, await collect(client.submit(r)))
        assert client.status().num_blocks_held == 0
        await client.stop()

    asyncio.run(main())


def test_stop_ends_the_process_and_what_is_live(folder):
    async def main():
        client = make_client(folder, step_ms=20)
        await client.start()
        stream = client.submit(request("a", [1], 150))
        await anext(stream)
        pid = client.process_id
        await client.stop()
        last = (await collect(stream))[-1]
        assert isinstance(last, RequestFailed) and last.code == "not_ready"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(main())


def test_a_signal_without_a_name_is_a_death_like_others(folder):
    async def main():
        client = make_client(folder, step_ms=2)
        await client.start()
        r = request("a", [1], 40)
        stream = client.submit(r)
        first = await anext(stream)
        os.kill(client.process_id, signal.SIGRTMIN + 6)
        assert_like_alone(r, [first, *await collect(stream)])
        assert client.status().num_restarts == 1
        await client.stop()

    asyncio.run(main())


def test_signals_from_the_terminal_leave_the_engine_alone(folder):
    async def main():
        client = make_client(folder)
        await client.start()
        os.kill(client.process_id, signal.SIGINT)
        os.kill(client.process_id, signal.SIGTERM)
        r = request("a", [1], 20)
        assert_like_alone(r, await collect(client.submit(r)))
        assert client.status().num_restarts == 0
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("phase", ["serving", "slow_load"])
def test_the_engine_dies_with_its_server(folder, phase):
    if phase == "slow_load":
        (folder / phase).touch()
    server = textwrap.dedent(
        """
        import asyncio, sys
        from jilju.engine.process import SupervisedClient
        from tests.engine.fakes import request
        async def main():
            client = SupervisedClient(sys.argv[1:])
            await client.start()
            async for event in client.submit(request("a", [1], 150)):
                print("token", flush=True)
        asyncio.run(main())
        """
    )
    command = [sys.executable, "-c", server, *COMMAND, str(folder), "20"]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if phase == "serving":
            assert process.stdout.readline() == b"token\n"

        async def main():
            await wait_until(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
            pid = int((folder / "pid").read_text())
            assert Path(f"/proc/{pid}").exists()
            process.kill()
            await wait_until(lambda: not is_running(pid), limit_s=2.0)

        asyncio.run(main())


def is_running(pid: int) -> bool:
    """A zombie, which only its new parent can clear away, does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_stop_during_the_load_ends_start(folder):
    (folder / "slow_load").touch()

    async def main():
        client = make_client(folder)
        start = asyncio.create_task(client.start())
        await wait_until(lambda: (folder / "pid").exists())
        await client.stop()
        with pytest.raises(StartupError, match="stopped before it was loaded"):
            await start

    asyncio.run(main())
