"""Responses: the answer object, its events, and the law that the joined stream is the whole object."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.engine.request import Request, RequestFailed, TokenEvent
from jilju.serve.answer import CompletionTokensDetails, Head, PromptTokensDetails, TokenTexts, Usage
from jilju.serve.context import SamplingDefaults, ServeLimits
from jilju.serve.generation import Choice, Delta
from jilju.serve.ledger import SequenceLife
from jilju.serve.responses.items import Output
from jilju.serve.responses.shape import ResponseRenderer
from jilju.serve.sealed import sealed, unsealed
from jilju.text.message import Part
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import EOT, ByteTokenizer, StubClient

pytestmark = pytest.mark.anyio

RESPONSES = "/v1/responses"
TEMPLATE = (
    "{% if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}"
    "{% if tools %}[tools {{ tools | map(attribute='function') | map(attribute='name') | join(' ') }}]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}
LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
USAGE = Usage(
    prompt_tokens=1, completion_tokens=1, total_tokens=2, prompt_tokens_details=PromptTokensDetails(0, 1),
    completion_tokens_details=CompletionTokensDetails(0),
)  # fmt: skip
NOW = 1_700_000_000.5


def call(arguments: str, name: str = "add") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class PieceTokenizer(ByteTokenizer):
    """Ids from 259 on are pieces of one answer, cut anywhere."""

    def __init__(self, pieces: Sequence[bytes] = ()):
        super().__init__()
        self.pieces = list(pieces)
        self.vocab_size = 259 + len(self.pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id - 259] if token_id >= 259 else super().token_bytes(token_id)


def answering(*texts: str | bytes, ends: bool = True, **settings: Any) -> StubClient:
    """Gives these pieces, a token each; with `ends` the end of turn after them."""
    ids = [*range(259, 259 + len(texts)), *([EOT] if ends else [])]
    return with_room(StubClient(answer=lambda request: ids, **settings))


def with_room(stub: StubClient) -> StubClient:
    assert stub.info is not None
    stub.info = msgspec.structs.replace(stub.info, max_context=100_000, num_blocks=10_000)
    return stub


def changes_for(*texts: str | bytes) -> dict[str, Any]:
    """What a server needs to give them, with ids and times that are always the same."""
    pieces = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return {
        "tokenizer": PieceTokenizer(pieces),
        "template": ChatTemplate(TEMPLATE),
        "max_context": 100_000,
        "random_bytes": bytes,
        "unix_time": lambda: NOW,
    }


def events_of(text: str) -> list[dict[str, Any]]:
    """Of a stream that said nothing else."""
    events = []
    for block in text.split("\n\n")[:-1]:
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def rebuilt(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client has that trusts the deltas alone. Every other event is compared with them."""
    created, in_progress, *middle, last = events
    assert [created["type"], in_progress["type"]] == ["response.created", "response.in_progress"]
    response = created["response"]
    assert in_progress["response"] == response and response["output"] == [] and response["usage"] is None
    assert set(response) == set(last["response"]), "no stub"
    output: list[Any] = response["output"]
    open_item: dict[str, Any] | None = None
    for event in middle:
        kind, index = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert open_item is None and index == len(output)
            open_item = event["item"]
            assert open_item is not None
            output.append(open_item)
            continue
        assert open_item is not None and index == len(output) - 1
        if kind == "output_item.done":
            if "encrypted_content" in open_item:
                open_item["encrypted_content"] = sealed(open_item["content"][0]["text"])
            if "status" in open_item:
                open_item["status"] = event["item"]["status"]
                assert open_item["status"] in ("completed", "incomplete")
            assert event["item"] == open_item
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        if kind == "content_part.added":
            assert event["content_index"] == len(open_item["content"])
            open_item["content"].append(event["part"])
        elif kind == "function_call_arguments.delta":
            open_item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (event["name"], event["arguments"]) == (open_item["name"], open_item["arguments"])
        else:
            part = open_item["content"][event["content_index"]]
            if kind == "content_part.done":
                assert event["part"] == part
            elif kind == f"{part['type']}.delta":
                part["text"] += event["delta"]
                if "logprobs" in event:
                    part["logprobs"] += event["logprobs"]
            else:
                assert kind == f"{part['type']}.done" and event["text"] == part["text"]
                assert event.get("logprobs") == part.get("logprobs")
    assert open_item is None, "every item was ended"
    ending = ("status", "completed_at", "incomplete_details", "usage")
    response |= {name: last["response"][name] for name in ending}
    assert last["type"] == f"response.{response['status']}"
    return response


