"""The ledger of calls: its laws, and listeners that cannot break it."""

import asyncio

import pytest

from jilju.clock import VirtualClock
from jilju.engine.request import RequestTimes
from jilju.serve.app import app_of
from jilju.serve.ledger import Call, Ledger, SequenceLife
from jilju.serve.server import make_server

from .conftest import Connect
from .stub import StubClient, make_context
from .test_answers import COMPLETIONS
from .test_billing import serving
from .test_cancel import cancel, live_ids, post, until
from .test_told import samples_of, value

pytestmark = pytest.mark.anyio


class Noted:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.num_tokens = 0

    def on_token(self, call: Call, gap_ns: int | None) -> None:
        self.num_tokens += 1

    def on_end(self, call: Call) -> None:
        self.calls.append(call)


class Broken:
    def on_token(self, call: Call, gap_ns: int | None) -> None:
        raise ZeroDivisionError

    def on_end(self, call: Call) -> None:
        raise KeyError(call.id)


def make_call(**changes: object) -> Call:
    return Call(id="a", route="/", key_name=None, label=None, received_ns=1, **changes)  # type: ignore[arg-type]


async def test_a_listener_that_fails_ends_no_call_and_hides_none() -> None:
    ledger, first, last = Ledger(VirtualClock(1)), Noted(), Noted()
    for listener in (first, Broken(), last):
        ledger.listen(listener)
    call = ledger.accept(make_call())
    ledger.token(call, None)
    assert ledger.imbalance() == 1, "its sums are wrong from here on, and that is told"
    ledger.end(call, "completed", 200)
    assert first.calls == last.calls == [call] and first.num_tokens == last.num_tokens == 1
    assert not ledger.live and ledger.imbalance() == 2


async def test_a_fold_of_the_log_that_fails_is_told_by_the_metrics(connect: Connect) -> None:
    async with serving(connect) as (http, server):

        def fail(step: object) -> None:
            raise ValueError("a fold is wrong")

        server.context.client.log.listen(fail)
        answer = await http.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 3})
        assert answer.status_code == 200
        samples = samples_of((await http.get("/metrics")).text)
        assert value(samples, "jilju_ledger_imbalance") == server.context.client.log.num_failures >= 3


def test_what_prompts_found_in_the_cache_counts_once_a_prompt() -> None:
    call = make_call()
    for number, (prompt_index, found) in enumerate([(0, 32), (0, 48), (1, None), (1, 16), (2, 0)]):
        times = None if found is None else RequestTimes(queued_ns=1, num_cached_tokens=found)
        call.lives.append(SequenceLife(number, number, prompt_index, 60, times=times))
    assert call.num_cached_tokens == call.record().num_cached_tokens == 32


async def test_who_leaves_has_had_his_hits_in_the_cache(connect: Connect) -> None:
    """The metrics, the log and the bill say the same of it."""
    async with serving(connect, step_s=0.002) as (http, server):
        body = {"prompt": "x" * 40, "max_tokens": 100, "ignore_eos": True}
        await http.post(COMPLETIONS, json=body | {"max_tokens": 1})
        call = post(http, COMPLETIONS, **body)
        await until(lambda: any(call.num_output_tokens > 2 for call in server.ledger.live.values()))
        [live] = server.ledger.live.values()
        await cancel(http, live_ids(server)[0])
        await call
        assert live.num_cached_tokens == live.record().num_cached_tokens == 36
        samples = samples_of((await http.get("/metrics")).text)
        assert value(samples, "jilju_prompt_tokens_total", source="cached") == 36
        assert value(samples, "jilju_prompt_tokens_total", source="computed") == 40 + 4


async def test_the_end_of_a_sequence_does_not_wait_for_a_slow_reader() -> None:
    """Nor do the engine's last event and what the reader takes count as the engine's time."""
    server = make_server(make_context(StubClient()))
    body = b'{"prompt": "abc", "max_tokens": 5, "stream": true, "ignore_eos": true}'
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "query_string": b"", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
    }  # fmt: skip

    async def receive() -> dict[str, object]:
        return parts.pop() if parts else await asyncio.Future[dict[str, object]]()

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(0.05)

    await app_of(server)(scope, receive, send)  # type: ignore[arg-type]
    [record] = server.calls
    [sequence] = record.sequences
    assert record.state == "completed" and sequence.ended_ns == record.last_event_ns
    held_up = [begin for begin, end in record.waits if begin < sequence.ended_ns < end]
    assert held_up, "the answer is made while its first chunk is written"
