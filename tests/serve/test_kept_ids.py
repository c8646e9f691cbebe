"""An answer that a chat sends back as text keeps the ids that were generated, for the caller who got it, and where it is wanted."""

from typing import Any

import httpx
import pytest

from jilju.config import ApiKey
from jilju.engine.request import Request, RequestFailed
from jilju.text.history import History
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import EOT, ByteTokenizer, StubClient
from .test_answers import CHAT, COMPLETIONS, events_of, joined

pytestmark = pytest.mark.anyio

HE = 259
HELLO = [*b"hello"]  # the tokenizer would take `he` for the first two
FIRST: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SECOND = [*FIRST, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "hey"}]


class MergingTokenizer(ByteTokenizer):
    """One token more: `he`."""

    vocab_size = 260

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False, after_special: bool = False
    ) -> list[int]:
        ids = super().encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)
        while b"he" in (text := bytes(id_ if id_ < 256 else 0 for id_ in ids)):
            ids[text.index(b"he") : text.index(b"he") + 2] = [HE]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return b"he" if token_id == HE else super().token_bytes(token_id)


def changes(history: History | None, **more: Any) -> dict[str, Any]:
    source = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<|im_end|>' }}{% endfor %}[assistant]"
    return {"tokenizer": MergingTokenizer(), "template": ChatTemplate(source), "history": history} | more


def stub_of(ids: list[int] | None = None) -> StubClient:
    return StubClient(answer=lambda request: [*(HELLO if ids is None else ids), EOT])


async def ask(http: httpx.AsyncClient, messages: list[dict[str, Any]], key: str = "", **fields: Any) -> str:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    response = await http.post(CHAT, json={"messages": messages} | fields, headers=headers)
    assert response.status_code == 200, response.text
    if fields.get("stream"):
        return joined(events_of(response))["text"]
    return response.json()["choices"][0]["message"]["content"]


def is_kept(first: Request, second: Request) -> bool:
    """Whether the second prompt goes on from the first one and its answer."""
    begin = first.prompt_ids + HELLO
    return second.prompt_ids[: len(begin)] == begin


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("on", [True, False])
async def test_the_second_turn_begins_with_the_ids_of_the_first(connect: Connect, on: bool, stream: bool) -> None:
    stub = stub_of()
    async with connect(stub, **changes(History() if on else None)) as (http, server):
        assert await ask(http, FIRST, stream=stream) == "hello"
        await ask(http, SECOND, stream=stream)
        plain = (await http.post("/tokenize", json={"messages": SECOND})).json()["tokens"]
        first, second = stub.requests
        assert is_kept(first, second) == on
        assert (second.prompt_ids == plain) == (not on), "/tokenize shows the plain ones"
        decode = server.context.tokenizer.decode
        assert decode(second.prompt_ids, skip_special_tokens=False) == decode(plain, skip_special_tokens=False)


async def test_the_count_of_prompt_tokens_is_that_of_the_ids_used(connect: Connect) -> None:
    async with connect(stub_of(), **changes(History())) as (http, _):
        await ask(http, FIRST)
        body = {"messages": SECOND, "return_token_ids": True}
        data = (await http.post(CHAT, json=body)).json()
        assert data["usage"]["prompt_tokens"] == len(data["prompt_token_ids"])
        assert data["prompt_token_ids"].count(HE) == 1, "of the last message alone"


async def test_callers_share_nothing(connect: Connect) -> None:
    stub = stub_of()
    keys = (ApiKey("a", "a" * 8), ApiKey("b", "b" * 8))
    async with connect(stub, **changes(History(), keys=keys)) as (http, _):
        await ask(http, FIRST, key="a" * 8)
        for key in ("a" * 8, "b" * 8):
            await ask(http, SECOND, key=key)
        await ask(http, SECOND, key="a" * 8, cache_salt="mine")
    first, *others = stub.requests
    assert [is_kept(first, request) for request in others] == [True, False, False]


async def test_a_stop_string_leaves_what_was_shown(connect: Connect) -> None:
    history, stub = History(), stub_of([*HELLO, *b" STOP"])
    async with connect(stub, **changes(history)) as (http, _):
        assert await ask(http, FIRST, stop=" ST") == "hello"
        await ask(http, SECOND)
    assert is_kept(*stub.requests)


async def test_each_choice_is_remembered(connect: Connect) -> None:
    answers = iter([HELLO, [*b"he", ord("y")]])
    stub = StubClient(answer=lambda request: [*next(answers, HELLO), EOT])
    history = History()
    async with connect(stub, **changes(history)) as (http, _):
        await http.post(CHAT, json={"messages": FIRST, "n": 2, "seed": 1})
        assert len(history) == 2
        await ask(http, SECOND)
    assert is_kept(stub.requests[0], stub.requests[-1])


async def test_what_fails_or_is_no_chat_is_not_remembered(connect: Connect) -> None:
    history, stub = History(), stub_of()
    async with connect(stub, **changes(history)) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": "Hi"})
        assert len(history) == 0
        stub.fail = lambda request, index: (
            RequestFailed(request_id=request.id, code="internal", message="broken") if index == 3 else None
        )
        assert (await http.post(CHAT, json={"messages": FIRST})).status_code == 500
        assert len(history) == 0
        stub.fail = lambda request, index: None
        await ask(http, FIRST)
        assert len(history) == 1
