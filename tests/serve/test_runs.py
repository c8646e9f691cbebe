"""Runs: what is kept of them, for how long, and who may see it."""

import asyncio
import itertools
import math
import tracemalloc
from array import array

import pytest

from jilju.account.records import CallRing
from jilju.account.time_ledger import Interval
from jilju.config import ApiKey
from jilju.engine.events import StepRing
from jilju.engine.request import Request, RequestFailed, RequestTimes, SamplingParams
from jilju.serve.generation import Choice, EncodedPrompt
from jilju.serve.ledger import Call, SequenceLife
from jilju.serve.runs.fold import joined, text_spans
from jilju.serve.runs.kept import KeptPrompt, KeptRun, KeptSequence
from jilju.serve.runs.store import RunStore
from jilju.serve.timings import Marks
from jilju.text.stream import TextStream

from .conftest import Connect
from .stub import ByteTokenizer, StubClient
from .test_answers import COMPLETIONS, chat_body
from .test_billing import serving
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
    async with connect(run_store_bytes=40_000) as (http, server):
        ids = [(await post(http, COMPLETIONS, prompt="x" * 300, max_tokens=4)).json()["id"] for _ in range(30)]
        kept = [run["id"] for run in (await http.get(RUNS)).json()["runs"]]
        assert kept == ids[::-1][: len(kept)] and 3 <= len(kept) <= 12
        assert server.runs.num_bytes <= 40_000
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
    """Texts as long as they lie in memory, wherever they stand in a message, and lists of the parameters."""
    prompt = KeptPrompt(array("i", range(100)), [{"role": "user", "content": "x" * 50}], 0)
    bare = KeptPrompt(array("i"), [], 0)
    assert 400 + 50 < prompt.num_bytes - bare.num_bytes < 400 + 50 + 500
    part = {"type": "text", "text": "각" * 5000}
    for messages in ([{"content": [part]}], [{"tool_calls": [{"function": {"arguments": "각" * 5000}}]}]):
        assert KeptPrompt(array("i"), messages, 0).num_bytes > 10_000
    sequence = KeptSequence(0, prompt, SamplingParams())
    empty = sequence.num_bytes
    sequence.output_ids.extend(range(10))
    sequence.tops.append([(1, -0.5)] * 3)
    assert 40 + 3 * 100 < sequence.num_bytes - empty < 40 + 3 * 200
    call = Call(id="c", route="/", key_name=None, label=None, received_ns=0)
    long = KeptSequence(
        0, bare, SamplingParams(allowed_token_ids=tuple(range(50_000)), bad_words_ids=((1,) * 256,) * 99)
    )
    assert KeptRun(call, 0.0, [bare], [long, long]).num_bytes > 50_000 * 36 + 99 * 256 * 36


def test_the_memory_that_a_store_takes_is_about_what_it_says() -> None:
    """Of runs as small as they come, of which there are most."""
    tracemalloc.start()
    try:
        store, before = RunStore(1 << 30), tracemalloc.get_traced_memory()[0]
        for number in range(500):
            call = Call(id=f"{number:024x}", route="/", key_name=None, label=None, received_ns=10**12 + number)
            call.marks, call.run_id = Marks(10**12 + number), f"chatcmpl-{number:024x}"
            prompt = EncodedPrompt(list(range(30)), messages=[{"role": "user", "content": f"number {number}"}])
            choices = [make_choice(number * 2 + index, index, prompt) for index in range(2)]
            store.begin(call, float(number), choices)
            call.lives += [choice.life for choice in choices]
            for choice in choices:
                assert choice.kept is not None
                choice.kept.output_ids.extend(range(20))
            del choices, choice
            store.on_end(call)
        took = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6 * took < store.num_bytes < 1.7 * took


def make_choice(number: int, index: int, prompt: EncodedPrompt) -> Choice:
    times = RequestTimes(queued_ns=10**12 + number, scheduled_ns=10**12 + number + 1, last_token_ns=10**12 + number + 2)
    request = Request(id=str(number), prompt_ids=prompt.ids, params=SamplingParams(seed=10**9 + number))
    life = SequenceLife(number, index, 0, len(prompt.ids), times=times, ended_ns=10**12 + number + 3)
    return Choice(index, request, TextStream(ByteTokenizer()), life, prompt=prompt)


def test_a_store_keeps_no_trace_of_what_it_dropped() -> None:
    store = RunStore(100_000)
    for number in range(3000):
        call = Call(id=f"{number}", route="/", key_name=f"key {number % 7}", label=None, received_ns=number)
        store.begin(call, 0.0, list[Choice]())
        store.on_end(call)
    kept = [run.call.id for key in range(7) for run in store.newest(f"key {key}")]
    assert sorted(kept, key=int) == [str(number) for number in range(3000 - len(kept), 3000)] and len(store) == len(
        kept
    )
    assert store.num_bytes == sum(run.num_bytes for key in range(7) for run in store.newest(f"key {key}")) <= 100_000
    assert [run.call.id for run in store.newest("key 3")] == [
        i for i in map(str, range(2999, 0, -1)) if int(i) % 7 == 3
    ][: len(list(store.newest("key 3")))]


