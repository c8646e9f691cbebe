"""Energy: what this machine says it has used, by its counters, or by the power that somebody declared.

Owns the reading of the package and memory counters that Linux shows under /sys/class/powercap, and their wrap-around. A counter
is of a whole processor package, whoever runs on it. Knows nothing of steps and requests.
"""

from collections.abc import Iterator
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


class PackageCounters:
    """Of every processor package, and of its memory where that is counted apart."""

    watts: float | None = None

    def __init__(self, zones: list[_Zone]):
        self._zones = zones
        has_memory = any(_name(zone.path) == "dram" for zone in zones)
        self.source = "RAPL package and memory counters" if has_memory else "RAPL package counter"

    def read_uj(self) -> int | None:
        try:
            return sum([zone.read() for zone in self._zones])
        except (OSError, ValueError):  # taken away while we ran
            return None


def find_meter(watts: float | None, folder: Path = POWERCAP) -> Meter | None:
    """Counters, if they may be read; else the declared power, if there is one."""
    try:
        zones = [
            _Zone(path, _number(path / "max_energy_range_uj"), _number(path / "energy_uj")) for path in _zones(folder)
        ]
    except (OSError, ValueError):  # most systems let only root read them
        zones = []
    if zones:
        return PackageCounters(zones)
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
