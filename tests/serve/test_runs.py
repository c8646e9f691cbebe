"""Runs: what is kept of them, for how long, and who may see it."""

import itertools
from array import array

import pytest

from jilju.account.time_ledger import Interval
from jilju.config import ApiKey
from jilju.engine.request import RequestFailed
from jilju.serve.generation import Choice
from jilju.serve.ledger import Call
from jilju.serve.runs.fold import joined, text_spans
from jilju.serve.runs.kept import KeptPrompt, KeptSequence
from jilju.serve.runs.store import RunStore

from .conftest import Connect
from .stub import StubClient
from .test_answers import COMPLETIONS, chat_body
from .test_cancel import post, until

pytestmark = pytest.mark.anyio

RUNS = "/v1/jilju/runs"
KEYS = (
    ApiKey("alice", "secret-a"),
    ApiKey("bob", "secret-b"),
    ApiKey("blind", "secret-c", frozenset({"generate", "tokenize", "metrics"})),
)
ALICE, BOB, BLIND = ({"x-api-key": f"secret-{name}"} for name in "abc")


async def test_a_key_sees_its_own_runs_alone(connect: Connect) -> None:
    async with connect(keys=KEYS) as (http, _):
        of_alice = (await post(http, headers=ALICE)).json()["id"]
        of_bob = (await post(http, headers=BOB)).json()["id"]
        for headers, own, other in ((ALICE, of_alice, of_bob), (BOB, of_bob, of_alice)):
            assert (await http.get(f"{RUNS}/{own}", headers=headers)).json()["id"] == own
            hidden = await http.get(f"{RUNS}/{other}", headers=headers)
            unknown = await http.get(f"{RUNS}/chatcmpl-{'0' * 24}", headers=headers)
            assert hidden.status_code == unknown.status_code == 404
            assert hidden.json()["error"]["message"].replace(other, "") == unknown.json()["error"]["message"].replace(
                f"chatcmpl-{'0' * 24}", ""
            ), "whether it is there must not be told"
            assert [run["id"] for run in (await http.get(RUNS, headers=headers)).json()["runs"]] == [own]
        for path in (RUNS, f"{RUNS}/{of_alice}", "/v1/jilju/steps/0"):
            assert (await http.get(path, headers=BLIND)).status_code == 403
            assert (await http.get(path)).status_code == 401


async def test_the_newest_comes_first(connect: Connect) -> None:
    async with connect() as (http, _):
        ids = [(await post(http, COMPLETIONS, prompt=f"p{i}", max_tokens=i + 1)).json()["id"] for i in range(4)]
        runs = (await http.get(RUNS)).json()["runs"]
        assert [run["id"] for run in runs] == ids[::-1]
        assert [run["output_tokens"] for run in runs] == [4, 3, 2, 1]


async def test_a_run_is_seen_while_it_goes(connect: Connect) -> None:
    stub = StubClient(hang_at=3)
    async with connect(stub) as (http, server):
        call = post(http, COMPLETIONS, prompt="abc", max_tokens=9)
        await until(lambda: stub.num_hanging == 1)
        (live,) = server.ledger.live.values()
        run = (await http.get(f"{RUNS}/{live.run_id}")).json()
        assert run["state"] == "running" and len(run["sequences"][0]["output"]) == 3
        assert run["sequences"][0]["ledger"]["is_balanced"]
        await http.post(f"/v1/requests/{live.id}/cancel")
        await call
        run = (await http.get(f"{RUNS}/{live.run_id}")).json()
        assert (run["state"], run["status"], run["code"]) == ("client_cancelled", 499, "request_cancelled")
        assert len(run["sequences"][0]["output"]) == 3 and run["sequences"][0]["ledger"]["is_balanced"]


async def test_a_failed_run_says_why(connect: Connect) -> None:
    def fail(request: object, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=stub.requests[0].id, code="nan_logits", message="a NaN") if index == 2 else None

    stub = StubClient(fail=fail)
    async with connect(stub) as (http, _):
        await post(http, COMPLETIONS, max_tokens=9)
        (listed,) = (await http.get(RUNS)).json()["runs"]
        run = (await http.get(f"{RUNS}/{listed['id']}")).json()
        assert (run["state"], run["status"], run["code"], run["message"]) == ("failed", 500, "nan_logits", "a NaN")


async def test_a_call_that_is_refused_has_a_run_without_text(connect: Connect) -> None:
    async with connect() as (http, server):
        refused = await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": -5})
        assert refused.status_code == 400
        (record,) = server.calls
        run = (await http.get(f"{RUNS}/{record.run_id}")).json()
        assert (run["state"], run["code"], run["sequences"], run["prompts"]) == ("failed", "invalid_value", [], [])