async def whole_and_streamed(
    connect: Connect, make: Callable[[], StubClient], body: dict[str, Any], **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    async with connect(make(), **changes) as (http, _):
        whole = await http.post(RESPONSES, json=body)
    async with connect(make(), **changes) as (http, _):
        streamed = await http.post(RESPONSES, json=body | {"stream": True})
    assert (whole.status_code, streamed.status_code) == (200, 200), whole.text
    assert streamed.headers["content-type"] == "text/event-stream"
    return whole.json(), events_of(streamed.text)


async def test_the_answer_object(connect: Connect) -> None:
    pieces = ("Hel", "lo")
    async with connect(answering(*pieces), **changes_for(*pieces)) as (http, _):
        response = await http.post(RESPONSES, json={"model": "stub", "input": "hi"})
    assert response.status_code == 200
    answer = response.json()
    call_id = response.headers["x-request-id"]
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert answer == {
        "id": f"resp_{call_id}", "object": "response", "created_at": 1_700_000_000, "completed_at": 1_700_000_000,
        "status": "completed", "error": None, "incomplete_details": None,
        "output": [{"id": f"msg_{call_id}-0", "type": "message", "role": "assistant", "status": "completed", "content": [part]}],
        "model": "stub",
        "usage": {"input_tokens": 20, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 17}, "output_tokens": 3,
                  "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 23},
        "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": False, "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "none", "tools": [], "top_logprobs": 0,
        "top_p": 1.0, "truncation": "disabled", "user": None,
    }  # fmt: skip
    assert len("[user]hi\n[assistant]") == answer["usage"]["input_tokens"]


async def test_the_settings_in_force_are_repeated(connect: Connect) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = {
        "input": "hi", "instructions": "be short", "max_output_tokens": 9, "metadata": {"a": "b", "c": {"d": [1]}},
        "parallel_tool_calls": False, "reasoning": {"effort": "high", "summary": "auto"}, "temperature": 0.5, "user": "u",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "medium"},
        "tool_choice": "none", "tools": [ADD | {"description": "adds", "strict": True}], "top_logprobs": 2, "include": [LOGPROBS],
        "truncation": "disabled", "store": False, "service_tier": "auto",
    }  # fmt: skip
    async with connect(answering("{}"), **changes_for("{}")) as (http, _):
        answer = (await http.post(RESPONSES, json=body)).json()
        named = await http.post(
            RESPONSES, json={"input": "hi", "tools": [ADD], "tool_choice": {"type": "function", "name": "add"}}
        )
    expected = {name: value for name, value in body.items() if name not in ("input", "include")}
    assert {name: answer[name] for name in expected} == expected | {"service_tier": "default"}
    assert named.json()["tool_choice"] == {"type": "function", "name": "add"}
    assert named.json()["tools"] == [ADD | {"description": None, "strict": None}]


async def test_model_defaults_are_the_settings_in_force(connect: Connect) -> None:
    defaults = SamplingDefaults(temperature=0.7, top_p=0.8, source="test")
    async with connect(answering("x"), defaults=defaults, **changes_for("x")) as (http, _):
        answer = (await http.post(RESPONSES, json={"input": "hi", "top_p": None})).json()
    assert (answer["temperature"], answer["top_p"]) == (0.7, 0.8)


