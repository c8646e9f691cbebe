"""The client of an engine in this process: events reach the event loop, aborts reach the engine."""

import asyncio

import pytest

from jilju.clock import WallClock
from jilju.engine.inprocess import InProcessClient
from jilju.engine.loop import Engine
from jilju.engine.request import RequestAborted, RequestFailed, TokenEvent
from jilju.errors import ContextLengthExceeded, EngineUnavailable, NotReady

from .fakes import FakeExecutor, make_limits, oracle, request, tiny_plan


def make_client(**limits) -> InProcessClient:
    bounds = make_limits(**limits)
    return InProcessClient(Engine(tiny_plan(), FakeExecutor(bounds), bounds, WallClock()))


async def collect(stream) -> list:
    return [event async for event in stream]


def test_streams_finish_like_alone():
    async def main():
        client = make_client(num_blocks=40)
        with pytest.raises(NotReady):
            client.submit(request("early", [1]))
        await client.start()
        requests = [request(f"r{i}", list(range(i + 1)), 20, seed=i) for i in range(8)]
        answers = await asyncio.gather(*(collect(client.submit(r)) for r in requests))
        for r, events in zip(requests, answers, strict=True):
            assert [e.token_id for e in events] == oracle(r)[0]
        assert sum(s.num_finished for s in client.log.steps) == 8
        assert client.status().num_blocks_held == 0 and client.status().state == "ready"
        with pytest.raises(ContextLengthExceeded):
            client.submit(request("long", [1] * 4000, 1000))
        await client.stop()
        with pytest.raises(EngineUnavailable):
            client.submit(requests[0])

    asyncio.run(main())


def test_closing_early_aborts_and_stop_ends_what_is_live():
    async def main():
        client = make_client(num_blocks=600)
        await client.start()
        left = client.submit(request("left", [1], 2000))
        assert isinstance(await anext(left), TokenEvent)
        await left.aclose()
        assert [e async for e in left] == []
        aborted = client.submit(request("aborted", [1], 2000))
        await anext(aborted)
        client.abort("aborted")
        client.abort("nobody")
        assert isinstance((await collect(aborted))[-1], RequestAborted)
        while client.status().num_running:  # "left" goes too
            await asyncio.sleep(0.001)
        live = client.submit(request("live", [1], 2000))
        await anext(live)
        await client.stop()
        last = (await collect(live))[-1]
        assert isinstance(last, RequestFailed) and last.code == "not_ready"

    asyncio.run(main())


def test_a_defect_of_the_engine_ends_its_requests(caplog):
    async def main():
        client = make_client()
        client._engine.scheduler.schedule = lambda now_ns: 1 / 0
        await client.start()
        (event,) = await collect(client.submit(request("a", [1])))
        assert isinstance(event, RequestFailed) and event.code == "internal"
        assert client.status().state == "gone"
        await client.stop()

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text
