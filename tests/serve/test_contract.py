"""What a call can ask for beside the text: calls of tools, forms, probabilities, pieces of the prompt, and how it is sent."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jilju.engine.request import Request
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import EOT, StubClient, StubCompiler
from .test_answers import CHAT, COMPLETIONS, chat_body

pytestmark = pytest.mark.anyio

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
THINKING = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def saying(text: str) -> StubClient:
    def answer(request: Request) -> Sequence[int]:
        return [*text.encode(), EOT]

    return StubClient(answer=answer, max_context=4096)


async def both(
    connect: Connect, stub: StubClient, body: dict[str, Any], **changes: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice of a whole answer, and the same put together from a stream."""
    async with connect(stub, **changes) as (http, _):
        whole = await http.post(CHAT, json=body)
        assert whole.status_code == 200, whole.text
        streamed = await http.post(CHAT, json=body | {"stream": True})
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    choice: dict[str, Any] = {}
    for line in streamed.text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        (part,) = json.loads(line[6:])["choices"]
        delta = part["delta"]
        for name in ("content", "reasoning", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        choice = {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return whole.json()["choices"][0], choice | {"message": message}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls hold the call's own, which is another one each time."""
    calls = [call | {"id": call["id"].rpartition("-")[2]} for call in message.get("tool_calls", [])]
    return message | ({"tool_calls": calls} if calls else {}) | {"content": message["content"] or None}


@pytest.mark.parametrize(
    "text",
    [
        "Let me see.\n" + CALL,
        CALL,
        CALL + "\n" + OTHER_CALL,
        "no call",
        '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>',
    ],
)
async def test_calls_are_the_same_streamed_and_whole(connect: Connect, text: str) -> None:
    whole, streamed = await both(connect, saying(text), chat_body(tools=TOOLS))
    assert without_ids(whole["message"]) == without_ids(streamed["message"])
    assert whole["finish_reason"] == streamed["finish_reason"]
    calls = whole["message"].get("tool_calls", [])
    assert (whole["finish_reason"] == "tool_calls") == bool(calls)
    assert [call["function"]["name"] for call in calls] == [name for name in ("weather", "time") if f'"{name}"' in text]
    for call in calls:
        assert json.loads(call["function"]["arguments"]) in ({"city": "서울"}, {})
    if not calls:
        assert whole["message"]["content"] == text


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                CALL,
                OTHER_CALL,
                "<tool_call>",
                "</tool_call>",
                "{",
                "}",
                '"',
                "가",
                "👩‍👧",
                "\n",
                "text",
                '{"name": "time"',
            ]
        )
    )
)
async def test_no_text_of_a_model_breaks_the_answer(connect: Connect, pieces: list[str]) -> None:
    whole, streamed = await both(connect, saying("".join(pieces)), chat_body(tools=TOOLS, max_tokens=400))
    assert without_ids(whole["message"]) == without_ids(streamed["message"])


async def test_a_choice_of_tools_reaches_grammar_and_finish_reason(connect: Connect) -> None:
    stub, compiler = saying(CALL), StubCompiler()
    async with connect(stub, workers=compiler) as (http, _):
        for choice, kinds, reason in (
            ("auto", ["lark"], "tool_calls"),
            ("required", ["lark"], "tool_calls"),
            ({"type": "function", "function": {"name": "weather"}}, ["lark"], "stop"),
            ("none", [], "stop"),
        ):
            compiler.sources.clear()
            answer = (await http.post(CHAT, json=chat_body(tools=TOOLS, tool_choice=choice))).json()["choices"][0]
            assert [source.kind for source in compiler.sources] == kinds
            assert answer["finish_reason"] == reason
            assert ("tool_calls" in answer["message"]) == bool(kinds)
            assert stub.requests[-1].grammar == (f"lark: {compiler.sources[0].text}" if kinds else "")
        assert "time" not in compiler.sources[0].text if compiler.sources else True
    prompts = [bytes(request.prompt_ids).decode() for request in stub.requests]
    assert all("weather" in prompt for prompt in prompts[:3])
    assert "weather" not in prompts[3], "a model that may not call is not told of tools"


