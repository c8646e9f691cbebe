"""Contract: corners where two of its rules meet, what an error may repeat, and what must not be done on the event loop."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from jilju.config import ApiKey
from jilju.engine.request import EngineEvent, Request, RequestTimes, SamplingParams
from jilju.errors import InvalidGrammar, JiljuError
from jilju.serve.answer import usage_so_far
from jilju.serve.chat import prompt as chat_prompt
from jilju.serve.chat import tools as tool_fields
from jilju.serve.chat.api import ChatApi, parse_chat
from jilju.serve.errors import MAX_ECHO, message_error
from jilju.serve.generation import Choice
from jilju.serve.ledger import SequenceLife
from jilju.serve.openai_completions import CompletionApi
from jilju.text.grammar import GrammarSource, to_llguidance
from jilju.text.stream import TextStream
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import EOT, ByteTokenizer, StubClient, StubCompiler, make_context
from .test_answers import CHAT, COMPLETIONS, chat_body, events_of, joined

pytestmark = pytest.mark.anyio

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# ---- several sequences of a prompt, and its scores ---------------------------------------------------------------------


class LateScores(StubClient):
    """The sequence that scores the prompt is the last to say anything, as in an engine: siblings without a token wait for no step."""

    def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        events = super().submit(request)

        async def late() -> AsyncIterator[EngineEvent]:
            await asyncio.sleep(0 if request.prompt_logprobs is None else 0.02)
            async for event in events:
                yield event

        return late()


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_of_a_scored_text_shows_its_scores(connect: Connect, stream: bool) -> None:
    body = {"prompt": ["abc", "de"], "max_tokens": 0, "echo": True, "logprobs": 2, "n": 3, "stream": stream}
    async with connect(LateScores()) as (http, _):
        response = await http.post(COMPLETIONS, json=body)
        assert response.status_code == 200, response.text
        events = events_of(response) if stream else []
    for index in range(6):
        choice = joined(events, index) if stream else response.json()["choices"][index]
        text = "abc" if index < 3 else "de"
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert choice["logprobs"]["tokens"] == [*text]
        assert choice["logprobs"]["token_logprobs"] == [None, *[-0.25] * (len(text) - 1)]


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(1, 4), (4, 1), (0, 3), (3, 0)])
async def test_each_kind_of_logprobs_has_as_many_alternatives_as_were_asked_of_it(
    connect: Connect, logprobs: int, prompt_logprobs: int
) -> None:
    body = {"prompt": "abc", "max_tokens": 1, "echo": True, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    async with connect() as (http, _):
        data = (await http.post(COMPLETIONS, json=body)).json()
    assert [len(place) for place in data["prompt_logprobs"][1:]] == [max(1, prompt_logprobs)] * 2
    assert [len(place) for place in data["choices"][0]["logprobs"]["top_logprobs"][1:]] == [max(1, logprobs)] * 3


async def test_too_many_sequences_are_told_by_the_field_that_makes_them(connect: Connect) -> None:
    async with connect() as (http, _):
        for fields, name in (({"n": 16}, "n"), ({"n": 2, "best_of": 16}, "best_of")):
            error = error_of(await http.post(COMPLETIONS, json={"prompt": ["x"] * 20} | fields))
            assert error["param"] == name and error["message"].startswith(f"{name} is 16")


def test_a_prompt_that_was_in_no_step_has_written_nothing() -> None:
    def usage(times: RequestTimes) -> Any:
        request = Request(id="r", prompt_ids=[1] * 9, params=SamplingParams(max_tokens=0, seed=1))
        life = SequenceLife(1, 0, 0, 9)
        choice = Choice(0, request, TextStream(ByteTokenizer()), life, times=times, ended=True)
        details = usage_so_far([choice]).prompt_tokens_details
        assert details is not None
        return details.cached_tokens, details.cache_write_tokens

    assert usage(RequestTimes(queued_ns=5)) == (0, 0)
    assert usage(RequestTimes(queued_ns=5, scheduled_ns=6, num_steps=1, num_cached_tokens=4)) == (4, 5)


async def test_a_call_is_charged_for_no_more_than_the_context(connect: Connect) -> None:
    stub = StubClient(hang_at=0, max_context=512)
    key = ApiKey("k", "secret-1", tokens_per_minute=1200)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100_000}
    async with connect(stub, keys=(key,)) as (http, server):
        headers = {"x-api-key": "secret-1"}
        calls = [asyncio.create_task(http.post(MESSAGES, json=body, headers=headers)) for _ in range(2)]
        async with asyncio.timeout(10):
            while stub.num_hanging < 2:
                await asyncio.sleep(0.002)
        for call_id in list(server.ledger.live):
            await http.post(f"/v1/requests/{call_id}/cancel", headers=headers)
        await asyncio.gather(*calls)


# ---- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "json_object"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_schema_beside_another_type_is_not_ignored(connect: Connect, kind: str, path: str) -> None:
    form = {"type": kind, "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body = (chat_body() if path == CHAT else {"prompt": "x"}) | {"response_format": form}
    async with connect() as (http, _):
        error = error_of(await http.post(path, json=body))
    assert (error["code"], error["param"]) == ("invalid_value", "response_format.json_schema")


THINKING = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"


@pytest.mark.parametrize("form", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a"}}])
async def test_an_answer_of_a_form_is_text_where_the_prompt_opens_thoughts(
    connect: Connect, form: dict[str, Any]
) -> None:
    stub = StubClient(answer=lambda request: [*b'{"a": 1}', EOT])
    async with connect(stub, template=ChatTemplate(THINKING)) as (http, _):
        held = (await http.post(CHAT, json=chat_body(**form))).json()["choices"][0]["message"]
        free = (await http.post(CHAT, json=chat_body())).json()["choices"][0]["message"]
    assert held == {"role": "assistant", "content": '{"a": 1}', "refusal": None}
    assert (free["content"], free["reasoning"]) == ("", '{"a": 1}')


async def test_two_ways_to_ask_for_thoughts_must_agree(connect: Connect) -> None:
    template = ChatTemplate(THINKING + "{% if enable_thinking %}{% endif %}")
    async with connect(template=template) as (http, _):
        for effort, given, status in (
            ("none", False, 200),
            ("none", True, 400),
            ("low", False, 400),
            ("low", True, 200),
        ):
            body = chat_body(reasoning_effort=effort, chat_template_kwargs={"enable_thinking": given}, max_tokens=1)
            response = await http.post(CHAT, json=body)
            assert response.status_code == status, response.text
            if status == 400:
                assert response.json()["error"]["code"] == "conflicting_parameters"


def test_marks_of_calls_are_shown_only_where_calls_are_read() -> None:
    class Marked(ByteTokenizer):
        special_texts = ByteTokenizer.special_texts | {"<tool_call>": 300}  # type: ignore[operator]

    source = '{% if tools %}<tool_call>{"arguments": 1}{% endif %}'
    context = make_context(tokenizer=Marked(), template=ChatTemplate(source))
    for choice, shown in (("auto", {300}), ("none", set()), ("required", {300})):
        fields = parse_chat(chat_body(tools=TOOLS, tool_choice=choice))
        assert ChatApi().shown_ids(fields, context) == shown


# ---- errors ----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    """An object, `depth` deep with the lists in it."""
    return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize(("depth", "status"), [(128, 200), (129, 400), (600, 400), (990, 400), (5000, 400)])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, "/tokenize", CHAT + "/render"])
async def test_arguments_of_a_call_are_as_deep_as_an_answers_can_be(
    connect: Connect, path: str, depth: int, status: int
) -> None:
    function = {"name": "f", "arguments": nested(depth)}
    if path == RESPONSES:
        items = [{"type": "function_call", "call_id": "c"} | function]
        body = {"input": [*items, {"type": "function_call_output", "call_id": "c", "output": "x"}]}
        where = "input[0].arguments"
    else:
        call = {"id": "c", "type": "function", "function": function}
        body = {
            "messages": [
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "x"},
            ]
        }
        where = "messages[0].tool_calls[0].function.arguments"
    async with connect(max_context=20_000, stub=StubClient(max_context=20_000)) as (http, _):
        response = await http.post(path, json=body)
    assert response.status_code == status, response.text
    if status == 400:
        assert error_of(response)["param"] == where


async def test_an_error_repeats_a_bounded_part_of_what_was_given(connect: Connect) -> None:
    deep = "".join('{"%s": ' % (chr(ord("a") + index) * 190) for index in range(20)) + '"\\ud800"' + "}" * 20
    tools = [{"type": "function", "function": WEATHER | {"name": f"zzzzzzzz{index}"}} for index in range(50)]
    choice = {"type": "function", "function": {"name": "z" * 500}}
    headers = {"content-type": "application/json"}
    async with connect(allow_request_template=True) as (http, _):
        error = error_of(await http.post(CHAT, content=f'{{"metadata": {deep}}}', headers=headers))
        assert len(error["message"]) < 2 * MAX_ECHO and len(error["param"]) <= MAX_ECHO
        deep = deep.replace('"\\ud800"', "1e999")
        error = error_of(await http.post(CHAT, content=f'{{"metadata": {deep}}}', headers=headers))
        assert len(error["message"]) < 2 * MAX_ECHO and len(error["param"]) <= MAX_ECHO
        error = error_of(await http.post(CHAT, json=chat_body(tools=tools, tool_choice=choice)))
        assert 100 < error["message"].count("z") <= MAX_ECHO
        for source in ("{{ raise_exception(messages[0].content) }}", "{{ messages[0][messages[0].content].x.y }}"):
            error = error_of(await http.post(CHAT, json=chat_body("z" * 1000, chat_template=source)))
            assert 100 < error["message"].count("z") <= MAX_ECHO
    with pytest.raises(InvalidGrammar) as raised:
        to_llguidance(GrammarSource(kind="lark", text="%" + "z" * 1000))
    assert 0 < raised.value.message.count("z") <= MAX_ECHO


class Refusing(StubCompiler):
    async def compile(self, source: GrammarSource, *, param: str | None = None) -> str:
        raise InvalidGrammar("it is wrong", param=param)


async def test_a_message_of_anthropics_form_begins_with_the_field(connect: Connect) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "structured_outputs": {"regex": "a"}}
    async with connect(workers=Refusing()) as (http, _):
        assert error_of(await http.post(MESSAGES, json=body))["message"] == "structured_outputs: it is wrong"
    for message, told in (("n is 3", "n is 3"), ("wrong", "n: wrong")):
        assert message_error(JiljuError(message, param="n"))["message"] == told
    assert message_error(JiljuError("wrong"))["message"] == "wrong"


# ---- rendering -----------------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "bye"},
]
WRITTEN = "[user]one two\n[assistant]ok\n[user]bye\n[assistant]"


@pytest.mark.parametrize(
    ("fields", "text", "shown"),
    [
        ({}, WRITTEN, ["one two", "ok", "bye"]),
        ({"add_special_tokens": True}, "<|bos|>" + WRITTEN, ["one two", "ok", "bye"]),
        ({"truncate_prompt_tokens": len(WRITTEN) - 8}, WRITTEN[8:], ["e two", "ok", "bye"]),
        ({"truncate_prompt_tokens": 20}, WRITTEN[-20:], [None, None, "bye"]),
        ({"truncate_prompt_tokens": 10, "truncation_side": "right"}, WRITTEN[:10], ["one ", None, None]),
    ],
)
async def test_spans_of_messages_lie_in_the_text_that_is_shown(
    connect: Connect, fields: dict[str, Any], text: str, shown: list[str | None]
) -> None:
    async with connect(tokenizer=ByteTokenizer(add_bos=True)) as (http, _):
        data = (await http.post(CHAT + "/render", json={"messages": CONVERSATION} | fields)).json()
    assert data["prompt_text"] == text
    spans = [message["content_span"] for message in data["messages"]]
    assert [None if span is None else text[slice(*span)] for span in spans] == shown


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_rendering_refuses_a_form_as_the_call_does(connect: Connect, path: str) -> None:
    body = (chat_body() if path == CHAT else {"prompt": "x"}) | {"structured_outputs": {"regex": "a"}}
    async with connect(workers=Refusing()) as (http, _):
        ran, rendered = [await http.post(route, json=body) for route in (path, path + "/render")]
    assert error_of(ran) == error_of(rendered) and ran.json()["error"]["param"] == "structured_outputs"


async def test_a_template_of_a_call_knows_the_tokens_texts(connect: Connect) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    async with connect(allow_request_template=True) as (http, _):
        data = (await http.post(CHAT + "/render", json=chat_body("hi", chat_template=source))).json()
        assert data["prompt_text"] == "<|bos|>hi<|eos|>"
        error = error_of(await http.post(CHAT, json=chat_body(chat_template="x" * 40_000)))
        assert error["param"] == "chat_template"


# ---- the event loop --------------------------------------------------------------------------------------------------------


def noted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[bool]:
    """Of each call of the function, whether it was on the loop's thread."""
    found: list[bool] = []
    loop_thread, function = threading.get_ident(), getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        found.append(threading.get_ident() == loop_thread)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, noting)
    return found


