"""The anthropic client against a server on a socket: messages, its stream helper, tools, counts, and the errors it raises."""

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, ToolUseBlock
from pydantic import BaseModel

from jilju.config import ApiKey
from jilju.engine.request import RequestFailed
from jilju.serve.context import ServeLimits

from .messages import ROOM, WEATHER, body, call, prompt_of, says
from .stub import EOT, StubClient
from .test_sockets import running

pytestmark = pytest.mark.anyio

KEYS = (ApiKey("k", "secret"),)
ANSWER = "<think>\nWhere?\n</think>\n\nI look." + call(
    "weather", '{"city": "서울", "days": [1, 2.5], "x": {"y": null}}'
)


def client_of(port: int, key: str = "secret") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key=key, max_retries=0)


def content_of(message: Message) -> list[dict[str, Any]]:
    return [block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in message.content]


async def test_a_message_streamed_and_whole() -> None:
    async with running(says(ANSWER), keys=KEYS, **ROOM) as (port, _), client_of(port) as client:
        given = body(max_tokens=300, tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 200})
        whole = await client.messages.create(**given)
        async with client.messages.stream(**given) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_message()
        async with client.messages.stream(**given) as stream:
            assert "".join([piece async for piece in stream.text_stream]) == "I look."
    assert whole.id == "msg_" + str(whole._request_id)
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert content_of(whole) == content_of(streamed)
    assert whole.usage == streamed.usage and whole.usage.output_tokens_details is not None
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert {"text", "thinking", "signature", "input_json", "message_stop"} <= set(kinds)


async def test_tools_round_trip() -> None:
    """The client gives its own objects back, with all that it writes into them."""
    answers = iter([ANSWER, "It rains."])
    stub = StubClient(answer=lambda request: [*next(answers).encode(), EOT])
    stub.info = says("").info
    async with running(stub, keys=KEYS, **ROOM) as (port, _), client_of(port) as client:
        given = body("Weather in Seoul?", max_tokens=300, tools=[WEATHER], tool_choice={"type": "auto"})
        first = await client.messages.create(**given)
        block = first.content[-1]
        assert isinstance(block, ToolUseBlock) and block.input == {"city": "서울", "days": [1, 2.5], "x": {"y": None}}
        answer: dict[str, Any] = {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        turns = [
            *given["messages"],
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [answer]},
        ]
        second = await client.messages.create(**given | {"messages": turns})
        counted = await client.messages.count_tokens(model="stub", messages=turns, tools=[WEATHER])
        dumped = [*turns[:1], {"role": "assistant", "content": [b.model_dump() for b in first.content]}, turns[2]]
        assert await client.messages.count_tokens(model="stub", messages=dumped, tools=[WEATHER]) == counted
    assert [block.to_dict() for block in second.content] == [{"type": "text", "text": "It rains."}]
    usage = second.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    rendered = prompt_of(stub.requests[1])
    assert (
        rendered.endswith("</tool_call>\n[tool weather]rain\n[assistant]")
        and "<think>Where?</think>I look." in rendered
    )


async def test_a_form_that_the_client_parses() -> None:
    class City(BaseModel):
        name: str

    async with running(says('{"name": "서울"}'), **ROOM) as (port, _), client_of(port) as client:
        message = await client.messages.parse(**body(), output_format=City)
    assert message.parsed_output == City(name="서울")


async def test_extras_pass_in_the_body() -> None:
    stub = says("ok")
    async with running(stub, **ROOM) as (port, _), client_of(port) as client:
        message = await client.messages.create(
            **body(), extra_body={"seed": 7, "min_p": 0.1, "timings": True}, extra_headers={"anthropic-beta": "x"}
        )
    assert (stub.requests[0].params.seed, stub.requests[0].params.min_p) == (7, 0.1)
    assert message.model_extra is not None and message.model_extra["timings"]["seed"] == 7


async def test_models_are_listed() -> None:
    async with running(says("ok"), **ROOM) as (port, _), client_of(port) as client:
        assert [model.id async for model in client.models.list()] == ["stub"]


async def test_errors_are_the_clients_own() -> None:
    def fail(request: Any, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code="internal", message="boom") if index == 2 else None

    stub = says("abcdef", fail=fail)
    limits = ServeLimits(body_bytes=10_000)
    async with running(stub, keys=KEYS, limits=limits, **ROOM) as (port, _), client_of(port) as client:
        with pytest.raises(anthropic.AuthenticationError) as unknown_key:
            async with client_of(port, "wrong") as stranger:
                await stranger.messages.create(**body())
        assert unknown_key.value.type == "authentication_error"
        assert unknown_key.value.request_id and unknown_key.value.api_message
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]\.type"):
            await client.messages.create(
                **body(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}])
            )
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**body(model="other"))
        with pytest.raises(anthropic.APIStatusError) as too_large:
            await client.messages.create(**body("x" * 20_000))
        assert (too_large.value.status_code, too_large.value.body["error"]["type"]) == (413, "request_too_large")  # type: ignore[index]
        with pytest.raises(anthropic.InternalServerError, match="boom"):
            await client.messages.create(**body())
        with pytest.raises(anthropic.APIStatusError, match="boom") as broken:
            async with client.messages.stream(**body()) as stream:
                await stream.get_final_message()
        assert json.loads(json.dumps(broken.value.body))["error"]["type"] == "api_error"


async def test_a_full_queue_is_a_rate_limit_that_says_when_to_come_again() -> None:
    limits = ServeLimits(queue_requests=0)
    async with running(says("ok"), limits=limits, **ROOM) as (port, _), client_of(port) as client:
        with pytest.raises(anthropic.RateLimitError) as full:
            await client.messages.create(**body())
    assert full.value.type == "rate_limit_error"
    assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
    assert 1000 <= int(full.value.response.headers["retry-after-ms"]) <= 60_000
