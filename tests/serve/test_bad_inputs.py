"""Bad inputs, by the rows of their table: each is refused with its code before an engine hears of it, and leaves nothing behind.

Rows of single fields and of grammars, of heads and bodies, have tests of their own; here are those that name routes, sizes and texts.
"""

import asyncio
import json
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from jsonschema.protocols import Validator

from jilju.clock import VirtualClock
from jilju.serve.openapi.route import describe
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import EOT, StubClient
from .test_answers import CHAT, COMPLETIONS
from .test_fields import TOOL, VALUES

pytestmark = pytest.mark.anyio

MESSAGES, COUNT, RESPONSES, EMBEDDINGS = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/embeddings"
RENDER, TOKENIZE, DETOKENIZE = "/v1/chat/completions/render", "/tokenize", "/detokenize"
USER = {"role": "user", "content": "x"}
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "x"},
    RESPONSES: {"input": "x"},
    MESSAGES: {"messages": [USER], "max_tokens": 5},
    COUNT: {"messages": [USER]},
    EMBEDDINGS: {"input": "x"},
    TOKENIZE: {"prompt": "x"},
    DETOKENIZE: {"tokens": [1]},
}
INVALID, MISSING, CONTEXT = "invalid_value", "missing_parameter", "context_length_exceeded"
UNSUPPORTED, CONTENT, CONFLICT = "unsupported_parameter", "unsupported_content", "conflicting_parameters"
URLS = ("http://127.0.0.1:9/x.png", "https://example.com/x", "file:///etc/passwd", "data:image/png;base64,AAAA", "http://169.254.169.254/latest",
        "http://a\\@127.0.0.1/", "//127.0.0.1/x", "")  # fmt: skip
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if style %}{{ style }}{% endif %}"
    "{% if messages | length == 7 %}{{ raise_exception('seven') }}{% endif %}"
)


