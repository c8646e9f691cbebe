"""The engine page's data over HTTP: streams of frames and their bounds, windows of the past, traces, the event-log file and its view."""

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jilju import view
from jilju.account.log_file import read_log
from jilju.config import ApiKey
from jilju.engine.events import pack_row
from jilju.engine.request import RequestFailed
from jilju.errors import ConfigError
from jilju.serve import event_file, live
from jilju.serve.recorded import recorded_app
from jilju.serve.runner import bind, serve
from jilju.serve.server import make_server
from jilju.serve.view_files import POLICY

from .conftest import Connect
from .stub import StubClient, make_context, step_record
from .test_answers import CHAT, chat_body
from .test_sockets import running, until

pytestmark = pytest.mark.anyio

BLUE = ApiKey("blue", "the-blue-secret")
RED = ApiKey("red", "the-red-secret")
GENERATES = ApiKey("plain", "the-plain-secret", frozenset({"generate"}))
FEED = "jilju-live-view"  # name of the task that feeds all pages


def with_key(key: ApiKey) -> dict[str, str]:
    return {"authorization": f"Bearer {key.secret}"}


def step(stub: StubClient, **changes: Any) -> None:
    """A step of 20 ms that has just ended, with a row of each request that is live or was asked for last."""
    now, size = stub.clock.now_ns(), 0
    rows = b""
    for request in stub.requests[-4:]:
        rows += pack_row(request.number, 0, len(request.prompt_ids), 1)
        size += 1
    values = {
        "step_id": stub.log.num_steps + 1, "begin_ns": now - 20_000_000, "scheduled_ns": now - 19_000_000,
        "packed_ns": now - 18_000_000, "done_ns": now - 1_000_000, "end_ns": now, "num_rows": size, "rows": rows,
        "num_blocks_held": 1, "num_blocks_cached": 3, "num_blocks_free": 60, "predicted_ns": 19_000_000,
        "is_rerun": False,
    }  # fmt: skip
    stub.log.add_step(step_record(**values | changes))


@contextlib.asynccontextmanager
async def page(http: httpx.AsyncClient, **options: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The frames of an open stream."""

    async def frames(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        async for line in response.aiter_lines():
            if line:
                yield json.loads(line.removeprefix("data: "))

    async with http.stream("GET", "/v1/jilju/events", **options) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"] == "text/event-stream"
        yield frames(response)


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=limits) as http:
        yield http


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the live view takes less."""
    monkeypatch.setattr(live, "PERIOD_S", 0.02)


def is_fed() -> bool:
    return any(task.get_name() == FEED for task in asyncio.all_tasks())


async def test_a_page_gets_each_step_and_mark_once(quick: None) -> None:
    stub = StubClient()
    async with running(stub) as (port, _), connected(port) as http:
        await http.post(CHAT, json=chat_body(max_tokens=3))
        step(stub)
        await http.get("/nowhere")
        seen: list[int] = []
        marks: list[str] = []
        async with page(http) as frames:
            first = await anext(frames)
            assert (first["steps"]["serial"], first["is_live"], first["state"]) == ([0], True, "ready")
            assert first["counts"]["completed"] == 1 and len(first["slowest"]) == 1
            assert first["tiles"]["output_tokens_per_s"] > 0
            assert {line["process"] for line in first["memory"]} == {"server"}
            seen += first["steps"]["serial"]
            marks += [mark["text"] for mark in first["marks"]]
            for number in range(1, 5):
                step(stub, step_id=1 if number == 3 else 10 + number)
                await http.get("/nowhere")
                while number not in seen or len(marks) < number + 1:
                    frame = await anext(frames)
                    seen += frame["steps"]["serial"]
                    marks += [mark["text"] for mark in frame["marks"]]
            assert is_fed()
        assert seen == [0, 1, 2, 3, 4]
        assert sorted(marks) == ["404 route_not_found"] * 5 + ["the engine was started again"]
        await until(lambda: not is_fed())


async def test_a_key_sees_its_own_runs_named_and_no_others(quick: None) -> None:
    stub = StubClient()
    async with running(stub, keys=(BLUE, RED, GENERATES)) as (port, _), connected(port) as http:
        runs = {}
        for key in (BLUE, RED):
            runs[key.name] = (await http.post(CHAT, json=chat_body(max_tokens=2), headers=with_key(key))).json()["id"]
        for path in ("/v1/jilju/events", "/v1/jilju/window", "/v1/jilju/trace"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers=with_key(GENERATES))).status_code == 403
        for key in (BLUE, RED):
            async with page(http, headers=with_key(key)) as frames:
                for _ in range(2):
                    frame = await anext(frames)
                    assert sorted(bar["run"] or "" for bar in frame["slowest"]) == ["", runs[key.name]]
                    assert set(frame["cost"]["by_key"]) <= {key.name}
                    assert set(frame["cost"]["machine_s"]["by_key"]) <= {key.name}
            window = await http.get("/v1/jilju/window", headers=with_key(key))
            assert [run for run in runs.values() if run in window.text] == [runs[key.name]]
            trace = await http.get("/v1/jilju/trace", headers=with_key(key))
            assert [run for run in runs.values() if run in trace.text] == [runs[key.name]]
        other = await http.get("/v1/jilju/trace", params={"run": runs["red"]}, headers=with_key(BLUE))
        assert (other.status_code, other.json()["error"]["code"]) == (404, "run_not_found")