async def test_nothing_is_kept_where_the_store_is_off(connect: Connect) -> None:
    async with connect(run_store_bytes=0) as (http, server):
        run_id = (await post(http)).json()["id"]
        assert len(server.runs) == 0 and (await http.get(RUNS)).json() == {"runs": []}
        run = (await http.get(f"{RUNS}/{run_id}")).json()
        assert run["state"] == "completed" and run["prompts"] == []
        unknown = (await http.get(f"{RUNS}/cmpl-1")).json()["error"]
        assert "--run-store" in unknown["message"]


async def test_the_store_holds_the_newest_within_its_bytes(connect: Connect) -> None:
    async with connect(run_store_bytes=12_000) as (http, server):
        ids = [(await post(http, COMPLETIONS, prompt="x" * 300, max_tokens=4)).json()["id"] for _ in range(30)]
        kept = [run["id"] for run in (await http.get(RUNS)).json()["runs"]]
        assert kept == ids[::-1][: len(kept)] and 3 <= len(kept) <= 12
        assert server.runs.num_bytes <= 12_000
        assert server.runs.num_bytes == sum(run.num_bytes for run in server.runs.newest(None))


def test_a_store_drops_ended_runs_only(anyio_backend: str) -> None:
    """A run that goes on is kept whatever it takes: its caller may look at it."""
    store = RunStore(1)
    calls = [Call(id=f"c{i}", route="/", key_name=None, label=None, received_ns=i) for i in range(3)]
    for call in calls:
        store.begin(call, 0.0, list[Choice]())
    store.on_end(calls[1])
    assert [run.call.id for run in store.newest(None)] == ["c2", "c0"]


async def test_the_parts_of_a_prompt_cover_its_text(connect: Connect) -> None:
    async with connect() as (http, _):
        body = chat_body(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
        run_id = (await http.post("/v1/chat/completions", json=body)).json()["id"]
        (prompt,) = (await http.get(f"{RUNS}/{run_id}")).json()["prompts"]
        at = 0
        for span in prompt["spans"]:
            assert span["begin"] == at < span["end"]
            at = span["end"]
        assert at == len(prompt["text"])
        said = {s["role"]: prompt["text"][s["begin"] : s["end"]] for s in prompt["spans"] if s["role"]}
        assert said == {"system": "be", "user": "hi"}
        assert "".join(token["text"] for token in prompt["tokens"]) == prompt["text"]


def test_a_message_that_is_not_found_is_the_templates() -> None:
    spans = text_spans([{"role": "user", "content": "gone"}, {"role": "user", "content": "here"}], "<here>")
    assert [(s.begin, s.end, s.role, s.message_index) for s in spans] == [
        (0, 1, None, None), (1, 5, "user", 1), (5, 6, None, None),
    ]  # fmt: skip
    assert text_spans([], "") == []


@pytest.mark.parametrize("num", [0, 1, 9, 100, 5000])
def test_joined_intervals_touch_and_sum(num: int) -> None:
    kinds = itertools.cycle(["host", "decode_own", "decode_others"])
    intervals, at = [], 7
    for index in range(num):
        blame = {index % 3: 0.5} if index % 3 == 2 else {}
        intervals.append(Interval(next(kinds), at, at + index % 5 + 1, blame))  # type: ignore[arg-type]
        at += index % 5 + 1
    found = joined(intervals, 80)
    assert len(found) <= max(80, min(num, 80)) and (num > 80 or found == intervals)
    if not num:
        return
    ends = [intervals[0].begin_ns, *(interval.end_ns for interval in found)]
    assert [interval.begin_ns for interval in found] == ends[:-1] and ends[-1] == at
    for kind in ("host", "decode_own", "decode_others"):
        assert sum(i.ns for i in found if i.kind == kind) == sum(i.ns for i in intervals if i.kind == kind)
    assert sum(sum(i.blame.values()) for i in found) == sum(sum(i.blame.values()) for i in intervals)


def test_sizes_count_what_is_held() -> None:
    prompt = KeptPrompt(array("i", range(100)), [{"role": "user", "content": "x" * 50}], 0)
    bare = KeptPrompt(array("i"), [], 0)
    assert prompt.num_bytes - bare.num_bytes == 400 + 54
    params = None
    sequence = KeptSequence(0, prompt, params)  # type: ignore[arg-type]
    empty = sequence.num_bytes
    sequence.output_ids.extend(range(10))
    sequence.tops.append([(1, -0.5)] * 3)
    assert sequence.num_bytes - empty == 40 + 300
