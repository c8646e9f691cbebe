"""Ledgers: a mixed load on `jilju serve`, and whether every run's time is accounted for.

Short and long prompts, streams and whole answers, several keys' worth of shared prefixes, clients that leave, a pool small enough that
sequences are preempted, and deaths of the engine. Of each run: its intervals touch and sum to its wall time, and that is the client's own
within 1 % + 5 ms. Of a run of short streams beside one long prompt: how much of what they lost to others is blamed on it.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from client import Exchange, completion, percentile, random_ids, with_lag
from rich.console import Console
from server import Server, serving
from start import engine_of

from jilju.bench.bars import LedgerFigures
from jilju.bench.report import table_of

AT_ONCE = 12
LEAVES = 0.1  # of the clients
KILLS = 6
SLACK_SHARE, SLACK_MS = 0.01, 5.0
LONG_PROMPT, NUM_SHORT = 1800, 8


class NamedExchange(Exchange):
    """One that keeps the id of its answer."""

    run_id = ""

    def data_received(self, data: bytes) -> None:
        if not self.run_id and (at := data.find(b'"id":"cmpl-')) >= 0:
            self.run_id = data[at + 6 : at + 6 + 29].decode()
        super().data_received(data)


async def named(port: int, body: dict[str, Any]) -> NamedExchange:
    exchange = NamedExchange(body)
    await asyncio.get_running_loop().create_connection(lambda: exchange, "127.0.0.1", port)
    return exchange


class Load:
    def __init__(self, server: Server, rng: random.Random):
        self._server, self._rng = server, rng
        self._prefixes = [random_ids(rng, 200) for _ in range(4)]
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
        self.checks: Counter[str] = Counter()
        self.excess_ms: list[float] = []  # of the client's clock over the run's, of those that were answered
        self._named: list[NamedExchange] = []
        self.num_kills = 0

    async def run(self, count: int) -> None:
        left = iter(range(count))
        await asyncio.gather(*[self._one_after_another(left, count) for _ in range(AT_ONCE)])

    async def check(self) -> None:
        """Afterwards: who looks at runs while they go takes the cores that they need."""
        for exchange in self._named:
            await self._check(exchange)
        await self._http.aclose()

    def _body(self, number: int) -> dict[str, Any]:
        rng = self._rng
        prompt = rng.choice(self._prefixes)[: rng.choice([0, 100, 200])] + random_ids(rng, rng.choice([8, 40, 300]))
        return completion(prompt, rng.choice([1, 8, 24, 80]), stream=number % 3 != 0)

    async def _one_after_another(self, left: Iterator[int], count: int) -> None:
        for number in left:
            if number and number % (count // (KILLS + 1)) == 0 and self.num_kills < KILLS:
                os.kill(engine_of(self._server.pid), signal.SIGKILL)
                self.num_kills += 1
            exchange = await named(self._server.port, self._body(number))
            if self._rng.random() < LEAVES:
                await asyncio.sleep(self._rng.uniform(0, 0.5))
                exchange.cancel()
            answer = await exchange.ended
            if answer.status in (429, 503):
                self.checks["refused"] += 1
                await asyncio.sleep(0.3)
            elif exchange.run_id:
                self._named.append(exchange)
            else:
                self.checks["left before the first token"] += 1

    async def _check(self, exchange: NamedExchange) -> None:
        """Of a run whose client knows its id."""
        for _ in range(100):
            run = (await self._http.get(f"/v1/jilju/runs/{exchange.run_id}")).json()
            if run["state"] != "running":
                break
            await asyncio.sleep(0.05)
        self.checks[run["state"]] += 1
        (sequence,) = run["sequences"]
        ledger = sequence["ledger"]
        ends = [0.0, *(interval["begin_ms"] + interval["ms"] for interval in ledger["intervals"])]
        begins = [interval["begin_ms"] for interval in ledger["intervals"]] + [ledger["total_ms"]]
        touch = all(abs(begin - end) < 1e-6 for begin, end in zip(begins, ends, strict=True))
        self.checks["unbalanced"] += not (touch and ledger["is_balanced"])
        self.checks["preempted"] += bool(sequence["preemptions"])
        self.checks["resumed"] += bool(sequence["resumes"])
        answer = exchange.answer
        if answer.is_complete:
            took_ms = (answer.end - answer.start) * 1e3
            self.excess_ms.append(took_ms - run["total_ms"])
            self.checks["off the client's clock"] += abs(self.excess_ms[-1]) > SLACK_SHARE * took_ms + SLACK_MS


async def contention(port: int, rng: random.Random) -> list[float]:
    """Of each short stream the share of what it lost to others beside a long prompt that is blamed on it."""
    short = [await named(port, completion(random_ids(rng, 20), 120)) for _ in range(NUM_SHORT)]
    while not all(exchange.answer.token_times for exchange in short):
        await asyncio.sleep(0.02)
    long = await named(port, completion(random_ids(rng, LONG_PROMPT), 1))
    await asyncio.gather(*[exchange.ended for exchange in [*short, long]])
    await asyncio.sleep(0.2)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        runs = [(await http.get(f"/v1/jilju/runs/{exchange.run_id}")).json() for exchange in [*short, long]]
    *shorts, of_long = [run["sequences"][0] for run in runs]
    begin = of_long["steps"][0]["begin_ms"]
    offset = {run["id"]: exchange.answer.start for run, exchange in zip(runs, [*short, long], strict=True)}
    shares: list[float] = []
    end = of_long["steps"][-1]["begin_ms"] + of_long["steps"][-1]["ms"]
    for run, sequence in zip(runs, shorts, strict=False):
        shift = (offset[runs[-1]["id"]] - offset[run["id"]]) * 1e3
        lost = [
            i for i in sequence["ledger"]["intervals"]
            if i["kind"] in ("decode_others", "stall_budget") and begin + shift - 5 <= i["begin_ms"] <= end + shift + 5
        ]  # fmt: skip
        of_it = sum(blame["ms"] for i in lost for blame in i["blame"] if blame["run"] == runs[-1]["id"])
        shares.append(of_it / sum(i["ms"] for i in lost))
    return shares


async def loaded(load: Load, count: int) -> list[float]:
    """The client's lag during the load."""
    _, lags = await with_lag(load.run(count))
    await load.check()
    return lags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rng = random.Random(5)
    # Three sequences of the longest kind fit, and twelve come.
    flags = ("--context", "1024", "--kv-memory", "40MiB", "--max-rows", "10", "--step-tokens", "256")
    with serving(arguments.model, *flags) as server:
        load = Load(server, rng)
        lags = asyncio.run(loaded(load, arguments.requests))
        metrics = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    with serving(arguments.model, "--context", "4096") as server:
        shares = [share for _ in range(3) for share in asyncio.run(contention(server.port, rng))]
    imbalance = next(
        float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith("jilju_ledger_imbalance")
    )
    figures = LedgerFigures(
        model=arguments.model,
        num_requests=arguments.requests,
        num_unbalanced=load.checks["unbalanced"],
        num_off=load.checks["off the client's clock"],
        num_timed=len(load.excess_ms),
        num_preempted=load.checks["preempted"],
        num_resumed=load.checks["resumed"],
        num_cancelled=load.checks["client_cancelled"] + load.checks["left before the first token"],
        num_kills=load.num_kills,
        imbalance=imbalance,
        excess_ms=statistics.median(load.excess_ms),
        excess_ms_max=max(load.excess_ms),
        blamed_share=min(shares),
    )
    table = table_of(f"{arguments.model}, {arguments.requests} calls, {AT_ONCE} at a time", ["", ""])
    for name, count in sorted(load.checks.items()):
        table.add_row(name, str(count))
    table.add_row("engines killed", str(load.num_kills))
    table.add_row("jilju_ledger_imbalance", f"{imbalance:g}")
    p50, p99, most = (percentile(load.excess_ms, percent) for percent in (50, 99, 100))
    table.add_row("client's clock over the run's, ms: p50, p99, most", f"{p50:.2f}, {p99:.2f}, {most:.2f}")
    table.add_row("the client's own lag, p99, ms", f"{1e3 * percentile(lags, 99):.2f}")
    low, middle = 100 * min(shares), 100 * statistics.median(shares)
    table.add_row("blamed on the long prompt, of what streams lost", f"{low:.1f} to {middle:.1f} % (least, median)")
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
