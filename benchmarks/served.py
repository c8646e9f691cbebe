"""Streams side by side against `jilju serve`, and against llama.cpp's own server on the same file and threads, in turn.

Two loads, closed loops: prompts of random ids, and prompts that share a prefix. Both servers stand by while the other is loaded; neither
takes CPU then. A run during which other processes took more than --max-others of the cores is repeated.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from start import engine_of

from jilju.assemble.engine import open_model
from jilju.bench.bars import ServedFigures
from jilju.bench.guard import Guard
from jilju.bench.load import LoadOptions, LoadResult, run_load
from jilju.bench.report import table_of

LOADS = {
    "200 tokens in, 64 out": {"random_input_len": 200},
    "800 shared and 50 own in, 64 out": {"random_prefix_len": 800, "random_input_len": 50},
}
CONTEXT = 1024  # of one sequence: the longest prompt and its answer
READY_TIMEOUT_S = 120


class Server(NamedTuple):
    name: str
    url: str
    pids: tuple[int, ...]


@contextlib.contextmanager
def jilju(model: str, threads: int, streams: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "jilju", "serve", model, "--port", "0", "--log-level", "warning"]
    command += ["--threads", str(threads), "--context", str(CONTEXT), "--max-rows", str(streams)]
    with running(command, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        url = next(m[0] for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        yield Server("jilju", url, (process.pid, engine_of(process.pid)))


@contextlib.contextmanager
def llama_server(program: Path, model: str, threads: int, streams: int, port: int) -> Iterator[Server]:
    command = [str(program), "-m", open_model(model).path, "--port", str(port), "-t", str(threads), "-tb", str(threads)]
    command += ["-np", str(streams), "-c", str(streams * CONTEXT)]
    with running(command, stderr=subprocess.DEVNULL) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_TIMEOUT_S
        while not answers(url + "/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"llama-server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield Server("llama-server", url, (process.pid,))


@contextlib.contextmanager
def running(command: list[str], stderr: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except OSError:
        return False


def load(server: Server, guard: Guard, streams: int, num_prompts: int, sizes: dict[str, int], seed: int) -> LoadResult:
    options = LoadOptions(
        url=server.url, num_prompts=num_prompts, warmup=streams, max_concurrency=streams, random_output_len=64, seed=seed, **sizes
    )  # fmt: skip
    # each attempt has prompts of its own, so that no server knows them
    seeds = iter(range(1000 * seed, 1000 * seed + 1000))
    return guard.run(lambda: run_load(msgspec.structs.replace(options, seed=next(seeds))), server.pids).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--llama-server", type=Path, help="its program; without it jilju runs alone")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=8399, help="for llama-server")
    parser.add_argument("--max-others", type=float, default=3.0, help="percent of the cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    guard = Guard(arguments.max_others / 100)
    figures = []
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(jilju(arguments.model, arguments.threads, arguments.streams))
        program, peer = arguments.llama_server, None
        if program:
            peer = stack.enter_context(
                llama_server(program, arguments.model, arguments.threads, arguments.streams, arguments.port)
            )
        for seed, (name, sizes) in enumerate(LOADS.items()):
            results = [
                load(server, guard, arguments.streams, arguments.num_prompts, sizes, seed) if server else None
                for server in (ours, peer)
            ]
            label = f"{arguments.model}, {arguments.streams} streams, {name}"
            figures.append(ServedFigures(load=label, shares_prefix="random_prefix_len" in sizes, ours=results[0], peer=results[1], peer_name="llama-server"))  # fmt: skip
    table = table_of(f"{arguments.model}, {arguments.streams} streams", ["server, load", "output tok/s", "ttft p50", "ttft p95", "itl p50", "client's CPU"])  # fmt: skip
    for figure, name in zip(figures, LOADS, strict=True):
        for server, r in (("jilju", figure.ours), (figure.peer_name, figure.peer)):
            if r is not None:
                cells = [f"{r.output_throughput:.0f}", *(f"{ms:.0f} ms" for ms in (r.median_ttft_ms, r.p95_ttft_ms, r.median_itl_ms))]  # fmt: skip
                table.add_row(f"{server}, {name}", *cells, f"{r.client_cpu_share:.1%}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
