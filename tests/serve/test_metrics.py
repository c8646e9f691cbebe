"""Metrics: folds whose totals are the ledger's, labels of closed sets, and a text that Prometheus reads."""

import asyncio
import io
import logging
import os
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jilju.clock import VirtualClock
from jilju.engine.client import EngineStatus
from jilju.engine.events import Closed, EventLog, pack_row
from jilju.engine.request import RequestTimes
from jilju.errors import ShedReason
from jilju.serve.context import GpuMemory
from jilju.serve.ledger import Call, SequenceLife
from jilju.serve.loop_lag import LoopLag
from jilju.serve.metrics.folds import (
    CANCEL_PHASES,
    FINISHED_REASONS,
    FRONTEND_STAGES,
    MINUTE,
    ROW_FAULTS,
    Folds,
    LastMinute,
    phase_of,
)
from jilju.serve.metrics.histogram import Histogram
from jilju.serve.metrics.memory import balanced, resident_bytes
from jilju.serve.metrics.own import WAITING_REASONS, waiting_reason
from jilju.serve.metrics.text import Exposition
from jilju.serve.request_log import CountingHandler
from jilju.serve.server import Server

from .conftest import Connect
from .stub import StubClient, step_record
from .test_answers import CHAT, COMPLETIONS, chat_body
from .test_cancel import cancel, live_ids, post, until
from .test_told import Samples, samples_of, value

pytestmark = pytest.mark.anyio

S = 10**9
GIB = 1 << 30
# Every label of ours besides `model`, and the values that it may have; None: as the server's own tables say.
LABELS: dict[str, set[str] | None] = {
    "line": {"requests", "idle", "load", "failed", "recompute", "host"},
    "le": None,
    "version": None, "block_size": None, "num_blocks": None, "kv_dtype": None, "kernel_set": None,
    "route": {CHAT, COMPLETIONS, "/v1/responses", "/v1/messages"},
    "state": {"completed", "client_cancelled", "deadline", "shed", "failed", "free", "cached", "held", "used"},
    "code": None,
    "phase": set(CANCEL_PHASES),
    "kind": {"prefill", "decode", "mixed", *ROW_FAULTS.values()},
    "stage": set(FRONTEND_STAGES),
    "source": {"computed", "cached"},
    "process": {"server", "engine", "gpu"},
    "owner": {"start", "run store", "calls", "log", "history", "grammars", "weights", "kv", "workspace", "unattributed", "not_resident"},
    "reason": {*WAITING_REASONS, *get_args(ShedReason), "disconnect", "recompute"},
}  # fmt: skip


def total(samples: Samples, name: str) -> float:
    return sum(count for (found, _), count in samples.items() if found == name)


async def mixed_traffic(http: Any, server: Server, stub: StubClient) -> None:
    """Calls that end in every way that one server brings about by itself."""
    await http.post(CHAT, json=chat_body(max_tokens=5))
    await http.post(CHAT, json=chat_body(max_tokens=7, n=3, stream=True))
    await http.post(COMPLETIONS, json={"prompt": ["abcd", "ef"], "max_tokens": 3})
    await http.post(CHAT, json={})
    await http.post(CHAT, content=b"{")
    await http.get("/nowhere")
    stub.hang_at = 2
    call = post(http, max_tokens=9, stream=True)
    await until(lambda: stub.num_hanging)
    await cancel(http, *live_ids(server))
    await call
    stub.hang_at = None


async def test_totals_are_those_of_the_ledger(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, server):
        await mixed_traffic(http, server, stub)
        samples, ledger = samples_of((await http.get("/metrics")).text), server.ledger
    assert total(samples, "jilju_requests_accepted_total") == ledger.num_accepted.total() == 6
    num_ended = ledger.num_ended.total()
    for name in ("jilju_requests_finished_total", "jilju_e2e_request_latency_seconds_count"):
        assert total(samples, name) == num_ended == 6, name
    num_mistakes = sum(number for (state, _), number in ledger.num_ended.items() if state == "failed")
    assert sum(server.metrics.folds.num_finished.values()) == num_ended - num_mistakes == 4
    assert total(samples, "jilju_requests_refused_total") == ledger.num_refused.total() == 1
    cancelled = value(samples, "jilju_requests_finished_total", state="client_cancelled", code="request_cancelled")
    assert total(samples, "jilju_requests_cancelled_total") == cancelled == 1
    made = value(samples, "jilju_generation_tokens_total")
    assert made == 5 + 3 * 7 + 2 * 3 + 2
    assert value(samples, "jilju_request_generation_tokens_sum") == made
    assert value(samples, "jilju_request_max_num_generation_tokens_sum") == 5 + 7 + 3 + 2
    prompt_tokens = total(samples, "jilju_prompt_tokens_total")
    assert value(samples, "jilju_request_prompt_tokens_sum") == prompt_tokens
    computed = value(samples, "jilju_prompt_tokens_total", source="computed")
    assert value(samples, "jilju_request_prefill_kv_computed_tokens_sum") == computed
    assert value(samples, "jilju_prefix_cache_query_tokens_total") == prompt_tokens
    assert value(samples, "jilju_wasted_tokens_total", reason="disconnect") == 2
    assert value(samples, "jilju_frontend_seconds_count", stage="parse") == 4, (
        "all whose body was JSON and had the fields"
    )
    assert value(samples, "jilju_ledger_imbalance") == 0