def image(kind: str, url: Any) -> list[dict[str, Any]]:
    if kind == "input_image":
        parts = [{"type": "input_text", "text": "see"}, {"type": kind, "image_url": url}]
    else:
        parts = [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": url}}]
    return [{"role": "user", "content": parts}]


def rows() -> Iterator[tuple[str, str, dict[str, Any], str, str]]:
    """Row, route, fields besides the base, code, param."""
    for path in (CHAT, COMPLETIONS):
        yield "B10", path, {"n": 17}, INVALID, "n"
        yield "B10", path, {"n": 2**31}, INVALID, "n"
        yield "B10", path, {"n": 0}, INVALID, "n"
        yield "B14", path, {"prompt_logprobs": 21}, INVALID, "prompt_logprobs"
        yield (
            "B14",
            path,
            {"logprob_token_ids": [1] * 129, "logprobs": 1 if path == COMPLETIONS else True},
            INVALID,
            "logprob_token_ids",
        )
        yield "B14", path, {"prompt_logprobs": 1, "stream": True}, CONFLICT, "prompt_logprobs"
        yield "B30", path, {"stream": "yes"}, INVALID, "stream"
        yield "B30", path, {"stream_options": {"include_usage": True}}, INVALID, "stream_options"
        yield "B30", path, {"stream": False, "stream_options": {}}, INVALID, "stream_options"
        yield (
            "B30",
            path,
            {"stream": True, "stream_options": {"include_all": True}},
            "unknown_parameter",
            "stream_options.include_all",
        )
        yield (
            "B30",
            path,
            {"stream": True, "stream_options": {"include_usage": "yes"}},
            INVALID,
            "stream_options.include_usage",
        )
    yield "B11", COMPLETIONS, {"best_of": 17}, INVALID, "best_of"
    yield "B11", COMPLETIONS, {"n": 3, "best_of": 2}, INVALID, "best_of"
    yield "B11", COMPLETIONS, {"best_of": 2, "stream": True}, CONFLICT, "best_of"
    yield "B11", COMPLETIONS, {"prompt": ["a"] * 128, "best_of": 2}, INVALID, "best_of"
    yield "B12", COMPLETIONS, {"prompt": ["a"] * 129}, INVALID, "prompt"
    yield "B12", COMPLETIONS, {"prompt": [[1]] * 129}, INVALID, "prompt"
    yield "B12", COMPLETIONS, {"prompt": ["a"] * 9, "n": 16}, INVALID, "n"
    yield "B12", COMPLETIONS, {"prompt": []}, INVALID, "prompt"
    yield "B12", EMBEDDINGS, {"input": ["a"] * 129}, INVALID, "input"
    for path in (CHAT, TOKENIZE, MESSAGES, COUNT):
        prompt = {"prompt": None} if path == TOKENIZE else {}
        yield "B13", path, {"messages": [USER] * 2049, **prompt}, INVALID, "messages"
        yield "B21", path, {"messages": [], **prompt}, INVALID, "messages"
        yield "B21", path, {"messages": [{"role": "robot", "content": "x"}], **prompt}, INVALID, "messages[0].role"
    yield "B13", RESPONSES, {"input": [USER] * 2049}, INVALID, "input"
    yield "B14", CHAT, {"logprobs": True, "top_logprobs": 21}, INVALID, "top_logprobs"
    yield "B14", CHAT, {"top_logprobs": 1}, INVALID, "top_logprobs"
    yield "B14", COMPLETIONS, {"logprobs": 21, "echo": True}, INVALID, "logprobs"
    yield from sampling_rows()
    yield from text_rows()
    yield from tool_rows()
    yield from content_rows()


def sampling_rows() -> Iterator[tuple[str, str, dict[str, Any], str, str]]:
    for path, name in (
        (CHAT, "max_tokens"),
        (COMPLETIONS, "max_tokens"),
        (RESPONSES, "max_output_tokens"),
        (MESSAGES, "max_tokens"),
    ):
        yield "B15", path, {name: -1}, INVALID, name
        yield "B15", path, {name: 4, "min_tokens": 5}, INVALID, "min_tokens"
        yield "B15", path, {name: None if path == CHAT else 400, "min_tokens": 600}, INVALID, "min_tokens"
        if path != MESSAGES:  # whose clients ask for as much as a model may ever write
            yield "B15", path, {name: 513}, CONTEXT, name
    yield "B15", COMPLETIONS, {"max_tokens": None, "min_tokens": 17}, INVALID, "min_tokens"
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        for name, values in {
            "temperature": (-1, 2.0001, 1e9),
            "top_p": (0, -0.1, 1.0001),
            "top_k": (-2, 260, 2**31),
            "min_p": (-0.1, 1.1),
            "presence_penalty": (-2.0001, 2.0001),
            "frequency_penalty": (-2.0001, 2.0001),
            "repetition_penalty": (0, -1, 2.0001),
            "seed": (2**63, -(2**63) - 1, 1.5, "1"),
            "logit_bias": ({"-1": 0}, {"259": 0}, {"abc": 0}, {"1": 1e9}, {"1": "2"}, {"1.0": 1}, {"": 1}),
            "stop_token_ids": ([259], [-1], [1] * 65),
            "allowed_token_ids": ([259], [-1], [1] * 260),
        }.items():
            row = {"seed": "B17", "logit_bias": "B18", "stop_token_ids": "B19", "allowed_token_ids": "B19"}.get(
                name, "B16"
            )
            for value in values:
                yield row, path, {name: value}, INVALID, name
    for prompt in ([-1], [259], [2**31], [1.5], [[1, [2]]], [[259]], [True]):
        yield "B19", COMPLETIONS, {"prompt": prompt}, INVALID, "prompt"
        yield "B19", DETOKENIZE, {"tokens": prompt}, INVALID, "tokens"


def text_rows() -> Iterator[tuple[str, str, dict[str, Any], str, str]]:
    for path, name in ((CHAT, "stop"), (COMPLETIONS, "stop"), (RESPONSES, "stop"), (MESSAGES, "stop_sequences")):
        for value in ([""], ["a"] * 17, ["x" * (1 << 20)], ["a", None], "x" if name != "stop" else ""):
            yield "B20", path, {name: value}, INVALID, name
    yield "B21", COMPLETIONS, {"prompt": ""}, "empty_prompt", "prompt"
    yield "B21", COMPLETIONS, {"prompt": ["a", ""]}, "empty_prompt", "prompt[1]"
    yield "B21", COMPLETIONS, {"prompt": [[]]}, "empty_prompt", "prompt[0]"
    for content in (None, [], 5, [{"type": "text"}], [{"type": "text", "text": None}], ["x"]):
        yield (
            "B21",
            CHAT,
            {"messages": [{"role": "user", "content": content}]},
            MISSING if content is None else INVALID,
            "messages[0]",
        )
    for path in (CHAT, RENDER, TOKENIZE):  # of the template itself
        body = {"messages": [USER] * 7} | ({"prompt": None} if path == TOKENIZE else {})
        yield "B21", path, body, "template_error", "messages"
    for path in BASES:
        for name in ("../../etc/passwd", "", "m" * 10_000, "Stub", "ѕtub", "stub\0", "stub/"):
            yield "B22", path, {"model": name}, "model_not_found", "model"


def tool_rows() -> Iterator[tuple[str, str, dict[str, Any], str, str]]:
    big = {"style": "x" * (1 << 20)}
    for path in (CHAT, RENDER, TOKENIZE, RESPONSES, MESSAGES, COUNT):
        base = {"prompt": None, "messages": [USER]} if path == TOKENIZE else {}
        if path not in (TOKENIZE, RESPONSES):
            yield "B50", path, {"chat_template": "{{ messages }}"}, UNSUPPORTED, "chat_template"
        for kwargs in ({"tokenize": False}, {"add_generation_prompt": 1}, {"messages": []}, {"nothing": 1}, {"raise_exception": 1}, big,
                       {"style": {"a": 1}}, {"style": [1]}):  # fmt: skip
            yield "B51", path, base | {"chat_template_kwargs": kwargs}, INVALID, "chat_template_kwargs"
    for path in (CHAT, TOKENIZE):
        yield (
            "B51",
            path,
            {"messages": [USER], "add_generation_prompt": "yes"} | ({"prompt": None} if path == TOKENIZE else {}),
            INVALID,
            "add_generation_prompt",
        )
    call = {"id": "c", "function": {"name": "f", "arguments": '{"a": "' + "x" * (1 << 20) + '"}'}}
    conversation = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ]
    yield "B60", CHAT, {"messages": conversation}, CONTEXT, "messages"
    yield "B60", CHAT, {"tools": [TOOL] * 129}, INVALID, "tools"
    yield "B60", CHAT, {"tools": [TOOL, TOOL]}, INVALID, "tools[1].function.name"
    yield (
        "B60",
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        INVALID,
        "tool_choice.function.name",
    )
    for schema in ({"type": "array"}, {"type": 5}, {"x": "y" * 70_000}, [], "{}"):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        yield "B60", CHAT, {"tools": [tool]}, INVALID, "tools[0].function.parameters"


