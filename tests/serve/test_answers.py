"""Chat and completions: shapes, and the law that a joined stream equals the whole answer."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jilju.engine.request import RequestFailed

from .conftest import Connect
from .stub import EOT, TEXTS, StubClient

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "stub", "messages": [{"role": "user", "content": text}]} | fields


def events_of(response: httpx.Response) -> list[Any]:
    """The data of each event, `[DONE]` as a string."""
    assert response.headers["content-type"] == "text/event-stream"
    events = []
    for block in response.text.split("\n\n")[:-1]:
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def joined(events: list[Any], index: int = 0) -> dict[str, Any]:
    """The whole answer's choice, put together from a stream."""
    choice: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": None, "finish_reason": None, "stop_reason": None}
    for event in events:
        for part in event["choices"] if isinstance(event, dict) else ():
            if part["index"] != index:
                continue
            assert choice["finish_reason"] is None, "nothing comes after the finish chunk"
            choice["text"] += part["text"] if "text" in part else part["delta"].get("content", "")
            choice["token_ids"] += part.get("token_ids", [])
            if part["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] = None if values is None else choice["logprobs"][name] + values
            choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
    return choice


def whole_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kept = {name: choice.get(name) for name in ("token_ids", "logprobs", "finish_reason", "stop_reason")}
    return kept | {"text": choice["text"] if "text" in choice else choice["message"]["content"]}


async def test_chat_answers_whole(connect: Connect) -> None:
    async with connect() as (http, _):
        response = await http.post(CHAT, json=chat_body(temperature=0))
    assert response.status_code == 200
    data = response.json()
    assert data["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert (data["object"], data["model"], data["system_fingerprint"]) == ("chat.completion", "stub", "fp_stub")
    (choice,) = data["choices"]
    assert choice["message"]["content"] in TEXTS
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    prompt = "[user]hello\n[assistant]"
    num_tokens = len(choice["message"]["content"].encode()) + 1
    assert data["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_tokens,
        "total_tokens": len(prompt) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": len(prompt) - 3, "truncated_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert "timings" not in data


async def test_stream_gives_one_chunk_a_token_and_role_with_the_first(connect: Connect) -> None:
    async with connect() as (http, _):
        response = await http.post(CHAT, json=chat_body(stream=True, temperature=0))
    events = events_of(response)
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = joined(chunks)["text"]
    assert len(chunks) == 1 + len(text.encode()) + 1, "role, one a byte, and the end of turn"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert "�" not in text


@pytest.mark.parametrize("continuous", [False, True])
async def test_usage_in_streams(connect: Connect, continuous: bool) -> None:
    options = {"continuous_usage_stats": True} if continuous else {"include_usage": True}
    async with connect() as (http, _):
        whole = (await http.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 9, "seed": 1})).json()
        response = await http.post(
            COMPLETIONS, json={"prompt": "abc", "max_tokens": 9, "seed": 1, "stream": True, "stream_options": options}
        )
    *chunks, last, done = events_of(response)
    assert done == "[DONE]"
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    if continuous:
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == list(range(1, 10))
    else:
        assert all(chunk["usage"] is None for chunk in chunks)


BODIES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 50),
        "max_tokens": st.integers(0, 60),
        "stop": st.lists(st.sampled_from(["STOP", "ST", "서", "울입", " ", "o", "END", "\n", "🇰", ". "]), max_size=3),
        "return_token_ids": st.booleans(),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 8),
        "skip_special_tokens": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=BODIES,
    prompt=st.text("ab서", min_size=1, max_size=4),
    logprobs=st.none() | st.integers(0, 2),
    usage=st.booleans(),
)
async def test_joined_stream_equals_the_whole_answer(
    connect: Connect, body: dict[str, Any], prompt: str, logprobs: int | None, usage: bool
) -> None:
    body = body | {"min_tokens": min(body["min_tokens"], body["max_tokens"])}
    chat = chat_body(prompt) | body | ({} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs})
    texts = {"prompt": [prompt, prompt + "x"], "logprobs": logprobs} | body
    stream = {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    async with connect() as (http, _):
        for path, fields in ((CHAT, chat), (COMPLETIONS, texts)):
            whole = (await http.post(path, json=fields)).json()
            events = events_of(await http.post(path, json=fields | stream))
            assert events[-1] == "[DONE]"
            for choice in whole["choices"]:
                expected = whole_choice(choice)
                got = joined(events[:-1], choice["index"])
                if not fields["return_token_ids"]:
                    expected["token_ids"] = []
                if got["logprobs"] is None and expected["logprobs"]:
                    got["logprobs"] = {
                        name: [] if value == [] else value for name, value in expected["logprobs"].items()
                    }
                assert got == expected
                assert (
                    not any(stop in expected["text"][body["min_tokens"] :] for stop in body["stop"])
                    or body["min_tokens"]
                )
            if usage:
                assert events[-2]["usage"] == whole["usage"]


async def test_stop_string_ends_the_text_aborts_and_is_counted_to_its_last_token(connect: Connect) -> None:
    text = "one two STOP three"
    stub = StubClient(answer=lambda request: list(text.encode()))
    async with connect(stub) as (http, server):
        data = (await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 64, "stop": ["zzz", "STOP"]})).json()
        assert server.metrics.folds.num_output_tokens == len("one two STOP")
    (choice,) = data["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two ", "stop", "STOP")
    assert data["usage"]["completion_tokens"] == len("one two STOP")
    assert stub.aborted == [stub.requests[0].id]
    assert data["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 1,
        "cache_write_tokens": 0,
        "truncated_tokens": 0,
    }


