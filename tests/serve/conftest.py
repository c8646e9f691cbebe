"""What the tests of the server share: a stub engine, and an HTTP client that calls the app in this process."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import pytest

from jilju.serve.app import app_of
from jilju.serve.server import Server, make_server

from .stub import StubClient, make_context

Connect = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, Server]]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def connect() -> Connect:
    @asynccontextmanager
    async def connected(
        stub: StubClient | None = None, host: str = "localhost", **changes: object
    ) -> AsyncIterator[tuple[httpx.AsyncClient, Server]]:
        server = make_server(make_context(stub, **changes))
        transport = httpx.ASGITransport(app_of(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
            yield http, server
        assert server.ledger.imbalance() == 0
        assert not server.ledger.live

    return connected
