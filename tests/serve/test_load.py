"""The door under load, and what a call says of its own: deadlines, priority, choices, the salt of its cache."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from jilju.clock import VirtualClock
from jilju.config import ApiKey
from jilju.engine.request import Request, RequestFailed
from jilju.serve.context import ServeLimits
from jilju.serve.door.auth import cache_salt
from jilju.serve.sampling import choice_seed
from jilju.serve.server import Server

from .conftest import Connect
from .stub import EOT, ByteTokenizer, StubClient
from .test_answers import CHAT, COMPLETIONS, chat_body, events_of, joined, whole_choice
from .test_told import samples_of, value

pytestmark = pytest.mark.anyio

KEYS = (ApiKey("alice", "secret-a"), ApiKey("bob", "secret-b"))
MS = 10**6
S = 10**9
BASE: dict[str, dict[str, Any]] = {CHAT: chat_body(max_tokens=1), COMPLETIONS: {"prompt": "x", "max_tokens": 1}}


class CountingTokenizer(ByteTokenizer):
    num_encoded = 0

    def encode(self, text: str, **flags: Any) -> list[int]:
        self.num_encoded += 1
        return super().encode(text, **flags)


@asynccontextmanager
async def waiting(
    http: httpx.AsyncClient, stub: StubClient, count: int, **fields: Any
) -> AsyncIterator[list["asyncio.Task[httpx.Response]"]]:
    """So many calls that have no first token, until the block is left."""
    stub.hang_at = 0
    calls = [asyncio.create_task(http.post(CHAT, json=chat_body(max_tokens=1) | fields)) for _ in range(count)]
    while stub.num_hanging < count:
        await asyncio.sleep(0)
    stub.hang_at = None
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def assert_overloaded(response: httpx.Response, wait_ms: int | None = None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (429, "overloaded", "rate_limit_error"), error
    seconds, ms = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
    assert 1 <= seconds <= 60 and (seconds - 1) * 1000 < ms <= seconds * 1000
    if wait_ms is not None:
        assert int(response.headers["x-jilju-predicted-wait-ms"]) == wait_ms
        assert min(max(1000, wait_ms), 48_000) <= ms <= min(max(1000, wait_ms), 48_000) * 1.25


async def empty(server: Server) -> None:
    while server.admission.num_waiting + server.admission.num_running:
        await asyncio.sleep(0)


# ---- refusals by load ------------------------------------------------------------------------------------------------


async def test_a_full_queue_is_refused_before_the_body_is_read(connect: Connect) -> None:
    stub = StubClient()
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    async with connect(stub, limits=ServeLimits(queue_requests=2)) as (http, server):
        async with waiting(http, stub, 2):
            refused = await http.post(CHAT, content=body(), headers={"content-type": "application/json"})
            assert_overloaded(refused, wait_ms=0)
            assert "2 requests wait and 2 are the most" in refused.json()["error"]["message"]
            samples = samples_of((await http.get("/metrics")).text)
            assert value(samples, "jilju_requests_shed_total", reason="queue_requests") == 1
            assert value(samples, "jilju_requests_shed_total", reason="predicted_wait") == 0
            assert value(samples, "jilju_shed_decision_seconds_count") == 1
        await empty(server)
        assert (await http.post(CHAT, json=chat_body(max_tokens=1))).status_code == 200
    assert read == 0


async def test_what_runs_does_not_count_as_waiting(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, limits=ServeLimits(queue_requests=1)) as (http, server):
        stub.hang_at = 1
        call = asyncio.create_task(http.post(CHAT, json=chat_body(max_tokens=2)))
        while server.admission.num_running == 0:
            await asyncio.sleep(0)
        stub.hang_at = None
        assert (await http.post(CHAT, json=chat_body(max_tokens=1))).status_code == 200
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await empty(server)


async def test_a_queue_full_of_tokens_is_refused_by_the_length_of_the_body(connect: Connect) -> None:
    stub = StubClient()
    tokenizer = CountingTokenizer()
    limits = ServeLimits(queue_pools=0.25)  # of 1024 tokens
    async with connect(stub, limits=limits, tokenizer=tokenizer) as (http, server), waiting(http, stub, 8):
        num_encoded = tokenizer.num_encoded
        assert server.admission.num_waiting_tokens == 8 * len("[user]hello\n[assistant]")
        for body in (chat_body("x" * 300), {"messages": [{"role": "user", "content": "x" * 300}], "n": 2}):
            assert_overloaded(await http.post(CHAT, json=body), wait_ms=0)
        chunked = await http.post(
            CHAT, content=aiter_of(b'{"messages":[{"role":"user","content":"' + b"x" * 300 + b'"}]}'),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert_overloaded(chunked, wait_ms=0)
        assert tokenizer.num_encoded == num_encoded
        assert server.metrics.folds.num_shed == {"queue_requests": 0, "queue_tokens": 3, "predicted_wait": 0}
        assert (await http.post(CHAT, json=chat_body("x" * 100, max_tokens=1))).status_code == 200
        never = await http.post(CHAT, json=chat_body("x" * 4000))
        assert (never.status_code, never.json()["error"]["code"]) == (400, "context_length_exceeded"), (
            "not to be tried again"
        )


async def aiter_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_wait_beyond_what_is_allowed_is_refused_before_tokenizing(connect: Connect, path: str) -> None:
    """23 tokens of a prompt wait, at a second each."""
    clock = VirtualClock(S)
    stub = StubClient(
        clock=clock, step_coefficients=(0.0, float(S), 0.0), queue_ns=23 * S
    )  # what comes true teaches nothing
    tokenizer = CountingTokenizer()
    async with connect(stub, clock=clock, tokenizer=tokenizer) as (http, server), waiting(http, stub, 1):
        num_encoded, num_requests = tokenizer.num_encoded, len(stub.requests)
        for fields, headers, allowed in (
            ({}, {}, True), ({"max_queue_ms": 22_999}, {}, False), ({"max_queue_ms": 23_000}, {}, True),
            ({"deadline_ms": 22_999}, {}, False), ({"deadline_ms": 23_000, "max_queue_ms": 600_000}, {}, True),
            ({}, {"x-jilju-max-queue-ms": "22999"}, False), ({}, {"x-jilju-deadline-ms": "22999"}, False),
            ({"max_queue_ms": 22_999}, {"x-jilju-max-queue-ms": "30000"}, False),
            ({"max_queue_ms": 30_000}, {"x-jilju-max-queue-ms": "22999"}, False),
            ({"max_queue_ms": 30_000}, {"x-jilju-max-queue-ms": "23000", "x-jilju-deadline-ms": "23000"}, True),
            ({"max_queue_ms": 1, "priority": -1}, {}, True),
        ):  # fmt: skip
            response = await http.post(path, json=BASE[path] | fields, headers=headers)
            if allowed:
                assert response.status_code == 200, (fields, headers, response.text)
                num_encoded, num_requests = tokenizer.num_encoded, len(stub.requests)
            else:
                assert_overloaded(response, wait_ms=23_000)
                assert (tokenizer.num_encoded, len(stub.requests)) == (num_encoded, num_requests)
        assert server.metrics.folds.num_shed["predicted_wait"] == 6


async def test_the_default_wait_is_a_limit_of_the_server(connect: Connect) -> None:
    stub = StubClient(step_coefficients=(0.0, float(S), 0.0))
    async with connect(stub, clock=VirtualClock(S)) as (http, _), waiting(http, stub, 3):
        assert_overloaded(await http.post(CHAT, json=chat_body()), wait_ms=69_000)
        assert (await http.post(CHAT, json=chat_body(max_tokens=1, max_queue_ms=69_000))).status_code == 200


async def test_one_key_that_fills_the_queue_leaves_another_its_share(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, keys=KEYS, limits=ServeLimits(queue_requests=2)) as (http, _):
        http.headers["x-api-key"] = "secret-a"
        async with waiting(http, stub, 2):
            assert_overloaded(await http.post(CHAT, json=chat_body(max_tokens=1)))
            other = await http.post(CHAT, json=chat_body(max_tokens=1), headers={"x-api-key": "secret-b"})
            assert other.status_code == 200
    assert [request.tenant for request in stub.requests] == ["alice", "alice", "bob"]


async def test_places_in_the_queue_are_given_back_whatever_becomes_of_a_call(connect: Connect) -> None:
    def fail(request: Request, index: int) -> RequestFailed | None:
        failed = RequestFailed(request_id=request.id, code="deadline_exceeded", message="not in a step within 1 ms")
        return failed if request.params.max_tokens == 7 else None

    stub = StubClient(fail=fail)
    async with connect(stub) as (http, server):
        for body, status in (
            (chat_body("x" * 600), 400), (chat_body(allowed_token_ids=[]), 400), (chat_body(logit_bias={"999": 1}), 400),
            (chat_body(max_tokens=7), 504), (chat_body(), 200), (chat_body(n=3, stop=["a"]), 200), (chat_body(max_tokens=0), 200),
        ):  # fmt: skip
            assert (await http.post(CHAT, json=body)).status_code == status
            assert (server.admission.num_waiting, server.admission.num_running) == (0, 0), body
        assert server.ledger.num_ended["deadline", "deadline_exceeded"] == 1


async def test_a_call_has_its_places_while_it_is_tokenized(connect: Connect) -> None:
    """Else a crowd that comes at once would pass the door as one."""
    stub = StubClient()
    seen: list[tuple[int, int]] = []

    class Looking(ByteTokenizer):
        def encode(self, text: str, **flags: Any) -> list[int]:
            seen.append((server.admission.num_waiting, server.admission.num_waiting_tokens))
            return super().encode(text, **flags)

    async with connect(stub, tokenizer=Looking()) as (http, server):
        body = {"prompt": ["x" * 30, "y" * 60], "n": 2, "max_tokens": 1}
        assert (await http.post(COMPLETIONS, json=body)).status_code == 200
        assert seen[0] == (4, 10 + 20 + 2), "a third of their bytes; siblings bring one token"


async def test_answers_teach_the_length_of_outputs_and_waits_the_prediction(connect: Connect) -> None:
    clock = VirtualClock(S)
    stub = StubClient(
        clock=clock, queue_ns=300 * MS, step_coefficients=(0.0, MS, 0.0), answer=lambda r: [97] * 4 + [EOT]
    )
    async with connect(stub, clock=clock) as (http, server):
        mean = server.admission.mean_output
        await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 4})
        assert server.admission.mean_output == mean, "what its own max_tokens cut off was not at its end"
        await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 400})
        assert server.admission.mean_output == mean + (5 - mean) / 32
        async with waiting(http, stub, 1):
            await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1})  # behind 23 ms
            assert server.admission.correction == pytest.approx(1 + (4 - 1) / 32)
            samples = samples_of((await http.get("/metrics")).text)
    assert value(samples, "jilju_eta_error_seconds_bucket", le="-0.5") == 0
    assert value(samples, "jilju_eta_error_seconds_bucket", le="-0.2") == 3, "promised 0, 0 and 23 ms, it took 300"


# ---- what reaches the engine -----------------------------------------------------------------------------------------


async def test_deadlines_priority_and_tenant_reach_the_engine(connect: Connect) -> None:
    stub = StubClient()
    clock = VirtualClock(5 * S)
    async with connect(stub, clock=clock, keys=KEYS) as (http, _):
        http.headers["x-api-key"] = "secret-b"
        for fields, headers in (
            ({}, {}),
            ({"deadline_ms": 9000, "max_queue_ms": 70_000, "priority": -7}, {}),
            ({"deadline_ms": 9000, "max_queue_ms": 800}, {"x-jilju-deadline-ms": "8000", "x-jilju-max-queue-ms": "900"}),
            ({"deadline_ms": 600_000, "max_queue_ms": 600_000, "priority": 100}, {"X-Jilju-Deadline-Ms": "600000"}),
        ):  # fmt: skip
            assert (await http.post(CHAT, json=chat_body(max_tokens=1) | fields, headers=headers)).status_code == 200
    told = [(r.deadline_ns - 5 * S, r.queue_deadline_ns - 5 * S, r.priority) for r in stub.requests]
    assert told == [
        (600 * S, 60 * S, 0), (9 * S, 70 * S, -7), (8 * S, 800 * MS, 0), (600 * S, 600 * S, 100)]  # fmt: skip
    assert {(r.arrival_ns, r.tenant) for r in stub.requests} == {(5 * S, "bob")}


@pytest.mark.parametrize("name", ["x-jilju-deadline-ms", "x-jilju-max-queue-ms"])
@pytest.mark.parametrize("given", ["0", "600001", "-1", "1.5", "1e3", "", "x", "١", "9" * 5000, "+1", "1 000"])
async def test_a_header_that_is_no_time_is_refused_by_its_name(connect: Connect, name: str, given: str) -> None:
    async with connect() as (http, server):
        response = await http.post(CHAT, json=chat_body(), headers=[(name.encode(), given.encode())])
        assert server.ledger.num_ended == {("failed", "invalid_value"): 1}
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", name)
    assert name in error["message"] and "1..600000" in error["message"] and len(error["message"]) < 400


async def test_of_a_header_given_twice_the_smaller_holds(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, clock=VirtualClock(S)) as (http, _):
        headers = [("x-jilju-deadline-ms", "5000"), ("x-jilju-deadline-ms", "4000")]
        await http.post(CHAT, json=chat_body(max_tokens=1), headers=headers)
        bad = await http.post(CHAT, json=chat_body(), headers=[*headers, ("x-jilju-deadline-ms", "x")])
    assert stub.requests[0].deadline_ns == 5 * S and bad.status_code == 400


async def test_a_deadline_of_the_calls_own_ends_it(connect: Connect) -> None:
    stub = StubClient(hang_at=2)
    async with connect(stub) as (http, server):
        whole = await http.post(CHAT, json=chat_body(deadline_ms=50))
        stream = await http.post(CHAT, json=chat_body(stream=True), headers={"x-jilju-deadline-ms": "50"})
        assert server.ledger.num_ended == {("deadline", "deadline_exceeded"): 2}
        assert (server.admission.num_waiting, server.admission.num_running) == (0, 0)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert whole.headers["x-should-retry"] == "false" and "0.05 s" in whole.json()["error"]["message"]
    assert '"code":"deadline_exceeded"' in stream.text and "[DONE]" not in stream.text
    assert len(stub.aborted) == 2


# ---- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_choices_of_a_prompt_streamed_and_whole(connect: Connect, path: str) -> None:
    stub = StubClient()
    fields = {"seed": 3, "return_token_ids": True, "max_tokens": 40, "logprobs": True if path == CHAT else 1}
    async with connect(stub) as (http, _):
        whole = (await http.post(path, json=BASE[path] | fields | {"n": 4})).json()
        alone = (await http.post(path, json=BASE[path] | fields)).json()
        stream = fields | {"n": 4, "stream": True, "stream_options": {"include_usage": True}}
        events = events_of(await http.post(path, json=BASE[path] | stream))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole_choice(whole["choices"][0]) == whole_choice(alone["choices"][0])
    for index in range(4):
        assert joined(events[:-1], index) == whole_choice(whole["choices"][index])
    assert len({tuple(choice["token_ids"]) for choice in whole["choices"]}) > 1
    prompt_ids = stub.requests[0].prompt_ids
    assert whole["prompt_token_ids"] == prompt_ids
    num_output = sum(len(choice["token_ids"]) for choice in whole["choices"])
    assert whole["usage"] == events[-2]["usage"]
    assert whole["usage"]["prompt_tokens"] == len(prompt_ids) == alone["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == num_output
    assert whole["usage"]["prompt_tokens_details"] == alone["usage"]["prompt_tokens_details"]
    assert [event for event in events[1:-1] if "prompt_token_ids" in event] == []
    if path == CHAT:
        roles = [e["choices"][0]["index"] for e in events[:-2] if e["choices"][0]["delta"].get("role") == "assistant"]
        assert sorted(roles) == [0, 1, 2, 3]


async def test_choices_are_siblings_with_seeds_of_their_own(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        body = {"prompt": ["ab", "cd"], "n": 3, "seed": -5, "max_tokens": 1}
        data = (await http.post(COMPLETIONS, json=body)).json()
        await http.post(CHAT, json=chat_body(n=2, max_tokens=1))
    requests = sorted(stub.requests[:6], key=lambda r: r.id)
    assert [r.prompt_ids for r in requests] == [[97, 98]] * 3 + [[99, 100]] * 3
    assert [r.sibling_of for r in requests] == ["", *[requests[0].id] * 2, "", *[requests[3].id] * 2]
    seeds = [r.params.seed for r in requests]
    assert seeds[0] == seeds[3] == -5 and seeds[:3] == seeds[3:] and len(set(seeds)) == 3
    assert [choice["index"] for choice in data["choices"]] == list(range(6))
    assert data["usage"]["prompt_tokens"] == 4 and data["usage"]["completion_tokens"] == 6
    first, second = (r.params.seed for r in stub.requests[6:])
    assert first is not None and second == choice_seed(first, 1) and 0 <= second < 2**53


def test_seeds_of_choices_are_fixed() -> None:
    """A figure that changes would change every answer with n > 1."""
    assert choice_seed(-(2**63), 0) == -(2**63)
    assert [choice_seed(7, index) for index in range(3)] == [7, 8946136677801757, 1598342219401642]
    assert len({choice_seed(seed, index) for seed in range(-50, 50) for index in range(16)}) == 1600


@pytest.mark.parametrize(
    ("num_prompts", "n", "status"),
    [(128, 1, 200), (8, 16, 200), (9, 15, 400), (9, 14, 200), (65, 2, 400), (64, 2, 200)],
)
async def test_prompts_times_choices_are_bounded(connect: Connect, num_prompts: int, n: int, status: int) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        body = {"prompt": ["x"] * num_prompts, "n": n, "max_tokens": 0}
        response = await http.post(COMPLETIONS, json=body)
    assert response.status_code == status
    assert len(stub.requests) == (num_prompts * n if status == 200 else 0)
    if status == 400:
        assert response.json()["error"]["param"] == "n" and "128" in response.json()["error"]["message"]


async def test_one_choice_that_fails_fails_the_call(connect: Connect) -> None:
    def fail(request: Request, index: int) -> RequestFailed | None:
        bad = index == 2 and request.sibling_of
        return RequestFailed(request_id=request.id, code="nan_logits", message="bad row") if bad else None

    async with connect(StubClient(fail=fail)) as (http, server):
        response = await http.post(CHAT, json=chat_body(n=2))
        assert (server.admission.num_waiting, server.admission.num_running) == (0, 0)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "nan_logits")


async def test_prompt_tokens_of_choices_are_counted_once(connect: Connect) -> None:
    async with connect(StubClient(num_cached=2)) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": "abcd", "n": 8, "max_tokens": 1})
        samples = samples_of((await http.get("/metrics")).text)
    assert value(samples, "jilju_prompt_tokens_total", source="cached") == 2
    assert value(samples, "jilju_prompt_tokens_total", source="computed") == 2
    assert value(samples, "jilju_generation_tokens_total") == 8


# ---- salts and limits ------------------------------------------------------------------------------------------------


async def test_a_salt_of_the_calls_own_is_added_to_the_keys(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, keys=KEYS) as (http, _):
        for secret in ("secret-a", "secret-b"):
            for salt in (None, "x", "x", "y" * 128):
                body = chat_body(max_tokens=1, cache_salt=salt)
                assert (await http.post(CHAT, json=body, headers={"x-api-key": secret})).status_code == 200
    salts = [request.salt for request in stub.requests]
    assert salts[1] == salts[2] and salts[5] == salts[6] and len(set(salts)) == 6
    assert cache_salt(None) == b"" and cache_salt(None, "x") not in salts and cache_salt(None, "x") != b""


async def test_limits_are_told(connect: Connect) -> None:
    async with connect(limits=ServeLimits(queue_requests=7)) as (http, _):
        (model,) = (await http.get("/v1/models")).json()["data"]
    assert model["jilju"]["limits"] == {
        "prompts": 128, "n": 16, "sequences": 128, "stop": 16, "stop_chars": 256, "top_logprobs": 20, "queue_requests": 7,
        "queue_tokens": 4 * 64 * 16, "max_queue_ms": 60_000, "deadline_ms": 600_000, "token_gap_ms": 50.0,
    }  # fmt: skip
