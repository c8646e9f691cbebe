"""Responses by the openai client, over a socket: answers, streams, tools, structured output, errors."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from jilju.engine.request import Request, RequestFailed
from jilju.text.template import ChatTemplate

from .stub import EOT, StubClient
from .test_responses import ADD, LOGPROBS, SEALED, TEMPLATE, call, with_room
from .test_sockets import running

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def client_of(
    answer: Callable[[str], str], **changes: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, StubClient]]:
    """A client of a model that answers the text of its prompt."""

    def ids(request: Request) -> list[int]:
        return [*answer(bytes(request.prompt_ids).decode()).encode(), EOT]

    stub = with_room(StubClient(answer=ids, **changes))
    async with (
        running(stub, template=ChatTemplate(TEMPLATE), max_context=100_000) as (port, _),
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, stub


async def test_whole_and_streamed_answers_are_the_same() -> None:
    async with client_of(lambda prompt: "<think>hm</think>대한민국의 수도는 서울입니다. 🇰🇷") as (client, _):
        settings: dict[str, Any] = {
            "model": "stub",
            "input": "어디?",
            "instructions": "short",
            "include": [LOGPROBS, SEALED],
        }
        whole = await client.responses.create(**settings, top_logprobs=2)
        assert whole.output_text == "대한민국의 수도는 서울입니다. 🇰🇷" and whole.status == "completed"
        assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 0
        assert whole.usage.input_tokens + whole.usage.output_tokens == whole.usage.total_tokens
        stream = await client.responses.create(**settings, top_logprobs=2, stream=True)
        events = [event async for event in stream]
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert deltas == whole.output_text
        last = events[-1]
        assert last.type == "response.completed" and last.response.output_text == whole.output_text
        assert last.response.usage == whole.usage
        for event in events:
            type(event).model_validate(event.model_dump())  # the client itself takes what it is given unchecked


async def test_the_streaming_helper_puts_an_answer_together() -> None:
    text = "<think>so</think>I add." + call('{"a": 1, "b": 2}')
    async with client_of(lambda prompt: text) as (client, _):
        tools: Any = [ADD | {"strict": False}]
        async with client.responses.stream(model="stub", input="1+2", tools=tools) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
    snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    assert snapshots[-1] == "I add."
    arguments = [event.snapshot for event in events if event.type == "response.function_call_arguments.delta"]
    assert arguments[-1] == '{"a": 1, "b": 2}'
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_round_with_a_tool(streamed: bool) -> None:
    def answer(prompt: str) -> str:
        if "[tool]3\n" in prompt:
            return "It is 3."
        return "<think>add them</think>" + call('{"a": 1, "b": 2}')

    async with client_of(answer) as (client, stub):
        history: list[Any] = [{"role": "user", "content": "1+2?"}]
        tools: Any = [ADD]

        async def ask() -> Any:
            settings: dict[str, Any] = {"model": "stub", "input": history, "tools": tools}
            if not streamed:
                return await client.responses.create(**settings)
            events = [event async for event in await client.responses.create(**settings, stream=True)]
            return events[-1].response

        first = await ask()
        history += first.output
        (called,) = [item for item in first.output if item.type == "function_call"]
        result = sum(json.loads(called.arguments).values())
        history.append({"type": "function_call_output", "call_id": called.call_id, "output": str(result)})
        second = await ask()
        assert second.output_text == "It is 3."
        expected = (
            "[tools add][user]1+2?\n[assistant]<think>add them</think>"
            '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>\n[tool]3\n[assistant]'
        )
        assert bytes(stub.requests[1].prompt_ids).decode() == expected


class City(BaseModel):
    name: str
    people: int


async def test_structured_output() -> None:
    async with client_of(lambda prompt: '{"name": "Seoul", "people": 9}') as (client, stub):
        parsed = await client.responses.parse(model="stub", input="a city", text_format=City)
        assert parsed.output_parsed == City(name="Seoul", people=9)
        async with client.responses.stream(model="stub", input="a city", text_format=City) as stream:
            done = [event async for event in stream if event.type == "response.output_text.done"]
            final = await stream.get_final_response()
        assert final.output_parsed == done[0].parsed == parsed.output_parsed
    assert all(
        request.grammar.startswith("json_schema: ") and '"people"' in request.grammar for request in stub.requests
    )


async def test_parsed_arguments_of_a_tool() -> None:
    tool: Any = openai.pydantic_function_tool(City)["function"]
    async with client_of(lambda prompt: call('{"name": "Seoul", "people": 9}', "City")) as (client, _):
        answer = await client.responses.parse(model="stub", input="a city", tools=[{"type": "function", **tool}])
    (called,) = answer.output
    assert called.type == "function_call" and called.parsed_arguments == {"name": "Seoul", "people": 9}


async def test_errors() -> None:
    def fail(request: Request, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code="internal", message="boom") if index == 2 else None

    async with client_of(lambda prompt: "hello", fail=fail) as (client, _):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.responses.create(model="stub", input="x", store=True)
        assert (bad.value.param, bad.value.code) == ("store", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="other", input="x")
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="stub", input="x")
        stream = await client.responses.create(model="stub", input="x", stream=True)
        events = [event async for event in stream]
        last = events[-1]
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error is not None and last.response.error.message == "internal: boom"
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.retrieve("resp_x")
        assert gone.value.code == "route_not_found"
