"""Measures the strength of the simulation: how many seeds it takes to see each planted bug, from several starts.

    python -m tests.simulation.measure_bugs [--cap 3000] [--starts 0,10000,20000] [--jobs 2] [NAME ...]

Prints a table, and rewrites `bugs.json` (for each bug the killing seed that is played in the fewest turns, and the law that fired)
for the bugs that were measured. Exit status 1 if a bug was not seen from some start.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jilju.assemble.simulation import RooflineBackend
from jilju.simulation.runs import be_quiet, play_seed
from tests.simulation.bugs import BUGS, bug_of, planted

TABLE = Path(__file__).parent / "bugs.json"


class Kill(msgspec.Struct, frozen=True):
    """A seed that sees a bug."""

    seed: int
    law: str  # that it breaks


@dataclass(frozen=True)
class Search:
    """What came of playing seeds from a start on."""

    name: str
    num_seeds: int
    num_turns: int = 0  # of the killing seed's run
    kill: Kill | None = None


def read_table() -> dict[str, Kill]:
    return msgspec.json.decode(TABLE.read_bytes(), type=dict[str, Kill])


def write_table(kills: dict[str, Kill]) -> None:
    TABLE.write_bytes(msgspec.json.format(msgspec.json.encode(dict(sorted(kills.items()))), indent=1) + b"\n")


def search(task: tuple[str, int], cap: int) -> Search:
    """A seed that fails without the bug too sees nothing of it."""
    name, start = task
    be_quiet()
    for seed in range(start, start + cap):
        with planted(bug_of(name)):
            outcome = play_seed(seed, RooflineBackend())
        if outcome.failure and not play_seed(seed, RooflineBackend()).failure:
            law = re.sub(r"\b\d+\b", "#", outcome.law)[:80]
            return Search(name, seed - start + 1, outcome.tally.num_turns, Kill(seed, law))
    return Search(name, cap)


def measure(names: Sequence[str], starts: Sequence[int], cap: int, jobs: int, console: Console) -> list[Search]:
    tasks = [(name, start) for name in names for start in starts]
    with ProcessPoolExecutor(jobs) as pool, Progress(console=console, disable=not console.is_terminal) as bar:
        return list(bar.track(pool.map(partial(search, cap=cap), tasks), total=len(tasks), description="planting"))


def report(console: Console, names: Sequence[str], searches: Sequence[Search], cap: int) -> dict[str, Kill]:
    table = Table("bug", "category", "killed", "median seeds", "worst", "law that fired")
    kills: dict[str, Kill] = {}
    medians: list[float] = []
    num_killed = 0
    for name in names:
        mine = [s for s in searches if s.name == name]
        found = sorted((s for s in mine if s.kill is not None), key=lambda s: s.num_turns)
        median = statistics.median(s.num_seeds for s in mine)
        medians.append(median)
        num_killed += len(found) == len(mine)
        worst = max(s.num_seeds for s in mine)
        law = ""
        if found and found[0].kill is not None:
            kills[name] = found[0].kill
            law = found[0].kill.law
        shown = f"> {cap}" if len(found) <= len(mine) // 2 else f"{median:g}"
        table.add_row(name, bug_of(name).category, f"{len(found)} of {len(mine)}", shown, f"{worst}", law)
    console.print(table)
    console.print(
        f"{num_killed} of {len(names)} bugs killed from every start ({num_killed / len(names):.0%}), "
        f"median of medians {statistics.median(medians):g} seeds"
    )
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="bugs to measure; default: all")
    parser.add_argument("--cap", type=int, default=3000, help="seeds to try from each start")
    parser.add_argument("--starts", default="0,10000,20000")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    names = options.names or [bug.name for bug in BUGS]
    starts = [int(start) for start in options.starts.split(",")]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    searches = measure(names, starts, options.cap, options.jobs, console)
    kills = report(console, names, searches, options.cap)
    known = read_table() if TABLE.exists() else {}
    known = {bug.name: known[bug.name] for bug in BUGS if bug.name in known}
    write_table(known | kills)
    return 1 if any(s.kill is None for s in searches) else 0


if __name__ == "__main__":
    sys.exit(main())