async def test_who_asks_for_the_head_gets_no_stream(connect: Connect) -> None:
    async with connect() as (http, _):
        answer = await http.head("/v1/jilju/events")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        assert not is_fed()


async def test_who_waits_is_told_when_it_may_begin() -> None:
    stub = StubClient(hang_at=0, step_coefficients=(1e6, 1e6, 0.0))
    async with running(stub) as (port, _), connected(port) as http:
        call = asyncio.create_task(http.post(CHAT, json=chat_body(max_tokens=3)))
        await until(lambda: stub.requests)
        frame = (await http.get("/v1/jilju/window")).json()
        (row,) = frame["waiting"]
        assert (row["cause"], row["run"].startswith("chatcmpl-")) == ("step", True)
        assert row["prompt_tokens"] == stub.requests[0].num_prompt_tokens
        assert abs(row["predicted_start_ms"] - row["since_ms"]) < 60_000
        step(stub)
        frame = (await http.get("/v1/jilju/window")).json()
        (row,) = frame["running"]
        assert frame["waiting"] == [] and row["phase"] == "decode"
        past = (await http.get("/v1/jilju/window", params={"end_ms": frame["end_ms"] - 0.5})).json()
        assert [row["predicted_start_ms"] for row in past["waiting"]] in ([], [None]), "only of now it is known"
        call.cancel()
        await until(lambda: not stub.live)


async def test_so_many_pages_and_no_more(quick: None) -> None:
    async with running(StubClient()) as (port, _), connected(port) as http, contextlib.AsyncExitStack() as stack:
        pages = [await stack.enter_async_context(page(http)) for _ in range(live.MAX_STREAMS)]
        for frames in pages:
            await anext(frames)
        refused = await http.get("/v1/jilju/events")
        assert refused.status_code == 429 and "retry-after" in refused.headers
        assert refused.json()["error"]["message"].startswith(f"{live.MAX_STREAMS} pages follow the engine")
        await stack.aclose()
        await until(lambda: not is_fed())
        async with page(http) as frames:
            await anext(frames)


