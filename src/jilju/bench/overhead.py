"""Overhead: what it costs that everything is accounted for.

Owns three figures. The log by itself: a record made, packed, told over the link and kept, timed in a loop. Everything on beside
everything off: two servers, one that keeps all that can be kept and is scraped each second, one whose log drops every record; the same
short loads in turn, CPU time of all their processes. An open page: the same loads with the engine page's stream open and without.
Knows nothing of models.
"""

import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from jilju.bench.bars import OverheadFigures
from jilju.bench.guard import Guard, process_cpu_s
from jilju.bench.load import LoadOptions, run_load
from jilju.engine.events import EventLog, StepRecord, pack_row
from jilju.errors import StartupError

READY_S = 120.0
LOOPS, MANY_ROWS = 20_000, 32
STREAMS, NUM_PROMPTS, NUM_INPUT, NUM_OUTPUT = 8, 16, 48, 96  # of one load
SCRAPE_S = 1.0
OPENING_S = (
    2.0  # until a page has its first frame, of the whole last minute: what it costs while it stays open is asked for
)
ON = ("--metrics-compat", "vllm", "--price", "1", "--watts", "65")  # besides what is on anyway, and files
OFF = ("--run-store", "0")
# A server whose log forgets each record at once: no ring, no metrics of steps, no bill.
WITHOUT = (
    "from jilju.engine.events import EventLog\n"
    "EventLog.add_step = lambda self, record: None\n"
    "from jilju.cli import main\n"
    "main()\n"
)


class _Served(msgspec.Struct, frozen=True):
    url: str
    pid: int

    def cpu_s(self) -> float:
        """Of the server and all that it started."""
        return sum(map(process_cpu_s, _family(self.pid)))