async def test_the_events_of_an_answer_in_order(connect: Connect) -> None:
    pieces = ("<think>", "hm", "</think>", "I ", "add.", call('{"a": 1}'), "\n", "Done")
    body = {"input": "1+1", "tools": [ADD]}
    whole, events = await whole_and_streamed(connect, lambda: answering(*pieces), body, **changes_for(*pieces))
    item = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]  # fmt: skip
    thoughts = [name.replace("output_text", "reasoning_text") for name in item]
    names = [event["type"].removeprefix("response.") for event in events]
    assert [name for name, before in zip(names, ["", *names], strict=False) if name != before] == [
        "created", "in_progress", *thoughts, *item,
        "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", *item, "completed",
    ]  # fmt: skip
    kinds = [(item["type"], item["id"].partition("_")[0]) for item in whole["output"]]
    assert kinds == [("reasoning", "rs"), ("message", "msg"), ("function_call", "fc"), ("message", "msg")]
    thought, text, called, more = whole["output"]
    assert thought == {"id": thought["id"], "type": "reasoning", "summary": [],
                       "content": [{"type": "reasoning_text", "text": "hm"}]}  # fmt: skip
    assert (text["content"][0]["text"], more["content"][0]["text"]) == ("I add.", "Done")
    assert (called["name"], called["arguments"], called["status"]) == ("add", '{"a": 1}', "completed")
    assert called["call_id"].startswith("call_")
    assert len({item["id"] for item in whole["output"]}) == 4
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    assert rebuilt(events) == whole == events[-1]["response"]


