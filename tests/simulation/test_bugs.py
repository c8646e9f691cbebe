"""The strength of the simulation: each planted bug is seen by the seed that saw it when it was last measured.

How many seeds that takes is measured by `make bugs`, which also writes the table of seeds anew; it is to be run when scripts are
drawn otherwise, or when a change of the engine lets a seed miss its bug.
"""

import pytest

from jilju.assemble.simulation import RooflineBackend
from jilju.simulation import Outcome
from jilju.simulation.runs import be_quiet, play_seed

from .bugs import BUGS, WEAK_HASH, Bug, planted
from .measure_bugs import read_table

KILLS = read_table()


@pytest.fixture(scope="module")
def whole() -> dict[int, Outcome]:
    """What the seeds of the table come to without a bug."""
    be_quiet()
    return {seed: play_seed(seed, RooflineBackend()) for seed in sorted({kill.seed for kill in KILLS.values()})}


def test_every_bug_was_killed():
    assert {bug.name for bug in BUGS} == set(KILLS), "run `make bugs`"
    assert len(BUGS) == len(KILLS) >= 36


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen(bug, whole):
    seed = KILLS[bug.name].seed
    with planted(bug):
        outcome = play_seed(seed, RooflineBackend())
    assert outcome.failure, f"{bug.says} Seed {seed} does not see it any more; run `make bugs ARGS={bug.name}`"
    assert not whole[seed].failure, f"seed {seed} fails without a bug: {whole[seed].failure}"


def test_a_weak_hash_alone_is_no_bug():
    with planted(Bug("weak_hash", "prefix", "Hashes collide, which costs hits and nothing else.", (WEAK_HASH,))):
        outcomes = [play_seed(seed, RooflineBackend()) for seed in range(40)]
    assert not [o.failure for o in outcomes if o.failure]
    assert sum(o.tally.num_cached_tokens for o in outcomes) > 0
