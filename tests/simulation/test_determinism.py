"""Determinism (I33): the same seed is the same run, event for event, whatever the order of Python's sets and hashes."""

import os
import subprocess
import sys

import pytest

from jilju.assemble.simulation import RooflineBackend
from jilju.simulation import World, draw
from jilju.simulation.runs import be_quiet, play_seed

SEEDS = range(12)
PRINT_DIGESTS = f"""
from jilju.assemble.simulation import RooflineBackend
from jilju.simulation.runs import be_quiet, play_seed
be_quiet()
print(*(play_seed(seed, RooflineBackend()).digest for seed in range({len(SEEDS)})))
"""


@pytest.fixture(scope="module")
def digests() -> list[str]:
    be_quiet()
    return [play_seed(seed, RooflineBackend()).digest for seed in SEEDS]


def test_a_seed_played_again_is_the_same_run(digests):
    assert [play_seed(seed, RooflineBackend()).digest for seed in SEEDS] == digests
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("hash_seed", ["1", "77"])
def test_another_order_of_hashes_is_the_same_run(digests, hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", PRINT_DIGESTS]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    assert printed.split() == digests


def test_looking_changes_nothing(digests):
    """A run whose log is kept is the same, and the log tells of it."""
    for seed in SEEDS[:4]:
        world = World(draw(seed), RooflineBackend(), keep_log=True)
        world.run()
        assert world.digest == digests[seed]
        assert world.log and sum(" end " in line for line in world.log) == len(draw(seed).requests)
