"""Memory: what both processes of `jilju serve` come to hold over thousands of short requests.

Streams, whole answers, refusals of bad fields and clients that leave, so many at a time. After every thousand it waits until nobody runs,
and reads what each process holds. Growth counts from the request after which caches and pools have been filled once.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from client import ask, completion, send
from rich.console import Console
from server import MIB, Memory, Server, idle_metrics, memory_of, serving

from jilju.bench.bars import MemoryFigures
from jilju.bench.report import table_of

KINDS = ("stream", "stream", "stream", "whole", "whole", "chat", "refused", "cancelled")  # as often as they stand here
WORDS = Path(__file__).read_text().split()  # prompts are cut out of some text, each time others
KV_MEMORY = "8MiB"  # 22 blocks, fewer than those at a time ask for; all have been written to before growth counts


class Sample(msgspec.Struct, frozen=True):
    num_requests: int
    server: Memory
    engine: Memory
    kept: int  # of the server's, as it says itself


def body_of(kind: str, rng: random.Random) -> dict[str, Any]:
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))
    body = completion(prompt, rng.randint(4, 8), stream=kind != "whole")
    if kind == "chat":
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": prompt}]
    if kind == "refused":
        body["max_tokens"] = -rng.randint(2, 1000)
    return body


async def clients(server: Server, left: Iterator[int], rng: random.Random, seen: Counter[str]) -> None:
    for number in left:
        kind = KINDS[number % len(KINDS)]
        body = body_of(kind, rng)
        if kind == "cancelled":
            exchange = await send(server.port, body)
            if rng.random() < 0.5:
                await exchange.wait(60.0)
            exchange.cancel()
            answer = await exchange.ended
        else:
            answer = await ask(server.port, body)
        seen["cancelled" if answer.is_cancelled else str(answer.status)] += 1


async def some(server: Server, numbers: range, concurrency: int, rng: random.Random, seen: Counter[str]) -> None:
    left = iter(numbers)
    await asyncio.gather(*[clients(server, left, rng, seen) for _ in range(concurrency)])


def kept_of(metrics: dict[str, float]) -> int:
    """What the log, the marks of calls and the run store hold, which grow up to their bounds."""
    owners = ("log", "calls", "run store")
    found = [value for name, value in metrics.items() if any(f'owner="{owner}"' in name for owner in owners)]
    assert len(found) == len(owners), f"{len(found)} of {owners} are in /metrics"
    return int(sum(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=2000, help="growth counts from after so many")
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rng, seen, samples = random.Random(1), Counter[str](), list[Sample]()
    with serving(arguments.model, "--context", "256", "--kv-memory", KV_MEMORY) as server:
        for begin in range(0, arguments.requests, arguments.every):
            asyncio.run(some(server, range(begin, begin + arguments.every), arguments.concurrency, rng, seen))
            _, metrics = idle_metrics(server)
            memory = memory_of(server.pid), memory_of(server.engine_pid)
            samples.append(Sample(begin + arguments.every, *memory, kept_of(metrics)))
    first = next(sample for sample in samples if sample.num_requests >= arguments.first)
    last = samples[-1]
    figures = MemoryFigures(
        model=arguments.model,
        first_request=first.num_requests,
        last_request=last.num_requests,
        num_steps=int(sum(value for name, value in metrics.items() if name.startswith("jilju_step_seconds_count"))),
        server_anonymous=last.server.anonymous - first.server.anonymous,
        server_resident=last.server.resident - first.server.resident,
        engine_anonymous=last.engine.anonymous - first.engine.anonymous,
        engine_resident=last.engine.resident - first.engine.resident,
        kept=last.kept - first.kept,
    )
    table = table_of(
        f"{arguments.model}, {', '.join(f'{count} x {what}' for what, count in sorted(seen.items()))}; MiB",
        ["requests", "server, anonymous", "resident", "engine, anonymous", "resident", "kept on purpose"],
    )
    for sample in samples:
        cells = [f"{value / MIB:.2f}" for value in (*sample.server, *sample.engine, sample.kept)]
        table.add_row(str(sample.num_requests), *cells)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    print(
        f"from {figures.first_request} on: {figures.anonymous / MIB:+.2f} MiB without pages of files and what is kept on purpose ({figures.kept / MIB:.2f} MiB), {figures.num_steps} steps"
    )
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
