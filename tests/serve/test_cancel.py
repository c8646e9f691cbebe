"""Cancel: calls that end by their caller's word, at every point of their way, and whose they must be."""

import asyncio
import gc
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from jilju.config import ApiKey
from jilju.serve.door.transport import Transport
from jilju.serve.endings import MAX_ENDINGS, Endings
from jilju.serve.ledger import Call
from jilju.serve.server import Server

from .conftest import Connect
from .stub import ByteTokenizer, StubClient
from .test_answers import CHAT, COMPLETIONS, chat_body, events_of
from .test_sockets import head, running

pytestmark = pytest.mark.anyio

KEYS = (ApiKey("alice", "secret-a"), ApiKey("bob", "secret-b"))
ALICE, BOB = {"x-api-key": "secret-a"}, {"x-api-key": "secret-b"}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def cancel(http: httpx.AsyncClient, name: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return await http.post(f"/v1/requests/{name}/cancel", headers=headers)


def live_ids(server: Server) -> list[str]:
    return [call.id for call in server.ledger.live.values()]


def post(
    http: httpx.AsyncClient, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any
) -> "asyncio.Task[httpx.Response]":
    body = chat_body(**fields) if path == CHAT else {"prompt": "abc"} | fields
    return asyncio.create_task(http.post(path, json=body, headers=headers))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hang_at", [0, 3])
@pytest.mark.parametrize(("path", "prefix"), [(CHAT, ""), (CHAT, "chatcmpl-"), (COMPLETIONS, "cmpl-")])
async def test_a_call_that_runs_ends(connect: Connect, stream: bool, hang_at: int, path: str, prefix: str) -> None:
    stub = StubClient(hang_at=hang_at)
    async with connect(stub) as (http, server):
        call = post(http, path, stream=stream, n=2)
        await until(lambda: stub.num_hanging == 2)
        [call_id] = live_ids(server)
        answer = await cancel(http, prefix + call_id)
        assert (answer.status_code, answer.json()) == (200, {"id": call_id, "state": "client_cancelled"})
        assert sorted(stub.aborted) == sorted(request.id for request in stub.requests)
        told = await call
        if stream and hang_at:
            assert told.status_code == 200
            assert events_of(told)[-1]["error"]["code"] == "request_cancelled"
        else:
            assert (told.status_code, told.json()["error"]["code"]) == (499, "request_cancelled")
        assert server.ledger.num_ended == {("client_cancelled", "request_cancelled"): 1}
        again = await cancel(http, call_id)
        assert (again.status_code, again.json()) == (200, {"id": call_id, "state": "client_cancelled"})


async def test_a_call_that_is_not_submitted_ends_too_and_reaches_no_engine(connect: Connect) -> None:
    class Slow(ByteTokenizer):
        began, go_on = threading.Event(), threading.Event()

        def encode(self, text: str, **flags: Any) -> list[int]:
            self.began.set()
            self.go_on.wait(10)
            return super().encode(text, **flags)

    stub = StubClient()
    tokenizer = Slow()
    async with connect(stub, tokenizer=tokenizer, max_context=100_000) as (http, server):
        call = post(http, COMPLETIONS, prompt="x" * 50_000)
        await until(tokenizer.began.is_set)
        [call_id] = live_ids(server)
        answer = await cancel(http, call_id)
        assert answer.json() == {"id": call_id, "state": "client_cancelled"}
        assert (await call).status_code == 499
        tokenizer.go_on.set()
    assert not stub.requests


async def test_what_has_ended_says_how(connect: Connect) -> None:
    async with connect() as (http, _):
        done = await http.post(CHAT, json=chat_body(max_tokens=1), headers={"x-client-request-id": "one"})
        failed = await http.post(CHAT, json={}, headers={"x-client-request-id": "two"})
        for answer, label, state in ((done, "one", "completed"), (failed, "two", "failed")):
            call_id = answer.headers["x-request-id"]
            assert (await cancel(http, call_id)).json() == {"id": call_id, "state": state}
            assert (await cancel(http, label)).json() == {"id": call_id, "state": state, "ids": [call_id]}
        assert (await cancel(http, done.json()["id"])).json()["state"] == "completed"


async def test_a_label_ends_all_live_calls_that_bear_it(connect: Connect) -> None:
    stub = StubClient(hang_at=1)
    async with connect(stub) as (http, server):
        calls = [post(http, headers={"x-client-request-id": label}) for label in ("a/b?", "a/b?", "other")]
        await until(lambda: stub.num_hanging == 3)
        ids = live_ids(server)
        answer = await cancel(http, "a%2Fb%3F")
        assert answer.json() == {"id": ids[1], "state": "client_cancelled", "ids": ids[:2]}
        assert live_ids(server) == ids[2:]
        assert (await cancel(http, "other")).json()["ids"] == ids[2:]
        assert [(await call).status_code for call in calls] == [499, 499, 499]


async def test_calls_of_another_key_are_not_there(connect: Connect) -> None:
    stub = StubClient(hang_at=1)
    async with connect(stub, keys=KEYS) as (http, server):
        call = post(http, headers=ALICE | {"x-client-request-id": "mine"})
        await until(lambda: stub.num_hanging == 1)
        [call_id] = live_ids(server)
        strange = [
            await cancel(http, name, BOB)
            for name in (call_id, f"chatcmpl-{call_id}", "mine", "chatcmpl-mine", "none", call_id[:-1])
        ]
        assert {answer.status_code for answer in strange} == {404} and live_ids(server) == [call_id]
        assert {answer.json()["error"]["code"] for answer in strange} == {"request_not_found"}
        assert (await cancel(http, call_id)).status_code == 401
        for name in (f"cmpl{call_id}", call_id.upper(), f"{call_id}-0", f"x-{call_id}", "min"):
            assert (await cancel(http, name, ALICE)).status_code == (200 if name == call_id else 404)
        # bob's label is alice's id: it is hers that she means
        other = post(http, headers=BOB | {"x-client-request-id": call_id})
        await until(lambda: stub.num_hanging == 2)
        assert (await cancel(http, call_id, ALICE)).json() == {"id": call_id, "state": "client_cancelled"}
        assert (await cancel(http, call_id, BOB)).json()["ids"] != [call_id]
        assert [(await task).status_code for task in (call, other)] == [499, 499]
        assert (await cancel(http, call_id, BOB)).json()["id"] != call_id
        assert (await cancel(http, "mine", BOB)).status_code == 404


async def test_many_may_cancel_one_call(connect: Connect) -> None:
    stub = StubClient(hang_at=1)
    async with connect(stub) as (http, server):
        call = post(http)
        await until(lambda: stub.num_hanging == 1)
        [call_id] = live_ids(server)
        answers = await asyncio.gather(*(cancel(http, call_id) for _ in range(9)))
        assert {answer.json()["state"] for answer in answers} == {"client_cancelled"}
        assert (await call).status_code == 499
        assert (await http.get(f"/v1/requests/{call_id}/cancel")).status_code == 405


def test_the_memory_of_endings_is_bounded() -> None:
    endings = Endings()

    def end(number: int, label: str | None) -> None:
        call = Call(id=str(number), route="/", key_name=None, label=label, received_ns=0)
        call.state = "completed"
        endings.on_end(call)

    end(0, "often")
    end(1, "once")
    for number in range(2, MAX_ENDINGS):
        end(number, "often" if number == 5 else None)
    assert endings.by_label("often", None) == ("5", "completed") and endings.by_label("once", None) == (
        "1",
        "completed",
    )
    end(MAX_ENDINGS, None)
    end(MAX_ENDINGS + 1, None)
    assert endings.by_id("1", None) is None and endings.by_label("once", None) is None
    assert endings.by_label("often", None) == ("5", "completed") and endings.by_id("2", None) == "completed"
    assert endings.by_id("2", "alice") is None and endings.by_label("often", "alice") is None


async def test_a_reader_that_stalls_is_not_waited_for() -> None:
    """Its call is in the middle of a write that does not end; the engine is free at once."""
    stub = StubClient(answer=lambda request: b"x" * 200_000)
    async with running(stub, max_context=200_000) as (port, _):
        assert stub.info is not None
        stub.info = msgspec.structs.replace(stub.info, max_context=200_000)
        body = json.dumps(chat_body(stream=True, max_tokens=199_000)).encode()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
        labelled = head(CHAT, body).replace(b"\r\n\r\n", b"\r\nX-Client-Request-Id: deaf\r\n\r\n")
        await asyncio.get_running_loop().sock_sendall(deaf, labelled + body)
        while not writes_wait():
            await asyncio.sleep(0.1)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            assert (await cancel(http, "deaf")).json()["state"] == "client_cancelled"
        assert stub.aborted == [stub.requests[0].id]
        deaf.close()


def writes_wait() -> bool:
    return any(
        isinstance(item, Transport) and item.flow is not None and item.flow.write_paused for item in gc.get_objects()
    )
