"""Shrinking: the script of a seed that sees a bug becomes one that a person can follow, and still sees it."""

import pytest

from jilju.assemble.simulation import RooflineBackend
from jilju.simulation import Script, draw, play, shrink
from jilju.simulation.runs import be_quiet
from jilju.simulation.script import from_json

from .bugs import bug_of, planted
from .measure_bugs import read_table

MAX_EVENTS = 10
MAX_TRIES = 600


def law_of(script: Script) -> str:
    return play(script, RooflineBackend()).law


@pytest.mark.parametrize("name", ["shared_block_counted_once", "noise_from_resume", "whole_half_fails"])
def test_a_failing_script_becomes_small(name):
    be_quiet()
    script = draw(read_table()[name].seed)
    with planted(bug_of(name)):
        law = law_of(script)
        small = shrink(script, lambda candidate: law_of(candidate) == law, MAX_TRIES)
        assert law and law_of(small) == law
    assert small.num_events <= min(MAX_EVENTS, script.num_events)
    assert len(small.to_json()) < len(script.to_json())
    assert from_json(small.to_json()) == small
    assert not play(small, RooflineBackend()).failure, "the bug is what fails, not what shrinking made of the script"


def test_a_script_that_is_as_small_as_it_can_be_stays():
    script = draw(3)
    one = shrink(script, lambda candidate: True)
    assert len(one.requests) == 1 and not one.faults
    assert shrink(one, lambda candidate: True) == one


def test_shrinking_ends_when_its_tries_do():
    tries: list[Script] = []

    def fails(candidate: Script) -> bool:
        tries.append(candidate)
        return True

    shrink(draw(4), fails, max_tries=7)
    assert len(tries) == 7
