"""Runs: scripts played one by one or many at a time, and what became of them.

Owns the outcome of a run and the pool of processes that plays seeds. Knows nothing of terminals; whoever waits is handed the
outcomes as they come.
"""

import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context

from jilju.simulation.draw import draw
from jilju.simulation.script import Script
from jilju.simulation.world import Backend, Tally, World

CHUNK = 8  # seeds that a process plays before it reports


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    tally: Tally
    digest: str
    seconds: float  # of CPU time, drawing included
    failure: str = ""  # the law that broke, or the error; empty: none
    details: str = ""  # where

    @property
    def law(self) -> str:
        """The failure without its particulars: what it is told apart by."""
        return self.failure.partition(":")[0]


@dataclass(slots=True)
class Total:
    """Sums over runs."""

    num_runs: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.num_runs += 1
        self.seconds += outcome.seconds
        for name in ("num_turns", "num_steps", "num_rows", "num_tokens", "num_deaths", "num_preemptions", "num_cached_tokens", "num_step_faults", "num_compared_tokens", "num_compared_requests", "virtual_ns"):  # fmt: skip
            setattr(self.tally, name, getattr(self.tally, name) + getattr(outcome.tally, name))
        self.tally.ends += outcome.tally.ends
        if outcome.failure:
            self.failures.append(outcome)

    @property
    def mean_batch(self) -> float:
        return self.tally.num_rows / max(1, self.tally.num_steps)

    @property
    def rows_per_second(self) -> float:
        """Scheduled rows per second of CPU time."""
        return self.tally.num_rows / max(1e-9, self.seconds)


def play(script: Script, backend: Backend) -> Outcome:
    """One run. Whatever it raises is its failure."""
    begin = time.process_time()
    world = World(script, backend)
    failure = details = ""
    try:
        world.run()
    except Exception as error:
        failure = str(error) if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: {error}"
        details = traceback.format_exc()
    return Outcome(script.seed, world.tally, world.digest, time.process_time() - begin, failure, details)


def play_seed(seed: int, backend: Backend, draw_script: Callable[[int], Script] = draw) -> Outcome:
    begin = time.process_time()
    script = draw_script(seed)
    spent = time.process_time() - begin
    outcome = play(script, backend)
    return Outcome(seed, outcome.tally, outcome.digest, outcome.seconds + spent, outcome.failure, outcome.details)


def play_many(
    seeds: Iterable[int], backend: Backend, jobs: int, draw_script: Callable[[int], Script] = draw
) -> Iterator[Outcome]:
    """Outcomes of all seeds, in order. With more than one job `backend` and `draw_script` must be ones that can be pickled."""
    if jobs == 1:
        yield from (play_seed(seed, backend, draw_script) for seed in seeds)
        return
    # Fresh processes: a fork of one that has threads or native memory of its own may die of them.
    with ProcessPoolExecutor(jobs, get_context("spawn"), be_quiet) as pool:
        waiting = iter(seeds)
        while batch := list(islice(waiting, CHUNK * jobs * 16)):
            yield from pool.map(partial(play_seed, backend=backend, draw_script=draw_script), batch, chunksize=CHUNK)


def be_quiet() -> None:
    """Faults of a script are logged by the engine as they should be; in a simulation nobody wants to read that."""
    logging.getLogger("jilju").setLevel(logging.CRITICAL + 1)
