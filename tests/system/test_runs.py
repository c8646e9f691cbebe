"""What a run's data say, against what its caller saw: tokens, probabilities, text, time, and who it waited for."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.system.conftest import needs_smollm2
from tests.system.prompts import CHAT_PROMPTS

pytestmark = needs_smollm2


def ask(url: str, prompt: str, **fields: Any) -> tuple[dict[str, Any], float]:
    """The answer, and its time by this client's clock in ms."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0.8, "seed": 3, "max_tokens": 24}
    with httpx.Client(base_url=url, timeout=120) as client:
        client.get("/livez")  # from here on it is connected
        begin = time.monotonic()
        answer = client.post("/v1/chat/completions", json=body | fields)
        took_ms = (time.monotonic() - begin) * 1e3
    assert answer.status_code == 200, answer.text
    return answer.json(), took_ms


def run_of(url: str, run_id: str) -> dict[str, Any]:
    """Once it has ended: its caller has the answer a moment before that."""
    for _ in range(200):
        run = httpx.get(f"{url}/v1/jilju/runs/{run_id}").json()
        if run.get("state") != "running":
            return run
        time.sleep(0.01)
    raise AssertionError(f"{run_id} does not end")


def check_ledger(sequence: dict[str, Any], total_ms: float) -> None:
    ledger = sequence["ledger"]
    assert ledger["is_balanced"] and math.isclose(ledger["total_ms"], total_ms)
    at = 0.0
    for interval in ledger["intervals"]:
        assert math.isclose(interval["begin_ms"], at, abs_tol=1e-6) and interval["ms"] >= 0
        at = interval["begin_ms"] + interval["ms"]
    assert math.isclose(at, total_ms) and math.isclose(sum(ledger["by_kind"].values()), total_ms)


def test_a_run_is_what_its_caller_got(smollm2_server):
    url = smollm2_server.url
    fields = {"logprobs": True, "top_logprobs": 4, "return_token_ids": True, "timings": True, "ignore_eos": True}
    answer, took_ms = ask(url, "달리기 경주가 시작되면 심판은", **fields)
    run = run_of(url, answer["id"])
    (prompt,), (sequence,) = run["prompts"], run["sequences"]
    choice = answer["choices"][0]
    assert [token["id"] for token in prompt["tokens"]] == answer["prompt_token_ids"]
    assert [token["id"] for token in sequence["output"]] == choice["token_ids"]
    told = choice["logprobs"]["content"]
    assert [token["logprob"] for token in sequence["output"]] == [token["logprob"] for token in told]
    for ours, theirs in zip(sequence["output"], told, strict=True):
        assert [a["logprob"] for a in ours["top"]] == [a["logprob"] for a in theirs["top_logprobs"]]
        assert bytes.fromhex(ours["bytes"]) == bytes(theirs["bytes"])
    assert b"".join(bytes.fromhex(t["bytes"]) for t in sequence["output"]).decode(errors="replace") == sequence["text"]
    assert (run["state"], run["status"], sequence["finish_reason"]) == ("completed", 200, "length")
    check_ledger(sequence, run["total_ms"])
    assert run["total_ms"] <= took_ms, "a run lies within what its caller's clock saw of it"
    assert math.isclose(run["ttft_ms"], answer["timings"]["ttft_ms"])

    spans = prompt["spans"]
    assert [prompt["text"][s["begin"] : s["end"]] for s in spans if s["role"] == "user"] == [
        "달리기 경주가 시작되면 심판은"
    ]
    assert [s["begin"] for s in spans] == [0, *(s["end"] for s in spans[:-1])] and spans[-1]["end"] == len(
        prompt["text"]
    )


def test_tokens_stand_in_the_steps_that_chose_them(smollm2_server):
    url = smollm2_server.url
    answer, _ = ask(url, "Count to twenty.", ignore_eos=True)
    sequence = run_of(url, answer["id"])["sequences"][0]
    steps, output = sequence["steps"], sequence["output"]
    prefill = [step for step in steps if step["kind"] == "prefill"]
    assert sum(step["count"] for step in prefill) + steps[0]["cached"] == answer["usage"]["prompt_tokens"]
    assert [token["step_index"] for token in output] == list(range(len(prefill) - 1, len(steps)))
    for step, following in pairwise(steps):
        assert following["start"] == step["start"] + step["count"] and following["begin_ms"] >= step["begin_ms"]
    for step in steps:
        parts = step["schedule_ms"] + step["pack_ms"] + step["run_ms"] + step["commit_ms"]
        assert math.isclose(parts, step["ms"], abs_tol=1e-6)
        assert math.isclose(step["own_ms"] + step["others_ms"], step["run_ms"], abs_tol=1e-6)
    ops = httpx.get(f"{url}/v1/jilju/steps/{steps[-1]['serial']}").json()
    assert ops["flops"] == sum(op["flops"] for op in ops["ops"]) == steps[-1]["flops"]
    assert ops["bytes"] == sum(op["bytes"] for op in ops["ops"]) == steps[-1]["bytes"]
    assert math.isclose(sum(op["ms"] for op in ops["ops"]), ops["run_ms"]) and math.isclose(
        sum(op["share"] for op in ops["ops"]), 1.0
    )


