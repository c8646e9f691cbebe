"""What a supervised engine's log tells between steps, and the bill over it, with a real process that is killed."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec

from jilju.account.bill import Bill
from jilju.account.step_model import StepModel
from jilju.clock import WallClock
from jilju.engine.events import StepRecord, iter_rows
from jilju.engine.process import SupervisedClient
from jilju.engine.request import Request, is_terminal
from tests.engine.fakes import request
from tests.engine.test_supervisor import make_client, wait_until


class Story:
    """What is told, in its order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []
        self.inside: set[int] = set()

    def on_enter(self, number: int, tenant: str, at_ns: int) -> None:
        self.told.append(("enter", tenant))
        self.inside.add(number)

    def on_leave(self, number: int, at_ns: int) -> None:
        self.told.append(("leave", number))
        self.inside.remove(number)

    def on_engine(self, is_ready: bool, at_ns: int) -> None:
        self.told.append(("engine", is_ready))

    def on_step(self, record: StepRecord) -> None:
        assert {row[0] for row in iter_rows(record.rows)} <= self.inside, "a row of one that has left, or never came"


def numbered(number: int, max_tokens: int) -> Request:
    made = request(f"r{number}", [number] * 9, max_tokens, seed=number)
    return msgspec.structs.replace(made, number=number, tenant="ann")


async def read(client: SupervisedClient, asked: Request, num_events: int) -> None:
    """Some events; then nobody reads on."""
    stream = client.submit(asked)
    async for event in stream:
        num_events -= 1
        if not num_events or is_terminal(event):
            break
    await stream.aclose()


def test_a_killed_engine_and_those_who_left_are_billed(tmp_path: Path) -> None:
    async def main() -> None:
        client = make_client(tmp_path, step_ms=2)
        story, clock = Story(), WallClock()
        bill = Bill(clock.now_ns(), lambda: StepModel(None))
        client.log.listen(bill.on_step)
        client.log.watch(bill)
        client.log.listen(story.on_step)
        client.log.watch(story)
        await client.start()
        left = asyncio.create_task(read(client, numbered(1, 100), 3))
        whole = asyncio.create_task(read(client, numbered(2, 60), 1000))
        await wait_until(lambda: len(client.log.steps) > 20)
        os.kill(client.process_id, signal.SIGKILL)
        await asyncio.gather(left, whole)
        await wait_until(lambda: not story.inside)
        assert bill.is_final([1, 2])
        now_ns = clock.now_ns()
        sums = bill.sums(now_ns)
        lines = {line: paid.machine_ns for line, paid in sums.lines.items()}
        assert sum(lines.values()) + sums.requests.machine_ns == sums.uptime_ns == now_ns - bill.begin_ns
        assert lines["load"] > 0 and lines["failed"] > 0 and lines["recompute"] > 0 and lines["host"] > 0
        assert sums.by_key.keys() == {"ann"} and bill.close([2]).machine_ns > bill.close([1]).machine_ns > 0
        await client.stop()
        engines = [what for kind, what in story.told if kind == "engine"]
        assert engines[:3] == [True, False, True]
        assert sorted(what for kind, what in story.told if kind == "leave") == [1, 2]

    asyncio.run(main())


def test_a_stopped_client_tells_of_all_who_were_inside(tmp_path: Path) -> None:
    async def main() -> None:
        client, story = make_client(tmp_path, step_ms=2), Story()
        client.log.watch(story)
        await client.start()
        reading = asyncio.create_task(read(client, numbered(1, 140), 10**6))
        await wait_until(lambda: len(client.log.steps) > 3)
        await client.stop()
        await reading
        assert not story.inside

    asyncio.run(main())
