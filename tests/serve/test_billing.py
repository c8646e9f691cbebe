"""The bill over a whole server with a real engine in it: each ending is paid for by its key, in the file and in the sums."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jilju.account.energy import DeclaredPower
from jilju.clock import WallClock
from jilju.engine.inprocess import InProcessClient
from jilju.engine.loop import Engine
from jilju.serve.server import Server
from jilju.serve.usage_log import UsageLog
from tests.engine.fakes import FakeExecutor, make_limits, tiny_plan

from .conftest import Connect
from .test_answers import CHAT, COMPLETIONS, chat_body, events_of
from .test_cancel import ALICE, BOB, KEYS, cancel, live_ids, post, until

pytestmark = pytest.mark.anyio

PLAN = tiny_plan(vocab_size=259)  # of the byte tokenizer; a prompt with ")" raises in its step, one with "(" has NaN
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@asynccontextmanager
async def serving(
    connect: Connect, step_s: float = 0.0, **changes: object
) -> AsyncIterator[tuple[httpx.AsyncClient, Server]]:
    limits = make_limits(num_blocks=64, max_rows=4)
    executor = FakeExecutor(limits, before_step=lambda: time.sleep(step_s))
    client = InProcessClient(Engine(PLAN, executor, limits, WallClock()))
    settings: dict[str, object] = {"max_context": 200, "plan": PLAN}
    async with connect(client, **settings | changes) as (http, server):
        await client.start()
        try:
            yield http, server
        finally:
            await client.stop()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_balance(server: Server) -> None:
    """To the ns, whatever goes on."""
    sums = server.billing.sums()
    requests = sum(paid.machine_ns for paid in sums.by_key.values())
    assert requests + sum(paid.machine_ns for paid in sums.lines.values()) == sums.uptime_ns
    now_ns = server.context.clock.now_ns()
    assert 0 <= now_ns - (server.billing.bill.begin_ns + sums.uptime_ns) < 10**9


async def test_every_ending_is_in_the_file_and_pays_for_what_it_took(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage_log = UsageLog(str(path))
    settings: dict[str, Any] = {
        "keys": KEYS,
        "price_per_hour": 3600.0,
        "meter": DeclaredPower(10.0),
        "usage_log": usage_log,
    }
    async with serving(connect, step_s=0.002, **settings) as (http, server):
        for headers in (ALICE, BOB):
            for stream in (False, True):
                answer = await http.post(CHAT, json=chat_body(stream=stream, max_tokens=5, n=2), headers=headers)
                assert answer.status_code == 200
                check_balance(server)
        call = post(http, headers=ALICE, stream=True, max_tokens=60)
        await until(lambda: any(call.num_output_tokens > 3 for call in server.ledger.live.values()))
        check_balance(server)
        await cancel(http, live_ids(server)[0], ALICE)
        await call
        for prompt, code in (("fails :)", "internal"), ("is NaN (", "nan_logits")):
            answer = await http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 3}, headers=BOB)
            assert answer.json()["error"]["code"] == code
        late = await http.post(COMPLETIONS, json={"prompt": "x" * 90, "max_tokens": 90, "deadline_ms": 30}, headers=BOB)
        assert late.status_code == 504
        wrong = await http.post(CHAT, json=chat_body(temperature=9), headers=ALICE)
        assert wrong.status_code == 400
        await until(lambda: len(lines_of(path)) == server.ledger.num_ended.total() == 9)
        check_balance(server)
        lines, sums = lines_of(path), server.billing.sums()

    states = [(line["state"], line["code"]) for line in lines]
    assert states.count(("completed", None)) == 4
    expected = {
        ("client_cancelled", "request_cancelled"), ("failed", "internal"), ("failed", "nan_logits"),
        ("deadline", "deadline_exceeded"), ("failed", "invalid_value"),
    }  # fmt: skip
    assert set(states) == expected | {("completed", None)}
    for key in ("alice", "bob"):
        paid_ns = sum(round(line["machine_ms"] * 1e6) for line in lines if line["key"] == key)
        assert paid_ns == sums.by_key[key].machine_ns > 0
    assert sum(line["cost_usd"] for line in lines) == pytest.approx(sums.requests.cost(3600.0))
    assert sum(line["joules"] for line in lines) == pytest.approx(sums.requests.joules)
    by_code = {line["code"]: line for line in lines}
    assert by_code["invalid_value"]["machine_ms"] == 0 and by_code["request_cancelled"]["output_tokens"] > 3
    assert all(by_code[code]["machine_ms"] > 0 for code in ("request_cancelled", "nan_logits", "deadline_exceeded"))
    assert by_code["internal"]["machine_ms"] == 0 and sums.lines["failed"].machine_ns > 0  # its steps gave nothing
    whole = lines[0]
    assert (whole["route"], whole["model"], whole["sequences"], whole["output_tokens"]) == (CHAT, "stub", 2, 10)
    assert whole["ms"] > whole["ttft_ms"] > whole["queue_ms"] >= 0 and whole["time"].endswith("Z")
    assert [line["streamed"] for line in lines[:4]] == [False, True, False, True]
    assert lines[2]["cached_tokens"] == 0 < lines[1]["cached_tokens"], "bob's cache is not alice's"


async def test_who_leaves_within_a_step_gets_its_line_when_the_step_is_known(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    async with serving(connect, step_s=0.1, keys=KEYS, usage_log=UsageLog(str(path))) as (http, server):
        call = post(http, COMPLETIONS, ALICE, prompt="x" * 60, max_tokens=50)
        await until(lambda: any(life for call in server.ledger.live.values() for life in call.lives))
        await asyncio.sleep(0.02)  # its first step runs
        await cancel(http, live_ids(server)[0], ALICE)
        assert (await call).status_code == 499
        [record] = server.calls
        assert record.state == "client_cancelled" and record.machine_ns == 0 and not lines_of(path)
        await until(lambda: lines_of(path))
        [line] = lines_of(path)
        assert line["machine_ms"] > 50 and line["cost_usd"] is None and line["joules"] is None
        [record] = server.calls
        assert record.machine_ns == round(line["machine_ms"] * 1e6) == server.billing.sums().requests.machine_ns


async def test_the_share_of_a_run(connect: Connect) -> None:
    async with serving(connect, step_s=0.002, price_per_hour=7.2) as (http, server):
        call = post(http, max_tokens=60)
        await until(lambda: any(call.num_output_tokens > 3 for call in server.ledger.live.values()))
        [live] = server.ledger.live.values()
        so_far = server.billing.share_of(live.record())
        assert so_far.machine_ms > 0 and so_far.amount == pytest.approx(so_far.machine_ms * 7.2 / 3.6e6)
        run_id = (await call).json()["id"]
        share = (await http.get(f"/v1/jilju/runs/{run_id}")).json()["cost"]
        assert share["machine_ms"] > so_far.machine_ms and share["joules"] is None
        assert (share["currency"], share["price_per_hour"], share["is_default"]) == ("USD", 7.2, False)


async def test_the_log_tells_the_cost(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jilju.access")
    async with serving(connect, step_s=0.002, price_per_hour=7.2, meter=DeclaredPower(10.0)) as (http, _):
        await http.post(CHAT, json=chat_body(max_tokens=5))
    [record] = [record for record in caplog.records if record.name == "jilju.access"]
    fields = record.jilju_fields  # type: ignore[attr-defined]
    assert fields["machine_ms"] > 2 and fields["cost_usd"] > 0 and fields["joules"] > 0
    assert (fields["preemptions"], fields["resumes"]) == (0, 0)
    assert f"machine_ms={fields['machine_ms']:g}" in record.getMessage()


# ---- the cache's explanation in answers -----------------------------------------------------------------------------------


async def ask(http: httpx.AsyncClient, path: str, text: str, *, stream: bool, timings: bool = True) -> dict[str, Any]:
    """Usage of an answer on any route."""
    body: dict[str, Any] = {"stream": stream, "timings": timings}
    if path == CHAT:
        body |= chat_body(text, max_tokens=2)
    elif path == COMPLETIONS:
        body |= {"prompt": text, "max_tokens": 2}
    elif path == RESPONSES:
        body |= {"input": text, "max_output_tokens": 2}
    else:
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    if stream and path in (CHAT, COMPLETIONS):
        body["stream_options"] = {"include_usage": True}
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        usage: dict[str, Any] = answer.json()["usage"]
        return usage
    if path in (CHAT, COMPLETIONS):
        return events_of(answer)[-2]["usage"]  # type: ignore[no-any-return]
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    found: list[dict[str, Any]] = [event.get("response", event).get("usage") for event in events]
    return next(usage for usage in reversed(found) if usage)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_answers_tell_why_the_cache_had_no_more(connect: Connect, path: str, stream: bool) -> None:
    async with serving(connect) as (http, _):
        first = (await ask(http, path, "one two three four five", stream=stream))["jilju_cache"]
        assert first["miss_reason"] == "never_seen" and first["hit_tokens"] == first["first_miss_position"] == 0
        assert first["earlier_text"] is None and first["own_text"] is None
        parted = (await ask(http, path, "one two three Four five", stream=stream))["jilju_cache"]
        assert (parted["miss_reason"], parted["earlier_text"], parted["own_text"]) == ("diverged", "f", "F")
        assert parted["hit_tokens"] % 4 == 0 and 12 <= parted["hit_tokens"] <= parted["first_miss_position"]
        assert "jilju_cache" not in await ask(http, path, "one two three", stream=stream, timings=False)


async def test_of_several_prompts_the_first_is_explained(connect: Connect) -> None:
    async with serving(connect) as (http, _):
        await ask(http, COMPLETIONS, "abcdefgh-", stream=False)
        body = {"prompt": ["ABCDEFGH-", "abcdefgh-"], "max_tokens": 1, "n": 2, "timings": True}
        usage = (await http.post(COMPLETIONS, json=body)).json()["usage"]
        assert usage["jilju_cache"]["miss_reason"] == "never_seen"
        assert usage["jilju_cache"]["hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 8


async def test_what_was_in_no_step_is_not_explained(connect: Connect) -> None:
    async with serving(connect) as (http, _):
        usage = (await http.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 0, "timings": True})).json()["usage"]
        assert "jilju_cache" not in usage


@pytest.mark.parametrize("is_shared", [False, True])
async def test_nobody_is_told_of_the_texts_of_another_key(connect: Connect, is_shared: bool) -> None:
    """Whose cache is shared can tell that something was there, as the setting says, but not how it goes on."""
    secret, guess = "the password is 1234", "the password is 9999"
    async with serving(connect, keys=KEYS, shared_prefix_cache=is_shared) as (http, _):
        answers = [
            await http.post(COMPLETIONS, json={"prompt": text, "max_tokens": 1, "timings": True}, headers=headers)
            for text, headers in ((secret, ALICE), (guess, BOB), (guess, ALICE))
        ]
    told = [answer.json()["usage"]["jilju_cache"] for answer in answers]
    assert told[1]["miss_reason"] == "never_seen" and told[1]["earlier_text"] is None
    assert told[1]["hit_tokens"] == (16 if is_shared else 0)
    assert (told[2]["miss_reason"], told[2]["earlier_text"], told[2]["own_text"]) == ("diverged", "1", "9")