async def test_every_label_has_a_closed_set_of_values(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, server):
        await mixed_traffic(http, server, stub)
        await http.post(CHAT, json=chat_body(user="alice", request_id="mine", session_id="ours"))
        text = (await http.get("/metrics")).text
    for name, labels in samples_of(text):
        assert dict(labels)["model"] == "stub", name
        for label, found in labels:
            allowed = {"stub"} if label == "model" else LABELS[label]
            assert allowed is None or found in allowed, f"{name} {label}={found}"
    assert not any(word in text for word in ("alice", "mine", "ours", "hello"))


@given(
    labels=st.dictionaries(st.sampled_from(("a", "b", "z")), st.text(max_size=20), min_size=1),
    number=st.floats(allow_nan=False),
)
def test_what_is_written_is_what_prometheus_reads(labels: dict[str, str], number: float) -> None:
    out = Exposition("x_", {"model": "m"})
    out.family("gauge", "y", "A text", [(labels, number)])
    (family,) = text_string_to_metric_families(out.text())
    (sample,) = family.samples
    assert (family.type, family.documentation) == ("gauge", "A text")
    assert (sample.name, sample.labels, sample.value) == ("x_y", {"model": "m", **labels}, number)


@given(observed=st.lists(st.floats(-10, 10)), low=st.sampled_from((-2.0, 0.5)))
def test_a_histogram_counts_each_once(observed: list[float], low: float) -> None:
    histogram = Histogram((low, 1, 2))
    for number in observed:
        histogram.observe(number)
    out = Exposition("", {"model": "m"})
    out.histogram("h", "A text", histogram)
    (family,) = text_string_to_metric_families(out.text())
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "h_bucket"}
    assert buckets == {
        **{repr(float(edge)): sum(number <= edge for number in observed) for edge in (low, 1, 2)},
        "+Inf": len(observed),
    }
    rest = {sample.name: sample.value for sample in family.samples if sample.name != "h_bucket"}
    assert rest == ({} if low < 0 else {"h_count": len(observed), "h_sum": pytest.approx(sum(observed))})


def test_a_name_says_what_it_is() -> None:
    out = Exposition("", {"model": "m"})
    with pytest.raises(AssertionError, match="no name of a counter"):
        out.one("counter", "things", "A text", 1)
    with pytest.raises(AssertionError, match="no name of a gauge"):
        out.one("gauge", "things_total", "A text", 1)


# ---- who waits, and what for -----------------------------------------------------------------------------------------


def status_of(**changes: Any) -> EngineStatus:
    return msgspec.structs.replace(StubClient().status(), **changes)


@pytest.mark.parametrize("closed_by", get_args(Closed))
def test_who_waits_waits_for_what_closed_the_last_step(closed_by: Closed) -> None:
    log = EventLog()
    folds = Folds(512, log)
    log.listen(folds.on_step)
    log.add_step(step_record(closed_by=closed_by))
    assert waiting_reason(status_of(), folds, draining=False) == ("step" if closed_by == "open" else closed_by)
    assert waiting_reason(status_of(state="restarting"), folds, draining=False) == "restart"
    assert waiting_reason(status_of(state="loading"), folds, draining=False) == "loading"
    assert waiting_reason(status_of(), folds, draining=True) == "drain"


