"""OpenTelemetry: a call's spans nest and are as long as the ledger says; names, attributes, and what is told nobody."""

import asyncio
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jilju.clock import VirtualClock
from jilju.config import resolve_serve_config
from jilju.engine.events import EventLog, pack_row
from jilju.engine.request import RequestFailed, RequestTimes, SamplingParams
from jilju.errors import ConfigError
from jilju.serve.ledger import Call, SequenceLife
from jilju.serve.otel import names
from jilju.serve.otel.attributes import span_attributes
from jilju.serve.otel.parts import MAX_CHUNKS, Part, parts_of
from jilju.serve.otel.providers import Providers, check_telemetry, make_providers
from jilju.serve.otel.telemetry import Telemetry
from jilju.serve.runs.store import RunStore
from jilju.serve.timings import Marks

from .conftest import Connect
from .stub import StubClient, make_context, step_record
from .test_answers import CHAT, COMPLETIONS, chat_body
from .test_cancel import cancel, live_ids, post, until

pytestmark = pytest.mark.anyio

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collected:
    """Exporters in memory, and what came to them."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        traces = TracerProvider(shutdown_on_exit=False)
        traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.providers = Providers(traces, MeterProvider([self.reader], shutdown_on_exit=False))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def root(self) -> ReadableSpan:
        [root] = [span for span in self.spans if span.kind is SpanKind.SERVER]
        return root

    def children(self) -> list[ReadableSpan]:
        context = self.root().context
        children = [span for span in self.spans if span.kind is not SpanKind.SERVER]
        assert context is not None
        assert all(child.parent is not None and child.parent.span_id == context.span_id for child in children)
        assert all(child.context is not None and child.context.trace_id == context.trace_id for child in children)
        return children

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        metrics = [m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
        return {metric.name: list(metric.data.data_points) for metric in metrics}


def length(span: ReadableSpan) -> int:
    assert span.start_time is not None and span.end_time is not None
    return span.end_time - span.start_time


# ---- what is told of a call ------------------------------------------------------------------------------------------


async def test_a_calls_spans_nest_and_touch_in_order(connect: Connect) -> None:
    collected = Collected()
    async with connect(StubClient(queue_ns=1000), telemetry=collected.providers) as (http, server):
        await http.post(CHAT, json=chat_body(max_tokens=5))
        [record] = server.calls
    root, children = collected.root(), collected.children()
    assert root.name == "chat stub" and length(root) == record.ended_ns - record.received_ns
    by_name = {child.name: child for child in children}
    assert list(by_name) == ["validate", "render", "tokenize", "queue", "prefill chunk 1", "decode", "write"]
    ends = [root.start_time]
    for child in children:
        assert child.start_time >= ends[-1], f"{child.name} begins before what is before it ends"
        ends.append(child.end_time)
    assert root.start_time <= children[0].start_time and ends[-1] <= root.end_time
    assert length(by_name["validate"]) == record.parsed_ns - record.received_ns
    assert length(by_name["render"]) == record.render_ns and length(by_name["tokenize"]) == record.tokenize_ns
    assert length(by_name["queue"]) == 1000
    assert length(by_name["write"]) == record.ended_ns - record.last_event_ns
    assert sum(map(length, children)) <= length(root)
    assert by_name["decode"].attributes == {"jilju.tokens": 5}


async def test_each_sequence_has_its_own(connect: Connect) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": "abcd", "n": 2, "max_tokens": 3})
    assert collected.root().name == "text_completion stub"
    decodes = [child.attributes for child in collected.children() if child.name == "decode"]
    assert decodes == [{"jilju.choice.index": index, "jilju.tokens": 3} for index in (0, 1)]


async def test_attributes_of_a_call(connect: Connect) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers) as (http, _):
        answer = await http.post(CHAT, json=chat_body(max_tokens=5, stream=False))
    told = dict(collected.root().attributes or {})
    usage = answer.json()["usage"]
    seconds = told.pop(names.RESPONSE_FIRST_CHUNK_S)
    assert 0 < seconds <= length(collected.root()) / 1e9
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "jilju",
        "gen_ai.request.model": "stub",
        "gen_ai.response.model": "stub",
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "server.address": "localhost",
    }
    assert told.items() >= expected.items()
    assert not {name for name in told if "messages" in name or "instructions" in name}, "content nobody asked for"


def test_parameters_are_told_as_they_were_understood() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=7, seed=11, max_tokens=64, stop=("END",), presence_penalty=1.0
    )
    call = Call("a", CHAT, None, None, 0, params=params, num_choices=3)
    assert span_attributes(call).items() >= {
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9, "gen_ai.request.top_k": 7, "gen_ai.request.seed": 11,
        "gen_ai.request.max_tokens": 64, "gen_ai.request.presence_penalty": 1.0, "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.choice.count": 3,
    }.items()  # fmt: skip
    assert span_attributes(call)["gen_ai.request.stop_sequences"] == ["END"]


async def test_a_trace_is_continued(connect: Connect) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers) as (http, server):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1"}
        await http.post(CHAT, json=chat_body(max_tokens=2), headers=headers)
        assert server.telemetry is not None and len(server.telemetry.origins) == 0
    root = collected.root()
    assert root.parent is not None and root.context is not None
    assert (f"{root.parent.span_id:016x}", f"{root.context.trace_id:032x}") == (PARENT, TRACE)
    assert root.context.trace_state.get("a") == "1"


@pytest.mark.parametrize("given", ["", "00-zz", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
async def test_what_is_no_trace_begins_one(connect: Connect, given: str) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers) as (http, _):
        await http.post(CHAT, json=chat_body(max_tokens=2), headers={"traceparent": given})
    assert collected.root().parent is None


async def test_what_is_not_sampled_upstream_is_not_told(connect: Connect) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers) as (http, _):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        await http.post(CHAT, json=chat_body(max_tokens=2), headers=headers)
    assert not collected.spans
    assert len(collected.points()[names.DURATION]) == 1, "measurements are of all calls"


async def test_calls_that_fail_say_why(connect: Connect) -> None:
    collected = Collected()

    def fail(request: Any, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code="nan_logits", message="NaN") if index == 1 else None

    async with connect(StubClient(fail=fail), telemetry=collected.providers) as (http, _):
        await http.post(CHAT, json={})
        await http.post(CHAT, json=chat_body())
    wrong, failed = (span for span in collected.spans if span.kind is SpanKind.SERVER)
    assert (wrong.attributes or {})["error.type"] == "missing_parameter"
    assert wrong.status.status_code is StatusCode.UNSET, "a caller's mistake is no fault of the server"
    assert (failed.attributes or {})["error.type"] == "nan_logits"
    assert failed.status.status_code is StatusCode.ERROR
    points = collected.points()
    assert {point.attributes.get("error.type"): point.count for point in points[names.DURATION]} == {
        "missing_parameter": 1,
        "nan_logits": 1,
    }
    assert names.FIRST_TOKEN not in points, "of calls that completed only"


async def test_a_call_that_is_cancelled_ends_its_spans(connect: Connect) -> None:
    collected, stub = Collected(), StubClient(hang_at=3)
    async with connect(stub, telemetry=collected.providers) as (http, server):
        call = post(http, stream=True)
        await until(lambda: stub.num_hanging == 1)
        await cancel(http, *live_ids(server))
        await call
    root, children = collected.root(), collected.children()
    assert (root.attributes or {})["error.type"] == "request_cancelled"
    assert children[-1].name == "decode" and children[-1].end_time <= root.end_time
    assert children[-1].attributes == {"jilju.tokens": 3}


async def test_measurements(connect: Connect) -> None:
    collected = Collected()
    async with connect(StubClient(delay_s=0.001), telemetry=collected.providers) as (http, _):
        for _ in range(3):
            await http.post(CHAT, json=chat_body(max_tokens=4))
        await http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
    points = collected.points()
    by_operation = {
        name: {point.attributes["gen_ai.operation.name"]: point.count for point in found}
        for name, found in points.items()
    }
    assert by_operation == {
        "gen_ai.server.request.duration": {"chat": 3, "text_completion": 1},
        "gen_ai.server.time_to_first_token": {"chat": 3, "text_completion": 1},
        "gen_ai.server.time_per_output_token": {"chat": 3},
    }
    bounds = {name: found[0].explicit_bounds for name, found in points.items()}
    assert bounds[names.DURATION] == names.DURATION_S and bounds[names.DURATION][-1] == pytest.approx(81.92)
    assert bounds[names.FIRST_TOKEN] == names.FIRST_TOKEN_S and bounds[names.PER_TOKEN] == names.PER_TOKEN_S


# ---- content ---------------------------------------------------------------------------------------------------------


async def test_content_is_told_where_it_is_asked_for(connect: Connect) -> None:
    collected = Collected()
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "안녕"}]},
    ]
    async with connect(telemetry=collected.providers, trace_content=True) as (http, _):
        answer = await http.post(CHAT, json={"messages": messages, "max_tokens": 400})
        text = answer.json()["choices"][0]["message"]["content"]
    told = dict(collected.root().attributes or {})
    assert msgspec.json.decode(told["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "안녕"}]}
    ]
    assert msgspec.json.decode(told["gen_ai.system_instructions"]) == [{"type": "text", "content": "be brief"}]
    [said] = msgspec.json.decode(told["gen_ai.output.messages"])
    assert (said["role"], said["finish_reason"]) == ("assistant", "stop")
    assert said["parts"] == [{"type": "text", "content": text}]


async def test_content_of_a_plain_prompt(connect: Connect) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers, trace_content=True) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 1})
    told = dict(collected.root().attributes or {})
    assert msgspec.json.decode(told["gen_ai.input.messages"])[0]["parts"][0]["content"] == "abc"


async def test_what_is_not_kept_is_not_told(connect: Connect) -> None:
    collected = Collected()
    async with connect(telemetry=collected.providers, trace_content=True, run_store_bytes=0) as (http, _):
        await http.post(CHAT, json=chat_body(max_tokens=1))
    assert "gen_ai.input.messages" not in (collected.root().attributes or {})


# ---- parts of a call, from the log -----------------------------------------------------------------------------------


def ended_call(times: RequestTimes, *, num_resumes: int = 0) -> Call:
    life = SequenceLife(7, 0, 0, 100, 4, times, 950, num_resumes, "length")
    marks = Marks(received_ns=0, body_ns=5, parsed_ns=10, submitted_ns=90, last_event_ns=960)
    return Call("a", CHAT, None, None, 0, lives=[life], marks=marks, ended_ns=1000, state="completed")


def log_of(*steps: tuple[int, int, int, int, int]) -> EventLog:
    """(step_id, begin, end, tokens of sequence 7, is_sampled), each beside a row of another."""
    log = EventLog()
    for step_id, begin_ns, end_ns, count, is_sampled in steps:
        rows = pack_row(3, 0, 1, 1) + (pack_row(7, 0, count, is_sampled) if count else b"")
        log.add_step(
            step_record(step_id=step_id, begin_ns=begin_ns, end_ns=end_ns, rows=rows, num_rows=len(rows) // 20)
        )
    return log


TIMES = RequestTimes(queued_ns=100, scheduled_ns=200, first_token_ns=500, last_token_ns=900, num_cached_tokens=16)


def test_prefill_is_told_by_chunks() -> None:
    log = log_of(
        (1, 150, 200, 0, 0), (2, 200, 300, 64, 0), (3, 300, 400, 0, 0), (4, 400, 505, 20, 1), (5, 505, 600, 1, 1)
    )
    parts = parts_of(ended_call(TIMES), log)
    assert parts[1:] == [
        Part("queue", 100, 200),
        Part("prefill chunk 1", 200, 300, {"jilju.tokens": 64, "jilju.cached_tokens": 16}),
        Part("prefill chunk 2", 400, 500, {"jilju.tokens": 20}),
        Part("decode", 500, 900, {"jilju.tokens": 4}),
        Part("write", 960, 1000),
    ]


def test_what_the_log_has_forgotten_is_one_chunk() -> None:
    parts = {part.name: part for part in parts_of(ended_call(TIMES), EventLog())}
    chunk = parts["prefill chunk 1"]
    assert (chunk.begin_ns, chunk.end_ns, dict(chunk.attributes)) == (
        200,
        500,
        {"jilju.tokens": 84, "jilju.cached_tokens": 16},
    )
    assert "prefill chunk 2" not in parts


def test_chunks_have_a_bound() -> None:
    log = log_of(*((n, 200 + n, 201 + n, 2, 0) for n in range(MAX_CHUNKS + 50)))
    chunks = [part for part in parts_of(ended_call(TIMES), log) if part.name.startswith("prefill")]
    assert len(chunks) == MAX_CHUNKS
    assert chunks[-1].attributes["jilju.tokens"] == 2 * 51 and chunks[-1].end_ns == 201 + MAX_CHUNKS + 49


def test_a_death_of_the_engine_is_a_part_of_its_own() -> None:
    log = log_of(
        (8, 200, 500, 84, 1), (9, 500, 550, 1, 1), (1, 700, 750, 80, 0), (2, 750, 800, 6, 1), (3, 800, 900, 1, 1)
    )
    resumes = [part for part in parts_of(ended_call(TIMES, num_resumes=1), log) if part.name == "resume"]
    assert resumes == [Part("resume", 550, 800)]


# ---- when it is wanted, and when it is not there ---------------------------------------------------------------------


async def test_a_defect_in_here_ends_no_call(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Call, log: EventLog) -> list[Part]:
        raise RuntimeError("a defect")

    monkeypatch.setattr("jilju.serve.otel.telemetry.parts_of", broken)
    async with connect(telemetry=Collected().providers) as (http, _):
        assert (await http.post(CHAT, json=chat_body(max_tokens=1))).status_code == 200


async def test_nothing_is_there_unless_it_is_wanted(connect: Connect) -> None:
    async with connect() as (http, server):
        assert server.telemetry is None
        await http.post(CHAT, json=chat_body(max_tokens=1))
    code = (
        "import sys, jilju.serve.runner, jilju.assemble.server; print([m for m in sys.modules if 'opentelemetry' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_settings_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    check_telemetry("off", False)
    check_telemetry("http://127.0.0.1:4318", True)
    with pytest.raises(ConfigError, match="--trace-content is given and --otel is off"):
        check_telemetry("off", True)
    monkeypatch.setattr("jilju.serve.otel.providers.NEEDED", ("no_such_package.sdk",))
    with pytest.raises(ConfigError, match=r"pip install 'jilju\[otel\]'"):
        check_telemetry("env", False)


async def test_a_collector_gets_it_under_the_names_that_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    bodies: list[bytes] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        size = next(int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length:"))
        bodies.append(await reader.readexactly(size))
        paths.append(head.split()[1])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(collect, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-jilju")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    providers = make_providers(f"http://127.0.0.1:{port}/base", "0.0.test")
    providers.traces.get_tracer("x").start_span("chat stub").end()
    providers.metrics.get_meter("x").create_histogram(names.DURATION).record(1.0)
    await asyncio.to_thread(providers.close)
    listener.close()
    assert sorted(paths) == ["/base/v1/metrics", "/base/v1/traces"]
    assert all(b"our-jilju" in body and b"service.version" in body for body in bodies)


def test_exporters_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    providers = make_providers("env", "0.0.test")
    providers.traces.get_tracer("x").start_span("chat stub").end()
    providers.close()


def test_times_are_those_of_the_wall_clock() -> None:
    collected = Collected()
    context = make_context(clock=VirtualClock(2000), telemetry=collected.providers)
    telemetry = Telemetry(context, collected.providers, RunStore(0), unix_ns=lambda: 5_000_000)
    telemetry.on_end(Call("a", CHAT, None, None, 1000, ended_ns=1900, state="completed", status=200))
    root = collected.root()
    assert (root.start_time, root.end_time) == (5_000_000 - 1000, 5_000_000 - 100)


@pytest.mark.parametrize("given", ["off", "env", "http://127.0.0.1:4318", "https://collector.example.org/otlp"])
def test_where_it_goes(given: str) -> None:
    config = resolve_serve_config(None, {"otel": given}, {})
    assert (config.otel, config.origins["otel"]) == (given, "--otel")
    assert resolve_serve_config(None, {}, {"JILJU_OTEL": given}).otel == given


@pytest.mark.parametrize(
    "given", ["on", "127.0.0.1:4318", "grpc://a:4317", "http://", "http://user:pass@a", "http://a?b=c"]
)
def test_where_it_cannot_go(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--otel is .*; allowed: off, env, or a URL such as"):
        resolve_serve_config(None, {"otel": given}, {})


def test_thousands_of_steps_are_told_apart_by_sequence() -> None:
    """Also of a ring that has begun to drop them, and of the step that was under way at the end."""
    steps = [(n, 200 + 10 * n, 205 + 10 * n, n % 3, n % 3 == 2) for n in range(1, 3000)]
    log = EventLog(ring=2500)
    for step_id, begin_ns, end_ns, count, is_sampled in steps:
        rows = pack_row(3, 0, 1, 1) * 7 + (pack_row(7, 0, count, is_sampled) if count else b"")
        log.add_step(
            step_record(step_id=step_id, begin_ns=begin_ns, end_ns=end_ns, rows=rows, num_rows=len(rows) // 20)
        )
    first_ns, last_ns = steps[600][1], steps[700][1] + 2  # it ends within that step
    times = msgspec.structs.replace(TIMES, scheduled_ns=first_ns, first_token_ns=last_ns, last_token_ns=last_ns)
    call = ended_call(times)
    call.ended_ns = call.lives[0].ended_ns = last_ns + 50
    chunks = [part for part in parts_of(call, log) if part.name.startswith("prefill")]
    wanted = [(begin, min(end, last_ns), count) for _, begin, end, count, _ in steps[600:701] if count]
    assert [(c.begin_ns, c.end_ns, c.attributes["jilju.tokens"]) for c in chunks] == wanted
