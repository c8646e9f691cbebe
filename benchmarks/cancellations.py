"""Cancellations: clients that leave at any moment of the queue, of prefill and of decode, and what of them stays in `jilju serve`.

So many at a time that some wait; a third leaves while decoding, after a number of tokens, the rest at any moment before the first token.
Nobody is answered to the end. The law, of every step's record: who had left before the step before it began is no longer in the
engine. At the end nobody runs or waits, no block is held, and every call is accounted for.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
from client import Answer, Exchange, completion, random_ids, send
from rich.console import Console
from server import Server, idle_metrics, num_waiting, read_records, serving

from jilju.bench.bars import CancellationFigures
from jilju.bench.report import table_of
from jilju.engine.events import StepRecord

ROWS, AT_ONCE = 8, 16  # half of those who are there wait
NUM_INPUT, STEP_TOKENS = 300, 64  # a prompt takes several steps
MOST_OUTPUT, NUM_OUTPUT = 16, 600  # who decodes leaves after up to so many tokens of those it asked for
SLACK_S = 0.001  # clocks of two processes are read a little apart from what they time


class Clients:
    def __init__(self, port: int, rng: random.Random):
        self._port, self._rng = port, rng
        self._first_s = 0.5  # running mean of the time to a first token
        self.answers: list[Answer] = []

    async def run(self, count: int, at_once: int) -> None:
        left = iter(range(count))
        await asyncio.gather(*[self._one_after_another(left) for _ in range(at_once)])

    async def _one_after_another(self, left: Iterator[int]) -> None:
        for number in left:
            exchange = await send(self._port, completion(random_ids(self._rng, NUM_INPUT), NUM_OUTPUT))
            if number % 3 == 0:
                await self._while_decoding(exchange)
            else:
                await self._before_first_token(exchange)
            exchange.cancel()
            self.answers.append(await exchange.ended)

    async def _before_first_token(self, exchange: Exchange) -> None:
        left_s = self._rng.uniform(0, self._first_s)
        while not exchange.answer.token_times and not exchange.ended.done():
            if (wait_s := exchange.answer.start + left_s - time.monotonic()) <= 0:
                return
            await exchange.wait(wait_s)

    async def _while_decoding(self, exchange: Exchange) -> None:
        count = self._rng.randint(1, MOST_OUTPUT)
        while len(exchange.answer.token_times) < count and not exchange.ended.done():
            await exchange.wait(60.0)
        if exchange.answer.token_times:
            self._first_s += (exchange.answer.first_token_s - self._first_s) / 8
        await asyncio.sleep(self._rng.uniform(0, 0.02))  # somewhere in a step


def late_steps(records: list[StepRecord], answers: list[Answer]) -> list[StepRecord]:
    """Steps that ended with more sequences than there were clients when the step before them began."""
    starts, ends = sorted(answer.start for answer in answers), sorted(answer.end for answer in answers)
    late = []
    for before, record in pairwise(records):
        num_come = bisect_left(starts, record.end_ns / 1e9)
        num_gone = bisect_left(ends, before.begin_ns / 1e9 - SLACK_S)
        if record.num_running + record.num_waiting > num_come - num_gone:
            late.append(record)
    return late


def left_over(metrics: dict[str, float], num_cancelled: int) -> dict[str, float]:
    """All of these must be 0."""
    ended = sum(value for name, value in metrics.items() if name.startswith("jilju_requests_finished_total"))
    return {
        "running": metrics["jilju_num_requests_running"],
        "waiting": num_waiting(metrics),
        "held blocks": metrics['jilju_blocks{state="held"}'],
        "broken laws": metrics["jilju_ledger_imbalance"],
        "calls without an end": abs(metrics['jilju_requests_accepted_total{route="/v1/completions"}'] - ended),
        "cancelled otherwise": abs(num_cancelled - metrics['jilju_requests_finished_total{code="",state="client_cancelled"}']),
    }  # fmt: skip


def run(server: Server, count: int) -> tuple[list[Answer], float, dict[str, float]]:
    clients = Clients(server.port, random.Random(1))
    asyncio.run(clients.run(count, AT_ONCE))
    settled_s, metrics = idle_metrics(server)
    return clients.answers, settled_s, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    flags = ("--context", "1024", "--kv-memory", "256MiB", "--max-rows", str(ROWS), "--step-tokens", str(STEP_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        with serving(arguments.model, *flags, records=file) as server:
            answers, settled_s, metrics = run(server, arguments.requests)
        records = read_records(file)
    cancelled = [answer for answer in answers if answer.is_cancelled]
    left, late = left_over(metrics, len(cancelled)), late_steps(records, answers)
    figures = CancellationFigures(
        model=arguments.model,
        num_cancelled=len(cancelled),
        num_before_first_token=sum(not answer.token_times for answer in cancelled),
        num_steps=len(records),
        num_late_steps=len(late),
        settled_s=settled_s,
        num_left=int(sum(left.values())),
    )
    table = table_of(f"{arguments.model}, {len(answers)} clients, {len(cancelled)} of them left", ["", ""])
    table.add_row("before the first token", str(figures.num_before_first_token))
    table.add_row("steps with somebody in the queue", f"{sum(r.num_waiting > 0 for r in records)} of {len(records)}")
    table.add_row("steps of prefill", str(sum(r.num_prefill_tokens > 0 for r in records)))
    table.add_row("taken out, by the engine's records", str(sum(r.num_aborted for r in records)))
    table.add_row("steps that still held one that had left before the step before", str(len(late)))
    table.add_row("until nobody ran or waited", f"{1e3 * settled_s:.0f} ms")
    for name, value in left.items():
        table.add_row(f"left over: {name}", f"{value:.0f}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