async def test_waiting_sequences_are_told_by_reason(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubClient()
    monkeypatch.setattr(stub, "status", lambda: status_of(num_waiting=4))
    async with connect(stub) as (http, _):
        stub.log.add_step(step_record(closed_by="blocks"))
        samples = samples_of((await http.get("/metrics")).text)
    assert value(samples, "jilju_num_requests_waiting", reason="blocks") == 4
    assert total(samples, "jilju_num_requests_waiting") == 4


@pytest.mark.parametrize(
    ("lives", "rows", "phase"),
    [
        ([], b"", "queued"),
        ([SequenceLife(7, 0, 0, 4)], b"", "queued"),
        ([SequenceLife(7, 0, 0, 4)], pack_row(8, 0, 4, 0), "queued"),
        ([SequenceLife(7, 0, 0, 4)], pack_row(7, 0, 4, 0), "prefill"),
        ([SequenceLife(7, 0, 0, 4, num_output_tokens=1)], pack_row(7, 0, 4, 1), "decode"),
        ([SequenceLife(7, 0, 0, 4, finish_reason="stop"), SequenceLife(8, 1, 0, 4)], b"", "decode"),
        ([SequenceLife(7, 0, 0, 4, num_output_tokens=1, finish_reason="stop")], b"", "writing"),
    ],
)
def test_a_client_that_leaves_has_come_so_far(lives: list[SequenceLife], rows: bytes, phase: str) -> None:
    log = EventLog()
    log.add_step(step_record(num_rows=len(rows) // 20, rows=rows))
    num_tokens = 1 if phase in ("decode", "writing") else 0
    call = Call("a", CHAT, None, None, 0, lives=lives, num_sequences=len(lives), num_output_tokens=num_tokens)
    assert phase_of(call, log) == phase


@pytest.mark.parametrize(
    ("state", "reasons", "told"),
    [
        ("completed", ["stop"], "stop"),
        ("completed", ["length"], "length"),
        ("completed", ["repetition"], "repetition"),
        ("completed", ["tool_calls"], "stop"),
        ("completed", ["stop", "length"], "length"),
        ("client_cancelled", [None], "abort"),
        ("deadline", [None], "abort"),
        ("shed", [], "abort"),
        ("failed", [None], "error"),
    ],
)
def test_a_call_ends_for_one_reason(state: Any, reasons: list[str | None], told: str) -> None:
    folds = Folds(512, EventLog())
    lives = [SequenceLife(n, n, 0, 4, ended_ns=n, finish_reason=reason) for n, reason in enumerate(reasons)]
    folds.on_end(Call("a", CHAT, None, None, 0, lives=lives, num_sequences=len(lives), state=state, status=500))
    assert folds.num_finished == dict.fromkeys(FINISHED_REASONS, 0) | {told: 1}
    folds.on_end(Call("b", CHAT, None, None, 0, state="failed", status=400))
    assert sum(folds.num_finished.values()) == 1, "a caller's mistake"


def test_a_calls_parameters_are_counted() -> None:
    folds = Folds(512, EventLog())
    params: Any = SimpleNamespace(max_tokens=64)
    times = RequestTimes(queued_ns=1, num_preemptions=2)
    call = Call("a", CHAT, None, None, 0, state="completed", num_sequences=1, times=[times])
    call.lives, call.params, call.num_choices = [SequenceLife(1, 0, 0, 4, finish_reason="stop")], params, 3
    folds.on_end(call)
    assert (folds.max_tokens.sum, folds.choices.sum, folds.preemptions.sum) == (64, 3, 2)


# ---- the machine -----------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.tuples(st.integers(0, 200 * S), st.integers(0, S)), max_size=30).map(sorted),
    late_ns=st.integers(0, 100 * S),
)
def test_the_last_minute_is_that_of_the_steps_that_ended_in_it(steps: list[tuple[int, int]], late_ns: int) -> None:
    minute = LastMinute()
    for end_ns, took_ns in steps:
        minute.add(step_record(begin_ns=end_ns - took_ns, end_ns=end_ns, bytes=3, flops=5))
    now_ns = (steps[-1][0] if steps else 0) + late_ns
    took = [took_ns for end_ns, took_ns in steps if end_ns // S > now_ns // S - MINUTE]
    assert minute.sums(now_ns) == (sum(took), 3 * len(took), 5 * len(took))


async def test_shares_of_the_roofs_are_of_the_last_minute(connect: Connect) -> None:
    stub, clock = StubClient(), VirtualClock(1000 * S)
    async with connect(stub, clock=clock) as (http, _):
        assert stub.info is not None
        stub.log.add_step(step_record(begin_ns=999 * S, end_ns=1000 * S, bytes=4 * 10**9, flops=10**11))
        text = (await http.get("/metrics")).text
        assert "# TYPE jilju_mbu gauge" in text and "jilju_mbu{" not in text, "no roof is known"
        stub.info = msgspec.structs.replace(stub.info, read_bytes_per_s=8e9, flops_per_s=4e11)
        samples = samples_of((await http.get("/metrics")).text)
        assert value(samples, "jilju_mbu") == 0.5 and value(samples, "jilju_mfu") == 0.25
        clock.advance_ns(61 * S)
        assert "jilju_mbu{" not in (await http.get("/metrics")).text, "nothing was computed"


@given(
    resident=st.integers(0, 2**40),
    owners=st.dictionaries(st.sampled_from(("weights", "kv", "workspace")), st.integers(0, 2**40)),
)
def test_lines_of_memory_sum_to_what_is_resident(resident: int, owners: dict[str, int]) -> None:
    lines = {line.owner: line.bytes for line in balanced("engine", resident, owners)}
    assert sum(lines.values()) == resident
    assert lines["unattributed"] >= 0 >= lines["not_resident"]
    assert all(lines[owner] == held for owner, held in owners.items())


async def test_memory_of_both_processes_is_told(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubClient()
    monkeypatch.setattr(StubClient, "process_id", os.getppid(), raising=False)
    async with connect(stub) as (http, server):
        stub.info = msgspec.structs.replace(stub.info, weight_bytes=1 << 12)
        samples = samples_of((await http.get("/metrics")).text)
        assert value(samples, "jilju_memory_bytes", process="engine", owner="weights") == 1 << 12
        for process in ("server", "engine"):
            lines = [
                held
                for (name, labels), held in samples.items()
                if name == "jilju_memory_bytes" and ("process", process) in labels
            ]
            assert sum(lines) > 1 << 20
        pages = [line for line in server.metrics.memory.owned() if line.is_file]
        assert {(line.process, line.owner) for line in pages} == {
            ("server", "start"), ("engine", "weights"), ("engine", "start"),
        }  # fmt: skip
        monkeypatch.setattr(StubClient, "process_id", 2**30, raising=False)
        assert 'process="engine"' not in (await http.get("/metrics")).text, "there is no such process"
    assert resident_bytes("self") and resident_bytes(str(2**30)) is None


async def test_what_is_set_aside_on_a_gpu_is_its_and_not_the_process_s(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, used = StubClient(), [120 * GIB]
    monkeypatch.setattr(StubClient, "process_id", os.getppid(), raising=False)
    gpu = GpuMemory(total_bytes=140 * GIB, used_bytes=lambda: used[0] if used else None)
    async with connect(stub, gpu=gpu, metrics_compat="vllm") as (http, _):
        stub.info = msgspec.structs.replace(
            stub.info, weight_bytes=15 * GIB, kv_bytes=100 * GIB, workspace_bytes=2 * GIB
        )
        text = (await http.get("/metrics")).text
        samples = samples_of(text)

        def lines(process: str) -> dict[str, float]:
            of_process = {
                dict(labels)["owner"]: held
                for (name, labels), held in samples.items()
                if name == "jilju_memory_bytes" and ("process", process) in labels
            }
            return {owner: held for owner, held in of_process.items() if held}

        held = {"weights": 15 * GIB, "kv": 100 * GIB, "workspace": 2 * GIB, "unattributed": 3 * GIB}
        assert lines("gpu") == held
        assert lines("engine").keys() == {"start"} and lines("engine")["start"] > 1 << 20
        assert value(samples, "jilju_gpu_memory_bytes", state="used") == 120 * GIB
        assert value(samples, "jilju_gpu_memory_bytes", state="free") == 20 * GIB
        assert 'gpu_memory_utilization="0.84"' in text
        used.clear()
        samples = samples_of((await http.get("/metrics")).text)
        assert not lines("gpu") and lines("engine"), "the driver does not answer"
        assert not [name for name, _ in samples if name == "jilju_gpu_memory_bytes"]


async def test_a_loop_that_is_kept_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jilju.serve.loop_lag.PERIOD_S", 0.001)
    clock = VirtualClock()
    lag = LoopLag(clock)
    assert lag.worst_s is None
    task = asyncio.create_task(lag.watch())
    await asyncio.sleep(0)
    clock.advance_ns(41_000_000)
    while lag.worst_s is None:
        await asyncio.sleep(0.001)
    assert lag.worst_s == pytest.approx(0.04)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_lines_that_cannot_be_written_are_counted(connect: Connect) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    handler = CountingHandler(Full())
    log = logging.getLogger("jilju.test-full")
    log.addHandler(handler)
    log.propagate = False
    for _ in range(3):
        log.warning("a line")
    async with connect(num_dropped_log_lines=lambda: handler.num_dropped) as (http, _):
        samples = samples_of((await http.get("/metrics")).text)
    assert value(samples, "jilju_dropped_log_lines_total") == 3


async def test_a_scrape_asks_nobody_and_changes_nothing(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, clock=VirtualClock(S)) as (http, server):
        await http.post(CHAT, json=chat_body(max_tokens=5))
        first, second = server.metrics.expose(), server.metrics.expose()
    moving = (b"jilju_memory_bytes", b"jilju_cpu_quota_cores")

    def still(text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if not line.startswith(moving)]

    assert still(first) == still(second)
