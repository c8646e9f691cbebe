"""/v1/messages and count_tokens: shapes, the law that a stream tells of the whole message, and what becomes of turns."""

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import jiter
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jilju.engine.request import EngineEvent, Request, TokenEvent
from jilju.serve.context import ServeLimits
from jilju.serve.messages.shape import whole_object
from jilju.serve.sealed import sealed
from jilju.text.history import History
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .messages import (
    CLOCK,
    COUNT,
    MESSAGES,
    ROOM,
    WEATHER,
    PieceTokenizer,
    assistant,
    body,
    call,
    events_of,
    prompt_of,
    rebuilt,
    result,
    says,
    text,
    tool_use,
    user,
    with_context,
    without_ids,
)
from .stub import EOT, StubClient, StubCompiler

pytestmark = pytest.mark.anyio


# ---- answers ---------------------------------------------------------------------------------------------------------


async def test_a_message_is_what_the_contract_says(connect: Connect) -> None:
    async with connect(says("Hello!"), **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=body())
    assert response.status_code == 200
    assert response.headers["request-id"] == response.headers["x-request-id"]
    num_input = len("[user]hello\n[assistant]")
    assert response.json() == {
        "id": "msg_" + response.headers["request-id"],
        "type": "message",
        "role": "assistant",
        "model": "stub",
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_input - 3,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "output_tokens": len("Hello!") + 1,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


async def test_thoughts_text_and_calls_are_blocks_in_their_order(connect: Connect) -> None:
    answer = (
        "<think>\nWhere?\n</think>\n\nI look." + call("weather", '{"city": "서울", "n": 1.0}') + call("clock", "{}")
    )
    async with connect(says(answer), **ROOM) as (http, _):
        data = (await http.post(MESSAGES, json=body(max_tokens=300, tools=[WEATHER, CLOCK]))).json()
    thinking, said, weather, clock = data["content"]
    assert thinking == {"type": "thinking", "thinking": "Where?", "signature": sealed("Where?")}
    assert said == {"type": "text", "text": "I look."}
    request_id = data["id"].removeprefix("msg_")
    assert weather == {
        "type": "tool_use",
        "id": f"toolu_{request_id}-0-0",
        "name": "weather",
        "input": {"city": "서울", "n": 1.0},
    }
    assert clock == {"type": "tool_use", "id": f"toolu_{request_id}-0-1", "name": "clock", "input": {}}
    assert data["stop_reason"] == "tool_use"
    assert 0 < data["usage"]["output_tokens_details"]["thinking_tokens"] < data["usage"]["output_tokens"]


async def test_events_of_a_stream(connect: Connect) -> None:
    answer = "<think>Hm</think>Yes" + call("clock", '{"a":1}')
    async with connect(says(answer), **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=body(tools=[CLOCK], stream=True, stream_interval=1000))
    events = events_of(response)
    kinds = [event["type"].removeprefix("content_block_") for event in events]
    # the first token goes alone, then what is left together
    assert kinds == [
        "message_start", "start", "delta", "delta", "stop", "start", "delta", "stop", "start", "delta", "stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [event["index"] for event in events[1:-2]] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert events[1]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[2]["delta"] == {"type": "thinking_delta", "thinking": "Hm"}
    assert events[3]["delta"] == {"type": "signature_delta", "signature": sealed("Hm")}
    assert events[5]["content_block"] == {"type": "text", "text": ""}
    assert events[8]["content_block"]["input"] == {} and events[8]["content_block"]["name"] == "clock"
    assert events[9]["delta"] == {"type": "input_json_delta", "partial_json": '{"a":1}'}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 3


async def test_message_start_leaves_with_the_first_token_although_it_shows_nothing(connect: Connect) -> None:
    stub = says("<think>x</think>y", hang_at=1)
    async with connect(stub, **ROOM, limits=ServeLimits(silence_s=0.02, total_s=0.3)) as (http, server):
        response = await http.post(MESSAGES, json=body(stream=True))
        assert server.ledger.num_ended == {("deadline", "deadline_exceeded"): 1}
    start, *pings, failed = events_of(response)
    assert start["type"] == "message_start"
    assert len(pings) > 3 and all(ping == {"type": "ping"} for ping in pings)
    assert failed["error"]["type"] == "timeout_error"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([0.5, -1e30, 1e-7])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
TEXTS = st.text('ab <>{}서\n"STOP', max_size=12)
CALLS = st.builds(call, st.sampled_from(["weather", "clock", "unknown"]), OBJECTS)
ANSWERS = st.builds(
    lambda thoughts, parts: thoughts + "".join(parts),
    st.sampled_from(["", "<think>", "<think></think>", "<think>\nhm 서\n</think>\n\n", "<think>STOP</think>"]),
    st.lists(TEXTS | CALLS, max_size=5),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    answer=ANSWERS,
    cuts=st.sets(st.integers(1, 200), max_size=40),
    max_tokens=st.integers(1, 60),
    stops=st.lists(st.sampled_from(["STOP", "서", '"', "}"]), max_size=2),
    interval=st.integers(1, 5),
    display=st.sampled_from(["summarized", "omitted"]),
)
async def test_a_stream_tells_of_the_whole_message(
    connect: Connect,
    answer: str,
    cuts: set[int],
    max_tokens: int,
    stops: list[str],
    interval: int,
    display: str,
) -> None:
    data = answer.encode()
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    tokenizer = PieceTokenizer([data[a:b] for a, b in itertools.pairwise(places) if a < b])
    stub = with_context(StubClient(answer=lambda request: tokenizer.answer), 8192)
    given = body(max_tokens=max_tokens, tools=[WEATHER, CLOCK], stop_sequences=stops, stream_interval=interval)
    given["thinking"] = {"type": "adaptive", "display": display}
    async with connect(stub, tokenizer=tokenizer, **ROOM) as (http, _):
        whole = (await http.post(MESSAGES, json=given)).json()
        events = events_of(await http.post(MESSAGES, json=given | {"stream": True}))
        # what is given out can be given back
        if whole["content"]:
            turns = [*given["messages"], {"role": "assistant", "content": whole["content"]}, user(text("go on"))]
            assert (await http.post(MESSAGES, json=given | {"messages": turns})).status_code == 200
    assert without_ids(rebuilt(events)) == without_ids(whole)
    kinds = [block["type"] for block in whole["content"]]
    assert "thinking" not in kinds[1:]
    assert all(a != b or a == "tool_use" for a, b in itertools.pairwise(kinds)), "text in a row is one block"
    shown = [block.get("text", block.get("thinking")) for block in whole["content"] if block["type"] != "tool_use"]
    assert all(shown) or display == "omitted"


@settings(max_examples=200, deadline=None)
@given(value=OBJECTS, part=st.floats(0, 1))
@example(value='{"a": 12}', part=0.9)
@example(value='{"a": [1, {"b": "}', part=1)
async def test_arguments_that_were_cut_are_what_clients_make_of_them(value: str, part: float) -> None:
    cut = value[: round(len(value) * part)]
    got = whole_object(cut)
    assert json.loads(got) == (jiter.from_json(cut.encode(), partial_mode=True) if cut else {})
    assert got == cut or cut != value or value.endswith('"}')


@pytest.mark.parametrize(
    "broken", ["", " ", "[1]", "nonsense", '{"a" 1}', "}", '{"a": 1}}', "[" * 100_000, '{"a":' * 100_000]
)
async def test_arguments_that_are_no_object_are_an_empty_one(broken: str) -> None:
    assert isinstance(json.loads(whole_object(broken)), dict)


STOPS: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("abc", {}, "end_turn", None),
    ("abcSTOPd", {"stop_sequences": ["x", "STOP"]}, "stop_sequence", "STOP"),
    ("abc", {"stop_token_ids": [ord("c")]}, "end_turn", None),
    ("abc", {"max_tokens": 2}, "max_tokens", None),
    ("a" * 9000, {"max_tokens": 10_000}, "model_context_window_exceeded", None),
    (call("clock", "{}"), {"tools": [CLOCK]}, "tool_use", None),
    (call("clock", "{}"), {"tools": [CLOCK], "tool_choice": {"type": "any"}}, "tool_use", None),
    (call("clock", "{}"), {"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "clock"}}, "tool_use", None),
    (call("clock", '{"a": 1}'), {"tools": [CLOCK], "max_tokens": 50}, "max_tokens", None),
    (call("clock", '{"a": 1}'), {"tools": [CLOCK], "stop_sequences": ["1"]}, "stop_sequence", "1"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("answer", "fields", "reason", "sequence"), STOPS)
async def test_why_it_ended(
    connect: Connect, answer: str, fields: dict[str, Any], reason: str, sequence: str | None, stream: bool
) -> None:
    async with connect(says(answer), **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=body(**{"stream": stream} | fields))
    message = rebuilt(events_of(response)) if stream else response.json()
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


class LoopFound(StubClient):
    """The engine finds a loop where others reach their max_tokens."""

    async def _events(self, request: Request) -> AsyncIterator[EngineEvent]:
        async for event in super()._events(request):
            if isinstance(event, TokenEvent) and event.finish_reason == "length":
                event = msgspec.structs.replace(event, finish_reason="repetition")
            yield event


async def test_a_loop_ends_as_max_tokens_does(connect: Connect) -> None:
    loop = {"max_pattern_size": 2, "min_count": 3}
    async with connect(LoopFound(answer=lambda request: b"ab" * 9), **ROOM) as (http, _):
        data = (await http.post(MESSAGES, json=body(max_tokens=8, repetition_detection=loop))).json()
    assert (data["content"][0]["text"], data["stop_reason"], data["stop_sequence"]) == ("abababab", "max_tokens", None)


async def test_timings_ride_on_the_last_event(connect: Connect) -> None:
    async with connect(says("abc"), **ROOM) as (http, _):
        whole = (await http.post(MESSAGES, json=body(timings=True, seed=3))).json()
        events = events_of(await http.post(MESSAGES, json=body(timings=True, seed=3, stream=True)))
    assert whole["timings"]["seed"] == 3 and events[-2]["timings"]["seed"] == 3
    assert [index for index, event in enumerate(events) if "timings" in event] == [len(events) - 2]


# ---- translation -----------------------------------------------------------------------------------------------------


async def rendered(connect: Connect, *turns: dict[str, Any], **fields: Any) -> str:
    stub = says("ok")
    async with connect(stub, **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=body(messages=list(turns), **fields))
        assert response.status_code == 200, response.text
    return prompt_of(stub.requests[0])


async def test_turns_become_messages(connect: Connect) -> None:
    thoughts = {"type": "thinking", "thinking": "Where?", "signature": sealed("Where?")}
    prompt = await rendered(
        connect,
        user(text("a"), text("b")),
        assistant(thoughts, text("I look."), tool_use(city="서울"), tool_use("toolu_2", "clock")),
        user(
            text("and now?"),
            result([text("rain"), text("wind")]),
            result("no clock", "toolu_2", is_error=True),
        ),
        assistant(text("Rain.")),
        {"role": "system", "content": [text("be brief")]},
        {"role": "ctx", "content": "c"},
        {"role": "msg", "content": "m"},
        system=[text("You help.", cache_control={"type": "ephemeral"}), text("Always.")],
    )
    assert prompt == (
        "[system]You help.\nAlways.\n[user]a\nb\n"
        '[assistant]<think>Where?</think>I look.<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n'
        "[tool weather]rain\nwind\n[tool clock]Error: no clock\n[user]and now?\n"
        "[assistant]Rain.\n[system]be brief\n[user]c\nm\n[assistant]"
    )


async def test_results_alone_make_no_turn_of_the_user_and_may_be_empty(connect: Connect) -> None:
    prompt = await rendered(
        connect,
        {"role": "user", "content": "q"},
        assistant(tool_use()),
        user({"type": "tool_result", "tool_use_id": "toolu_1"}, result("Error 7", is_error=True)),
    )
    assert prompt.endswith("</tool_call>\n[tool weather]\n[tool weather]Error 7\n[assistant]")


async def test_turns_of_one_role_are_joined(connect: Connect) -> None:
    prompt = await rendered(
        connect,
        {"role": "system", "content": "s2"},
        {"role": "user", "content": "a"},
        user(text("b")),
        {"role": "assistant", "content": "c"},
        assistant(text("d")),
        user(text("e")),
        system="s1",
    )
    assert prompt == "[system]s1\ns2\n[user]a\nb\n[assistant]c\nd\n[user]e\n[assistant]"


async def test_an_omitted_thought_comes_back_by_its_signature(connect: Connect) -> None:
    stub = says("<think>secret</think>Yes")
    async with connect(stub, **ROOM) as (http, _):
        fields = body(thinking={"type": "adaptive", "display": "omitted"})
        content = (await http.post(MESSAGES, json=fields)).json()["content"]
        assert content[0] == {"type": "thinking", "thinking": "", "signature": sealed("secret")}
        turns = [*fields["messages"], {"role": "assistant", "content": content}, user(text("why?"))]
        assert (await http.post(MESSAGES, json=fields | {"messages": turns})).status_code == 200
    assert "<think>secret</think>Yes\n[user]why?" in prompt_of(stub.requests[1])


async def test_a_final_message_of_the_assistant_is_the_beginning_of_the_answer(connect: Connect) -> None:
    prompt = await rendered(connect, user(text("q")), {"role": "assistant", "content": "The best answer is ("})
    assert prompt == "[user]q\n[assistant]The best answer is ("
    assert (await rendered(connect, user(text("q")), {"role": "assistant", "content": ""})) == "[user]q\n[assistant]"


SWITCHED: list[tuple[dict[str, Any], str]] = [
    ({}, "[assistant]"),
    ({"thinking": {"type": "disabled"}}, "[assistant]<think></think>"),
    ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "[assistant]<think></think>"),
    ({"thinking": {"type": "adaptive"}}, "[assistant]"),
    ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "[assistant]"),
    ({"output_config": {"effort": "low"}}, "[assistant]"),
]


@pytest.mark.parametrize(("fields", "end"), SWITCHED)
async def test_thinking_sets_the_switch_of_the_template(connect: Connect, fields: dict[str, Any], end: str) -> None:
    assert (await rendered(connect, user(text("q")), **fields)) == "[user]q\n" + end


async def test_what_reaches_the_engine_and_the_compiler(connect: Connect) -> None:
    stub, compiler = says("ok"), StubCompiler()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with connect(stub, workers=compiler, **ROOM) as (http, _):
        for fields in (
            {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop_sequences": ["x"], "priority": 3,
             "presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"65": -100},
             "stop_token_ids": [66], "min_tokens": 2, "metadata": {"user_id": "u"}, "service_tier": "auto"},
            {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
            {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "tool", "name": "clock"}},
            {"tools": [WEATHER], "tool_choice": {"type": "none"}},
            {"structured_outputs": {"regex": "a+"}},
        ):  # fmt: skip
            response = await http.post(MESSAGES, json=body(**fields))
            assert response.status_code == 200, response.text
    first, *rest = stub.requests
    params = first.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 5, 0.1, 7)
    assert (params.stop, params.max_tokens, params.min_tokens, params.stop_token_ids) == (("x",), 100, 2, (66,))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, 0.5, 1.1)
    assert (params.logit_bias, first.priority, first.grammar) == ({65: -100}, 3, "")
    assert [source.kind for source in compiler.sources] == ["json_schema", "lark", "lark", "regex"]
    assert json.loads(compiler.sources[0].text) == schema
    assert "weather" in compiler.sources[1].text and "weather" not in compiler.sources[2].text
    assert "[tools]" in prompt_of(rest[1]) and "[tools]" not in prompt_of(rest[3]) and not rest[3].grammar


