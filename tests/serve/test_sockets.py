"""Real sockets: clients that leave, readers that are slow, the openai client, and how a server ends."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jilju.config import ApiKey
from jilju.engine.request import RequestFailed
from jilju.errors import StartupError
from jilju.serve.context import ServeLimits
from jilju.serve.runner import bind, serve

from .stub import TEXTS, StubClient, make_context
from .test_answers import CHAT, chat_body

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def running(stub: StubClient, **changes: object) -> AsyncIterator[tuple[int, "asyncio.Task[int]"]]:
    """A server in this loop, ended by a signal at the latest when the block is left."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    ready = asyncio.Event()
    task = asyncio.create_task(serve(make_context(stub, **changes), listener, on_ready=lambda address: ready.set()))
    await ready.wait()
    try:
        yield port, task
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0
        assert stub.stopped


def head(path: str, body: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hang_at", [0, 3])
@pytest.mark.parametrize("reset", [True, False])
async def test_a_client_that_leaves_is_aborted(stream: bool, hang_at: int, reset: bool) -> None:
    stub = StubClient(hang_at=hang_at)
    body = json.dumps(chat_body(stream=stream)).encode()
    async with running(stub) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(CHAT, body) + body)
        if stream and hang_at:
            await reader.readuntil(b"\n\n")
        await until(lambda: stub.requests)
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: stub.aborted)
        await until(lambda: not stub.live)
        assert stub.aborted == [stub.requests[0].id]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            metrics = (await http.get("/metrics")).text
        assert 'jilju_requests_finished_total{code="",model="stub",state="client_cancelled"} 1.0' in metrics
        assert 'jilju_ledger_imbalance{model="stub"} 0.0' in metrics


async def test_a_client_that_leaves_within_its_body_reaches_no_engine() -> None:
    stub = StubClient()
    async with running(stub) as (port, _):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(CHAT, b"x" * 1000) + b"{")
        await writer.drain()
        writer.close()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            while 'state="client_cancelled"' not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.005)
    assert not stub.requests


async def test_a_reader_that_takes_nothing_has_left_and_hurts_nobody() -> None:
    stub = StubClient(answer=lambda request: b"x" * 200_000)
    limits = ServeLimits(stall_s=0.2)
    body = json.dumps(chat_body(stream=True, max_tokens=199_000)).encode()
    async with running(stub, limits=limits, max_context=200_000) as (port, _):
        assert stub.info is not None
        stub.info = type(stub.info)(
            **{name: getattr(stub.info, name) for name in stub.info.__struct_fields__} | {"max_context": 200_000}
        )
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
        await asyncio.get_running_loop().sock_sendall(deaf, head(CHAT, body) + body)
        await until(lambda: stub.requests)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            other = await http.post(CHAT, json=chat_body(max_tokens=3))
            assert other.status_code == 200
            await until(lambda: stub.requests[0].id in stub.aborted)
            while 'state="client_cancelled"} 1.0' not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.005)
        deaf.close()


