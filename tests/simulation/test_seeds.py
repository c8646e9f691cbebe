"""The simulation's seeds: whatever is drawn, every law holds and every request gets what it gets alone."""

import os
from pathlib import Path

import msgspec
import pytest

from jilju.assemble.simulation import RooflineBackend
from jilju.simulation import draw, play, play_many
from jilju.simulation.runs import Total
from jilju.simulation.script import from_json

NUM_SEEDS = 2000
SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.json"))


def test_no_seed_breaks_a_law():
    total = Total()
    for outcome in play_many(range(NUM_SEEDS), RooflineBackend(), jobs=len(os.sched_getaffinity(0))):
        total.add(outcome)
    assert not total.failures, [(o.seed, o.failure[:500]) for o in total.failures[:5]]
    assert total.num_runs == NUM_SEEDS
    tally = total.tally  # the seeds do what they are for
    assert min(tally.num_deaths, tally.num_preemptions, tally.num_step_faults) > 500
    assert tally.num_cached_tokens > 100_000 and tally.ends["completed"] > 20_000


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_that_once_failed_do_not_fail_again(path):
    outcome = play(from_json(path.read_bytes()), RooflineBackend())
    assert not outcome.failure, f"{outcome.failure}\n{outcome.details}"


def test_a_broken_law_is_seen():
    """The oracle of another seed is not this one's."""

    class Confused(RooflineBackend):
        def alone(self, script, request):
            params = msgspec.structs.replace(request.params, seed=request.params.seed ^ 1, temperature=1.0)
            return super().alone(script, msgspec.structs.replace(request, params=params))

    failures = [play(draw(seed), Confused()).failure for seed in range(10)]
    assert sum("I20" in failure for failure in failures) >= 5
