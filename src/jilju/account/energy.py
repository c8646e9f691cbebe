"""Energy: what this machine says it has used, by its counters, or by the power that somebody declared.

Owns the reading of the package and memory counters that Linux shows under /sys/class/powercap, and their wrap-around. A counter
is of a whole processor package, or a whole GPU, whoever runs on it; a GPU's is asked by a function that is handed in. Knows
nothing of steps and requests.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """`source` is shown beside what it says. Either it counts, or its power is known."""

    @property
    def source(self) -> str: ...

    @property
    def watts(self) -> float | None: ...

    def read_uj(self) -> int | None:
        """Microjoules since the first reading; None: there are no counters (any more)."""
        ...


@dataclass(frozen=True)
class DeclaredPower:
    """The machine draws so much all the time, as somebody said."""

    watts: float
    source: str = "declared watts"

    def read_uj(self) -> int | None:
        return None


@dataclass(slots=True)
class _Zone:
    path: Path
    range_uj: int  # it goes on from 0 after that
    last_uj: int
    sum_uj: int = 0

    def read(self) -> int:
        now_uj = _number(self.path / "energy_uj")
        self.sum_uj += now_uj - self.last_uj if now_uj >= self.last_uj else self.range_uj - self.last_uj + now_uj
        self.last_uj = now_uj
        return self.sum_uj


@dataclass(slots=True)
class _Gpu:
    ask_uj: Callable[[], int | None]  # since the driver was loaded; None: it does not say
    last_uj: int
    sum_uj: int = 0

    def read(self) -> int:
        now_uj = self.ask_uj()
        if now_uj is None:
            raise ValueError("the GPU's counter is not told any more")
        self.sum_uj += max(0, now_uj - self.last_uj)  # 64 bits do not wrap; one that went back was set to 0
        self.last_uj = now_uj
        return self.sum_uj


class Counters:
    """Of every processor package, of its memory where that is counted apart, and of the GPU that computes."""

    watts: float | None = None

    def __init__(self, counters: Sequence[_Zone | _Gpu], source: str):
        self._counters, self.source = counters, source

    def read_uj(self) -> int | None:
        try:
            return sum([counter.read() for counter in self._counters])
        except (OSError, ValueError):  # taken away while we ran
            return None


def find_meter(
    watts: float | None, folder: Path = POWERCAP, ask_gpu_uj: Callable[[], int | None] | None = None
) -> Meter | None:
    """Counters, if there are any that may be read; else the declared power, if there is one."""
    try:
        zones = [
            _Zone(path, _number(path / "max_energy_range_uj"), _number(path / "energy_uj")) for path in _zones(folder)
        ]
    except (OSError, ValueError):  # most systems let only root read them
        zones = []
    counters: list[_Zone | _Gpu] = [*zones]
    sources = []
    if zones:
        has_memory = any(_name(zone.path) == "dram" for zone in zones)
        sources.append("RAPL package and memory counters" if has_memory else "RAPL package counter")
    gpu_uj = None if ask_gpu_uj is None else ask_gpu_uj()
    if ask_gpu_uj is not None and gpu_uj is not None:
        counters.append(_Gpu(ask_gpu_uj, gpu_uj))
        sources.append("NVML GPU counter")
    if counters:
        return Counters(counters, ", ".join(sources))
    return None if watts is None else DeclaredPower(watts)


def _zones(folder: Path) -> Iterator[Path]:
    """Packages, and memory, which no package counts in. A package that two drivers show counts once."""
    seen: set[str] = set()
    for path in sorted(folder.glob("intel-rapl:*")):  # the driver's name on AMD's processors too
        name = _name(path)
        if name.startswith("package-") and name not in seen:
            seen.add(name)
            yield path
        elif name == "dram":
            yield path


def _name(path: Path) -> str:
    return (path / "name").read_text(encoding="ascii").strip()


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
