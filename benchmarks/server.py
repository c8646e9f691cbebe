"""A server to load: `jilju serve` in a process of its own, and what is seen of it from outside.

Owns its start and end, the reading of its metrics and of both processes' memory. What it logs goes to a file that is shown if it fails.
With `records` it also leaves the records of its steps when it ends (`recorded.py`). Knows nothing of the load.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from recorded import __file__ as RECORDED
from start import engine_of

from jilju.engine.events import StepRecord

READY_TIMEOUT_S = 120
MIB = 1 << 20


class Server(NamedTuple):
    port: int
    pid: int
    engine_pid: int

    @property
    def pids(self) -> tuple[int, int]:
        return self.pid, self.engine_pid


class Memory(NamedTuple):
    """Bytes of a process."""

    anonymous: int
    resident: int


@contextlib.contextmanager
def serving(model: str, *flags: str, records: Path | None = None) -> Iterator[Server]:
    """`records`: a file for those of its steps, complete when this is left."""
    program = ["-m", "jilju"] if records is None else [RECORDED, str(records)]
    command = [sys.executable, *program, "serve", model, "--port", "0", "--log-level", "warning", *flags]
    with tempfile.NamedTemporaryFile("r") as log:
        process = subprocess.Popen(command, stdout=log.fileno(), stderr=subprocess.STDOUT)
        try:
            port = wait_for(lambda: said_port(process, Path(log.name)), READY_TIMEOUT_S)
            if port is None:
                raise SystemExit(f"the server did not start:\n{log.read()}")
            yield Server(port, process.pid, engine_of(process.pid))
        finally:
            process.terminate()
            process.wait()


def said_port(process: "subprocess.Popen[bytes]", log: Path) -> int | None:
    if process.poll() is not None:
        raise SystemExit(f"the server ended with status {process.returncode}:\n{log.read_text()}")
    said = re.search(r"ready: http://127\.0\.0\.1:(\d+)", log.read_text())
    return int(said[1]) if said else None


def wait_for(found: Callable[[], int | None], timeout_s: float) -> int | None:
    """What `found` gives once it is not None; None if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while (value := found()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def metrics_of(server: Server) -> dict[str, float]:
    """By name and labels, the model's left out: `jilju_blocks{state="held"}`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    pairs = (
        re.sub(r',?model="[^"]*"', "", line).replace("{,", "{").replace("{}", "").rpartition(" ") for line in lines
    )
    return {name: float(value) for name, _, value in pairs}


def num_waiting(metrics: dict[str, float]) -> float:
    """For whatever reason."""
    return sum(value for name, value in metrics.items() if name.startswith("jilju_num_requests_waiting"))


def idle_metrics(server: Server, timeout_s: float = 10.0) -> tuple[float, dict[str, float]]:
    """Seconds until nobody runs or waits, and the metrics then, or at the end of the patience."""
    begin = time.monotonic()
    while True:
        metrics, took_s = metrics_of(server), time.monotonic() - begin
        busy = metrics["jilju_num_requests_running"] + num_waiting(metrics)
        if not busy or took_s > timeout_s:
            return took_s, metrics
        time.sleep(0.005)


def memory_of(pid: int) -> Memory:
    text = Path(f"/proc/{pid}/status").read_text()

    def field(name: str) -> int:
        return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)[1])

    return Memory(field("RssAnon"), field("VmRSS"))


def read_records(file: Path) -> list[StepRecord]:
    return msgspec.msgpack.decode(file.read_bytes(), type=list[StepRecord])