def test_several_answers_and_prompts_of_one_call(smollm2_server):
    url = smollm2_server.url
    body = {"prompt": ["One two three", "Once upon a time"], "n": 2, "max_tokens": 6, "temperature": 1, "seed": 5}
    answer = httpx.post(url + "/v1/completions", json=body, timeout=60).json()
    run = run_of(url, answer["id"])
    assert [prompt["text"] for prompt in run["prompts"]] == body["prompt"]
    assert [sequence["prompt_index"] for sequence in run["sequences"]] == [0, 0, 1, 1]
    for sequence, choice in zip(run["sequences"], answer["choices"], strict=True):
        assert sequence["text"].startswith(choice["text"])
        check_ledger(sequence, run["total_ms"])


def test_the_cache_says_why_it_had_no_more(smollm2_server):
    url = smollm2_server.url
    text = "The quick brown fox jumps over the lazy dog and runs into the deep dark forest behind the old mill " * 3
    first, _ = ask(url, text + "at night.", max_tokens=2)
    again, _ = ask(url, text + "by day.", max_tokens=2)
    cache = run_of(url, again["id"])["prompts"][0]["cache"]
    assert cache["miss_reason"] == "diverged"
    assert (cache["earlier_text"], cache["own_text"]) == (" at", " by")
    assert cache["hit_tokens"] == cache["first_miss_position"] // 16 * 16 > 16
    assert run_of(url, first["id"])["prompts"][0]["cache"]["miss_reason"] in ("diverged", "never_seen")


def test_streams_know_the_long_prompt_that_held_them_up(smollm2_server):
    url = smollm2_server.url
    with ThreadPoolExecutor(6) as pool:
        short = [pool.submit(ask, url, prompt, max_tokens=90, ignore_eos=True) for prompt in CHAT_PROMPTS[:4]]
        time.sleep(0.3)
        long, _ = pool.submit(ask, url, "word " * 1500, max_tokens=1).result()
        answers = [future.result()[0] for future in short]
    steps = run_of(url, long["id"])["sequences"][0]["steps"]
    shared = {step["serial"] for step in steps if step["count"] >= 64}
    blamed = []
    for answer in answers:
        run = run_of(url, answer["id"])
        check_ledger(run["sequences"][0], run["total_ms"])
        for step in run["sequences"][0]["steps"]:
            if step["serial"] in shared:
                assert long["id"] in {neighbour["run"] for neighbour in step["neighbours"]}
        blamed.append(run["sequences"][0]["ledger"]["blame"][0]["run"])
    assert blamed == [long["id"]] * 4


def test_a_run_survives_its_engine(smollm2_server):
    url = smollm2_server.url
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask, url, CHAT_PROMPTS[0], max_tokens=300, ignore_eos=True)
        while not smollm2_server.metric("jilju_num_requests_running"):
            time.sleep(0.02)
        time.sleep(0.15)  # some of its tokens are made by then, and far from all
        smollm2_server.kill_engine()
        answer, _ = future.result()
    run = run_of(url, answer["id"])
    sequence = run["sequences"][0]
    check_ledger(sequence, run["total_ms"])
    assert sequence["ledger"]["by_kind"]["restart"] > 0 and sequence["ledger"]["by_kind"]["recompute"] > 0
    assert sequence["resumes"] == 1 and len(sequence["output"]) == 300
    assert [token["step_index"] is not None for token in sequence["output"]] == [True] * 300
    assert smollm2_server.metric("jilju_ledger_imbalance") == 0


@pytest.mark.parametrize("path", ["runs/chatcmpl-000000000000000000000000", "runs/x", "steps/99999999", "steps/-1"])
def test_what_is_not_there_is_404(smollm2_server, path):
    answer = httpx.get(f"{smollm2_server.url}/v1/jilju/{path}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "run_not_found"