async def test_earlier_calls_and_results_reach_the_template(connect: Connect) -> None:
    stub = StubClient(max_context=4096)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "서울"}'}}
    messages = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    async with connect(stub) as (http, _):
        assert (await http.post(CHAT, json={"messages": messages, "tools": TOOLS, "max_tokens": 1})).status_code == 200
    prompt = bytes(stub.requests[0].prompt_ids).decode()
    assert "서울" in prompt and "rain" in prompt and "<tool_call>" in prompt


@pytest.mark.parametrize(
    "text", ["<think>\n음…\n</think>\n\nYes.", "<think>never closed", "no thoughts", "<think></think>"]
)
async def test_thoughts_are_split_off(connect: Connect, text: str) -> None:
    template = ChatTemplate(THINKING)
    whole, streamed = await both(connect, saying(text), chat_body(), template=template)
    assert without_ids(whole["message"]) == without_ids(streamed["message"])
    message = whole["message"]
    assert ("reasoning" in message) == ("음" in text or "never" in text)
    assert message.get("reasoning") == message.get("reasoning_content")
    hidden, _ = await both(connect, saying(text), chat_body(include_reasoning=False), template=template)
    assert "reasoning" not in hidden["message"]
    assert hidden["message"]["content"] == message["content"]
    assert "think" not in (message["content"] or "") or "<think>" not in text


async def test_effort_switches_thinking(connect: Connect) -> None:
    stub = saying("x")
    async with connect(stub, template=ChatTemplate(THINKING)) as (http, _):
        for effort in ("none", "high", None):
            assert (await http.post(CHAT, json=chat_body(reasoning_effort=effort))).status_code == 200
        data = (await http.post(CHAT, json=chat_body())).json()
    off, on, unset = (b"</think>" in bytes(request.prompt_ids) for request in stub.requests[:3])
    assert (off, on, unset) == (True, False, False)
    assert data["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_forms_reach_the_engine(connect: Connect) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}, "strict": True}}},
         "json_schema", '{"type":"integer"}'),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "json_schema", '{"type":"integer"}'),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "json_schema", '{"type":"integer"}'),
        ({"structured_outputs": {"regex": "[0-9]+"}}, "regex", "[0-9]+"),
        ({"structured_outputs": {"choice": ["예", "no"]}}, "choice", '["예","no"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ]  # fmt: skip
    stub = StubClient()
    async with connect(stub) as (http, _):
        for fields, kind, text in cases:
            for path, body in ((CHAT, chat_body()), (COMPLETIONS, {"prompt": "x"})):
                response = await http.post(path, json=body | fields | {"max_tokens": 2, "timings": True})
                assert response.status_code == 200, response.text
                assert stub.requests[-1].grammar == f"{kind}: {text}"
    async with connect(stub, workers=None) as (http, _):
        response = await http.post(CHAT, json=chat_body(response_format={"type": "json_object"}))
        assert response.json()["error"]["code"] == "unsupported_parameter"


async def test_the_best_of_several_come_first(connect: Connect) -> None:
    async with connect(StubClient()) as (http, _):
        base = {"prompt": ["a", "b"], "temperature": 1, "seed": 3, "max_tokens": 20}
        best = (await http.post(COMPLETIONS, json=base | {"n": 2, "best_of": 5})).json()
        every = (await http.post(COMPLETIONS, json=base | {"n": 5})).json()
        refused = await http.post(COMPLETIONS, json=base | {"n": 3, "best_of": 2})
        streamed = await http.post(COMPLETIONS, json=base | {"best_of": 2, "stream": True})
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in best["choices"]] == [None] * 4
    texts = [choice["text"] for choice in every["choices"]]
    assert {c["text"] for c in best["choices"][:2]} <= set(texts[:5])
    assert {c["text"] for c in best["choices"][2:]} <= set(texts[5:])
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]
    assert (refused.json()["error"]["param"], refused.status_code) == ("best_of", 400)
    assert streamed.json()["error"]["code"] == "conflicting_parameters"


