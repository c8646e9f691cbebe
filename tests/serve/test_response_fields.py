"""Responses: every field taken, without effect or refused, the paths that errors name, and what becomes of the input."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.engine.request import Request
from jilju.serve.responses.fields import RESPONSE
from jilju.serve.sampling import UNSUPPORTED
from jilju.serve.sealed import sealed, unsealed
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import EOT, StubClient, StubCompiler
from .test_fields import BOOLS, SHARED_GOOD, VALUES, in_range
from .test_responses import ADD, LOGPROBS, RESPONSES, SEALED, answering, changes_for, with_room

pytestmark = pytest.mark.anyio

OWN_GOOD: dict[str, set[str]] = {
    "input": {"empty", "one", "nul"},
    "instructions": {"empty", "one", "nul"},
    "max_output_tokens": in_range(0, 400, integral=True),
    "min_tokens": in_range(0, 400, integral=True),
    "tools": {"list"},
    "tool_choice": set(),  # of texts none, auto and required
    "parallel_tool_calls": BOOLS,
    "text": {"object"},
    "reasoning": {"object"},
    "include": {"list"},
    "top_logprobs": {"0"},  # more needs logprobs
    "chat_template_kwargs": {"object"},
    "metadata": {name for name, value in VALUES.items() if isinstance(value, dict)},
    "user": {name for name, value in VALUES.items() if isinstance(value, str)},
}


async def post(connect: Connect, body: dict[str, Any], **changes: Any) -> Any:
    async with connect(**changes) as (http, _):
        return await http.post(RESPONSES, json=body)


async def test_each_field_with_each_class_of_value(connect: Connect) -> None:
    good = {name: SHARED_GOOD[name] for name in RESPONSE.fields - set(OWN_GOOD)} | OWN_GOOD
    assert RESPONSE.fields == set(good), "a field is added to this table when it is served"
    async with connect(clock=VirtualClock(10**9)) as (http, _):
        for field, names in good.items():
            for name, value in VALUES.items():
                response = await http.post(RESPONSES, json={"input": "hi", field: value})
                expected = name in names or (value is None and field != "input")
                wanted = 200 if expected else 404 if field == "model" and isinstance(value, str) else 400
                assert response.status_code == wanted, (field, name, response.text[:300])
                if wanted == 400:
                    error = response.json()["error"]
                    whole_prompt = field == "instructions" and error["code"] == "context_length_exceeded"
                    assert error["param"].startswith("input" if whole_prompt else field), error
                    assert len(error["message"]) < 500


async def test_what_is_refused_and_what_has_no_effect(connect: Connect) -> None:
    body = {"input": "hi", "max_output_tokens": 1}
    contract = {"background", "previous_response_id", "conversation", "prompt", "context_management", "max_tool_calls"}
    of_chat = {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "response_format",
        "reasoning_effort",
        "functions",
    }
    assert contract | of_chat <= set(RESPONSE.later)
    async with connect(clock=VirtualClock(10**9)) as (http, _):
        for field, off in RESPONSE.later.items():
            for value in (None, *off):
                response = await http.post(RESPONSES, json=body | {field: value})
                assert response.status_code == 200, (field, value, response.text)
            for value in ("nonsense", 3, {"x": 1}, [7]):
                error = (await http.post(RESPONSES, json=body | {field: value})).json()["error"]
                assert (error["code"], error["param"]) == ("unsupported_parameter", field), error
        for field, allowed in RESPONSE.no_ops.items():
            for value in ["anything", {"a": 1}, None] if not isinstance(allowed, tuple) else [*allowed, None]:
                assert (await http.post(RESPONSES, json=body | {field: value})).status_code == 200
        for field, value in (("store", True), ("truncation", "auto"), ("verbosity", "high"), ("background", True)):
            error = (await http.post(RESPONSES, json=body | {field: value})).json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_parameter", field)
        assert (await http.post(RESPONSES, json=body | {"prompt_embeds": "x"})).json()["error"][
            "code"
        ] == "unsupported_content"


def item(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": list(parts) or "x"} | fields


USER = item()
CALL = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "x"}
THOUGHTS = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing_parameter", "input"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": [USER] * 2049}, "invalid_value", "input"),
    ({"input": [1]}, "invalid_value", "input[0]"),
    ({"input": [{}]}, "missing_parameter", "input[0].type"),
    ({"input": [USER, {"type": 1}]}, "invalid_value", "input[1].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "unsupported_parameter", "input[0].type"),
    ({"input": [USER | {"x": 1}]}, "unknown_parameter", "input[0].x"),
    ({"input": [USER | {"role": "robot"}]}, "invalid_value", "input[0].role"),
    ({"input": [USER | {"role": "tool"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"type": "message", "content": "x"}]}, "missing_parameter", "input[0].role"),
    ({"input": [{"role": "user"}]}, "missing_parameter", "input[0].content"),
    ({"input": [{"role": "user", "content": []}]}, "invalid_value", "input[0].content"),
    ({"input": [{"role": "user", "content": 1}]}, "invalid_value", "input[0].content"),
    ({"input": [USER, USER, item({"type": "text", "text": "x"})]}, "invalid_value", "input[2].content[0].type"),
    ({"input": [item({"text": "x"})]}, "invalid_value", "input[0].content[0].type"),
    ({"input": [item({"type": {}, "text": "x"})]}, "invalid_value", "input[0].content[0].type"),
    ({"input": [item({"type": "reasoning_text", "text": "x"})]}, "invalid_value", "input[0].content[0].type"),
    ({"input": [item("x")]}, "invalid_value", "input[0].content[0]"),
    ({"input": [item({"type": "input_text", "text": 1})]}, "invalid_value", "input[0].content[0].text"),
    ({"input": [item({"type": "input_text"})]}, "missing_parameter", "input[0].content[0].text"),
    ({"input": [item({"type": "input_text", "text": "x", "y": 1})]}, "unknown_parameter", "input[0].content[0].y"),
    ({"input": [item({"type": "output_text", "text": "x", "annotations": [{}]})]}, "unsupported_parameter", "input[0].content[0].annotations"),
    ({"input": [item({"type": "input_image", "image_url": "http://169.254.169.254"})]}, "unsupported_content", "input[0].content[0]"),
    ({"input": [item({"type": "input_file", "file_id": "x"})]}, "unsupported_content", "input[0].content[0]"),
    ({"input": [CALL | {"arguments": "[1]"}]}, "invalid_value", "input[0].arguments"),
    ({"input": [CALL | {"arguments": "{"}]}, "invalid_value", "input[0].arguments"),
    ({"input": [CALL | {"arguments": {}}]}, "invalid_value", "input[0].arguments"),
    ({"input": [CALL | {"name": ""}]}, "invalid_value", "input[0].name"),
    ({"input": [CALL | {"call_id": None}]}, "missing_parameter", "input[0].call_id"),
    ({"input": [CALL | {"namespace": "n"}]}, "unsupported_parameter", "input[0].namespace"),
    ({"input": [CALL | {"async": True}]}, "unsupported_parameter", "input[0].async"),
    ({"input": [CALL, RESULT | {"output": {}}]}, "invalid_value", "input[1].output"),
    ({"input": [CALL, RESULT | {"output": [{"type": "input_image"}]}]}, "unsupported_content", "input[1].output[0]"),
    ({"input": [CALL, RESULT | {"output": [{"type": "refusal", "refusal": "x"}]}]}, "invalid_value", "input[1].output[0].type"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "missing_parameter", "input[0].call_id"),
    ({"input": [THOUGHTS | {"content": None}]}, "missing_parameter", "input[0].content"),
    ({"input": [THOUGHTS | {"content": []}]}, "missing_parameter", "input[0].content"),
    ({"input": [THOUGHTS | {"content": [{"type": "input_text", "text": "x"}]}]}, "invalid_value", "input[0].content[0].type"),
    ({"input": [THOUGHTS | {"summary": [{"type": "summary_text", "text": "x"}]}]}, "unsupported_parameter", "input[0].summary"),
    ({"input": [THOUGHTS | {"encrypted_content": "gAAAAAB"}]}, "invalid_value", "input[0].encrypted_content"),
    ({"input": [THOUGHTS | {"encrypted_content": sealed("x")[:-4] + "AAA="}]}, "invalid_value", "input[0].encrypted_content"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "missing_parameter", "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "missing_parameter", "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unknown_parameter", "tools[0].function"),
    ({"tools": [ADD, ADD]}, "invalid_value", "tools[1].name"),
    ({"tools": [ADD | {"name": "a b"}]}, "invalid_value", "tools[0].name"),
    ({"tools": [ADD | {"parameters": {"type": "array"}}]}, "invalid_value", "tools[0].parameters.type"),
    ({"tools": [ADD | {"parameters": {"x": "y" * 70_000}}]}, "invalid_value", "tools[0].parameters"),
    ({"tools": [ADD | {"parameters": 1}]}, "invalid_value", "tools[0].parameters"),
    ({"tools": [ADD | {"defer_loading": True}]}, "unsupported_parameter", "tools[0].defer_loading"),
    ({"tools": [ADD] * 129}, "invalid_value", "tools"),
    ({"tools": [1]}, "invalid_value", "tools[0]"),
    ({"tool_choice": "maybe"}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "invalid_value", "tool_choice.name"),
    ({"tools": [ADD], "tool_choice": {"type": "function"}}, "missing_parameter", "tool_choice.name"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": 1}}, "invalid_value", "tool_choice.name"),
    ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "unsupported_parameter", "tool_choice.type"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "add", "x": 1}}, "unknown_parameter", "tool_choice.x"),
    ({"text": {"x": 1}}, "unknown_parameter", "text.x"),
    ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
    ({"text": {"format": "json"}}, "invalid_value", "text.format"),
    ({"text": {"format": {}}}, "missing_parameter", "text.format.type"),
    ({"text": {"format": {"type": "grammar"}}}, "invalid_value", "text.format.type"),
    ({"text": {"format": {"type": "text", "name": "x"}}}, "unknown_parameter", "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "missing_parameter", "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "missing_parameter", "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "n" * 65, "schema": {}}}}, "invalid_value", "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"x": "y" * 300_000}}}}, "invalid_value", "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "json_schema": {}}}}, "unknown_parameter", "text.format.json_schema"),
    ({"text": {"format": {"type": "json_object"}}, "tools": [ADD]}, "conflicting_parameters", "text.format"),
    ({"reasoning": {"effort": "huge"}}, "invalid_value", "reasoning.effort"),
    ({"reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "unsupported_parameter", "reasoning.summary"),
    ({"reasoning": {"generate_summary": "auto"}}, "unsupported_parameter", "reasoning.generate_summary"),
    ({"reasoning": {"x": 1}}, "unknown_parameter", "reasoning.x"),
    ({"include": [LOGPROBS, "code_interpreter_call.outputs"]}, "unsupported_parameter", "include[1]"),
    ({"include": ["nonsense"]}, "invalid_value", "include[0]"),
    ({"include": [1]}, "invalid_value", "include[0]"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 21, "include": [LOGPROBS]}, "invalid_value", "top_logprobs"),
    ({"stream_options": {"include_obfuscation": False}}, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "unsupported_parameter", "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "unsupported_parameter", "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
    ({"chat_template_kwargs": {"x": 1}}, "invalid_value", "chat_template_kwargs"),
    ({"max_output_tokens": 513}, "context_length_exceeded", "max_output_tokens"),
    ({"input": "x" * 600}, "context_length_exceeded", "input"),
    ({"nonsense": None}, "unknown_parameter", "nonsense"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param"), CASES, ids=[f"{param}-{code}" for _, code, param in CASES])
async def test_errors_name_the_path_in_the_callers_words(
    connect: Connect, body: dict[str, Any], code: str, param: str
) -> None:
    response = await post(connect, ({"input": "hi"} if "input" not in body and body else {}) | body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
    assert len(error["message"]) < 500
    assert "messages" not in error["message"] and "max_completion_tokens" not in error["message"]


async def test_the_templates_refusals_are_of_the_input(connect: Connect) -> None:
    refusing = ChatTemplate("{{ raise_exception('no system') }}")
    for changes, code in (({"template": refusing}, "template_error"), ({"template": None}, "template_error"),
                          ({"template": ChatTemplate("{{ '' }}")}, "empty_prompt")):  # fmt: skip
        error = (await post(connect, {"input": "hi"}, **changes)).json()["error"]
        assert (error["code"], error["param"]) == (code, "input")


async def test_a_lenient_server_names_what_it_leaves_out(connect: Connect) -> None:
    parts = item({"type": "input_text", "text": "x", "b": 1}, a=1)
    body = {"input": [parts], "text": {"c": 1}, "reasoning": {"d": 1}, "tools": [ADD | {"e": 1}], "f": 1}
    response = await post(connect, body, stub=with_room(StubClient()), lenient=True, max_context=100_000)
    assert response.status_code == 200, response.text
    assert response.headers["x-jilju-ignored"].split(", ") == [
        "input[0].a", "input[0].content[0].b", "tools[0].e", "text.c", "reasoning.d", "f",
    ]  # fmt: skip
    for known in ({"store": True}, {"input": [{"type": "item_reference", "id": "x"}]}, {"tools": [{"type": "mcp"}]}):
        error = (await post(connect, {"input": "x"} | known, lenient=True)).json()["error"]
        assert error["code"] == "unsupported_parameter"


async def prompt_of(connect: Connect, **body: Any) -> str:
    """What the model is given, as text."""
    stub = answering("x")
    response = await post(connect, {"max_output_tokens": 1} | body, stub=stub, **changes_for("x"))
    assert response.status_code == 200, response.text
    return bytes(stub.requests[0].prompt_ids).decode()


async def test_input_becomes_messages(connect: Connect) -> None:
    assert await prompt_of(connect, input="hi") == "[user]hi\n[assistant]"
    assert await prompt_of(connect, input="hi", instructions="be kind") == "[system]be kind\n[user]hi\n[assistant]"
    parts = item({"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b", "cache_control": {}})
    developer = {"role": "developer", "content": "d"}
    said = item({"type": "output_text", "text": "s", "annotations": [], "logprobs": []}, {"type": "refusal", "refusal": "no"},
                role="assistant", id="msg_1", status="completed", phase="final_answer")  # fmt: skip
    got = await prompt_of(connect, input=[developer, parts, said, USER], instructions="i")
    assert got == "[system]i\n[system]d\n[user]a\nb\n[assistant]s\nno\n[user]x\n[assistant]"


async def test_a_turn_of_the_assistant_becomes_one_message(connect: Connect) -> None:
    said = item(role="assistant")
    other = CALL | {"call_id": "d", "arguments": '{"a": 1}', "id": "fc_1", "status": "completed"}
    called = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    called_other = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    result = RESULT | {"output": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]}
    other_result = RESULT | {"call_id": "d"}
    cases: list[tuple[list[Any], str]] = [
        ([CALL, other, result, other_result], f"[assistant]{called}{called_other}\n[tool]1\n2\n[tool]x\n"),
        ([said, CALL, RESULT], f"[assistant]x{called}\n[tool]x\n"),
        ([THOUGHTS, said, CALL, RESULT], f"[assistant]<think>hm</think>x{called}\n[tool]x\n"),
        ([THOUGHTS, CALL, RESULT, THOUGHTS, said],
         f"[assistant]<think>hm</think>{called}\n[tool]x\n[assistant]<think>hm</think>x\n"),
        ([CALL, said, CALL], f"[assistant]{called}\n[assistant]x{called}\n"),
        ([CALL, THOUGHTS, other], f"[assistant]{called}\n[assistant]<think>hm</think>{called_other}\n"),
        ([said, said], "[assistant]x\n[assistant]x\n"),
        ([THOUGHTS, THOUGHTS, said], "[assistant]<think>hm\nhm</think>x\n"),
        ([THOUGHTS], "[assistant]<think>hm</think>\n"),
        ([THOUGHTS | {"content": None, "encrypted_content": sealed("서울")}, said], "[assistant]<think>서울</think>x\n"),
        ([THOUGHTS | {"encrypted_content": sealed("kept")}, said], "[assistant]<think>kept</think>x\n"),
    ]  # fmt: skip
    for items, expected in cases:
        got = await prompt_of(connect, input=[USER, *items, USER])
        assert got == f"[user]x\n{expected}[user]x\n[assistant]", items


async def test_tools_and_their_choice_reach_template_and_grammar(connect: Connect) -> None:
    sub = ADD | {"name": "sub", "description": "takes away", "strict": False}

    async def told(**body: Any) -> tuple[str, list[str]]:
        compiler = StubCompiler()
        stub = answering("x")
        changes = changes_for("x") | {"workers": compiler}
        response = await post(connect, {"input": "hi", "tools": [ADD, sub]} | body, stub=stub, **changes)
        assert response.status_code == 200, response.text
        assert stub.requests[0].grammar == "".join(f"{s.kind}: {s.text}" for s in compiler.sources)
        prompt = bytes(stub.requests[0].prompt_ids).decode()
        return prompt.partition("[user]")[0], [source.text for source in compiler.sources]

    free = await told()
    assert free == await told(tool_choice="auto") and free[0] == "[tools add sub]" and len(free[1]) == 1
    must = await told(tool_choice="required")
    one = await told(tool_choice="required", parallel_tool_calls=False)
    named = await told(tool_choice={"type": "function", "name": "sub"})
    assert len({free[1][0], must[1][0], one[1][0], named[1][0]}) == 4
    assert '"add"' not in named[1][0].replace("\\", "") and "sub" in named[1][0]
    assert await told(tool_choice="none") == ("", [])


async def test_a_format_reaches_the_grammar(connect: Connect) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    formats: list[tuple[dict[str, Any], str]] = [
        ({"type": "text"}, ""),
        ({"type": "json_object"}, "json_object: "),
        ({"type": "json_schema", "name": "n", "schema": schema}, 'json_schema: {"type":"object","properties":{"a":{"type":"integer"}}}'),
    ]  # fmt: skip
    for form, grammar in formats:
        stub = StubClient()
        assert (await post(connect, {"input": "hi", "text": {"format": form}}, stub=stub)).status_code == 200
        assert stub.requests[0].grammar == grammar


async def test_effort_and_kwargs_set_the_templates_switch(connect: Connect) -> None:
    assert (await prompt_of(connect, input="hi", reasoning={"effort": "none"})).startswith("[thinking False]")
    assert (await prompt_of(connect, input="hi", reasoning={"effort": "low"})).startswith("[thinking True]")
    switched = await prompt_of(connect, input="hi", chat_template_kwargs={"enable_thinking": False})
    assert switched.startswith("[thinking False]")
    assert (await prompt_of(connect, input="hi", reasoning={"summary": "auto"})).startswith("[user]")


async def test_what_reaches_the_engine(connect: Connect) -> None:
    stub = StubClient()
    body = {
        "input": "hi", "max_output_tokens": 9, "min_tokens": 2, "ignore_eos": True, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
        "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"97": 1}, "seed": 5,
        "stop": ["zz"], "stop_token_ids": [65], "bad_words": ["q"], "allowed_token_ids": [97, 98], "include": [LOGPROBS],
        "top_logprobs": 3, "cache_salt": "s", "priority": -3, "deadline_ms": 500_000, "max_queue_ms": 50_000, "request_id": "r",
        "session_id": "t", "skip_special_tokens": False, "repetition_detection": {"max_pattern_size": 2, "min_count": 3},
    }  # fmt: skip
    assert (await post(connect, body, stub=stub)).status_code == 200
    (request,) = stub.requests
    params = request.params
    assert (params.max_tokens, params.min_tokens, params.ignore_eos, params.temperature, params.top_p, params.top_k) == (9, 2, True, 0.5, 0.9, 7)  # fmt: skip
    assert (params.min_p, params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        0.1,
        1.1,
        1,
        -1,
    )
    assert (params.logit_bias, params.seed, params.stop, params.logprobs) == ({97: 1}, 5, ("zz",), 3)
    assert params.allowed_token_ids == (97, 98) and params.bad_words_ids and params.repetition_detection is not None
    assert request.end_ids == (65,) and request.priority == -3 and request.salt
    plain = await post(connect, {"input": "hi"}, stub=stub)
    assert plain.status_code == 200
    assert stub.requests[1].params.logprobs is None
    assert stub.requests[1].params.max_tokens == 512 - stub.requests[1].num_prompt_tokens, "what is left of the context"


async def test_thoughts_go_out_sealed_and_come_back(connect: Connect) -> None:
    pieces = ("<think>", "deep ", "서울", "</think>", "Yes")
    given: list[Request] = []

    def answer(request: Request) -> list[int]:
        given.append(request)
        return [*range(259, 264), EOT]

    stub = with_room(StubClient(answer=answer))
    async with connect(stub, **changes_for(*pieces)) as (http, _):
        first = (await http.post(RESPONSES, json={"input": "hi", "include": [SEALED]})).json()
        thoughts, said = first["output"]
        assert unsealed(thoughts["encrypted_content"]) == thoughts["content"][0]["text"] == "deep 서울"
        del thoughts["content"]  # as some clients do
        follow = [{"role": "user", "content": "hi"}, thoughts, said, {"role": "user", "content": "more"}]
        assert (await http.post(RESPONSES, json={"input": follow})).status_code == 200
        plain = (await http.post(RESPONSES, json={"input": "hi"})).json()
    assert "encrypted_content" not in plain["output"][0]
    assert (
        bytes(given[1].prompt_ids).decode()
        == "[user]hi\n[assistant]<think>deep 서울</think>Yes\n[user]more\n[assistant]"
    )


@given(st.text())
def test_what_is_sealed_comes_back(text: str) -> None:
    assert unsealed(sealed(text)) == text


@given(st.text() | st.binary().map(lambda data: data.hex()) | st.just(""), st.integers(0, 30), st.characters())
def test_what_is_not_ours_or_is_altered_does_not(text: str, at: int, other: str) -> None:
    assert unsealed(text) is None
    whole = sealed("thoughts of a model")
    altered = whole[:at] + other + whole[at + 1 :]
    assert altered == whole or unsealed(altered) is None
    assert unsealed(whole[:at]) is None


def test_the_document_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "responses.md").read_text(encoding="utf-8")
    fields = text.partition("\n## Fields\n")[2].partition("\n### Items")[0]
    table, _, below = fields.partition("\nWithout effect:")
    no_effect, _, refused = below.partition("\nRefused with")

    def names(part: str) -> set[str]:
        return set(re.findall(r"`(\w+)`", part))

    taken = set().union(*(names(row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")))
    assert taken == RESPONSE.fields
    assert names(no_effect) == set(RESPONSE.no_ops)
    assert names(refused) - {"unsupported_parameter", "unsupported_content", "include"} == set(RESPONSE.later) - set(
        UNSUPPORTED
    )
