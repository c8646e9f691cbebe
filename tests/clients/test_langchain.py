"""LangChain's ChatOpenAI: invoke, stream, tools, structured output."""

import pytest

from conftest import KEY, PERSON, QUESTION, TOOL

langchain = pytest.importorskip("langchain_openai")


@pytest.fixture(scope="module")
def chat(url, model):
    return langchain.ChatOpenAI(
        base_url=url + "/v1", api_key=KEY, model=model, temperature=0, max_tokens=120, max_retries=0
    )


def test_invoke_and_stream(chat):
    whole = chat.invoke(QUESTION).content
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole


def test_tools(chat):
    from langchain_core.messages import HumanMessage, ToolMessage

    bound = chat.bind_tools([{"type": "function", "function": TOOL}], tool_choice="required")
    answer = bound.invoke("Weather in Seoul?")
    (call,) = answer.tool_calls[:1]
    assert call["name"] == "get_weather" and call["args"]["unit"] in ("C", "F")
    results = [ToolMessage("rain", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert chat.invoke([HumanMessage("Weather in Seoul?"), answer, *results]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    schema = {"title": "Person", "description": "A person", **PERSON}
    person = chat.with_structured_output(schema, method=method).invoke("Invent a person.")
    assert set(person) == {"name", "age"}
