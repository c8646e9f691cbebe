"""What is told about calls: ledger, metrics, health, the log's lines, timings, the models list."""

import asyncio
import json
import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jilju.clock import VirtualClock
from jilju.config import ApiKey
from jilju.engine.request import RequestTimes
from jilju.errors import DeadlineExceeded, NanLogits, NotReady, Overloaded
from jilju.serve.errors import error_of, retry_headers
from jilju.serve.ledger import Call, Ledger, state_of
from jilju.serve.metrics.histogram import Histogram, token_edges
from jilju.serve.request_log import JsonFormatter, TextFormatter, make_formatter
from jilju.serve.timings import Marks, make_timings

from .conftest import Connect
from .stub import StubClient, step_record
from .test_answers import CHAT, COMPLETIONS, chat_body, events_of

pytestmark = pytest.mark.anyio

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset((labels | {"model": "stub"}).items())]


async def test_metrics_are_folds_that_balance(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        stub.log.add_step(step_record(begin_ns=0, end_ns=3_000_000, num_prefill_tokens=20, num_decode_tokens=2))
        stub.log.add_step(step_record(begin_ns=0, end_ns=4_000_000, num_decode_tokens=2))
        await http.post(CHAT, json=chat_body(max_tokens=5))
        await http.post(COMPLETIONS, json={"prompt": ["abcd", "ef"], "max_tokens": 3, "stream": True})
        await http.post(CHAT, json={})
        await http.get("/nowhere")
        samples = samples_of((await http.get("/metrics")).text)
    assert value(samples, "jilju_requests_accepted_total", route=CHAT) == 2
    assert value(samples, "jilju_requests_accepted_total", route=COMPLETIONS) == 1
    assert value(samples, "jilju_requests_finished_total", state="completed", code="") == 2
    assert value(samples, "jilju_requests_finished_total", state="failed", code="missing_parameter") == 1
    assert value(samples, "jilju_requests_refused_total", code="route_not_found") == 1
    assert value(samples, "jilju_generation_tokens_total") == 5 + 6
    prompt = len("[user]hello\n[assistant]") + 6
    assert value(samples, "jilju_prompt_tokens_total", source="cached") == 3 + 3 + 2
    assert value(samples, "jilju_prompt_tokens_total", source="computed") == prompt - 8
    assert value(samples, "jilju_time_to_first_token_seconds_count") == 2
    assert value(samples, "jilju_inter_token_latency_seconds_count") == 4 + 4
    assert value(samples, "jilju_e2e_request_latency_seconds_count") == 3
    assert value(samples, "jilju_request_queue_time_seconds_count") == 3
    assert value(samples, "jilju_step_seconds_count", kind="mixed") == 1
    assert value(samples, "jilju_step_seconds_bucket", kind="decode", le="0.005") == 1
    assert value(samples, "jilju_step_tokens_sum", kind="decode") == 4
    assert value(samples, "jilju_blocks", state="free") == 60
    for name in ("ledger_imbalance", "num_requests_running", "engine_restarts_total"):
        assert value(samples, f"jilju_{name}") == 0
    assert value(samples, "jilju_ready") == 1


def test_a_histograms_edge_belongs_below_and_its_buckets_add_up() -> None:
    histogram = Histogram((1, 2.5))
    for observed in (0.5, 1, 1.1, 2.5, 99):
        histogram.observe(observed)
    assert list(zip(histogram.edge_texts, histogram.totals(), strict=True)) == [("1.0", 2), ("2.5", 4), ("+Inf", 5)]
    assert token_edges(300) == (1, 2, 5, 10, 20, 50, 100, 200, 300)


async def test_a_scheduler_that_is_stuck_is_not_healthy(connect: Connect) -> None:
    stub = StubClient(is_stuck=True, num_step_faults=3, num_quarantined=2)
    async with connect(stub) as (http, _):
        health = await http.get("/health")
        assert health.status_code == 503 and health.json()["checks"]["scheduler"] is False
        text = (await http.get("/metrics")).text
    assert 'jilju_step_faults_total{model="stub"} 3.0' in text
    assert 'jilju_quarantined_requests_total{model="stub"} 2.0' in text


async def test_health_is_progress(connect: Connect) -> None:
    stub = StubClient(hang_at=0, step_age_s=100.0)
    clock = VirtualClock(1)
    async with connect(stub, clock=clock) as (http, _):
        idle = await http.get("/health")
        assert (idle.status_code, idle.json()["status"]) == (200, "ok"), "an old step is no fault where nothing waits"
        call = asyncio.create_task(http.post(CHAT, json=chat_body()))
        while not stub.live:
            await asyncio.sleep(0)
        assert (await http.get("/health")).status_code == 200, "work has just come"
        clock.advance_ns(5_100_000_000)
        stuck = await http.get("/health")
        assert stuck.status_code == 503 and stuck.json()["checks"]["steps"] is False and stuck.json()["running"] == 1
        stub.step_age_s = 0.1
        assert (await http.get("/health")).status_code == 200
        stub.hang_at = None
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        stub.state = "gone"
        assert (await http.get("/health")).status_code == 503
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "engine_unavailable")
        assert (await http.get("/version")).json() == {"version": "0.0.test"}


