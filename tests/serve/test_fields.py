"""Fields: every served field against every class of bad value, and the rule that nothing is accepted and ignored."""

import json
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.serve.chat.api import CHAT as CHAT_RULES
from jilju.serve.openai_completions import COMPLETION as COMPLETION_RULES
from jilju.serve.sampling import NO_OPS, UNSUPPORTED

from .conftest import Connect
from .stub import ByteTokenizer, StubClient
from .test_answers import CHAT, COMPLETIONS, chat_body

pytestmark = pytest.mark.anyio

HUGE = "x" * 100_000
DEEP: Any = 1
for _ in range(50):
    DEEP = [DEEP]
NAMES = st.sampled_from(
    sorted(
        CHAT_RULES.fields
        | COMPLETION_RULES.fields
        | set(UNSUPPORTED)
        | set(NO_OPS)
        | {"type", "text", "role", "tokens", "n\0"}
    )
)
VALUES: dict[str, Any] = {
    "null": None, "true": True, "false": False, "empty": "", "one": "1", "huge": HUGE, "nul": "\0", "list": [], "object": {},
    "deep": DEEP, "list of null": [None], "list of list": [[]], "object of null": {"a": None},
    "-1": -1, "-2": -2, "0": 0, "1": 1, "2": 2, "1.0": 1.0, "1.5": 1.5, "2.5": 2.5, "-0.0": -0.0, "1e-30": 1e-30, "1e308": 1e308,
    "16": 16, "17": 17, "100": 100, "101": 101, "-100": -100, "-101": -101, "600000": 600_000, "600001": 600_001, "21": 21, "513": 513, "2^31": 2**31, "2^63": 2**63, "2^63-1": 2**63 - 1, "-2^63": -(2**63), "-2^63-1": -(2**63) - 1,
    "2^64": 2**64, "ids": [1, 2], "id V": [259], "strings": ["a", "b"], "mixed": ["a", 1], "17 strings": ["a"] * 17,
    "string of 257": ["a" * 257], "65 ids": [1] * 65, "129 prompts": ["a"] * 129,
    "biases": {"0": -100, "258": 0.5}, "bias of V": {"259": 1}, "bias beyond": {"1": -100.5}, "bias of true": {"1": True},
    "bias of a string": {"1": "2"}, "bias of 01": {"01": 1}, "bias of -1": {"-1": 1}, "bias of 1.0": {"1.0": 1}, "long key": {"1" * 5000: 1},
    "bias of another digit": {"\u0661": 1}, "1025 biases": {str(i): 1 for i in range(1025)},
}  # fmt: skip
NUMBERS = {name: value for name, value in VALUES.items() if type(value) in (int, float)}


def in_range(low: float, high: float, *, integral: bool, above: bool = False) -> set[str]:
    return {
        name
        for name, value in NUMBERS.items()
        if (low < value if above else low <= value) and value <= high and (not integral or type(value) is int)
    }


