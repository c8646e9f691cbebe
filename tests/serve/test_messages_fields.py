"""/v1/messages: every field taken, without effect or refused, and errors, which name what the caller wrote."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.config import ApiKey
from jilju.engine.request import RequestFailed
from jilju.serve.chat.api import ChatFields
from jilju.serve.context import ServeLimits
from jilju.serve.errors import MESSAGE_TYPES
from jilju.serve.messages.api import MESSAGES as RULES
from jilju.serve.messages.api import OF_CHAT, OWN, SHARED, TOOL
from jilju.serve.messages.blocks import BLOCKS, OTHER_BLOCKS
from jilju.serve.sealed import sealed
from jilju.text.template import ChatTemplate
from tests.test_docs import names, rows, section

from .conftest import Connect
from .messages import (
    CLOCK,
    COUNT,
    MESSAGES,
    ROOM,
    SOURCE,
    TEMPLATE,
    assistant,
    body,
    events_of,
    result,
    says,
    text,
    tool_use,
    user,
)

pytestmark = pytest.mark.anyio

# ---- fields ----------------------------------------------------------------------------------------------------------


def test_every_field_of_chat_is_taken_or_refused_by_name() -> None:
    assert set(ChatFields.__struct_fields__) <= OWN | SHARED | set(OF_CHAT)
    assert not SHARED & set(OF_CHAT) and not OWN & SHARED
    assert RULES.fields == OWN | SHARED | {"context_management"}


GOOD: dict[str, list[Any]] = {
    "messages": [[{"role": "user", "content": "x"}], [user(text("x", citations=None, cache_control=None))]],
    "system": ["s", [text("s")], []],
    "stop_sequences": [[], ["a"] * 16],
    "temperature": [0, 1, 2],
    "top_k": [-1, 0, 5],
    "stream": [False],
    "tools": [[], [CLOCK], [CLOCK | {"type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}],
              [CLOCK | {"eager_input_streaming": True, "defer_loading": False, "input_examples": [], "type": None}]],
    "tool_choice": [{"type": "auto"}, {"type": "none"}, {"type": "auto", "disable_parallel_tool_use": True}],
    "thinking": [{"type": "disabled"}, {"type": "adaptive", "display": "omitted"}, {"type": "enabled", "budget_tokens": 99}],
    "output_config": [{}, {"effort": "max"}, {"format": {"type": "json_schema", "schema": {}}}, {"format": None}],
    "context_management": [{}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}],
    "metadata": [{"user_id": "u"}],
    "service_tier": ["auto", "standard_only"],
    "cache_control": [{"type": "ephemeral"}],
    "container": [], "mcp_servers": [[]], "speed": ["standard"], "inference_geo": [], "diagnostics": [],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "request_id": ["r"], "session_id": ["s"], "deadline_ms": [600_000], "max_queue_ms": [1], "stream_interval": [3],
    "timings": [True], "skip_special_tokens": [False], "include_stop_str_in_output": [True], "bad_words": [["x"]],
    "repetition_detection": [{"max_pattern_size": 4, "min_count": 3}], "n": [1], "logprobs": [False],
}  # fmt: skip


@pytest.mark.parametrize("field", GOOD)
async def test_what_is_taken(connect: Connect, field: str) -> None:
    async with connect(says("ok"), clock=VirtualClock(10**9), **ROOM) as (http, _):
        for value in [*GOOD[field], *([None] if field != "messages" else [])]:
            response = await http.post(MESSAGES, json=body(**{field: value}))
            assert response.status_code == 200, (value, response.text)


INVALID, UNKNOWN, UNSUPPORTED = "invalid_value", "unknown_parameter", "unsupported_parameter"
CONTENT, MISSING, CONFLICT = "unsupported_content", "missing_parameter", "conflicting_parameters"
FIRST, SECOND = "messages[0].content", "messages[1].content"


def turns(*given: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(given)}


def after(*blocks: dict[str, Any], role: str = "assistant") -> dict[str, Any]:
    """Such a turn as the second of three."""
    return turns(user(text("q")), {"role": role, "content": list(blocks)}, user(text("r")))


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": None}, MISSING, "max_tokens"),
    ({"max_tokens": 0}, INVALID, "max_tokens"),
    ({"max_tokens": "9"}, INVALID, "max_tokens"),
    ({"messages": []}, INVALID, "messages"),
    ({"messages": None}, MISSING, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 2049}, INVALID, "messages"),
    ({"messages": ["x"]}, INVALID, "messages[0]"),
    (turns({"role": "tool", "content": "x"}), INVALID, "messages[0].role"),
    (turns({"role": "user"}), MISSING, FIRST),
    (turns({"role": "user", "content": 5}), INVALID, FIRST),
    (turns({"role": "user", "content": []}), INVALID, FIRST),
    (turns({"role": "user", "content": "x", "name": "n"}), UNKNOWN, "messages[0].name"),
    (turns(user({"text": "x"})), MISSING, FIRST + "[0].type"),
    (turns(user({"type": 5})), INVALID, FIRST + "[0].type"),
    (turns(user({"type": "video"})), INVALID, FIRST + "[0].type"),
    (turns(user({"type": "text"})), MISSING, FIRST + "[0].text"),
    (turns(user(text("a"), text(5))), INVALID, FIRST + "[1].text"),  # type: ignore[arg-type]
    (turns(user(text("a", citations=[{}]))), UNSUPPORTED, FIRST + "[0].citations"),
    (turns(user(text("a", foo=1))), UNKNOWN, FIRST + "[0].foo"),
    (turns(user(tool_use())), INVALID, FIRST + "[0].type"),
    (turns(user({"type": "thinking", "thinking": "x", "signature": "y"})), INVALID, FIRST + "[0].type"),
    (turns(user(result("x"))), INVALID, FIRST + "[0].tool_use_id"),
    (turns({"role": "system", "content": [result("x")]}), INVALID, FIRST + "[0].type"),
    (after(result("x")), INVALID, SECOND + "[0].type"),
    (after({"type": "tool_use", "name": "n", "input": {}}), MISSING, SECOND + "[0].id"),
    (after({"type": "tool_use", "id": "", "name": "n", "input": {}}), INVALID, SECOND + "[0].id"),
    (after({"type": "tool_use", "id": "i", "name": "n", "input": "{}"}), INVALID, SECOND + "[0].input"),
    (after(tool_use() | {"caller": {"type": "code_execution_20250825"}}), UNSUPPORTED, SECOND + "[0].caller"),
    (after({"type": "thinking", "thinking": "x"}), MISSING, SECOND + "[0].signature"),
    (after({"type": "thinking", "thinking": "x", "signature": sealed("y")}), INVALID, SECOND + "[0].signature"),
    (after({"type": "thinking", "thinking": "x", "signature": "EqQBCg=="}), INVALID, SECOND + "[0].signature"),
    (after({"type": "redacted_thinking", "data": "x"}), CONTENT, SECOND + "[0].type"),
    (turns(user(text("q")), assistant(tool_use()), user(result([{"type": "image", "source": {}}]))), CONTENT,
     "messages[2].content[0].content[0].type"),
    (turns(user(text("q")), assistant(tool_use()), user(result(5))), INVALID, "messages[2].content[0].content"),
    (turns(user(text("q")), assistant(tool_use()), user(result("", is_error="yes"))), INVALID,
     "messages[2].content[0].is_error"),
    (turns(user(text("q")), assistant(tool_use())), INVALID, SECOND + "[0].type"),
    (turns(user(text("q")), {"role": "assistant", "content": "The "}), INVALID, SECOND),
    (turns(user(text("q")), assistant(text("The"), text("x\n"))), INVALID, SECOND + "[1].text"),
    (turns(user(text("q")), assistant({"type": "thinking", "thinking": "x", "signature": sealed("x")})), INVALID,
     SECOND + "[0].type"),
    (turns(user(text("q")), assistant(tool_use()), assistant(text("x"))), INVALID, SECOND + "[0].type"),
    ({"system": 5}, INVALID, "system"),
    ({"system": [{"type": "image"}]}, CONTENT, "system[0].type"),
    ({"system": [text("a", foo=1)]}, UNKNOWN, "system[0].foo"),
    ({"stop_sequences": "x"}, INVALID, "stop_sequences"),
    ({"stop_sequences": ["a"] * 17}, INVALID, "stop_sequences"),
    ({"stop_sequences": [""]}, INVALID, "stop_sequences[0]"),
    ({"temperature": 3}, INVALID, "temperature"),
    ({"top_k": 500}, INVALID, "top_k"),
    ({"tools": {}}, INVALID, "tools"),
    ({"tools": [CLOCK] * 2}, INVALID, "tools[1].name"),
    ({"tools": [CLOCK | {"name": "a b"}]}, INVALID, "tools[0].name"),
    ({"tools": [{"name": "a"}]}, MISSING, "tools[0].input_schema"),
    ({"tools": [CLOCK | {"input_schema": {"type": "string"}}]}, INVALID, "tools[0].input_schema.type"),
    ({"tools": [CLOCK | {"input_schema": {"x": "y" * 70_000}}]}, INVALID, "tools[0].input_schema"),
    ({"tools": [CLOCK | {"parameters": {}}]}, UNKNOWN, "tools[0].parameters"),
    ({"tools": [CLOCK | {"defer_loading": True}]}, UNSUPPORTED, "tools[0].defer_loading"),
    ({"tools": [CLOCK, {"type": "web_search_20250305", "name": "web_search"}]}, UNSUPPORTED, "tools[1].type"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, UNSUPPORTED, "tools[0].type"),
    ({"tool_choice": "auto"}, INVALID, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, INVALID, "tool_choice.type"),
    ({"tool_choice": {"type": "required"}}, INVALID, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}, "tools": [CLOCK]}, MISSING, "tool_choice.name"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [CLOCK]}, INVALID, "tool_choice.name"),
    ({"tool_choice": {"type": "auto", "name": "clock"}, "tools": [CLOCK]}, INVALID, "tool_choice.name"),
    ({"tool_choice": {"type": "auto", "x": 1}}, UNKNOWN, "tool_choice.x"),
    ({"thinking": {"type": "on"}}, INVALID, "thinking.type"),
    ({"thinking": {"type": "between_tools"}}, UNSUPPORTED, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, MISSING, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 100}}, INVALID, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 10}}, INVALID, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive"}} | turns(user(text("q")), assistant(text("The"))), CONFLICT, "thinking"),
    ({"output_config": {"effort": "none"}}, INVALID, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_object"}}}, INVALID, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, MISSING, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"x": "y" * 300_000}}}}, INVALID,
     "output_config.format.schema"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {}}}, "tools": [CLOCK]}, CONFLICT, "tools"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {}}}, "structured_outputs": {"regex": "a"}}, CONFLICT,
     "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}} | turns(user(text("q")), assistant(text("The"))), CONFLICT,
     "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, CONFLICT, "structured_outputs"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, UNSUPPORTED, "context_management.edits[0]"),
    ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}]}},
     UNSUPPORTED, "context_management.edits[0]"),
    ({"context_management": []}, UNSUPPORTED, "context_management"),
    ({"container": "c"}, UNSUPPORTED, "container"),
    ({"mcp_servers": [{"type": "url"}]}, UNSUPPORTED, "mcp_servers"),
    ({"speed": "fast"}, UNSUPPORTED, "speed"),
    ({"max_completion_tokens": 9}, UNSUPPORTED, "max_completion_tokens"),
    ({"stop": ["x"]}, UNSUPPORTED, "stop"),
    ({"n": 2}, UNSUPPORTED, "n"),
    ({"logprobs": True}, UNSUPPORTED, "logprobs"),
    ({"truncate_prompt_tokens": 5}, UNSUPPORTED, "truncate_prompt_tokens"),
    ({"reasoning_effort": "low"}, UNSUPPORTED, "reasoning_effort"),
    ({"guided_regex": "x"}, UNSUPPORTED, "guided_regex"),
    ({"prompt_embeds": "x"}, CONTENT, "prompt_embeds"),
    ({"prompt": "x"}, UNKNOWN, "prompt"),
    ({"chat_template_kwargs": {"foo": 1}}, INVALID, "chat_template_kwargs"),
    ({"documents": [{"a": "b"}]}, UNSUPPORTED, "documents"),
    ({"chat_template": "x"}, UNSUPPORTED, "chat_template"),
    ({"min_tokens": 101}, INVALID, "min_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code", "path"), BAD)
async def test_what_is_refused_names_the_callers_own_path(
    connect: Connect, fields: dict[str, Any], code: str, path: str
) -> None:
    async with connect(says("ok"), clock=VirtualClock(10**9), **ROOM) as (http, server):
        response = await http.post(MESSAGES, json=body(**fields))
        ended = dict(server.ledger.num_ended)
    assert response.status_code == 400, response.text
    error = response.json()
    assert error.keys() == {"type", "error", "request_id"} and error["type"] == "error"
    assert error["request_id"] == response.headers["request-id"]
    assert error["error"].keys() == {"type", "message"} and error["error"]["type"] == "invalid_request_error"
    message = error["error"]["message"]
    assert message.startswith((path + " ", path + ":")) or f"and {path} each" in message, message
    assert len(message) < 700
    assert ended == {("failed", code): 1}


@pytest.mark.parametrize("kind", sorted(OTHER_BLOCKS | {"web_search_tool_result", "mcp_tool_result"}))
async def test_other_blocks_are_content_that_is_not_supported(connect: Connect, kind: str) -> None:
    async with connect(says("ok"), **ROOM) as (http, server):
        for given in (turns(user({"type": kind})), after({"type": kind})):
            assert (await http.post(MESSAGES, json=body(**given))).status_code == 400
        assert server.ledger.num_ended == {("failed", CONTENT): 2}


@pytest.mark.parametrize("field", sorted(RULES.later))
async def test_fields_of_later_are_refused_unless_off(connect: Connect, field: str) -> None:
    async with connect(says("ok"), **ROOM) as (http, _):
        for value in (None, *RULES.later[field]):
            assert (await http.post(MESSAGES, json=body(**{field: value}))).status_code == 200
        message = (await http.post(MESSAGES, json=body(**{field: {"x": 1}}))).json()["error"]["message"]
        assert message.startswith(f"{field} is "), message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}, "output_config": {"effort": "low"}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "output_config.effort"),
    ],
)
async def test_a_model_without_a_switch_for_thinking(connect: Connect, fields: dict[str, Any], path: str) -> None:
    template = ChatTemplate(SOURCE.replace("enable_thinking", "other"))
    async with connect(says("ok"), template=template, max_context=8192) as (http, _):
        refused = await http.post(MESSAGES, json=body(**fields))
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(f"{path} is given and this model has no switch")
        assert (await http.post(MESSAGES, json=body(thinking={"type": "disabled"}))).status_code == 200
        assert (await http.post(COUNT, json=body(**fields))).status_code == 400


async def test_a_lenient_server_names_what_it_ignored(connect: Connect) -> None:
    given = body(
        messages=[user(text("q", foo=1))],
        tools=[CLOCK | {"bar": 2}],
        system=[text("s", baz=3)],
        thinking={"type": "disabled", "x": 1},
        top=1,
    )
    async with connect(says("ok"), lenient=True, **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=given)
        assert response.status_code == 200, response.text
    ignored = set(response.headers["x-jilju-ignored"].split(", "))
    assert ignored == {"messages[0].content[0].foo", "tools[0].bar", "system[0].baz", "thinking.x", "top"}


async def test_headers_of_the_api_have_no_effect(connect: Connect) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "context-1m-2025-08-07"}
    async with connect(says("ok"), **ROOM) as (http, _):
        assert (await http.post(MESSAGES, json=body(), headers=headers)).status_code == 200


async def test_a_prompt_that_does_not_fit_is_refused_and_output_is_what_is_left(connect: Connect) -> None:
    stub = says("a" * 600, context=512)
    async with connect(stub, template=TEMPLATE) as (http, _):
        long = await http.post(MESSAGES, json=body("x" * 600))
        assert long.status_code == 400 and long.json()["error"]["message"].startswith(
            "messages: the prompt has 618 tokens"
        )
        answer = (await http.post(MESSAGES, json=body(max_tokens=100_000))).json()
    assert stub.requests[0].params.max_tokens == 512 - len("[user]hello\n[assistant]")
    assert answer["stop_reason"] == "model_context_window_exceeded"


RICH = body(
    system=[text("s")],
    stop_sequences=["x"],
    temperature=0.5,
    tools=[CLOCK | {"description": "d", "strict": True}],
    tool_choice={"type": "tool", "name": "clock", "disable_parallel_tool_use": True},
    thinking={"type": "enabled", "budget_tokens": 10, "display": "omitted"},
    output_config={"effort": "low"},
    context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    metadata={"user_id": "u"},
    messages=[
        user(text("q")),
        assistant({"type": "thinking", "thinking": "t", "signature": sealed("t")}, text("a"), tool_use(city="c")),
        user(result([text("r")], is_error=True), text("b")),
    ],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a body."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = with_value(value[path[0]], path[1:], new)
    return changed


VALUES = st.sampled_from([None, True, 0, -1, 1.5, 2**70, "", "x", "text", "tool_result", "assistant", "auto", [], [None], ["x"],
                          {}, {"type": "text"}, {"x": None}, [{"type": "tool_use"}], [[[]]], "\0", "x" * 300])  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.sampled_from(places(RICH)[1:]), VALUES), min_size=1, max_size=3))
async def test_no_body_breaks_the_server(connect: Connect, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    changed = RICH
    for path, value in changes:
        if path in places(changed):
            changed = with_value(changed, path, value)
    async with connect(says("ok"), **ROOM) as (http, _):
        for path in (MESSAGES, COUNT):
            response = await http.post(path, json=changed)
            wanted = (200, 400, 404) if isinstance(changed.get("model"), str) else (200, 400)
            assert response.status_code in wanted, response.text
            if response.status_code == 400:
                error = response.json()["error"]
                assert error["type"] == "invalid_request_error" and len(error["message"]) < 700


# ---- errors ----------------------------------------------------------------------------------------------------------


async def test_errors_of_the_gate_have_this_shape_too(connect: Connect) -> None:
    keys = (ApiKey("k", "secret"),)
    key = {"x-api-key": "secret"}
    limits = ServeLimits(body_bytes=1000)
    async with connect(says("ok"), keys=keys, limits=limits, **ROOM) as (http, _):
        for path in (MESSAGES, COUNT):
            calls = [
                (401, "authentication_error", http.post(path, json=body())),
                (403, "permission_error", http.post(path, json=body(), headers=key | {"host": "evil.example"})),
                (404, "not_found_error", http.post(path, json=body(model="x"), headers=key)),
                (404, "not_found_error", http.post(path + "/x", json=body(), headers=key)),
                (405, "invalid_request_error", http.get(path, headers=key)),
                (413, "request_too_large", http.post(path, json=body("x" * 2000), headers=key)),
                (415, "invalid_request_error", http.post(path, content=b"{}", headers=key)),
                (400, "invalid_request_error",
                 http.post(path, content=b"{", headers=key | {"content-type": "application/json"})),
            ]  # fmt: skip
            for status, kind, response in calls:
                answer = await response
                assert answer.status_code == status, answer.text
                data = answer.json()
                assert (data["type"], data["error"]["type"]) == ("error", kind)
                assert data.keys() == {"type", "error", "request_id"} and data["error"].keys() == {"type", "message"}
                assert data["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
        other = await http.post("/v1/completions", json={"prompt": "x"})
    assert "request-id" not in other.headers and other.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("internal", 500, "api_error"),
        ("not_ready", 503, "overloaded_error"),
        ("kv_capacity_exceeded", 400, "invalid_request_error"),
        ("deadline_exceeded", 504, "timeout_error"),
    ],
)
async def test_errors_of_the_engine(connect: Connect, code: str, status: int, kind: str) -> None:
    def fail(request: Any, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code=code, message="boom") if index == at else None

    async with connect(says("abcdef", fail=fail), **ROOM) as (http, _):
        at = 0
        for stream in (False, True):
            response = await http.post(MESSAGES, json=body(stream=stream))
            assert response.status_code == status
            assert response.json()["error"] == {"type": kind, "message": "boom"}
        at = 3
        events = events_of(await http.post(MESSAGES, json=body(stream=True)))
    assert events[-1] == {"type": "error", "error": {"type": kind, "message": "boom"}}
    assert [event["type"] for event in events[:2]] == ["message_start", "content_block_start"]
    assert not {"message_delta", "message_stop"} & {event["type"] for event in events}


async def test_a_full_queue_says_when_to_come_again(connect: Connect) -> None:
    async with connect(says("ok"), limits=ServeLimits(queue_requests=0), **ROOM) as (http, _):
        response = await http.post(MESSAGES, json=body())
    assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1 and int(response.headers["retry-after-ms"]) >= 1000


def test_the_document_names_every_field() -> None:
    used, no_effect, refused = (section("messages.md", f"### {name}") for name in ("Used", "No effect", "Refused"))
    taken = {name for row in rows(used) for name in names(row[0])}
    assert taken == RULES.fields
    assert set(RULES.no_ops) <= names(no_effect)
    told = [row[1] for row in rows(refused)]
    assert names("".join(told[:3])) == set(RULES.later)
    for rules in (TOOL, *BLOCKS.values()):
        assert set(rules.later) <= names("".join(told[3:]))
    assert {(row[0], row[1]) for row in rows(section("messages.md", "## Errors"))} == {
        *((str(status), kind) for status, kind in MESSAGE_TYPES.items()),
        ("others", "invalid_request_error"),
    }