TEXT = st.text(st.sampled_from("ab서🇰{}<>\n \"'"), min_size=1, max_size=12)
ARGUMENTS = st.dictionaries(
    st.sampled_from("abc"), st.integers() | st.text(max_size=5) | st.lists(st.none()), max_size=2
)
ANSWER = st.tuples(
    st.sampled_from(
        ["", "<think>hm 서울</think>", "<think>\nlong\n</think>\n\n", "<think></think>", "<think>unclosed "]
    ),
    st.lists(TEXT | ARGUMENTS.map(lambda value: call(json.dumps(value))) | st.just(call("{}", "unknown")), max_size=4),
).map(lambda parts: parts[0] + "".join(parts[1]))
BODY = st.fixed_dictionaries(
    {"include": st.sets(st.sampled_from([LOGPROBS, SEALED])).map(sorted)},
    optional={
        "max_output_tokens": st.integers(0, 12),
        "stop": st.lists(st.sampled_from(["a", "서", "b ", "</tool_call>", '"']), max_size=3),
        "min_tokens": st.integers(0, 3),
        "skip_special_tokens": st.booleans(),
        "tools": st.just([ADD]),
        "timings": st.booleans(),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(answer=ANSWER, cuts=st.just([1]) | st.lists(st.integers(1, 9), min_size=1), body=BODY)
@example(
    answer="<think>hm</think>x" + call("{}") + "y", cuts=[99], body={"tools": [ADD], "include": [LOGPROBS, SEALED]}
)
@example(answer="", cuts=[1], body={"include": []})
async def test_the_joined_stream_is_the_whole_object(
    connect: Connect, answer: str, cuts: list[int], body: dict[str, Any]
) -> None:
    data, pieces = answer.encode(), []
    while data:
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(data[:size])
        data = data[size:]
    body = {"input": "hi"} | body | {"min_tokens": min(body.get("min_tokens", 0), body.get("max_output_tokens", 99))}
    clock = VirtualClock(10**9)
    whole, events = await whole_and_streamed(
        connect, lambda: answering(*pieces, clock=clock), body, clock=clock, **changes_for(*pieces)
    )
    got = rebuilt(events)
    if body.get("timings"):
        got["timings"] = events[-1]["response"]["timings"]
        assert got["timings"]["seed"] == whole["timings"]["seed"]
    assert got == whole == events[-1]["response"]
    assert ("timings" in whole) == body.get("timings", False)
    assert len(whole["output"]) >= 1
    cut = whole["status"] == "incomplete"
    assert cut == (whole["incomplete_details"] == {"reason": "max_output_tokens"}) == (whole["completed_at"] is None)
    statuses = [item["status"] for item in whole["output"] if "status" in item]
    assert set(statuses[:-1]) <= {"completed"} and set(statuses[-1:]) <= {whole["status"]}
    for item in whole["output"]:
        for part in item.get("content", []) if item["type"] == "message" else []:
            shown = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
            assert not shown or LOGPROBS in body["include"]
            if LOGPROBS in body["include"] and len(pieces) == len(answer.encode()):  # a byte a token
                assert shown.decode(errors="ignore") == part["text"].rstrip("\ufffd"), "its tokens, and no others"
        if item["type"] == "reasoning":
            assert (unsealed(item["encrypted_content"]) if SEALED in body["include"] else None) in (
                None, item["content"][0]["text"],
            )  # fmt: skip


async def test_logprobs_are_those_of_the_text(connect: Connect) -> None:
    pieces = ("<think>", "hm", "</think>", "A", "서".encode()[:1], "서".encode()[1:], "ST", call("{}"), "B")
    body = {"input": "hi", "tools": [ADD], "include": [LOGPROBS], "top_logprobs": 2, "stop": ["STOP"]}
    whole, _ = await whole_and_streamed(connect, lambda: answering(*pieces), body, **changes_for(*pieces))
    _, text, _, more = whole["output"]
    assert text["content"][0]["text"] == "A서ST"
    tokens = [entry["token"] for entry in text["content"][0]["logprobs"]]
    assert tokens[:3] == ["A", "bytes:\\xec", "bytes:\\x84\\x9c"] and tokens[3] == "ST"
    (entry,) = more["content"][0]["logprobs"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("B", [66], -0.25), "the end of turn has no text"
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -0.5]
    assert set(entry["top_logprobs"][0]) == {"token", "bytes", "logprob"}


async def test_an_answer_without_text_has_one_empty_message(connect: Connect) -> None:
    for body, status in (({}, "completed"), ({"max_output_tokens": 0}, "incomplete")):
        whole, events = await whole_and_streamed(connect, lambda: answering(), {"input": "hi"} | body, **changes_for())
        (item,) = whole["output"]
        assert (item["content"][0]["text"], item["status"], whole["status"]) == ("", status, status)
        assert rebuilt(events) == whole


async def test_a_call_that_is_cut_off_is_incomplete(connect: Connect) -> None:
    pieces = tuple(call('{"a": "long"}'))
    body = {"input": "hi", "tools": [ADD], "max_output_tokens": 55}
    whole, events = await whole_and_streamed(connect, lambda: answering(*pieces), body, **changes_for(*pieces))
    (item,) = whole["output"]
    assert (item["type"], item["status"]) == ("function_call", "incomplete")
    assert '{"a": "long"}'.startswith(item["arguments"]) and item["arguments"]
    assert events[-1]["type"] == "response.incomplete" and rebuilt(events) == whole


def renderer_of(end_reason: Any) -> tuple[ResponseRenderer, Delta]:
    head = Head(
        id="resp_1", created=1, model="m", fingerprint="f", include_usage=True, continuous_usage=False, logprobs=None,
        prompt_logprobs=None, return_token_ids=False, return_prompt_text=False, skip_special_tokens=True, tokens_as_ids=False,
        num_choices=1,
    )  # fmt: skip
    stub: Any = None
    request = Request(id="1-0", prompt_ids=[1], params=stub)
    choice = Choice(0, request, stub, SequenceLife(1, 0, 0, 1), finish_reason=end_reason)
    delta = Delta(choice, (Part("text", "a"),), (TokenEvent(request_id="1-0", index=0, token_id=97),), end_reason)
    output = Output(head, TokenTexts(ByteTokenizer(), head), is_sealed=False)
    return ResponseRenderer(head, choice, output, {}, lambda: 2.0), delta


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", "completed"), ("tool_calls", "completed"), ("length", "incomplete"), ("repetition", "incomplete")],
)
def test_why_it_ended(reason: str, status: str) -> None:
    renderer, delta = renderer_of(reason)
    events = events_of(renderer.chunk(delta, None, None).decode())
    assert events[-1]["item"]["status"] == status
    last = json.loads(renderer.ending(USAGE, None).partition(b"data: ")[2])
    assert (last["type"], last["response"]["status"]) == (f"response.{status}", status)
    details = last["response"]["incomplete_details"]
    assert details == ({"reason": "max_output_tokens"} if status == "incomplete" else None)


async def test_created_comes_with_the_first_token_even_if_that_shows_nothing(connect: Connect) -> None:
    pieces = ("서".encode()[:1], "서".encode()[1:])
    async with connect(answering(*pieces), **changes_for(*pieces)) as (http, _):
        blocks: list[str] = []
        async with http.stream("POST", RESPONSES, json={"input": "hi", "stream": True}) as response:
            blocks = [chunk async for chunk in response.aiter_text() if chunk]
    assert [event["type"] for event in events_of("".join(blocks))][:3] == [
        "response.created", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip


async def test_failure_before_the_first_token_has_its_own_status(connect: Connect) -> None:
    def fail(request: Request, index: int) -> RequestFailed:
        return RequestFailed(request_id=request.id, code="nan_logits", message="bad row")

    async with connect(answering("x", fail=fail), **changes_for("x")) as (http, _):
        response = await http.post(RESPONSES, json={"input": "hi", "stream": True})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "nan_logits"


async def test_failure_within_a_stream_is_its_last_event(connect: Connect) -> None:
    def fail(request: Request, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code="internal", message="boom") if index == 2 else None

    pieces = ("a", "b", "c")
    async with connect(answering(*pieces, fail=fail), **changes_for(*pieces)) as (http, server):
        response = await http.post(RESPONSES, json={"input": "hi", "stream": True})
        assert server.ledger.num_ended == {("failed", "internal"): 1}
    *events, last = events_of(response.text)
    assert last["type"] == "response.failed"
    assert set(last["response"]) == set(events[0]["response"])
    assert last["response"]["status"] == "failed" and last["response"]["completed_at"] is None
    assert last["response"]["error"] == {"code": "server_error", "message": "internal: boom"}
    (item,) = last["response"]["output"]
    assert (item["content"][0]["text"], item["status"]) == ("ab", "incomplete")
    assert events[-1]["type"] == "response.output_text.delta"


async def test_an_open_stream_says_wait_after_silence(connect: Connect) -> None:
    stub = answering("a", "b", hang_at=1)
    limits = ServeLimits(silence_s=0.02, total_s=0.5)
    async with connect(stub, limits=limits, **changes_for("a", "b")) as (http, _):
        response = await http.post(RESPONSES, json={"input": "hi", "stream": True})
    assert ": wait\n\n" in response.text
    events = events_of(response.text.replace(": wait\n\n", ""))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["message"].startswith("deadline_exceeded: ")
    assert "[DONE]" not in response.text


async def test_timings_come_with_the_end(connect: Connect) -> None:
    for body in ({"timings": True}, {"timings": True, "stop": ["b"]}):
        async with connect(answering("a", "b"), **changes_for("a", "b")) as (http, _):
            whole = (await http.post(RESPONSES, json={"input": "hi"} | body)).json()
            streamed = await http.post(RESPONSES, json={"input": "hi", "stream": True} | body)
        events = events_of(streamed.text)
        assert events[0]["response"]["timings"] is None
        assert set(events[-1]["response"]["timings"]) == set(whole["timings"]) >= {"total_ms", "ttft_ms", "seed"}


async def test_a_call_can_be_cancelled_by_its_response_id(connect: Connect) -> None:
    stub = answering("a", "b", hang_at=1)
    async with connect(stub, **changes_for("a", "b")) as (http, server):
        streamed = asyncio.create_task(http.post(RESPONSES, json={"input": "hi", "stream": True}))
        while not stub.num_hanging:
            await asyncio.sleep(0.002)
        (live,) = server.ledger.live
        cancelled: httpx.Response = await http.post(f"/v1/requests/resp_{live}/cancel")
        events = events_of((await streamed).text)
    assert cancelled.status_code == 200, cancelled.text
    assert events[-1]["response"]["error"]["message"].startswith("request_cancelled: ")
