"""litellm, in front of both shapes: OpenAI's and Anthropic's."""

import json

import pytest

from conftest import KEY, QUESTION, TOOL

litellm = pytest.importorskip("litellm")
ASK = [{"role": "user", "content": QUESTION}]


def test_openai_shape(url, model):
    common = {"model": f"openai/{model}", "api_base": url + "/v1", "api_key": KEY, "temperature": 0, "max_tokens": 24}
    whole = litellm.completion(messages=ASK, **common).choices[0].message.content
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=ASK, stream=True, **common)
    )
    assert streamed == whole
    common["max_tokens"] = 120
    called = litellm.completion(
        messages=ASK, tools=[{"type": "function", "function": TOOL}], tool_choice="required", **common
    )
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["unit"] in ("C", "F")


def test_anthropic_shape(url, model):
    answer = litellm.completion(model=f"anthropic/{model}", api_base=url, api_key=KEY, messages=ASK, max_tokens=24)
    assert answer.choices[0].message.content