async def test_stop_token_id_is_named_and_shows_no_text(connect: Connect) -> None:
    stub = StubClient(answer=lambda request: list(b"abc"))
    async with connect(stub) as (http, _):
        data = (await http.post(COMPLETIONS, json={"prompt": "x", "stop_token_ids": [ord("c")]})).json()
    (choice,) = data["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", ord("c"))
    assert data["usage"]["completion_tokens"] == 3


async def test_max_tokens_zero_is_an_empty_answer_that_ends_by_length(connect: Connect) -> None:
    async with connect() as (http, _):
        whole = (await http.post(CHAT, json=chat_body(max_tokens=0))).json()
        events = events_of(await http.post(CHAT, json=chat_body(max_tokens=0, stream=True)))
    assert whole["choices"][0]["message"]["content"] == ""
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0
    assert [event["choices"][0]["delta"] for event in events[:-1]] == [{"role": "assistant", "content": ""}, {}]


async def test_prompts_in_four_forms(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        for prompt in ("ab", ["ab"], [97, 98], [[97, 98]]):
            assert (await http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 1})).status_code == 200
        answers = (await http.post(COMPLETIONS, json={"prompt": ["ab", "cd", "ef"], "max_tokens": 4, "seed": 7})).json()
        alone = (await http.post(COMPLETIONS, json={"prompt": "cd", "max_tokens": 4, "seed": 7})).json()
    assert all(request.prompt_ids == [97, 98] for request in stub.requests[:4])
    assert [choice["index"] for choice in answers["choices"]] == [0, 1, 2]
    assert answers["choices"][1]["text"] == alone["choices"][0]["text"]
    assert answers["usage"]["prompt_tokens"] == 6 and answers["usage"]["completion_tokens"] == 12