async def test_an_echo_and_what_it_scores(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        body = {"prompt": "서울 a", "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
        whole = (await http.post(COMPLETIONS, json=body)).json()["choices"][0]
        plain = (await http.post(COMPLETIONS, json=body | {"echo": False})).json()["choices"][0]
        scored = (await http.post(COMPLETIONS, json=body | {"max_tokens": 0})).json()["choices"][0]
        by_ids = (await http.post(COMPLETIONS, json=body | {"prompt": [97, 98], "logprobs": None})).json()["choices"][0]
        lines = (await http.post(COMPLETIONS, json=body | {"stream": True})).text.split("\n\n")
    assert whole["text"] == "서울 a" + plain["text"]
    assert by_ids["text"].startswith("ab")
    logprobs = whole["logprobs"]
    count = len("서울 a".encode())
    assert len(logprobs["tokens"]) == count + 3
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:] == [-0.25] * (count + 2)
    assert logprobs["text_offset"][:count] == [0, 0, 0, 1, 1, 1, 2, 3]
    assert scored["text"] == "서울 a" and scored["finish_reason"] == "length"
    assert scored["logprobs"]["token_logprobs"] == [None] + [-0.25] * (count - 1)
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["tokens"]] == logprobs[
        "tokens"
    ]


async def test_logprobs_of_the_prompt(connect: Connect) -> None:
    async with connect(StubClient()) as (http, _):
        chat = (await http.post(CHAT, json=chat_body("hi", prompt_logprobs=2, max_tokens=1))).json()
        two = (await http.post(COMPLETIONS, json={"prompt": ["ab", "c"], "prompt_logprobs": 0, "max_tokens": 1})).json()
    places = chat["prompt_logprobs"]
    assert places[0] is None and len(places) == chat["usage"]["prompt_tokens"]
    assert all(len(place) == 2 and next(iter(place.values()))["rank"] == 1 for place in places[1:])
    assert two["prompt_logprobs"] == [[None, {"98": {"logprob": -0.25, "rank": None, "decoded_token": "b"}}], [None]]


async def test_chosen_ids_have_their_logprobs(connect: Connect) -> None:
    async with connect(StubClient()) as (http, _):
        body = chat_body(logprobs=True, logprob_token_ids=[65, 258], max_tokens=2, return_tokens_as_token_ids=True)
        entries = (await http.post(CHAT, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert [[top["token"] for top in entry["top_logprobs"]] for entry in entries] == [
        ["token_id:65", "token_id:258"]
    ] * 2
    assert all(entry["token"].startswith("token_id:") for entry in entries)


@pytest.mark.parametrize("interval", [1, 3, 1000])
async def test_an_interval_puts_tokens_together(connect: Connect, interval: int) -> None:
    body = chat_body(stream=True, stream_interval=interval, return_token_ids=True, temperature=0)
    async with connect(StubClient()) as (http, _):
        text = (await http.post(CHAT, json=body)).text
        whole = (await http.post(CHAT, json=chat_body(temperature=0))).json()["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n") if line.startswith("data: {")][1:]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole
    counts = [len(chunk["token_ids"]) for chunk in chunks]
    assert counts[0] == 1 and all(count == interval for count in counts[1:-1]) and counts[-1] <= max(1, interval)
    assert chunks[-1]["finish_reason"] == "stop"


async def test_stop_strings_may_be_included(connect: Connect) -> None:
    async with connect(saying("one STOP two")) as (http, _):
        for included, want in ((True, "one STOP"), (False, "one ")):
            body = chat_body(stop=["STOP"], include_stop_str_in_output=included)
            choice = (await http.post(CHAT, json=body)).json()["choices"][0]
            assert (choice["message"]["content"], choice["stop_reason"]) == (want, "STOP")


async def test_prompts_are_cut_only_when_asked(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        for fields, want in (
            ({"truncate_prompt_tokens": 3}, b"hij"),
            ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"abc"),
            ({"truncate_prompt_tokens": 20}, b"abcdefghij"),
            ({}, b"abcdefghij"),
        ):
            data = (await http.post(COMPLETIONS, json={"prompt": "abcdefghij", "max_tokens": 1} | fields)).json()
            assert bytes(stub.requests[-1].prompt_ids) == want
            assert data["usage"]["prompt_tokens_details"]["truncated_tokens"] == 10 - len(want)
        long = {"prompt": "x" * 600, "max_tokens": 12}
        assert (await http.post(COMPLETIONS, json=long)).status_code == 400
        assert (await http.post(COMPLETIONS, json=long | {"truncate_prompt_tokens": -1})).status_code == 200
    assert len(stub.requests[-1].prompt_ids) == 500


async def test_bad_words_and_loops_reach_the_engine(connect: Connect) -> None:
    stub = StubClient()
    loop = {"max_pattern_size": 4, "min_count": 3}
    async with connect(stub) as (http, _):
        await http.post(CHAT, json=chat_body(bad_words=["ab", " c"], repetition_detection=loop, max_tokens=1))
    params = stub.requests[0].params
    assert set(params.bad_words_ids) == {(97, 98), (32, 97, 98), (32, 99)}
    assert params.repetition_detection is not None
    assert (params.repetition_detection.min_pattern_size, params.repetition_detection.min_count) == (1, 3)


async def test_the_final_message_is_continued(connect: Connect) -> None:
    stub = StubClient()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    async with connect(stub) as (http, _):
        await http.post(CHAT, json={"messages": messages, "continue_final_message": True, "max_tokens": 1})
        await http.post(CHAT, json={"messages": messages, "add_generation_prompt": False, "max_tokens": 1})
        await http.post(CHAT, json={"messages": messages, "max_tokens": 1, "return_prompt_text": True})
    prompts = [bytes(request.prompt_ids).decode() for request in stub.requests]
    assert prompts == ["[user]hi\n[assistant]The answer", "[user]hi\n[assistant]The answer\n",
                       "[user]hi\n[assistant]The answer\n[assistant]"]  # fmt: skip


async def test_a_template_of_the_call(connect: Connect) -> None:
    stub = StubClient()
    body = chat_body(
        "hi",
        chat_template="<{{ messages[0].content }}|{{ mood }}>",
        chat_template_kwargs={"mood": "merry"},
        max_tokens=1,
    )
    async with connect(stub, allow_request_template=True) as (http, _):
        assert (await http.post(CHAT, json=body)).status_code == 200
        broken = await http.post(CHAT, json=body | {"chat_template": "{% if %}"})
    assert bytes(stub.requests[0].prompt_ids) == b"<hi|merry>"
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "chat_template")