def content_rows() -> Iterator[tuple[str, str, dict[str, Any], str, str]]:
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        for value in ("AAAA", ["AAAA"], {"data": "AAAA"}, [[0.5]]):
            yield "B70", path, {"prompt_embeds": value}, CONTENT, "prompt_embeds"
    for url in URLS:
        for path in (CHAT, RENDER):
            for kind in ("image_url", "video_url", "audio_url"):
                yield "B71", path, {"messages": image(kind, url)}, CONTENT, "messages[0].content[1]"
        yield "B71", TOKENIZE, {"prompt": None, "messages": image("image_url", url)}, CONTENT, "messages[0].content[1]"
        yield "B71", RESPONSES, {"input": image("input_image", url)}, CONTENT, "input[0].content[1]"
        block = {"type": "image", "source": {"type": "url", "url": url}}
        for path in (MESSAGES, COUNT):
            yield "B71", path, {"messages": [{"role": "user", "content": [block]}]}, CONTENT, "messages[0].content[0]"
    for part in (
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_data": "AAAA"}},
    ):
        yield "B71", CHAT, {"messages": [{"role": "user", "content": [part]}]}, CONTENT, "messages[0].content[0]"


ROWS = list(rows())


async def refused(http: httpx.AsyncClient, path: str, fields: dict[str, Any], code: str, param: str) -> None:
    base = BASES[CHAT] if path == RENDER else BASES[path]
    response = await http.post(path, json=base | fields)
    given = (path, str(fields)[:200], response.text[:300])
    assert response.status_code == (404 if code == "model_not_found" else 400), given
    error = response.json()["error"]
    if path in (MESSAGES, COUNT):  # this form has neither: its message begins with the path
        assert error["message"].startswith(param.partition("[")[0]) or code == "model_not_found", given
    else:
        assert error["code"] == code, given
        assert error["param"].startswith(param), given
    assert len(response.content) < 1500, given