async def test_long_bodies_are_read_beside_the_loop(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, completion = noted(monkeypatch, ChatApi, "parse"), noted(monkeypatch, CompletionApi, "parse")
    async with connect() as (http, _):
        for content in ("x", [{"type": "text", "text": "x"}] * 5000):
            await http.post(CHAT, json=chat_body() | {"messages": [{"role": "user", "content": content}]})
        for prompt in ("x", [1] * 50_000):
            await http.post(COMPLETIONS, json={"prompt": prompt})
    assert chat == completion == [True, False]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x"}] * 500,
        [{"role": "user", "content": "x", "name": "n" * 10_000}],
        [{"role": "user", "content": "x", "reasoning": "n" * 10_000}],
    ],
    ids=["many", "names", "thoughts"],
)
async def test_long_conversations_are_rendered_beside_the_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]]
) -> None:
    on_loop = noted(monkeypatch, ChatTemplate, "render")
    async with connect(StubClient(max_context=100_000), max_context=100_000) as (http, _):
        assert (await http.post(CHAT, json=chat_body(max_tokens=1))).status_code == 200
        assert (await http.post(CHAT, json={"messages": messages, "max_tokens": 1})).status_code == 200
    assert on_loop == [True, False]


async def test_a_template_of_a_call_is_compiled_once_and_beside_the_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, rendered = noted(monkeypatch, chat_prompt, "_compiled"), noted(monkeypatch, ChatTemplate, "render")
    async with connect(allow_request_template=True) as (http, _):
        body = chat_body(chat_template="{{ messages[0].content }}", n=4, max_tokens=1, tools=TOOLS)
        assert (await http.post(CHAT, json=body)).status_code == 200
    assert compiled == rendered == [False]