async def test_rendering_shows_what_would_run(connect: Connect) -> None:
    stub = StubClient()
    messages = [
        {"role": "user", "content": "안녕"},
        {"role": "assistant", "content": "Hi <|im_end|>"},
        {"role": "user", "content": "bye"},
    ]
    body = {"messages": messages, "max_tokens": 5, "return_token_offsets": True, "seed": 4, "stop": "x"}
    async with connect(stub) as (http, _):
        rendered = await http.post(CHAT + "/render", json=body)
        assert rendered.status_code == 200, rendered.text
        del body["return_token_offsets"]
        await http.post(CHAT, json=body)
        two = [
            (await http.post(COMPLETIONS + "/render", json={"prompt": prompt})).json()[0]
            for prompt in ("<|bos|>", [256, 256, 97])
        ]
    data = rendered.json()
    assert data["token_ids"] == stub.requests[0].prompt_ids
    assert data["count"] == len(data["token_ids"])
    assert data["prompt_text"] == "[user]안녕\n[assistant]Hi <|im_end|>\n[user]bye\n[assistant]"
    shown = [data["prompt_text"][slice(*message["content_span"])] for message in data["messages"]]
    assert shown == ["안녕", "Hi <|im_end|>", "bye"]
    assert [(warning["code"], warning["message"]) for warning in data["warnings"]] == [("control_token_text", 1)]
    assert (data["sampling"]["seed"], data["sampling"]["max_tokens"], data["sampling"]["stop"]) == (4, 5, ["x"])
    assert [data["prompt_text"][slice(*offset)] for offset in data["token_offsets"]][:9] == [
        *"[user]",
        "안",
        "안",
        "안",
    ]
    assert not any(warning["code"] == "double_bos" for warning in two[0]["warnings"])
    assert [warning["code"] for warning in two[1]["warnings"]] == ["double_bos"]


async def test_a_rerendered_answer_is_warned_of(connect: Connect) -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}[assistant]")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "c"},
    ]
    async with connect(template=template) as (http, _):
        data = (await http.post(CHAT + "/render", json={"messages": messages})).json()
    (warning,) = data["warnings"]
    assert (warning["code"], warning["message"]) == ("rendered_differently", 1)
    assert [data["prompt_text"][slice(*m["content_span"])] for m in data["messages"]] == ["a", "b", "c"]
