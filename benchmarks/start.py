"""What a start of `jilju serve` takes: time, memory, and CPU while idle.

The model is in the cache folder and its file in the page cache. Time until the address is printed and until the first token's chunk: of
the first start, which packs, and medians of those after it. Then what both processes hold, and what they take of a core while nobody calls.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import msgspec

from jilju.assemble.engine import BLOCK_SIZE, make_executor, open_model
from jilju.bench.bars import StartFigures
from jilju.bench.guard import process_cpu_s

KV_MEMORY = 256 << 20
SETTLE_S, IDLE_S = 2.0, 5.0  # after the first answer, until it is idle; then this long it is watched


def memory_bytes(pid: int, *fields: str) -> int:
    """Sum of fields of smaps_rollup."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(1024 * int(re.search(rf"^{field}: *(\d+) kB", text, re.MULTILINE)[1]) for field in fields)


def engine_of(server_pid: int) -> int:
    """The server's child that runs the engine."""
    for task in Path(f"/proc/{server_pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if "engine_process" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise SystemExit(f"process {server_pid} has no engine")


def first_token(url: str) -> None:
    body = {"prompt": "Hello", "stream": True, "max_tokens": 1}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        answer.readline()


class Run(NamedTuple):
    ready_s: float
    first_token_s: float
    engine_private_bytes: int
    server_resident_bytes: int
    idle_share: float


def run(model: str, packed_cache: str, is_watched: bool = False) -> Run:
    """One start and stop. Memory and idleness are looked at only if `is_watched`, for that takes its time."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "jilju", "serve", model, "--port", "0", "--log-level", "warning"]
    command += ["--kv-memory", str(KV_MEMORY)]
    environment = os.environ | {"JILJU_PACKED_CACHE": packed_cache}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = next(m[0] for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        ready = time.monotonic()
        first_token(url)
        times = ready - begin, time.monotonic() - begin
        if not is_watched:
            return Run(*times, 0, 0, 0.0)
        time.sleep(SETTLE_S)
        engine = engine_of(server.pid)
        before = process_cpu_s(server.pid) + process_cpu_s(engine)
        time.sleep(IDLE_S)
        idle = (process_cpu_s(server.pid) + process_cpu_s(engine) - before) / IDLE_S
        private = memory_bytes(engine, "Private_Clean", "Private_Dirty")
        return Run(*times, private, memory_bytes(server.pid, "Rss"), idle)
    finally:
        server.terminate()
        server.communicate()


def figures_of(model: str, repeats: int) -> StartFigures:
    file = open_model(model)
    executor = make_executor("native")
    block_bytes = executor.kv_bytes_per_token(file.plan) * BLOCK_SIZE
    run(model, "off")  # the file is in the page cache from here on
    with tempfile.TemporaryDirectory() as folder:
        packing = run(model, folder)
        watched = run(model, folder, is_watched=True)
        runs = [run(model, folder) for _ in range(repeats)]
    return StartFigures(
        model=model,
        first_ready_s=packing.ready_s,
        ready_s=statistics.median(each.ready_s for each in runs),
        first_token_s=statistics.median(each.first_token_s for each in runs),
        engine_private_bytes=watched.engine_private_bytes,
        weight_bytes=executor.weight_bytes(file.plan),
        kv_bytes=KV_MEMORY // block_bytes * block_bytes,
        server_resident_bytes=watched.server_resident_bytes,
        idle_share=watched.idle_share,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "qwen2.5-coder-0.5b"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = [figures_of(model, arguments.repeats) for model in arguments.models]
    for f in figures:
        print(
            f"{f.model}: ready after {f.ready_s:.2f} s, first token after {f.first_token_s:.2f} s (medians of {arguments.repeats}); "
            f"the first start, which packs, {f.first_ready_s:.2f} s; "
            f"engine {f.engine_private_bytes / 1e6:.0f} MB private (weights {f.weight_bytes / 1e6:.0f}, KV up to {f.kv_bytes / 1e6:.0f}), "
            f"server {f.server_resident_bytes / 1e6:.0f} MB resident; idle {f.idle_share:.1%} of a core"
        )
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