BOOLS = {"true", "false"}
SHARED_GOOD: dict[str, set[str]] = {
    "max_tokens": in_range(0, 400, integral=True),
    "min_tokens": in_range(0, 16, integral=True),
    "ignore_eos": BOOLS,
    "temperature": in_range(0, 2, integral=False),
    "top_p": in_range(0, 1, integral=False, above=True),
    "top_k": in_range(-1, 259, integral=True),
    "min_p": in_range(0, 1, integral=False),
    "repetition_penalty": in_range(0, 2, integral=False, above=True),
    "presence_penalty": in_range(-2, 2, integral=False),
    "frequency_penalty": in_range(-2, 2, integral=False),
    "logit_bias": {"object", "biases"},
    "allowed_token_ids": {"ids", "65 ids"},
    "seed": in_range(-(2**63), 2**63 - 1, integral=True),
    "stop": {"one", "nul", "list", "strings"},
    "stop_token_ids": {"list", "ids"},
    "skip_special_tokens": BOOLS,
    "stream": BOOLS,
    "stream_options": set(),  # never without stream
    "return_token_ids": BOOLS,
    "return_tokens_as_token_ids": BOOLS,
    "return_prompt_text": BOOLS,
    "return_token_offsets": {"false"},
    "stream_interval": in_range(1, 2**31 - 1, integral=True),
    "bad_words": {"list", "strings", "17 strings"},
    "logprob_token_ids": {"list"},  # more needs logprobs
    "prompt_logprobs": in_range(0, 20, integral=True),
    "repetition_detection": {"loop"},
    "response_format": {"no format", "json object"},
    "structured_outputs": {"any json"},
    "include_stop_str_in_output": BOOLS,
    "truncate_prompt_tokens": in_range(-1, 2**31 - 1, integral=True) - {"0"},
    "truncation_side": {"left"},
    "timings": BOOLS,
    "n": in_range(1, 16, integral=True),
    "cache_salt": {"one", "nul"},
    "priority": in_range(-100, 100, integral=True),
    "deadline_ms": in_range(1, 600_000, integral=True),
    "max_queue_ms": in_range(1, 600_000, integral=True),
    "add_special_tokens": BOOLS,
    "request_id": {"empty", "one", "nul"},
    "session_id": {"empty", "one", "nul"},
    "model": set(),
}
GOOD = {
    CHAT: SHARED_GOOD
    | {
        "messages": set(),
        "max_completion_tokens": in_range(0, 400, integral=True),
        "logprobs": BOOLS,
        "top_logprobs": {"0"},  # more needs logprobs
        "min_tokens": in_range(0, 400, integral=True),
        "tools": {"list"},
        "tool_choice": set(),  # of texts none, auto and required
        "parallel_tool_calls": BOOLS,
        "reasoning_effort": set(),
        "include_reasoning": BOOLS,
        "add_generation_prompt": BOOLS,
        "continue_final_message": BOOLS,
        "chat_template_kwargs": {"object"},
        "chat_template": set(),
        "documents": {"list"},
    },
    COMPLETIONS: SHARED_GOOD
    | {
        "prompt": {"one", "nul", "strings", "ids", "17 strings", "string of 257", "65 ids"},
        "logprobs": in_range(0, 20, integral=True),
        "best_of": in_range(1, 16, integral=True),
        "echo": BOOLS,
    },
}
BASE = {CHAT: chat_body("hi"), COMPLETIONS: {"prompt": "hi"}}
REQUIRED = {"messages", "prompt"}


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in GOOD for field in GOOD[path]])
async def test_each_field_with_each_class_of_value(connect: Connect, path: str, field: str) -> None:
    rules = {CHAT: CHAT_RULES, COMPLETIONS: COMPLETION_RULES}[path]
    assert rules.fields == set(GOOD[path]), "a field is added to this table when it is served"
    async with connect(clock=VirtualClock(10**9)) as (http, _):  # no deadline passes while it stands still
        for name, value in VALUES.items():
            response = await http.post(path, json=BASE[path] | {field: value})
            expected = name in GOOD[path][field] or (value is None and field not in REQUIRED)
            wanted = 200 if expected else 404 if field == "model" and isinstance(value, str) else 400
            assert response.status_code == wanted, (field, name, response.text[:300])
            if wanted == 400:
                error = response.json()["error"]
                assert error["param"].startswith(field) or (field, error["param"]) == ("logprobs", "top_logprobs"), (
                    error
                )
                assert len(error["message"]) < 500
                assert error["code"] in ("invalid_value", "missing_parameter", "empty_prompt", "unsupported_parameter",
                                         "unknown_parameter", "context_length_exceeded", "no_allowed_token",
                                         "conflicting_parameters"), error  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_fields_of_later_are_refused_unless_off(connect: Connect, path: str) -> None:
    rules = {CHAT: CHAT_RULES, COMPLETIONS: COMPLETION_RULES}[path]
    async with connect() as (http, _):
        for field, off in rules.later.items():
            for value in (None, *off):
                response = await http.post(path, json=BASE[path] | {field: value, "max_tokens": 1})
                assert response.status_code == 200, (field, value, response.text)
            for value in ("nonsense", 3, {"x": 1}, [7]):
                response = await http.post(path, json=BASE[path] | {field: value})
                error = response.json()["error"]
                assert (error["code"], error["param"]) == ("unsupported_parameter", field), error
        for field, allowed in NO_OPS.items():
            good = ["anything", {"a": 1}, None] if not isinstance(allowed, tuple) else [*allowed, None]
            for value in good:
                assert (await http.post(path, json=BASE[path] | {field: value, "max_tokens": 1})).status_code == 200
            if isinstance(allowed, tuple):
                error = (await http.post(path, json=BASE[path] | {field: "other"})).json()["error"]
                assert (error["code"], error["param"]) == ("unsupported_parameter", field)


def test_true_is_not_one() -> None:
    assert UNSUPPORTED["length_penalty"] == (1,)


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