async def test_what_is_shown_of_a_rendering_is_found_beside_the_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as (http, _):
        decoded = noted(monkeypatch, ByteTokenizer, "decode")
        assert (await http.post(CHAT + "/render", json=chat_body(return_token_offsets=True))).status_code == 200
        assert (await http.post(COMPLETIONS + "/render", json={"prompt": "x"})).status_code == 200
    assert decoded == [False, False]


async def test_strings_of_many_tokens_are_made_beside_the_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as (http, _):
        of_tokens = noted(monkeypatch, ByteTokenizer, "token_bytes")
        for text in ("ab", "x" * 5000):
            body = {"prompt": text, "return_token_strs": True}
            assert (await http.post("/tokenize", json=body)).json()["token_strs"] == [*text]
    assert of_tokens == [True] * 2 + [False] * 5000


async def test_words_that_must_be_tokenized_are_so_beside_the_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = StubClient()
    async with connect(stub) as (http, _):
        encoded = noted(monkeypatch, ByteTokenizer, "encode")
        assert (
            await http.post(COMPLETIONS, json={"prompt": "x", "bad_words": ["y"], "max_tokens": 1})
        ).status_code == 200
    assert encoded == [True, False, False]
    assert stub.requests[0].params.bad_words_ids == ((121,), (32, 121))


