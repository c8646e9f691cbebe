"""Thousands of generated calls against a real server: nothing that it cannot answer, nothing that its description does not say.

    python -m tests.serve.soak_api [--examples 120] [--seed 1]

First `--examples` calls of each route, then the bounds of every field of every route: some 13,000 calls. Strings may hold NUL and
whatever else Unicode has. Ends with status 1 if a call went against the description, got a 5xx or no answer within a minute, if the
server's ledger does not balance, or if its memory grew.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.system.conftest import Server

from .explore import Findings, explore

VOCAB_SIZE = 49_152  # of smollm2-135m
CALL_S = 60.0
MEASURED_AFTER = 1_000  # calls: caches have filled by then
GROWTH = 1.10  # what memory may be at the end, in times of what it was then, and a few pages of an allocator
GROWTH_BYTES = 32 << 20


class Memory:
    """Resident bytes of the server and of its engine, by the number of calls."""

    def __init__(self, server: Server):
        self._server = server
        self.samples: dict[int, dict[str, int]] = {}

    def look(self, num_calls: int) -> None:
        if num_calls % MEASURED_AFTER == 0:
            pids = {"server": self._server.process.pid, "engine": self._server.engine_pid()}
            self.samples[num_calls] = {name: resident_bytes(pid) for name, pid in pids.items() if pid is not None}

    def grown(self) -> list[str]:
        first, last = self.samples[min(self.samples)], self.samples[max(self.samples)]
        return [
            f"{name}: {first[name] >> 20} MiB, then {last[name] >> 20} MiB"
            for name in first
            if last.get(name, 0) > first[name] * GROWTH + GROWTH_BYTES
        ]


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def touch_what_is_reserved(server: Server) -> None:
    """The KV cache and the room for a step are promised at the start, and resident when they were used."""
    for number in range(4):
        prompt = f"{number} " + "so " * 1_900
        httpx.post(
            server.url + "/v1/completions", json={"prompt": prompt, "max_tokens": 1}, timeout=CALL_S
        ).raise_for_status()


def soak(server: Server, memory: Memory, num_examples: int, seed: int) -> Findings:
    """Both phases, one after the other, as one."""
    description = httpx.get(server.url + "/openapi.json").json()
    total = Findings()
    for phase in ("fuzzing", "coverage"):
        before, begin = total.num_calls, time.monotonic()
        found = explore(
            description,
            url=server.url,
            phases=[phase],
            num_examples=num_examples,
            vocab_size=VOCAB_SIZE,
            seed=seed,
            timeout_s=CALL_S,
            on_call=lambda num_calls, before=before: memory.look(before + num_calls),  # type: ignore[misc]
        )
        print(f"{phase}: {found.num_calls} calls in {time.monotonic() - begin:.0f} s", flush=True)
        total.num_calls += found.num_calls
        total.statuses += found.statuses
        total.failures |= found.failures
        total.errors += found.errors
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="Generated calls against a real server.")
    parser.add_argument("--examples", type=int, default=120, help="calls of each route, besides those of the bounds")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    server = Server("smollm2-135m", "--context", "2048", "--kv-memory", "64MiB")
    memory = Memory(server)
    try:
        touch_what_is_reserved(server)
        findings = soak(server, memory, arguments.examples, arguments.seed)
        server.wait_idle()
        imbalance, restarts = server.metric("jilju_ledger_imbalance"), server.metric("jilju_engine_restarts_total")
    finally:
        status = server.stop()
    by_status = Counter[str]()
    for (_, answered), count in findings.statuses.items():
        by_status[answered] += count
    print("by status: " + ", ".join(f"{count} x {name}" for name, count in sorted(by_status.items())))
    for num_calls, sample in memory.samples.items():
        print(f"after {num_calls} calls: " + ", ".join(f"{name} {size >> 20} MiB" for name, size in sample.items()))
    wrong = [findings.text()] if findings.failures or findings.errors else []
    wrong += [f"answers with {name}" for name in by_status if name.startswith("5") and name != "504"]
    wrong += [f"memory has grown: {line}" for line in memory.grown()]
    wrong += [f"the ledger does not balance: {imbalance}"] if imbalance else []
    wrong += [f"the engine was started again {restarts:.0f} times"] if restarts else []
    wrong += [f"the server ended with status {status}"] if status else []
    print("\n".join(wrong) or f"{findings.num_calls} calls, and nothing was wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
