"""The openai package: chat, completions, responses, models, errors."""

import json

import pytest

from conftest import KEY, PERSON, QUESTION, TOOL

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0, timeout=120)


def ask(text=QUESTION):
    return [{"role": "user", "content": text}]


def test_chat_whole_and_streamed(client, model):
    whole = client.chat.completions.create(model=model, messages=ask(), temperature=0, max_tokens=24)
    chunks = list(client.chat.completions.create(
        model=model, messages=ask(), temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_logprobs_stop_and_choices(client, model):
    answer = client.chat.completions.create(
        model=model, messages=ask(), n=2, seed=1, max_tokens=8, logprobs=True, top_logprobs=3, stop=["Paris"]
    )
    assert len(answer.choices) == 2
    assert all(len(token.top_logprobs) == 3 for choice in answer.choices for token in choice.logprobs.content)
    assert all("Paris" not in choice.message.content for choice in answer.choices)


def test_a_tool_is_called_and_its_result_read(client, model):
    tools = [{"type": "function", "function": TOOL}]
    first = client.chat.completions.create(
        model=model,
        messages=ask("Weather in Seoul?"),
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=120,
    )
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("C", "F")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain, 12 degrees"}
    second = client.chat.completions.create(
        model=model,
        messages=[*ask("Weather in Seoul?"), message, result],
        tools=tools,
        tool_choice="none",
        max_tokens=24,
    )
    assert second.choices[0].message.content


def test_a_streamed_call_is_the_whole_one(client, model):
    body = {
        "model": model, "messages": ask("Weather in Seoul?"), "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "temperature": 0, "max_tokens": 120,
    }  # fmt: skip
    whole = client.chat.completions.create(**body).choices[0]
    name, arguments = "", ""
    for chunk in client.chat.completions.create(stream=True, **body):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, arguments) == (
        whole.message.tool_calls[0].function.name,
        whole.message.tool_calls[0].function.arguments,
    )
    assert whole.finish_reason == "stop"


def test_answers_of_a_schema(client, model):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(
        model=model, messages=ask("A person?"), response_format=form, max_tokens=120
    )
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120


def test_completions(client, model):
    answer = client.completions.create(model=model, prompt=["One two", "Three"], max_tokens=4, logprobs=2, echo=True)
    assert answer.choices[0].text.startswith("One two")
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_responses(client, model):
    whole = client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=24)
    assert whole.output_text and whole.status in ("completed", "incomplete")
    events = list(
        client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=24, stream=True)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    tool = {"type": "function", "strict": True, **TOOL}
    called = client.responses.create(
        model=model, input="Weather in Seoul?", tools=[tool], tool_choice="required", max_output_tokens=120
    )
    call = next(item for item in called.output if item.type == "function_call")
    assert json.loads(call.arguments)["unit"] in ("C", "F")


def test_models(client, model):
    assert model in [entry.id for entry in client.models.list()]
    assert client.models.retrieve(model).id == model


def test_errors_are_the_package_s_own(client, model):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=ask())
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=ask(), temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=model, input="x")
    assert refused.value.code == "unsupported_task"
