"""POST /v1/embeddings: what is wrong with a call is told; what is right is refused, since no model has pooling."""

from typing import Any

import openai
import pytest

from .conftest import Connect
from .stub import StubClient
from .test_sockets import running

pytestmark = pytest.mark.anyio

EMBEDDINGS = "/v1/embeddings"


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "text"},
        {"input": "text", "model": "stub", "encoding_format": "base64", "dimensions": 1, "user": "u"},
        {"input": "text", "model": None, "encoding_format": None, "dimensions": None, "user": None},
        {"input": ["a", "b"]},
        {"input": ["a"] * 128},
        {"input": [1, 2, 258]},
        {"input": [[1], [2, 3]]},
        {"input": [5] * 512},
    ],
)
async def test_a_good_call_is_told_that_the_model_makes_none(connect: Connect, fields: dict[str, Any]) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        answer = await http.post(EMBEDDINGS, json=fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_task")
    assert '"stub"' in answer.json()["error"]["message"] and not stub.requests


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({}, 400, "missing_parameter", "input"),
        ({"input": None}, 400, "missing_parameter", "input"),
        ({"input": 1}, 400, "invalid_value", "input"),
        ({"input": {}}, 400, "invalid_value", "input"),
        ({"input": []}, 400, "invalid_value", "input"),
        ({"input": ""}, 400, "empty_prompt", "input"),
        ({"input": ["a", ""]}, 400, "empty_prompt", "input[1]"),
        ({"input": [[1], []]}, 400, "empty_prompt", "input[1]"),
        ({"input": ["a", 1]}, 400, "invalid_value", "input"),
        ({"input": [[1], "a"]}, 400, "invalid_value", "input"),
        ({"input": ["a"] * 129}, 400, "invalid_value", "input"),
        ({"input": [[1]] * 129}, 400, "invalid_value", "input"),
        ({"input": [True]}, 400, "invalid_value", "input[0]"),
        ({"input": [-1]}, 400, "invalid_value", "input[0]"),
        ({"input": [1, 259]}, 400, "invalid_value", "input[1]"),
        ({"input": [[1], [3, 259]]}, 400, "invalid_value", "input[1][1]"),
        ({"input": [5] * 513}, 400, "context_length_exceeded", "input"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 1.5}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 1 << 20}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "model": "other"}, 404, "model_not_found", "model"),
        ({"input": "a", "stream": True}, 400, "unknown_parameter", "stream"),
    ],
)
async def test_a_bad_call_is_told_what_is_wrong(
    connect: Connect, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    async with connect() as (http, _):
        answer = await http.post(EMBEDDINGS, json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


async def test_the_openai_client_is_told_so() -> None:
    async with (
        running(StubClient()) as (port, _),
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.embeddings.create(model="stub", input=["a"])
        assert refused.value.code == "unsupported_task"
