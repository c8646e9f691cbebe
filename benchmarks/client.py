"""Requests to a server as a load sends them: each on a connection of its own, never again after a refusal.

Owns the bytes of a request, what came back of it and when, and the client's own lag. It speaks HTTP/1.1 itself and looks for no more than
it counts, so as not to take the cores that it measures. Knows nothing of arrivals. Times are seconds of the monotonic clock, which the
server's step records tell too.
"""

import asyncio
import contextlib
import gc
import math
import random
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

FIRST_ID, LAST_ID = 1000, 20_000  # of prompts: above what vocabularies keep for bytes and marks
LAG_S = 0.01  # between two looks at the client's own lag
EVENT, DONE = b"\ndata: {", b"\ndata: [DONE]"  # JSON has no line break inside, so these are the events themselves

T = TypeVar("T")


def completion(prompt: list[int] | str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A greedy stream of just so many tokens, unless `fields` say otherwise."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return body | fields


def random_ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(FIRST_ID, LAST_ID), k=count)


@dataclass(slots=True)
class Answer:
    """What the client of one request saw."""

    start: float
    status: int = 0  # 0: no head came
    token_times: list[float] = field(default_factory=list)
    is_done: bool = False  # a stream said so, or a whole answer is complete
    is_cancelled: bool = False
    end: float = 0.0

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.is_done

    @property
    def first_token_s(self) -> float:
        return self.token_times[0] - self.start

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def token_s(self) -> float:
        """Mean gap; 0 of a single token."""
        return (self.token_times[-1] - self.token_times[0]) / max(1, len(self.token_times) - 1)


class Exchange(asyncio.Protocol):
    """One request and its answer; `cancel()` closes the connection, as a client that leaves does."""

    def __init__(self, body: dict[str, Any]):
        self.answer = Answer(time.monotonic())
        self._changed = asyncio.Event()
        self.ended: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._is_stream = bool(body["stream"])
        path = b"/v1/chat/completions" if "messages" in body else b"/v1/completions"
        data = msgspec.json.encode(body)
        self._message = (
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (path, len(data), data)
        )
        self._held = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "TCP gives streams"
        self._transport = transport
        transport.write(self._message)
        self._message = b""

    def data_received(self, data: bytes) -> None:
        now, held, answer = time.monotonic(), self._held + data, self.answer
        if answer.status == 0:
            if b"\r\n\r\n" not in held:
                self._held = held
                return
            answer.status = int(held.split(b" ", 2)[1])
            held = held[held.index(b"\r\n\r\n") :]
        if self._is_stream and answer.status == 200 and not answer.is_cancelled:
            whole = held[: held.rfind(b"\n")]  # lines are counted when they are complete
            answer.token_times += [now] * whole.count(EVENT)
            answer.is_done = answer.is_done or DONE in whole
            held = held[len(whole) :]
        self._held = held
        self._changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        answer = self.answer
        answer.end = answer.end or time.monotonic()
        if not self._is_stream and answer.status and error is None:
            answer.is_done = True
        self._changed.set()
        if not self.ended.done():
            self.ended.set_result(answer)

    async def wait(self, timeout_s: float) -> None:
        """Until something else came: a token, or the end."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def cancel(self) -> None:
        """Unless the answer is there already."""
        if self._transport is not None and not self.answer.is_done and not self.ended.done():
            self.answer.is_cancelled, self.answer.end = True, time.monotonic()
            self._transport.close()


async def send(port: int, body: dict[str, Any]) -> Exchange:
    """A request that is under way. One that could not be sent has ended, with status 0."""
    exchange = Exchange(body)
    try:
        await asyncio.get_running_loop().create_connection(lambda: exchange, "127.0.0.1", port)
    except OSError as error:
        exchange.connection_lost(error)
    return exchange


async def ask(port: int, body: dict[str, Any]) -> Answer:
    exchange = await send(port, body)
    return await exchange.ended


async def open_loop(port: int, bodies: Sequence[dict[str, Any]], rate: float, rng: random.Random) -> list[Answer]:
    """Poisson arrivals, whatever becomes of those before them. `start` is when each was due, so that a client that is late sees it."""
    tasks, due = [], time.monotonic()
    for body in bodies:
        due += rng.expovariate(rate)
        await asyncio.sleep(due - time.monotonic())
        tasks.append(asyncio.create_task(_due(port, body, due)))
    return await asyncio.gather(*tasks)


async def _due(port: int, body: dict[str, Any], due: float) -> Answer:
    exchange = await send(port, body)
    exchange.answer.start = due
    return await exchange.ended


async def closed_loop(port: int, bodies: Iterator[dict[str, Any]], concurrency: int, duration_s: float) -> list[Answer]:
    """So many at a time; nothing is sent after `duration_s`, and what is under way then is answered."""
    answers: list[Answer] = []
    end = time.monotonic() + duration_s

    async def one_after_another() -> None:
        while time.monotonic() < end:
            answers.append(await ask(port, next(bodies)))

    await asyncio.gather(*[one_after_another() for _ in range(concurrency)])
    return answers


async def with_lag(work: Awaitable[T]) -> tuple[T, list[float]]:
    """What `work` gives, and how late the client's loop was meanwhile, in seconds, a look each 10 ms."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.monotonic() + LAG_S
            await asyncio.sleep(LAG_S)
            lags.append(time.monotonic() - due)

    watching = asyncio.create_task(watch())
    gc.collect()
    gc.freeze()  # what is here by now stays: collections in the load look at its own requests only
    try:
        return await work, lags
    finally:
        gc.unfreeze()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; 0 of none."""
    ordered = sorted(values) or [0.0]
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