def measure_overhead(
    model: str,
    *,
    guard: Guard,
    num_rounds: int,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> OverheadFigures:
    """Raises BusyMachine, or StartupError where a server does not come up."""
    step_us, row_us = log_costs()
    on_shares: list[float] = []
    page_shares: list[float] = []
    others: list[float] = []
    total = 2 * num_rounds
    with tempfile.TemporaryDirectory() as folder:
        files = ("--event-log", f"{folder}/events", "--usage-log", f"{folder}/usage")
        with _serving(model, *ON, *files) as on, _serving(model, *OFF, program=("-c", WITHOUT)) as off:
            for number in range(-1, num_rounds):  # the first does not count

                def compared(seed: int = number) -> float:
                    pair = [(on, True), (off, False)] if seed % 2 else [(off, False), (on, True)]
                    cost = {is_on: _loaded(served, seed, scraped=is_on) for served, is_on in pair}
                    return cost[True] / cost[False] - 1

                done = guard.run(compared, [*_family(on.pid), *_family(off.pid)])
                if number >= 0:
                    on_shares.append(done.value)
                    others.append(done.others_share)
                    progress(len(on_shares), total, "on and off")
            for number in range(num_rounds):

                def watched(seed: int = number) -> float:
                    cores = {is_open: _core_share(on, seed, is_open) for is_open in (seed % 2 == 0, seed % 2 == 1)}
                    return cores[True] - cores[False]

                done = guard.run(watched, _family(on.pid))
                page_shares.append(done.value)
                others.append(done.others_share)
                progress(num_rounds + len(page_shares), total, "an open page")
            step_ms, rows = _steps(on.url)
    log_share = (step_us + row_us * rows) / 1e3 / step_ms
    low, middle, high = statistics.quantiles(on_shares, n=4)
    return OverheadFigures(
        model=model,
        step_us=step_us,
        row_us=row_us,
        median_step_ms=step_ms,
        log_share=log_share,
        num_rounds=num_rounds,
        on_share=middle,
        on_share_low=low,
        on_share_high=high,
        page_core_share=statistics.median(page_shares),
        others_share=max(others),
    )


def log_costs() -> tuple[float, float]:
    """Microseconds of CPU time of a step and of each of its rows, from the engine's record to the server's ring, medians of five."""
    runs = [(_log_us(1), _log_us(MANY_ROWS)) for _ in range(5)]
    row_us = statistics.median((many - one) / (MANY_ROWS - 1) for one, many in runs)
    return statistics.median(one for one, _ in runs) - row_us, row_us


def _log_us(num_rows: int) -> float:
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(StepRecord)
    numbers = dict.fromkeys(set(StepRecord.__struct_fields__) - {"is_rerun", "closed_by", "rows"}, 1 << 40)
    numbers |= {name: 7 for name in numbers if name.startswith("num_")} | {"num_rows": num_rows}
    rows: list[tuple[int, int, int, bool]] = [(1000 + i, 500 + i, 1, True) for i in range(num_rows)]
    sent: list[StepRecord] = []
    engine, server = EventLog(), EventLog()
    engine.keep_none()
    engine.listen(sent.append)
    begin = time.thread_time()
    for _ in range(LOOPS):
        packed = b"".join([pack_row(*row) for row in rows])
        record = StepRecord(**numbers, is_rerun=False, rows=packed)  # type: ignore[arg-type]
        engine.add_step(record)
        server.add_step(decoder.decode(encoder.encode(sent.pop())))
    return (time.thread_time() - begin) / LOOPS * 1e6


def _loaded(served: _Served, seed: int, *, scraped: bool) -> float:
    """CPU seconds of one load."""
    before = served.cpu_s()
    with _asking(served.url + "/metrics") if scraped else _asking(None):
        _load(served.url, seed)
    return served.cpu_s() - before


def _core_share(served: _Served, seed: int, is_open: bool) -> float:
    """Of a core, what the server's own process takes during one load."""
    with _streaming(served.url, is_open):
        time.sleep(OPENING_S if is_open else 0.0)
        before, begin = process_cpu_s(served.pid), time.monotonic()
        _load(served.url, seed)
        return (process_cpu_s(served.pid) - before) / (time.monotonic() - begin)


def _load(url: str, seed: int) -> None:
    result = run_load(
        LoadOptions(
            url=url, num_prompts=NUM_PROMPTS, max_concurrency=STREAMS, random_input_len=NUM_INPUT,
            random_output_len=NUM_OUTPUT, seed=seed,
        )
    )  # fmt: skip
    if result.failed:
        raise StartupError(f"{result.failed} of {NUM_PROMPTS} requests failed: {result.first_error}")


def _steps(url: str) -> tuple[float, float]:
    """The median step of the last minute in ms, and its rows."""
    with urllib.request.urlopen(url + "/v1/jilju/window?seconds=60", timeout=10) as answer:
        steps: dict[str, Any] = msgspec.json.decode(answer.read())["steps"]
    return statistics.median(steps["ms"]), statistics.median(steps["rows"])


@contextmanager
def _asking(url: str | None) -> Iterator[None]:
    """Meanwhile somebody asks once a second."""
    done = threading.Event()

    def ask() -> None:
        while url is not None and not done.wait(SCRAPE_S):
            urllib.request.urlopen(url, timeout=10).read()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _streaming(url: str, is_open: bool) -> Iterator[None]:
    """Meanwhile somebody reads the stream of the engine's page."""
    if not is_open:
        yield
        return
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"GET /v1/jilju/events?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reading = threading.Thread(target=_read_all, args=(sock,))
        reading.start()
        try:
            yield
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            reading.join()


def _read_all(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


@contextmanager
def _serving(model: str, *flags: str, program: tuple[str, ...] = ("-m", "jilju")) -> Iterator[_Served]:
    command = [sys.executable, *program, "serve", model, "--port", "0", "--log-level", "warning", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _Served(_address(process, log), process.pid)
        finally:
            process.terminate()
            process.wait()


def _address(process: "subprocess.Popen[bytes]", log: Any) -> str:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        log.seek(0)
        found = [word for word in log.read().split() if word.startswith("http://127.0.0.1:")]
        if found:
            return str(found[0])
        time.sleep(0.05)
    log.seek(0)
    raise StartupError(f"a server to measure did not start:\n{log.read()}")


def _family(pid: int) -> list[int]:
    """The process and all that came of it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _family(int(child))
    return found