# ---- count_tokens ----------------------------------------------------------------------------------------------------

COUNTED: list[dict[str, Any]] = [
    {},
    {"system": "s", "tools": [WEATHER], "tool_choice": {"type": "any"}},
    {"thinking": {"type": "disabled"}},
    {"messages": [user(text("q")), {"role": "assistant", "content": "The"}], "temperature": 0},
    {"messages": [user(text("q")), assistant(text("a"), tool_use()), user(result("r"))], "stream": True},
]


@pytest.mark.parametrize("fields", COUNTED)
async def test_count_tokens_counts_what_a_message_counts(connect: Connect, fields: dict[str, Any]) -> None:
    given = body(**fields)
    async with connect(says("ok"), **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=given | {"stream": False})
        usage = response.json()["usage"]
        bare = {name: value for name, value in given.items() if name != "max_tokens"}
        counted = await http.post(COUNT, json=bare)
        again = await http.post(COUNT, json=given)
    assert counted.json() == again.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert counted.headers["request-id"] == counted.headers["x-request-id"]


async def test_count_tokens_counts_the_ids_that_are_kept(connect: Connect) -> None:
    """An answer stands for the tokens that were made, and those only under the salt that it was made under."""
    stub = with_context(StubClient(answer=lambda request: [*range(259, 262), EOT]), 8192)
    tokenizer = PieceTokenizer([b"one ", b"two ", b"three"])
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}[assistant]")
    turns = [user(text("q")), assistant(text("one two three")), user(text("r"))]
    async with connect(stub, tokenizer=tokenizer, history=History(), template=template, max_context=8192) as (http, _):
        plain = (await http.post(COUNT, json=body(messages=turns))).json()["input_tokens"]
        assert (await http.post(MESSAGES, json=body("q", cache_salt="s"))).status_code == 200
        kept = (await http.post(COUNT, json=body(messages=turns, cache_salt="s"))).json()["input_tokens"]
        usage = (await http.post(MESSAGES, json=body(messages=turns, cache_salt="s"))).json()["usage"]
        other = (await http.post(COUNT, json=body(messages=turns, cache_salt="t"))).json()["input_tokens"]
    assert kept == usage["input_tokens"] + usage["cache_read_input_tokens"] == plain - len("one two three") + 3
    assert other == plain


async def test_count_tokens_runs_nothing_and_refuses_what_a_message_would(connect: Connect) -> None:
    stub = says("ok")
    async with connect(stub, **ROOM) as (http, _):
        error = (await http.post(COUNT, json=body(nonsense=1))).json()
        assert error["error"] == {
            "type": "invalid_request_error",
            "message": "nonsense is no field of this route; leave it out",
        }
        assert (await http.post(COUNT, json=body(model="other"))).status_code == 404
        assert (await http.post(COUNT, json=body())).status_code == 200
    assert not stub.requests