@pytest.mark.parametrize("row", sorted({row for row, *_ in ROWS}))
async def test_what_is_bad_is_refused_before_the_engine(
    connect: Connect, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connected(*_: object) -> None:
        raise AssertionError("the server calls nobody")

    stub = StubClient()
    async with connect(stub, template=TEMPLATE) as (http, server):
        for name in ("connect", "connect_ex", "sendto"):
            monkeypatch.setattr(socket.socket, name, connected)
        monkeypatch.setattr(socket, "getaddrinfo", connected)
        for _, path, fields, code, param in (found for found in ROWS if found[0] == row):
            await refused(http, path, fields, code, param)
        assert {state for state, _ in server.ledger.num_ended} <= {"failed"}
    assert not stub.requests and not stub.aborted


async def test_memory_stays_where_it_is_however_many_are_refused(connect: Connect) -> None:
    stub = StubClient()
    async with connect(stub, template=TEMPLATE) as (http, _):
        sizes = []
        for _ in range(6):
            for row, path, fields, code, param in ROWS:
                if row != "B60":  # these are large, and memory is to be seen that is small and stays
                    await refused(http, path, fields, code, param)
            sizes.append(resident_bytes())
    assert sizes[-1] - sizes[1] < 8 << 20, [size >> 20 for size in sizes]
    assert not stub.requests


def resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


# ---- single rows -----------------------------------------------------------------------------------------------------


async def test_b18_a_bias_bans_nothing_and_an_empty_choice_does(connect: Connect) -> None:
    banned = {str(token_id): -100 for token_id in range(259)}
    stub = StubClient()
    async with connect(stub) as (http, _):
        biased = await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 2, "logit_bias": banned})
        empty = await http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 2, "allowed_token_ids": []})
    assert biased.status_code == 200 and stub.requests[0].params.logit_bias == {int(key): -100.0 for key in banned}
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, "no_allowed_token")


@pytest.mark.parametrize(
    ("stop", "kept", "reason"),
    [
        (["서울", "서울입니다", "서"], "대한민국의 수도는 ", "서"),
        (["울입", "서울입니다. "], "대한민국의 수도는 서", "울입"),
        (["👧", "👩\u200d👩\u200d👧 가"], "대한민국의 수도는 서울입니다. 🇰🇷 그리고 👩\u200d👩\u200d", "👧"),
        (["\u200d👩\u200d👧", "없다"], "대한민국의 수도는 서울입니다. 🇰🇷 그리고 👩", "\u200d👩\u200d👧"),
        (
            ["없다", "<|im_end|>"],
            "대한민국의 수도는 서울입니다. 🇰🇷 그리고 👩\u200d👩\u200d👧 가족.",
            None,
        ),  # the token itself has no text
    ],
)
async def test_b20_nothing_at_or_after_a_stop_leaves(
    connect: Connect, stop: list[str], kept: str, reason: str | None
) -> None:
    """Of several the one that ends first; every character is spread over tokens here."""
    text = "대한민국의 수도는 서울입니다. 🇰🇷 그리고 👩\u200d👩\u200d👧 가족."
    stub = StubClient(answer=lambda request: [*text.encode(), EOT])
    body = {"prompt": "x", "max_tokens": 300, "stop": stop, "skip_special_tokens": False}
    async with connect(stub) as (http, _):
        whole = (await http.post(COMPLETIONS, json=body)).json()["choices"][0]
        streamed = await http.post(COMPLETIONS, json=body | {"stream": True})
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert whole["text"] == "".join(chunk["text"] for chunk in chunks) == kept
    assert whole["finish_reason"] == chunks[-1]["finish_reason"] == "stop"
    assert whole["stop_reason"] == chunks[-1]["stop_reason"] == reason


async def test_b21_what_has_no_content_but_is_a_message_passes(connect: Connect) -> None:
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": ""}],
        [{"role": "system", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "y"}]}],
    ]
    async with connect() as (http, _):
        for messages in conversations:
            for path in (CHAT, RENDER):
                assert (await http.post(path, json={"messages": messages, "max_tokens": 1})).status_code == 200, (
                    messages
                )