async def test_models_are_read_by_every_kind_of_client(connect: Connect) -> None:
    async with connect(quantization="Q4_K_M") as (http, _):
        data = (await http.get("/v1/models")).json()
        one = (await http.get("/v1/models/stub")).json()
    assert data["object"] == "list" and data["has_more"] is False and data["first_id"] == data["last_id"] == "stub"
    assert data["data"] == [one]
    assert (one["object"], one["type"], one["owned_by"], one["root"], one["parent"]) == (
        "model",
        "model",
        "jilju",
        "stub",
        None,
    )
    assert one["max_model_len"] == 512
    assert one["jilju"]["quantization"] == "Q4_K_M" and one["jilju"]["deterministic"] is True
    assert one["jilju"]["defaults"]["temperature"] == 1.0


async def test_one_line_a_call(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jilju.access")
    async with connect(keys=(ApiKey("alice", "s3cret"),)) as (http, _):
        headers = {"authorization": "Bearer s3cret", "x-request-id": "mine"}
        answer = await http.post(CHAT, json=chat_body("내용", max_tokens=4, request_id="r\n\x1b[31m"), headers=headers)
        await http.get("/v1/models", headers=headers)
        await http.get("/v1/models")
    lines = [record for record in caplog.records if record.name == "jilju.access"]
    assert len(lines) == 2, "a call and a refusal; what is read is at debug"
    entry = json.loads(JsonFormatter().format(lines[0]))
    assert entry["id"] == answer.headers["x-request-id"]
    assert (entry["key"], entry["state"], entry["status"], entry["output_tokens"]) == ("alice", "completed", 200, 4)
    assert entry["client_id"] == "mine" and entry["ms"] >= entry["ttft_ms"] > 0 and entry["level"] == "info"
    text = TextFormatter().format(lines[0])
    assert "key=alice" in text and "\n" not in text and "\x1b" not in text
    for record in lines:
        assert not any(secret in make_formatter("json").format(record) + text for secret in ("s3cret", "내용"))
    assert json.loads(JsonFormatter().format(lines[1]))["status"] == 401


def test_json_lines_carry_messages_and_exceptions() -> None:
    try:
        raise ValueError("x\ny")
    except ValueError as error:
        record = logging.LogRecord(
            "jilju", logging.ERROR, "f", 1, "a %s", ("b",), (ValueError, error, error.__traceback__)
        )
    entry = json.loads(JsonFormatter().format(record))
    assert entry["message"] == "a b" and "ValueError: x" in entry["exception"]


def call(call_id: str) -> Call:
    return Call(id=call_id, route=CHAT, key_name=None, label=None, received_ns=0)


def test_a_call_ends_once_and_the_ledger_sees_what_is_missing() -> None:
    ledger = Ledger(VirtualClock())
    first = ledger.accept(call("a"))
    ledger.accept(call("b"))
    assert ledger.imbalance() == 0
    ledger.end(first, "completed", 200)
    with pytest.raises(AssertionError, match="cannot end again"):
        ledger.end(first, "failed", 500, "internal")
    assert ledger.imbalance() == 0
    del ledger.live["b"]
    assert ledger.imbalance() == 1


def test_codes_of_the_engine_find_their_class() -> None:
    assert isinstance(error_of("nan_logits", "x"), NanLogits)
    assert error_of("kv_capacity_exceeded", "x").status == 400
    strange = error_of("nobody_knows", "x")
    assert (strange.status, strange.code, strange.message) == (500, "internal", "nobody_knows: x")
    assert [state_of(error) for error in (NanLogits(""), Overloaded(""), NotReady(""), DeadlineExceeded(""))] == [
        "failed", "shed", "shed", "deadline"]  # fmt: skip


@given(wait_s=st.none() | st.floats(0, 1e6), byte=st.binary(min_size=1, max_size=1))
def test_the_two_retry_headers_tell_the_same_wait(wait_s: float | None, byte: bytes) -> None:
    headers = dict(retry_headers(Overloaded("x", retry_after_s=wait_s), lambda count: byte))
    seconds, ms = int(headers[b"retry-after"]), int(headers[b"retry-after-ms"])
    assert 1 <= seconds <= 60 and (seconds - 1) * 1000 < ms <= seconds * 1000
    assert b"x-jilju-predicted-wait-ms" not in headers, "nobody predicted one"


@given(wait_ns=st.integers(0, 10**15))
def test_an_overload_tells_the_predicted_wait_and_spreads_clients_however_long_it_is(wait_ns: int) -> None:
    error = Overloaded("x", predicted_wait_ns=wait_ns, retry_after_s=wait_ns / 1e9)
    first, last = (dict(retry_headers(error, lambda count, byte=byte: byte)) for byte in (b"\x00", b"\xff"))
    assert int(first[b"x-jilju-predicted-wait-ms"]) == wait_ns // 10**6
    assert 1.24 * int(first[b"retry-after-ms"]) < int(last[b"retry-after-ms"]) <= 60_000


@given(
    gaps=st.lists(st.integers(0, 10**9), min_size=12, max_size=12),
    sends=st.lists(st.tuples(st.integers(0, 10**10), st.integers(0, 10**9)), max_size=3),
    stalled=st.floats(0, 1),
    resumed=st.floats(0, 1.5),  # its end is seen later than the last token's commit
    reached=st.integers(0, 3),
)
def test_timings_sum_to_the_total_and_no_part_is_negative(
    gaps: list[int], sends: list[tuple[int, int]], stalled: float, resumed: float, reached: int
) -> None:
    moments = [sum(gaps[: count + 1]) for count in range(len(gaps))]
    received, parsed, rendered, tokenized, submitted, queued, scheduled, first, last, last_event, _, now = moments
    times = RequestTimes(
        queued_ns=queued,
        scheduled_ns=scheduled if reached > 0 else 0,
        first_token_ns=first if reached > 1 else 0,
        last_token_ns=last if reached > 1 else 0,
        stalled_ns=int(stalled * (last - first)) if reached > 1 else 0,
        resume_ns=int(resumed * (last - first)) if reached > 1 else 0,
    )
    end = 0
    disjoint = []
    for begin, length in sends:
        begin = max(begin, end)
        end = min(begin + length, now)
        disjoint.append((min(begin, end), end))
    marks = Marks(
        received_ns=received, parsed_ns=parsed, render_ns=rendered - parsed, tokenize_ns=tokenized - rendered,
        submitted_ns=submitted, first_token_ns=first, last_event_ns=last_event, waits=disjoint,
    )  # fmt: skip
    timings = msgspec.to_builtins(make_timings(marks, times, first_sent_ns=0, num_tokens=2, seed=1, now_ns=now))
    assert_sums(timings)


def assert_sums(timings: dict[str, Any]) -> None:
    parts = {n: v for n, v in timings.items() if n.endswith("_ms") and n not in ("total_ms", "ttft_ms", "tpot_ms")}
    assert len(parts) == 12 and all(part >= 0 for part in parts.values()), timings
    assert sum(round(part * 1e6) for part in parts.values()) == round(timings["total_ms"] * 1e6)


async def test_timings_of_a_stream_whose_engine_died_name_the_gap(connect: Connect) -> None:
    stub = StubClient(resume_ns=1_500_000, delay_s=0.002)

    def die(request: Any, index: int) -> None:
        stub.num_restarts = 1 if index > 2 else 0

    stub.fail = die
    async with connect(stub) as (http, _):
        events = events_of(await http.post(CHAT, json=chat_body(stream=True, timings=True, max_tokens=6)))
    timings = events[-2]["timings"]
    assert (timings["resumes"], timings["resume_ms"]) == (1, 1.5)
    assert timings["decode_ms"] > 0
    assert_sums(timings)