async def test_unknown_fields_at_every_depth(connect: Connect) -> None:
    user = {"role": "user", "content": "x"}
    assistant = {"role": "assistant", "content": None}
    cases: list[tuple[dict[str, Any], str, str]] = [
        (chat_body(n=True), "invalid_value", "n"),
        (chat_body(length_penalty=True), "unsupported_parameter", "length_penalty"),
        (chat_body(nonsense=1), "unknown_parameter", "nonsense"),
        (chat_body(nonsense=None), "unknown_parameter", "nonsense"),
        (chat_body(**{"x" * 300: 1}), "unknown_parameter", "x" * 200),
        (chat_body(stream=True, stream_options={"x": 1}), "unknown_parameter", "stream_options.x"),
        (chat_body(stream=True, stream_options={"include_obfuscation": True}), "unsupported_parameter", "stream_options.include_obfuscation"),
        (chat_body(stream_options={}), "invalid_value", "stream_options"),
        (chat_body(max_tokens=3, max_completion_tokens=4), "conflicting_parameters", "max_tokens"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [user] * 2049}, "invalid_value", "messages"),
        ({}, "missing_parameter", "messages"),
        ({"messages": [{"content": "x"}]}, "missing_parameter", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_parameter", "messages[0].content"),
        ({"messages": [user, {"role": "robot", "content": "x"}]}, "invalid_value", "messages[1].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "missing_parameter", "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [user | {"x": 1}]}, "unknown_parameter", "messages[0].x"),
        ({"messages": [user | {"tool_calls": [{}]}]}, "missing_parameter", "messages[0].tool_calls[0].function"),
        ({"messages": [user | {"tool_calls": [CALL]}]}, "invalid_value", "messages[0].tool_calls"),
        ({"messages": [assistant | {"tool_calls": [CALL | {"x": 1}]}]}, "unknown_parameter", "messages[0].tool_calls[0].x"),
        ({"messages": [assistant | {"tool_calls": [CALL | {"type": "custom"}]}]}, "unsupported_parameter", "messages[0].tool_calls[0].type"),
        ({"messages": [assistant | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}]},
         "invalid_value", "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [assistant | {"content": "a", "reasoning": "b", "reasoning_content": "c"}]}, "conflicting_parameters",
         "messages[0].reasoning_content"),
        (chat_body(tools=[{"type": "web_search"}]), "unsupported_parameter", "tools[0].type"),
        (chat_body(tools=[{"type": "function", "function": {"name": "f", "x": 1}}]), "unknown_parameter", "tools[0].function.x"),
        (chat_body(tools=[TOOL, TOOL]), "invalid_value", "tools[1].function.name"),
        (chat_body(tools=[TOOL] * 129), "invalid_value", "tools"),
        (chat_body(tools=[{"type": "function", "function": {"name": "a b"}}]), "invalid_value", "tools[0].function.name"),
        (chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]), "invalid_value",
         "tools[0].function.parameters.type"),
        (chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 70_000}}}]), "invalid_value",
         "tools[0].function.parameters"),
        (chat_body(tool_choice="required"), "invalid_value", "tool_choice"),
        (chat_body(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "invalid_value", "tool_choice.function.name"),
        (chat_body(tools=[TOOL], tool_choice={"type": "function", "function": {}}), "missing_parameter", "tool_choice.function.name"),
        (chat_body(tools=[TOOL], response_format={"type": "json_object"}), "conflicting_parameters", "tools"),
        (chat_body(structured_outputs={"json_object": True}, response_format={"type": "json_object"}), "conflicting_parameters",
         "structured_outputs"),
        (chat_body(structured_outputs={"regex": "a", "choice": ["a"]}), "conflicting_parameters", "structured_outputs"),
        (chat_body(structured_outputs={}), "conflicting_parameters", "structured_outputs"),
        (chat_body(structured_outputs={"json": "{"}), "invalid_value", "structured_outputs.json"),
        (chat_body(structured_outputs={"whitespace_pattern": " "}), "unsupported_parameter", "structured_outputs.whitespace_pattern"),
        (chat_body(response_format={"type": "json_schema"}), "missing_parameter", "response_format.json_schema"),
        (chat_body(response_format={"type": "json_schema", "json_schema": {"schema": {}}}), "missing_parameter", "response_format.json_schema.name"),
        (chat_body(response_format={"type": "grammar"}), "invalid_value", "response_format.type"),
        (chat_body(response_format={"type": "text", "json_schema": {"name": "n", "schema": {}}}), "invalid_value", "response_format.json_schema"),
        (chat_body(reasoning_effort="low"), "unsupported_parameter", "reasoning_effort"),
        (chat_body(chat_template="{{ messages }}"), "unsupported_parameter", "chat_template"),
        (chat_body(chat_template_kwargs={"enable_thinking": True}), "invalid_value", "chat_template_kwargs"),
        (chat_body(chat_template_kwargs={"tokenize": True}), "invalid_value", "chat_template_kwargs"),
        (chat_body(chat_template_kwargs={"add_generation_prompt": True}), "invalid_value", "chat_template_kwargs"),
        (chat_body(documents=[{"title": "a"}]), "unsupported_parameter", "documents"),
        (chat_body(add_generation_prompt=True, continue_final_message=True), "conflicting_parameters", "continue_final_message"),
        (chat_body(prompt_logprobs=1, stream=True), "conflicting_parameters", "prompt_logprobs"),
        (chat_body(repetition_detection={"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}), "invalid_value",
         "repetition_detection.min_pattern_size"),
        (chat_body(logprob_token_ids=[1]), "invalid_value", "logprob_token_ids"),
        (chat_body(logprobs=True, logprob_token_ids=[259]), "invalid_value", "logprob_token_ids[0]"),
        (chat_body(thinking_token_budget=5), "unsupported_parameter", "thinking_token_budget"),
        ({"messages": [user | {"content": 1}]}, "invalid_value", "messages[0].content"),
        ({"messages": [user | {"content": []}]}, "invalid_value", "messages[0].content"),
        ({"messages": [user | {"content": ["x"]}]}, "invalid_value", "messages[0].content[0]"),
        ({"messages": [user | {"content": [{"type": "text"}]}]}, "invalid_value", "messages[0].content[0].text"),
        ({"messages": [user | {"content": [{"type": "text", "text": 1}]}]}, "invalid_value", "messages[0].content[0].text"),
        ({"messages": [user | {"content": [{"type": "poem", "text": "x"}]}]}, "invalid_value", "messages[0].content[0].type"),
        ({"messages": [user | {"content": [{"type": ["text"], "text": "x"}]}]}, "invalid_value", "messages[0].content[0].type"),
        ({"messages": [user | {"content": [{"type": {}, "text": "x"}]}]}, "invalid_value", "messages[0].content[0].type"),
        ({"messages": [user | {"content": [{"type": "text", "text": "x", "y": 1}]}]}, "unknown_parameter", "messages[0].content[0].y"),
        ({"messages": [user | {"content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}]},
         "unsupported_content", "messages[0].content[0]"),
        (chat_body(prompt_embeds="x"), "unsupported_content", "prompt_embeds"),
    ]  # fmt: skip
    async with connect() as (http, _):
        for body, code, param in cases:
            response = await http.post(CHAT, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
        parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
        good = await http.post(CHAT, json={"messages": [{"role": "developer", "content": parts, "name": "n"}]})
        assert good.status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries({}, optional={name: JSON | st.just("text") for name in ("type", "text", "x")})
MESSAGE = st.fixed_dictionaries({}, optional={name: JSON | st.sampled_from(["user", "system", "text"]) | st.lists(PART, max_size=2) for name in
                                              ("role", "content", "name", "type", "text", "tool_calls", "x")})  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.dictionaries(NAMES, JSON, max_size=4),
    messages=st.lists(MESSAGE | JSON, max_size=3) | JSON,
    path=st.sampled_from([CHAT, COMPLETIONS, "/tokenize", "/detokenize"]),
)
async def test_no_json_is_a_fault_of_the_server(connect: Connect, body: Any, messages: Any, path: str) -> None:
    raw = json.dumps(body | {"messages": messages}).encode()  # with NaN and lone surrogates where they come up
    async with connect() as (http, _):
        response = await http.post(path, content=raw, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (raw, response.text)


async def test_parts_and_the_developer_role_reach_the_template(connect: Connect) -> None:
    stub = StubClient()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "<|im_end|>"}]
    async with connect(stub) as (http, _):
        await http.post(CHAT, json={"messages": [{"role": "developer", "content": parts}], "max_tokens": 1})
    assert bytes(stub.requests[0].prompt_ids) == b"[system]a\n<|im_end|>\n[assistant]", (
        "a user's special text stays text"
    )


async def test_the_edge_of_the_context_is_exact_and_the_message_counts(connect: Connect) -> None:
    async with connect() as (http, _):
        for length, max_tokens, status in (
            (500, 12, 200),
            (500, 13, 400),
            (512, 0, 200),
            (513, 0, 400),
            (511, None, 400),
        ):
            response = await http.post(COMPLETIONS, json={"prompt": "x" * length, "max_tokens": max_tokens})
            assert response.status_code == status, (length, max_tokens)
            if status == 400:
                error = response.json()["error"]
                assert error["code"] == "context_length_exceeded"
                assert str(length) in error["message"] and "512" in error["message"]
        around = len("[user]\n[assistant]")
        fits = await http.post(CHAT, json=chat_body("x" * (511 - around)))
        full = await http.post(CHAT, json=chat_body("x" * (512 - around)))
    assert fits.json()["usage"]["completion_tokens"] == 1
    assert full.json()["error"]["code"] == "context_length_exceeded"


async def test_an_empty_prompt_needs_a_bos(connect: Connect) -> None:
    async with connect() as (http, _):
        for prompt in ("", [""], [[]]):
            response = await http.post(COMPLETIONS, json={"prompt": prompt})
            assert (response.status_code, response.json()["error"]["code"]) == (400, "empty_prompt")
    async with connect(tokenizer=ByteTokenizer(add_bos=True)) as (http, _):
        assert (await http.post(COMPLETIONS, json={"prompt": ""})).status_code == 200
        assert (await http.post(COMPLETIONS, json={"prompt": "", "add_special_tokens": False})).status_code == 400


async def test_a_model_without_a_template_completes_and_does_not_chat(connect: Connect) -> None:
    async with connect(template=None) as (http, _):
        refused = await http.post(CHAT, json=chat_body())
        models = (await http.get("/v1/models")).json()
        assert (await http.post(COMPLETIONS, json={"prompt": "x"})).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "template_error")
    assert models["data"][0]["jilju"]["features"] == ["completions", "structured_outputs"]


async def test_tokenize_and_detokenize(connect: Connect) -> None:
    async with connect(tokenizer=ByteTokenizer(add_bos=True)) as (http, _):
        data = (await http.post("/tokenize", json={"prompt": "a서", "return_token_strs": True})).json()
        assert data == {"count": 5, "max_model_len": 512, "tokens": [256, 97, 0xEC, 0x84, 0x9C],
                        "token_strs": ["<|bos|>", "a", "bytes:\\xec", "bytes:\\x84", "bytes:\\x9c"]}  # fmt: skip
        bare = (await http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False})).json()
        assert (bare["tokens"], bare["token_strs"]) == ([97], None)
        chat = (await http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})).json()
        assert bytes(chat["tokens"]) == b"[user]x\n[assistant]"
        text = await http.post("/detokenize", json={"tokens": [0xEC, 0x84, 0x9C, 258]})
        assert text.json() == {"prompt": "서<|im_end|>"}
        parts = await http.post("/detokenize", json={"tokens": [97, 0xEC, 258, 258], "return_token_strs": True})
        assert parts.json()["token_strs"] == ["a", "bytes:\\xec", "<|im_end|>", "<|im_end|>"]
        assert parts.json()["special_ids"] == [258]
        for path, body in (
            ("/tokenize", {}), ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
            ("/tokenize", {"prompt": 1}), ("/tokenize", {"prompt": "x", "y": 1}), ("/tokenize", {"messages": []}),
            ("/detokenize", {}), ("/detokenize", {"tokens": [259]}), ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {"tokens": ["a"]}), ("/detokenize", {"tokens": [1.0]}),
        ):  # fmt: skip
            assert (await http.post(path, json=body)).status_code == 400, body
        assert (await http.post("/tokenize", json={"prompt": "x", "model": "../etc"})).status_code == 404


async def test_many_tokens_are_decoded_off_the_loop(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    async with connect() as (http, server):
        tokenizer = server.context.tokenizer
        decode = tokenizer.decode

        def noted(*args: Any, **kwargs: Any) -> str:
            threads.append(threading.get_ident())
            return decode(*args, **kwargs)

        monkeypatch.setattr(tokenizer, "decode", noted)
        for count in (10, 10_000):
            assert (await http.post("/detokenize", json={"tokens": [97] * count})).json() == {"prompt": "a" * count}
    assert threads[0] == threading.get_ident() != threads[1]