async def test_the_openai_client_sees_the_same_answer_streamed_and_whole() -> None:
    prompts = ["대한민국의 수도는 어디인가요?", "Why is the sky blue?", "서울", "🇰🇷", "1+1"]
    stub = StubClient()
    async with (
        running(stub, keys=(ApiKey("k", "secret"),)) as (port, _),
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["stub"]
        assert (await client.models.retrieve("stub")).owned_by == "jilju"
        for index, prompt in enumerate(prompts):
            settings: dict[str, Any] = {"seed": 5} if index % 2 else {"temperature": 0}
            message: Any = {"role": "user", "content": prompt}
            whole = await client.chat.completions.create(model="stub", messages=[message], **settings)
            stream = await client.chat.completions.create(
                model="stub", messages=[message], stream=True, stream_options={"include_usage": True}, **settings
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == whole.choices[0].message.content and text in TEXTS
            assert chunks[-1].usage == whole.usage
            assert chunks[0].choices[0].delta.role == "assistant"
        completion = await client.completions.create(model="stub", prompt=prompts, max_tokens=9, logprobs=2, seed=1)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3, 4]
        assert all(len(choice.logprobs.tokens or ()) == 9 for choice in completion.choices if choice.logprobs)
        chat = await client.chat.completions.create(model="stub", messages=[message], logprobs=True, top_logprobs=3)
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None and len(logprobs.content[0].top_logprobs) == 3


async def test_the_openai_client_maps_our_errors() -> None:
    def fail(request: Any, index: int) -> RequestFailed | None:
        return RequestFailed(request_id=request.id, code="internal", message="boom") if index == 2 else None

    stub = StubClient(fail=fail)
    message: Any = {"role": "user", "content": "x"}
    async with (
        running(stub, keys=(ApiKey("k", "secret"),), limits=ServeLimits(queue_requests=1)) as (port, _),
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client,
    ):

        async def chat(**fields: Any) -> Any:
            return await client.chat.completions.create(**{"model": "stub", "messages": [message]} | fields)

        with pytest.raises(openai.NotFoundError) as unknown:
            await chat(model="other")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await chat(temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.InternalServerError):
            await chat()
        with pytest.raises(openai.APIError, match="boom"):
            async for _ in await chat(stream=True):
                pass
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="stub", prompt=["a", "b"])
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_calls_before_the_engine_is_ready_get_503_and_the_page_is_there() -> None:
    stub = StubClient(state="loading", load_s=0.3)
    listener = bind("127.0.0.1", 0)
    task = asyncio.create_task(serve(make_context(stub), listener))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
        assert (await http.get("/livez")).status_code == 200
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": "loading"})
        refused = await http.post(CHAT, json=chat_body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.02)
        assert (await http.post(CHAT, json=chat_body())).status_code == 200
        assert "server" not in ready.headers
    os.kill(os.getpid(), signal.SIGINT)
    assert await task == 0


async def test_an_engine_that_cannot_load_ends_the_server_with_its_message() -> None:
    stub = StubClient(state="loading", load_error="no memory for 3 GiB")
    with pytest.raises(StartupError, match="no memory"):
        await serve(make_context(stub), bind("127.0.0.1", 0))
    assert stub.stopped


async def test_drain_refuses_new_calls_and_lets_live_ones_finish() -> None:
    stub = StubClient(delay_s=0.01, answer=lambda request: b"y" * 60)
    async with running(stub) as (port, task), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        live = asyncio.create_task(http.post(CHAT, json=chat_body(max_tokens=60, stream=True)))
        await until(lambda: stub.requests)
        os.kill(os.getpid(), signal.SIGTERM)
        while (ready := await http.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.002)
        assert ready.json()["reason"] == "draining"
        refused = await http.post(CHAT, json=chat_body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert "retry-after" in refused.headers
        answer = await live
        assert answer.text.endswith("data: [DONE]\n\n")
        assert await task == 0


async def test_drain_ends_what_is_not_complete_with_an_error_event() -> None:
    stub = StubClient(hang_at=2)
    async with (
        running(stub, limits=ServeLimits(drain_s=0.1)) as (port, task),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        streamed = asyncio.create_task(http.post(CHAT, json=chat_body(stream=True)))
        whole = asyncio.create_task(http.post(CHAT, json=chat_body()))
        await until(lambda: len(stub.requests) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        text = (await streamed).text
        assert '"code":"not_ready"' in text and "[DONE]" not in text
        assert (await whole).status_code == 503
        assert await task == 0
    assert len(stub.aborted) == 2


async def test_an_engine_that_is_given_up_ends_the_server_as_a_failure() -> None:
    stub = StubClient()
    task = asyncio.create_task(serve(make_context(stub), bind("127.0.0.1", 0)))
    await asyncio.sleep(0.05)
    stub.state = "gone"
    assert await task == 1


SCRIPT = """
import sys
from tests.serve.stub import StubClient, make_context
from jilju.serve.runner import run_server
sys.exit(run_server(make_context(StubClient(hang_at=1)), port=0, on_ready=lambda address: print(address, flush=True)))
"""


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
async def test_the_process_ends_by_signals(signals: list[signal.Signals]) -> None:
    """One signal on an idle server; two on one whose answer would never end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    async with httpx.AsyncClient(base_url=address) as http:
        assert (await http.get("/readyz")).status_code == 200
        if len(signals) > 1:
            async with http.stream("POST", CHAT, json=chat_body(stream=True)) as response:
                await anext(response.aiter_bytes())
                for number in signals:
                    process.send_signal(number)
                    await asyncio.sleep(0.1)
                await process.wait()
        else:
            process.send_signal(signals[0])
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