def test_calls_of_many_sequences_are_kept_in_bounded_number() -> None:
    ring, number = CallRing(100, max_sequences=50), 0
    for index in range(40):
        call = Call(id=str(index), route="/", key_name=None, label=None, received_ns=index)
        call.ended_ns = index + 1
        for choice in range(1 + index % 9):
            call.lives.append(SequenceLife(number, choice, 0, 1))
            number += 1
        ring.add(call.record())
        ring.add(call.record())  # once more, when its cost is known
        kept = list(ring)
        assert sum(len(each.sequences) for each in kept) <= 50 and kept[-1].id == str(index)
        assert all(ring.of_number(s.number) is each for each in kept for s in each.sequences)
    assert ring.of_number(0) is None and ring.dropped_ns == int(kept[0].id)
    huge = Call(id="huge", route="/", key_name=None, label=None, received_ns=0)
    huge.lives += [SequenceLife(10_000 + index, index, 0, 1) for index in range(128)]
    ring.add(huge.record())
    assert [each.id for each in ring] == ["huge"], "the newest is always there"


def test_a_slow_reader_fills_no_memory() -> None:
    marks = Marks(0)
    for number in range(10_000):
        marks.note_send(number * 10**7, number * 10**7 + 2 * 10**6)
    assert len(marks.waits) <= 16 and marks.waits[-1][0] == 9_999 * 10**7


# ---- the tokens of a run and the steps that chose them --------------------------------------------------------------------


async def test_steps_that_chose_tokens_nobody_wanted_do_not_move_the_others(connect: Connect) -> None:
    """A stop string ends an answer while the engine goes on for a step or more."""
    async with serving(connect, step_s=0.002) as (http, server):
        body = {"prompt": "abcdef", "max_tokens": 60, "logprobs": 0, "seed": 1}
        whole = (await http.post(COMPLETIONS, json=body)).json()["choices"][0]["text"]
        answer = (await http.post(COMPLETIONS, json=body | {"stop": [whole[5:7]]})).json()
        await until(lambda: not server.ledger.live)
        [sequence] = (await http.get(f"{RUNS}/{answer['id']}")).json()["sequences"]
        steps, output = sequence["steps"], sequence["output"]
        assert len(output) == answer["usage"]["completion_tokens"]
        for token in output:
            step = steps[token["step_index"]]
            assert step["start"] + step["count"] == 6 + token["index"]
            assert token["at_ms"] == pytest.approx(step["begin_ms"] + step["ms"])


async def test_tokens_whose_steps_the_log_has_dropped_stand_in_none(connect: Connect) -> None:
    async with serving(connect, step_s=0.001) as (http, server):
        log = server.context.client.log
        log.steps = StepRing(8)
        run_id = (await http.post(COMPLETIONS, json={"prompt": "abcdef", "max_tokens": 30})).json()["id"]
        await until(lambda: not server.ledger.live)
        [sequence] = (await http.get(f"{RUNS}/{run_id}")).json()["sequences"]
        steps, output, ledger = sequence["steps"], sequence["output"], sequence["ledger"]
        assert 0 < len(steps) <= 8 and [step["cached"] for step in steps] == [0] * len(steps)
        assert all(step["kind"] == "decode" for step in steps)
        known = [token["index"] for token in output if token["step_index"] is not None]
        assert known == list(range(30 - len(steps), 30))
        assert ledger["is_balanced"] and ledger["by_kind"]["in_flight"] > ledger["by_kind"]["decode_own"]


async def test_a_run_can_be_read_while_its_tokens_come(connect: Connect) -> None:
    """The fold is made in a thread of what was copied: whatever is added meanwhile, what it shows fits together."""
    async with serving(connect, step_s=0.0005) as (http, server):
        body = {"prompt": ["abcdef", "ghijkl"], "max_tokens": 150, "logprobs": 3, "ignore_eos": True, "n": 2}
        call = asyncio.ensure_future(http.post(COMPLETIONS, json=body))
        await until(lambda: any(call.lives for call in server.ledger.live.values()))
        [live] = server.ledger.live.values()
        lengths = set()
        while not call.done():
            run = (await http.get(f"{RUNS}/{live.run_id}")).json()
            for sequence in run["sequences"]:
                output = sequence["output"]
                lengths.add(len(output))
                assert all(len(token["top"]) == 3 and token["logprob"] <= 0 for token in output)
                assert all(token["step_index"] is not None for token in output)
                assert sequence["ledger"]["is_balanced"] and sequence["ledger"]["total_ms"] == run["total_ms"]
        assert (await call).status_code == 200 and len(lengths) > 3


async def test_impossible_tokens_have_a_number_for_their_probability(connect: Connect) -> None:
    kept = KeptPrompt(array("i", [97, 98]), (), 0, array("f", [-math.inf]))
    sequence = KeptSequence(0, kept, SamplingParams(), array("i", [97]), array("f", [-math.inf]))
    async with serving(connect) as (http, server):
        run_id = (await http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 1})).json()["id"]
        await until(lambda: not server.ledger.live)
        [run] = server.runs.newest(None)
        run.prompts, run.sequences = [kept], [sequence]
        shown = (await http.get(f"{RUNS}/{run_id}")).json()
        assert shown["prompts"][0]["tokens"][1]["logprob"] == shown["sequences"][0]["output"][0]["logprob"] == -9999.0


@pytest.mark.parametrize("serial", ["-1", "1e3", "x" * 300, "9" * 18, "9" * 400, "٣", "0x1"])
async def test_a_step_that_is_not_there_says_which_are(connect: Connect, serial: str) -> None:
    async with serving(connect) as (http, _):
        missing = await http.get(f"/v1/jilju/steps/{serial}")
        assert missing.status_code == 404 and "none yet" in missing.json()["error"]["message"]
        await http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 3})
        missing = await http.get(f"/v1/jilju/steps/{serial}")
        message = missing.json()["error"]["message"]
        assert missing.status_code == 404 and "it keeps 0 to " in message and len(message) < 500
