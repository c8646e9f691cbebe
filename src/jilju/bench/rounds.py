"""Rounds: several things measured in turn, so that what slows the machine for a while slows all of them.

Owns the method of every comparison here: a warm-up round, then rounds in which each contender runs once; a figure is the
median of its rates, a ratio the median over rounds of the two rates' ratio. Knows nothing of what the contenders do.
"""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from jilju.bench.guard import Guard


class Contender(msgspec.Struct, frozen=True):
    name: str
    run: Callable[[], float]  # one run: a rate, more is better
    pids: tuple[int, ...] = ()  # processes besides this one that do the work


class Rounds(msgspec.Struct, frozen=True):
    rates: dict[str, list[float]]  # by contender, a rate a round
    others_share: float  # the most that other processes took of the cores during a round

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def ratio(self, name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(self.rates[name], self.rates[other], strict=True))


def take_turns(
    contenders: Sequence[Contender], num_rounds: int, guard: Guard, progress: Callable[[int], None] = lambda done: None
) -> Rounds:
    """`num_rounds` undisturbed rounds after one that does not count. Raises BusyMachine."""
    pids = [pid for contender in contenders for pid in contender.pids]

    def one_round() -> list[float]:
        return [contender.run() for contender in contenders]

    one_round()
    rounds = []
    for _ in range(num_rounds):
        rounds.append(guard.run(one_round, pids))
        progress(len(rounds))
    rates = zip(*(done.value for done in rounds), strict=True)
    return Rounds(
        {contender.name: list(own) for contender, own in zip(contenders, rates, strict=True)},
        max(done.others_share for done in rounds),
    )