async def test_tools_are_checked_once_a_call(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = noted(monkeypatch, tool_fields, "check_parameters")
    async with connect(StubClient(max_context=2048), max_context=2048) as (http, _):
        answer = await http.post(CHAT, json=chat_body(tools=TOOLS, n=8, max_tokens=1))
        assert answer.status_code == 200, answer.text
    assert len(checked) == 1


# ---- deadlines -------------------------------------------------------------------------------------------------------------


class Waiting(StubCompiler):
    """Has no worker free for as long as anybody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.num_left = 0

    async def compile(self, source: GrammarSource, *, param: str | None = None) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            self.num_left += 1
        raise AssertionError("nothing sets the event")


@pytest.mark.parametrize("fields", [{"deadline_ms": 300}, {"max_queue_ms": 300}, {"deadline_ms": 300, "stream": True}])
async def test_deadlines_hold_while_a_call_waits_for_a_worker(connect: Connect, fields: dict[str, Any]) -> None:
    stub, workers = StubClient(), Waiting()
    async with connect(stub, workers=workers) as (http, server):
        response = await http.post(CHAT, json=chat_body(structured_outputs={"regex": "a"}, **fields))
        assert error_of(response, 504)["code"] == "deadline_exceeded"
        assert server.ledger.num_ended == {("deadline", "deadline_exceeded"): 1}
        assert server.admission.num_waiting == 0
    assert workers.num_left == 1 and not stub.requests


# ---- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [5, 600], ids=["answered", "refused"])
async def test_a_call_is_gone_with_its_answer(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    """Its prompt may be large; an error that holds the frames that hold it would keep it until a collection."""

    class Ids(list[int]):
        """A list that can be looked after."""

    made: list[weakref.ref[Ids]] = []

    def encode(self: ByteTokenizer, text: str, **flags: bool) -> list[int]:
        ids = Ids(text.encode())
        made.append(weakref.ref(ids))
        return ids

    stub = StubClient()
    async with connect(stub) as (http, _):
        monkeypatch.setattr(ByteTokenizer, "encode", encode)
        gc.disable()
        try:
            response = await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": max_tokens})
            stub.requests.clear()
            async with asyncio.timeout(10):
                while made[0]() is not None:  # the last tasks of the call have a turn to end
                    await asyncio.sleep(0.002)
        finally:
            gc.enable()
    assert response.status_code == (200 if max_tokens == 5 else 400)