async def test_what_reaches_the_engine(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        await http.post(
            CHAT,
            json=chat_body(
                temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1, seed=-5, max_completion_tokens=9,
                min_tokens=2, stop="x", stop_token_ids=[65, EOT], logprobs=True, top_logprobs=4,
                presence_penalty=-2, frequency_penalty=1.5, logit_bias={"0": -100, "258": 0.5}, allowed_token_ids=[7, 0, 7],
            ),
        )  # fmt: skip
        await http.post(CHAT, json=chat_body(ignore_eos=True))
        await http.post(CHAT, json=chat_body())
    params = stub.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (
        0.5,
        0.9,
        0,
        0.1,
        1.1,
    )
    assert (params.seed, params.max_tokens, params.min_tokens, params.stop, params.logprobs) == (-5, 9, 2, ("x",), 4)
    assert (params.presence_penalty, params.frequency_penalty) == (-2, 1.5)
    assert (params.logit_bias, params.allowed_token_ids) == ({0: -100, 258: 0.5}, (7, 0, 7))
    plain = stub.requests[2].params
    assert (plain.presence_penalty, plain.frequency_penalty, plain.logit_bias, plain.allowed_token_ids) == (
        0,
        0,
        {},
        None,
    )
    assert stub.requests[0].end_ids == (257, EOT, 65)
    assert stub.requests[1].end_ids == ()
    assert stub.requests[1].params.max_tokens == 512 - stub.requests[1].num_prompt_tokens, "what is left of the context"
    seeds = {request.params.seed for request in stub.requests[1:]}
    assert len(seeds) == 2 and all(seed is not None and 0 <= seed < 2**53 for seed in seeds)


async def test_logprobs_of_chat_and_completions(connect: Connect) -> None:
    stub = StubClient(answer=lambda request: list("서a".encode()))
    async with connect(stub) as (http, _):
        chat = (await http.post(CHAT, json=chat_body(logprobs=True, top_logprobs=2, max_tokens=4))).json()
        text = (await http.post(COMPLETIONS, json={"prompt": "x", "logprobs": 2, "max_tokens": 4})).json()
        none = (await http.post(COMPLETIONS, json={"prompt": "x", "logprobs": 0, "max_tokens": 4})).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xEC], [0x84], [0x9C], [97]]
    assert content[0]["token"] == "bytes:\\xec" and content[3]["token"] == "a"
    assert [top["logprob"] for top in content[3]["top_logprobs"]] == [-0.25, -0.5]
    logprobs = text["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 0, 0, 1]
    assert logprobs["token_logprobs"] == [-0.25] * 4
    assert logprobs["top_logprobs"][3] == {"a": -0.25, "h": -0.5}
    assert none["choices"][0]["logprobs"]["top_logprobs"][3] == {"a": -0.25}


async def test_minus_infinity_has_a_number(connect: Connect) -> None:
    from jilju.serve.answer import finite

    assert finite(float("-inf")) == -9999.0 and finite(-1.5) == -1.5


@pytest.mark.parametrize("stream", [False, True])
async def test_timings_sum_to_the_total_exactly(connect: Connect, stream: bool) -> None:
    body = chat_body(timings=True, seed=3, stop=["END", "dog"], stream=stream)
    async with connect(StubClient(delay_s=0.0005)) as (http, _):
        response = await http.post(CHAT, json=body)
    timings = events_of(response)[-2]["timings"] if stream else response.json()["timings"]
    parts = [name for name in timings if name.endswith("_ms") and name not in ("total_ms", "ttft_ms", "tpot_ms")]
    assert len(parts) == 12
    assert sum(round(timings[name] * 1e6) for name in parts) == round(timings["total_ms"] * 1e6)
    assert all(timings[name] >= 0 for name in parts), timings
    assert timings["seed"] == 3 and timings["resumes"] == 0
    assert 0 < timings["ttft_ms"] < timings["total_ms"]


async def test_timings_ride_on_the_usage_chunk_where_there_is_one(connect: Connect) -> None:
    async with connect() as (http, _):
        body = chat_body(timings=True, stream=True, stream_options={"include_usage": True})
        events = events_of(await http.post(CHAT, json=body))
    assert [index for index, event in enumerate(events[:-1]) if "timings" in event] == [len(events) - 2]
    assert events[-2]["choices"] == [] and events[-2]["usage"]


async def test_failure_before_the_first_token_keeps_its_own_status(connect: Connect) -> None:
    stub = StubClient(
        fail=lambda request, index: RequestFailed(request_id=request.id, code="nan_logits", message="bad row")
    )
    async with connect(stub) as (http, server):
        response = await http.post(CHAT, json=chat_body(stream=True))
        assert server.ledger.num_ended == {("failed", "nan_logits"): 1}
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "bad row",
        "type": "server_error",
        "param": None,
        "code": "nan_logits",
    }


async def test_failure_within_a_stream_is_an_error_event_and_no_done(connect: Connect) -> None:
    def fail(request: Any, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code="internal", message="boom") if index == 3 else None

    async with connect(StubClient(fail=fail)) as (http, server):
        events = events_of(await http.post(CHAT, json=chat_body(stream=True)))
        assert server.ledger.num_ended == {("failed", "internal"): 1}
    assert len(events) == 1 + 3 + 1
    assert events[-1]["error"]["code"] == "internal"
    assert all("choices" in event and event["choices"][0]["finish_reason"] is None for event in events[:-1])


async def test_an_open_stream_says_wait_after_silence_and_never_before_it_opens(connect: Connect) -> None:
    from jilju.serve.context import ServeLimits

    stub = StubClient(hang_at=2)
    limits = ServeLimits(silence_s=0.02, total_s=0.5)
    async with connect(stub, limits=limits) as (http, server):
        response = await http.post(CHAT, json=chat_body(stream=True))
        assert server.ledger.num_ended == {("deadline", "deadline_exceeded"): 1}
        stub.hang_at = 0
        refused = await http.post(CHAT, json=chat_body(stream=True))
    blocks = response.text.split("\n\n")[:-1]
    assert blocks.count(": wait") > 3 and blocks[2].startswith("data: ") and blocks[3] == ": wait"
    assert '"code":"deadline_exceeded"' in blocks[-1]
    assert refused.status_code == 504 and refused.headers["x-should-retry"] == "false"
    assert len(stub.aborted) == 2


async def test_defaults_of_the_model_hold_where_a_call_says_nothing(connect: Connect) -> None:
    from jilju.serve.context import SamplingDefaults

    stub = StubClient()
    defaults = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, source="test")
    async with connect(stub, defaults=defaults) as (http, _):
        await http.post(CHAT, json=chat_body(temperature=None))
        await http.post(CHAT, json=chat_body(temperature=1, top_k=0))
    first, second = (request.params for request in stub.requests)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert (second.temperature, second.top_p, second.top_k) == (1.0, 0.8, 0)
