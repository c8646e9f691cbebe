"""Contention: what a decode step loses to a neighbour that takes half of a core.

Owns the neighbour (a process that works and sleeps by turns) and the method: undisturbed and disturbed runs alternate. On two cores
a step that spread over whatever is free would take 2 / 1.5 = 1.33 times as long. Knows nothing of backends.
"""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from jilju.bench.guard import Guard, process_cpu_s
from jilju.bench.rounds import Contender, take_turns
from jilju.bench.steps import Steps

RUN_S = 1.0
# Works off half of the time that has passed, then sleeps 5 ms: undisturbed, 5 ms at a time. What it was kept from it makes up for, up to
# 20 ms; the time that it was stopped it does not.
NEIGHBOUR = """
import time
last, behind = time.perf_counter(), 0.0
while True:
    now = time.perf_counter()
    behind, last = min(behind + (now - last) / 2, 0.02), now
    end = time.process_time() + behind
    while time.process_time() < end:
        pass
    behind = 0.0
    time.sleep(0.005)
"""


class Contention(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    rows: int
    context: int
    num_threads: int
    step_ms: float
    disturbed_step_ms: float
    ratio: float  # median over rounds of disturbed / undisturbed
    neighbour_share: float  # of one core, what the neighbour got while it ran
    others_share: float


class Neighbour:
    """Takes half of a core while it is awake; begins asleep."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
        self._process.send_signal(signal.SIGSTOP)
        self.shares: list[float] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def beside(self, work: Callable[[], float]) -> float:
        self._process.send_signal(signal.SIGCONT)
        begin, cpu = time.perf_counter(), process_cpu_s(self.pid)
        try:
            return work()
        finally:
            self.shares.append((process_cpu_s(self.pid) - cpu) / (time.perf_counter() - begin))
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure_contention(
    model: str, steps: Steps, rows: int, context: int, num_threads: int, *, guard: Guard, num_rounds: int = 5,
    progress: Callable[[int], None] = lambda done: None,
) -> Contention:  # fmt: skip
    """Raises BusyMachine."""
    steps.fill(rows, context)
    neighbour = Neighbour()
    try:
        contenders = [
            Contender("undisturbed", lambda: 1 / steps.decode(rows, context, RUN_S)),
            Contender(
                "disturbed", lambda: 1 / neighbour.beside(lambda: steps.decode(rows, context, RUN_S)), (neighbour.pid,)
            ),
        ]
        done = take_turns(contenders, num_rounds, guard, progress)
    finally:
        neighbour.close()
    return Contention(
        model=model,
        rows=rows,
        context=context,
        num_threads=num_threads,
        step_ms=1e3 / done.median("undisturbed"),
        disturbed_step_ms=1e3 / done.median("disturbed"),
        ratio=done.ratio("undisturbed", "disturbed"),
        neighbour_share=statistics.median(neighbour.shares),
        others_share=done.others_share,
    )
