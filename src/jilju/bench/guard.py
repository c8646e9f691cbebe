"""Guard: how much of the machine other processes took while something was measured, and no figure from a busy machine.

Owns the reading of /proc and the rule: a run during which others used more than a share of all cores is repeated, and after
some attempts the measurement is given up with a message. Knows nothing of what is measured.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from jilju.errors import BusyMachine

MAX_OTHERS_SHARE = (
    0.03  # of all cores: llama.cpp, which spins between its ops, loses most of its speed to a busy neighbour
)
ATTEMPTS = 6
PAUSE_S = 5.0  # between two attempts: a neighbour's test run or build takes its time

T = TypeVar("T")


class CpuTimes(msgspec.Struct, frozen=True):
    """Seconds since some fixed point."""

    wall: float
    machine: float  # CPU time of everything on this machine, and what the host took from it
    own: float  # of that, this process and those named

    def others_share(self, later: "CpuTimes", num_cores: int) -> float:
        """Share of the cores' time until `later` that went to anybody else."""
        others = (later.machine - self.machine) - (later.own - self.own)
        return max(0.0, others / ((later.wall - self.wall) * num_cores))


class Guarded(msgspec.Struct, Generic[T], frozen=True):
    value: T
    others_share: float


class Guard:
    def __init__(
        self,
        max_others_share: float = MAX_OTHERS_SHARE,
        *,
        attempts: int = ATTEMPTS,
        read: Callable[[Sequence[int]], CpuTimes] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.max_others_share = max_others_share
        self._attempts = attempts
        self._read = read or read_cpu_times
        self._sleep = sleep

    def run(self, work: Callable[[], T], pids: Sequence[int] = ()) -> Guarded[T]:
        """The result of an undisturbed run of `work`. Processes `pids` work for it. Raises BusyMachine."""
        shares: list[float] = []
        for attempt in range(self._attempts):
            if attempt > 0:
                self._sleep(PAUSE_S)
            before = self._read(pids)
            value = work()
            shares.append(before.others_share(self._read(pids), num_cores()))
            if shares[-1] <= self.max_others_share:
                return Guarded(value, shares[-1])
        raise BusyMachine(
            f"in {len(shares)} runs other processes took {', '.join(f'{share:.1%}' for share in shares)} of the cores; a figure counts "
            f"below {self.max_others_share:.1%}: end what else runs here, or allow more by --max-others"
        )


def num_cores() -> int:
    """Cores that are online, whoever may use them: what /proc/stat sums over."""
    return os.sysconf("SC_NPROCESSORS_ONLN")


def read_cpu_times(pids: Sequence[int]) -> CpuTimes:
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    first_line = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first_line.split()[1:9])
    machine = (user + nice + system + irq + softirq + steal) * tick_s
    return CpuTimes(time.monotonic(), machine, sum(process_cpu_s(pid) for pid in {os.getpid(), *pids}))


def process_cpu_s(pid: int) -> float:
    """CPU seconds that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