async def test_pages_of_one_key_share_a_fold(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[Any] = []
    make_fold = live.make_fold
    monkeypatch.setattr(
        live, "make_fold", lambda *given, **options: folded.append(options["since"]) or make_fold(*given, **options)
    )
    async with running(StubClient()) as (port, _), connected(port) as http, contextlib.AsyncExitStack() as stack:
        pages = [await stack.enter_async_context(page(http)) for _ in range(4)]
        for frames in pages:
            for _ in range(3):
                await anext(frames)
        shared = [since for since in folded if since is not None]
        assert len(shared) - len(set(shared)) == 0, "each place in the stream is folded once"
        assert len(set(shared[-3:])) == 3


async def test_a_drain_ends_the_pages(quick: None) -> None:
    async with running(StubClient()) as (port, task), connected(port) as http, page(http) as frames:
        await anext(frames)
        os.kill(os.getpid(), signal.SIGTERM)
        async for _ in frames:  # its end is a whole answer's, else this raises
            pass
        assert await task == 0
    assert not is_fed()


async def test_a_reader_that_does_not_keep_up_begins_anew(connect: Connect) -> None:
    async with connect() as (_, server):
        pages = live._Pages(live._Folds(server))
        slow = pages.open(live.Viewer(), 60)
        for _ in range(live.MAX_WAITING_FRAMES):
            await pages._send([slow])
        assert not slow.is_ended and slow.frames.full()
        await pages._send([slow])
        assert slow.is_ended and await slow.frames.get() is None
        pages.close(slow)


async def test_a_defect_of_the_fold_ends_the_pages_and_nothing_else(
    quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(StubClient()) as (port, _), connected(port) as http:
        async with page(http) as frames:
            await anext(frames)
            monkeypatch.setattr(live, "make_fold", lambda *given, **options: 1 // 0)
            async for _ in frames:
                pass
        assert "the live view failed" in caplog.text
        assert (await http.get("/v1/jilju/events")).status_code == 500
        monkeypatch.undo()
        async with page(http) as frames:
            await anext(frames)


async def test_windows_of_the_past(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        first = (await http.get("/v1/jilju/window")).json()
        await http.post(CHAT, json=chat_body(max_tokens=3))
        step(stub)
        newest = (await http.get("/v1/jilju/window", params={"seconds": 3600})).json()
        assert newest["steps"]["serial"] == [0] and newest["counts"]["completed"] == 1
        past = (await http.get("/v1/jilju/window", params={"end_ms": first["end_ms"]})).json()
        assert past["end_ms"] == first["end_ms"]
        # What the stub says of its blocks, no step has left.
        first["blocks"] |= {"held": 0, "cached": 0, "free": 64}
        first["tiles"]["kv_used_share"] = 0.0
        for name in ("tiles", "steps", "marks", "counts", "running", "waiting", "slowest", "blocks"):
            assert past[name] == first[name], name


@pytest.mark.parametrize(
    ("path", "query", "code", "words"),
    [
        ("window", {"end_ms": "5"}, "invalid_value", 'end_ms is "5"; allowed: '),
        ("window", {"end_ms": "1e300"}, "invalid_value", "of the log's own clock"),
        ("window", {"end_ms": "nan"}, "invalid_value", "leave it out for the newest"),
        ("window", {"end_ms": "soon"}, "invalid_value", 'end_ms is "soon"'),
        ("window", {"seconds": "0"}, "invalid_value", "a whole number from 1 to 3600"),
        ("window", {"seconds": "3601"}, "invalid_value", "1 to 3600"),
        ("window", {"seconds": "٣"}, "invalid_value", "1 to 3600"),
        ("window", {"end": "5"}, "unknown_parameter", "no parameter of this route; allowed: seconds, end_ms"),
        ("window", [("seconds", "5"), ("seconds", "6")], "invalid_value", "seconds is given twice"),
        ("events", {"end_ms": "5"}, "unknown_parameter", "allowed: seconds"),
        ("events", {"seconds": "-1"}, "invalid_value", "1 to 3600"),
        ("trace", {"seconds": "601"}, "invalid_value", "1 to 600"),
        ("trace", {"seconds": "5", "run": "x"}, "conflicting_parameters", "give one of them"),
    ],
)
async def test_what_is_asked_wrongly(connect: Connect, path: str, query: Any, code: str, words: str) -> None:
    async with connect() as (http, _):
        answer = await http.get(f"/v1/jilju/{path}", params=query)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, code)
        assert words in error["message"]


async def test_a_trace_of_a_run_and_of_the_last_seconds(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        runs = [(await http.post(CHAT, json=chat_body(text, max_tokens=3))).json()["id"] for text in ("a", "b")]
        step(stub)
        both = await http.get("/v1/jilju/trace", params={"seconds": 9})
        assert both.headers["content-type"] == "application/json"
        assert {event["id"] for event in both.json()["traceEvents"] if event["ph"] == "b"} == set(runs)
        one = (await http.get("/v1/jilju/trace", params={"run": runs[1]})).json()
        assert {event["id"] for event in one["traceEvents"] if event["ph"] == "b"} == {runs[1]}
        same = (await http.get("/v1/jilju/trace", params={"run": runs[1].removeprefix("chatcmpl-")})).json()
        assert same["traceEvents"] == one["traceEvents"]
        missing = await http.get("/v1/jilju/trace", params={"run": "chatcmpl-none"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "run_not_found")


# ---- the event-log file --------------------------------------------------------------------------------------------


async def test_a_server_writes_its_log(tmp_path: Path) -> None:
    path = tmp_path / "e.jlog"
    stub = StubClient(
        fail=lambda request, index: (
            RequestFailed(request_id=request.id, code="nan_logits", message="")
            if request.params.max_tokens == 5
            else None
        )
    )
    async with running(stub, event_log=str(path)) as (port, _), connected(port) as http:
        for max_tokens in (3, 5):
            await http.post(CHAT, json=chat_body(max_tokens=max_tokens))
        step(stub)
        await http.get("/nowhere")
        window = (await http.get("/v1/jilju/window")).json()
    recorded = read_log(path)
    assert (recorded.model, recorded.info) == ("stub", stub.info)
    assert [call.state for call in recorded.calls] == ["completed", "failed"]
    assert [step.step_id for step in recorded.log.steps] == [1] and len(recorded.log.step(0).rows) == 2
    assert [refusal.code for refusal in recorded.refusals] == ["route_not_found"]
    async with viewed(path) as http:
        found = (await http.get("/v1/jilju/window", params={"end_ms": window["end_ms"]})).json()
        live_only = ("is_live", "memory", "cost", "energy", "unix_ms", "blocks", "tiles")
        assert {n: v for n, v in found.items() if n not in live_only} == {
            n: v for n, v in window.items() if n not in live_only
        }
        assert not found["is_live"] and found["unix_ms"] == pytest.approx(window["unix_ms"], abs=50)
        assert found["tiles"] | {"kv_used_share": 0} == window["tiles"] | {"kv_used_share": 0}


async def test_a_log_is_written_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is much, and into a second file where the first is full."""
    path, stub = tmp_path / "e.jlog", StubClient()
    monkeypatch.setattr(event_file, "FLUSH_S", 0.01)
    monkeypatch.setattr(event_file, "FLUSH_BYTES", 2000)
    async with (
        running(stub, event_log=str(path), event_log_bytes=event_file.LEAST_BYTES) as (port, _),
        connected(port) as http,
    ):
        step(stub)
        await until(lambda: len(read_log(path).log.steps) == 1)
        older = path.with_name("e.jlog.1")
        while not older.exists():
            size = path.stat().st_size
            for _ in range(500):
                step(stub)
            await until(lambda size=size: older.exists() or path.stat().st_size > size)
        before = (await http.get("/v1/jilju/window")).json()["counts"]
    first, second = read_log(older), read_log(path)
    assert len(first.log.steps) + len(second.log.steps) == stub.log.num_steps
    assert second.info == stub.info and second.counts.accepted == before["accepted"] == 0


async def test_a_disk_that_is_full_ends_the_log_and_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_file, "FLUSH_S", 0.01)
    stub = StubClient()
    server = make_server(make_context(stub, event_log=str(tmp_path / "e.jlog")))
    file = server.event_file
    assert file is not None
    file.open()
    writing = asyncio.create_task(file.run())
    monkeypatch.setattr(file._writer, "write", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step(stub)
            await asyncio.sleep(0.03)
        await writing
    assert [record.message for record in caplog.records] == [
        f"the event log ends here, serving goes on: {tmp_path / 'e.jlog'}: No space left on device"
    ]
    await file.close()
    assert len(read_log(tmp_path / "e.jlog").log.steps) == 0


def full(data: bytes) -> bool:
    raise OSError(28, "No space left on device")


async def test_a_disk_that_does_not_keep_up_ends_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_file, "MAX_BYTES", 1000)
    stub = StubClient()
    server = make_server(make_context(stub, event_log=str(tmp_path / "e.jlog")))
    assert server.event_file is not None
    server.event_file.open()
    for _ in range(20):
        step(stub)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    await server.event_file.close()


async def test_a_file_that_cannot_be_begun_stops_the_start(tmp_path: Path) -> None:
    for bad in ({"event_log": str(tmp_path)}, {"event_log": str(tmp_path / "e.jlog"), "event_log_bytes": 5}):
        listener = bind("127.0.0.1", 0)
        with pytest.raises(ConfigError, match="--event-log"):
            await serve(make_context(StubClient(), **bad), listener)
        listener.close()


# ---- jilju view ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def viewed(path: Path, host: str = "127.0.0.1:8001") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(recorded_app(read_log(path), view.DIRECTORY))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
        yield http


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Of a server that did one step."""
    path = tmp_path / "e.jlog"
    stub = StubClient()
    server = make_server(make_context(stub, event_log=str(path)))
    assert server.event_file is not None
    server.event_file.open()
    step(stub)
    asyncio.run(server.event_file.close())
    yield path


async def test_a_recorded_file_is_viewed_offline(file: Path) -> None:
    async with viewed(file) as http:
        shown = await http.get("/engine")
        assert shown.status_code == 200 and shown.headers["content-security-policy"] == POLICY
        assert (await http.get("/")).headers["location"] == "/engine"
        assert (await http.get("/view/base.css")).status_code == 200
        window = (await http.get("/v1/jilju/window")).json()
        assert (window["steps"]["serial"], window["is_live"], window["memory"]) == ([0], False, None)
        assert (await http.get("/v1/jilju/steps/0")).json()["serial"] == 0
        for path, code, words in (
            ("/v1/jilju/events", "route_not_found", "no live events; ask /v1/jilju/window"),
            ("/v1/jilju/events?seconds=60", "route_not_found", "no live events"),
            ("/v1/jilju/runs/chatcmpl-1", "run_not_found", "texts and tokens are not in an event log"),
            ("/v1/jilju/runs", "run_not_found", "texts and tokens are not in an event log"),
            ("/runs", "run_not_found", "texts and tokens are not in an event log"),
            ("/runs/chatcmpl-1", "run_not_found", "texts and tokens are not in an event log"),
            ("/v1/jilju/steps/1", "run_not_found", "there is no step"),
            ("/v1/models", "route_not_found", "this is a recorded file"),
        ):
            answer = await http.get(path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == code
            assert words in answer.json()["error"]["message"]
        assert (await http.post("/engine")).status_code == 405
        assert (await http.get("/v1/jilju/window", params={"end_ms": 1})).status_code == 400
    async with viewed(file, host="evil.example") as http:
        assert (await http.get("/v1/jilju/window")).status_code == 403