async def test_b23_a_label_is_no_id(connect: Connect) -> None:
    """Nor is what a caller says of itself told to anybody."""
    stub = StubClient(hang_at=2)
    says = {
        "user": "a\n\x1b[31m" * 10_000,
        "metadata": {"x": "\r\n" * 500_000},
        "request_id": "a\nid=b",
        "session_id": "\x1b[2J",
    }
    async with connect(stub) as (http, server):
        first = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": "x"}))
        while not stub.num_hanging:
            await asyncio.sleep(0.001)
        (live_id,) = server.ledger.live
        stub.hang_at = None
        second = await http.post(COMPLETIONS, json={"prompt": "x", **says}, headers={"x-request-id": live_id})
        assert second.status_code == 200
        assert second.headers["x-client-request-id"] == live_id != second.headers["x-request-id"]
        assert list(server.ledger.live) == [live_id]
        ended = (await http.post(f"/v1/requests/{live_id}/cancel")).json()
        assert ended == {"id": live_id, "state": "client_cancelled"}
        assert (await first).status_code == 499


TEXTS = {
    "nul": "a\0b",
    "control": "\x01\x1b[31m\x7f\x85",
    "right to left": "\u202eabc\u202c עברית",
    "joined": "👩" + "\u200d👩" * 10_000,
    "composed": unicodedata.normalize("NFC", "한국어 é"),
    "decomposed": unicodedata.normalize("NFD", "한국어 é"),
    "special": "<|im_end|><|bos|>[INST]<|eos|>",
    "not a character": "\ufffe\uffff\U0010ffff",
    "replacement": "\ufffd",
    "byte order": "\ufeffx",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_b24_texts_come_back_as_they_were(connect: Connect, text: str) -> None:
    stub = StubClient(max_context=1 << 20)
    async with connect(stub) as (http, _):
        tokens = (await http.post(TOKENIZE, json={"prompt": text})).json()["tokens"]
        assert (await http.post(DETOKENIZE, json={"tokens": tokens})).json() == {"prompt": text}
        answer = await http.post(
            CHAT, json={"messages": [{"role": "user", "content": text}], "max_tokens": 1, "return_prompt_text": True}
        )
    assert max(tokens) < 256, "the text of a control token is no control token"
    assert answer.json()["prompt_text"] == f"[user]{text}\n[assistant]"
    assert bytes(id_ for id_ in stub.requests[0].prompt_ids if id_ < 256).decode() == f"[user]{text}\n[assistant]"


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'"\\ud800"', INVALID),
        (b'"\\udc00\\ud800"', INVALID),
        (b'{"\\udfff": 1}', INVALID),
        (b'"\xc0\x80"', "invalid_json"),
        (b'"\xed\xa0\x80"', "invalid_json"),
        (b'"\xf4\x90\x80\x80"', "invalid_json"),
        (b'"\xff"', "invalid_json"),
        (b"NaN", INVALID),
        (b"-Infinity", INVALID),
        (b"1e400", INVALID),
        (b"1" * 1000, INVALID),
        (b'"a\nb"', "invalid_json"),
    ],
)
async def test_b24_bytes_that_are_no_text_and_numbers_that_are_none(
    connect: Connect, path: str, raw: bytes, code: str
) -> None:
    body = json.dumps(BASES[path])[:-1].encode() + b', "user": ' + raw + b"}"
    stub = StubClient()
    async with connect(stub) as (http, _):
        response = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    if path not in (MESSAGES, COUNT):
        assert response.json()["error"]["code"] == code
    assert not stub.requests


# ---- every field of the routes without a table of their own --------------------------------------------------------


@pytest.mark.parametrize("path", [MESSAGES, TOKENIZE, DETOKENIZE, EMBEDDINGS])
async def test_each_field_with_each_class_of_value(connect: Connect, path: str) -> None:
    """Judged by the description: what it does not allow is refused, and nothing is a fault of the server."""
    description = msgspec.to_builtins(describe("0", model="stub", lenient=False))
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    judge: Validator = jsonschema.Draft202012Validator(schema | {"components": description["components"]})
    properties = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    fields = [
        name for name, told in properties.items() if told["description"] not in ("has no effect", "not supported")
    ]
    num_good = 0
    async with connect(clock=VirtualClock(10**9)) as (http, _):
        for field in [*fields, "nonsense"]:
            for name, value in VALUES.items():
                body = BASES[path] | {field: value}
                response = await http.post(path, json=body)
                status = response.status_code
                assert status in ((200, 400, 404) if judge.is_valid(body) else (400, 404)), (field, name, response.text)
                assert (status == 404) <= (field == "model"), (field, name)
                num_good += status == 200
    assert num_good > len(fields) or path == EMBEDDINGS
