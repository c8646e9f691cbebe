"""The anthropic package: messages, streams, tools, counting, errors."""

import pytest

from conftest import KEY, QUESTION, TOOL

anthropic = pytest.importorskip("anthropic")
ONE_TOOL = {"type": "any", "disable_parallel_tool_use": True}  # a small model may call for ever
TOOLS = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}]


@pytest.fixture(scope="module")
def client(url):
    return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=120)


def ask(text=QUESTION):
    return [{"role": "user", "content": text}]


def test_a_message_whole_and_streamed(client, model):
    body = {"model": model, "max_tokens": 24, "messages": ask(), "system": "Answer in one word."}
    whole = client.messages.create(**body, extra_body={"seed": 3})
    with client.messages.stream(**body, extra_body={"seed": 3}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason in ("end_turn", "max_tokens")
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tool_is_used_and_its_result_read(client, model):
    body = {"model": model, "max_tokens": 120, "tools": TOOLS}
    first = client.messages.create(messages=ask("Weather in Seoul?"), tool_choice=ONE_TOOL, **body)
    assert first.stop_reason == "tool_use"
    use = next(block for block in first.content if block.type == "tool_use")
    assert use.input["unit"] in ("C", "F")
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]}
    turns = [*ask("Weather in Seoul?"), {"role": "assistant", "content": first.content}, result]
    second = client.messages.create(messages=turns, tool_choice={"type": "none"}, **body)
    assert second.content[0].type == "text"
    with client.messages.stream(messages=ask("Weather in Seoul?"), tool_choice=ONE_TOOL, **body) as stream:
        final = stream.get_final_message()
    assert next(block for block in final.content if block.type == "tool_use").name == "get_weather"


def test_tokens_are_counted(client, model):
    count = client.messages.count_tokens(model=model, messages=ask(), tools=TOOLS).input_tokens
    usage = client.messages.create(model=model, max_tokens=1, messages=ask(), tools=TOOLS).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_package_s_own(client, model):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", max_tokens=1, messages=ask())
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=model, max_tokens=1, messages=ask(), extra_body={"nonsense": 1})
