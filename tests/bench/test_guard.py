"""The guard: what counts as disturbed, and the rounds that it watches over."""

import subprocess
import sys
import time

import pytest

from jilju.bench.guard import CpuTimes, read_cpu_times
from jilju.bench.rounds import Contender, Rounds, take_turns
from jilju.errors import BusyMachine
from tests.bench.fakes import busy_guard, idle_guard


def test_the_share_of_others_is_what_is_not_ours():
    before = CpuTimes(wall=10.0, machine=100.0, own=50.0)
    assert before.others_share(CpuTimes(12.0, 104.0, 53.0), num_cores=2) == pytest.approx(0.25)
    assert before.others_share(CpuTimes(12.0, 103.0, 53.1), num_cores=2) == 0.0, "ticks of two clocks may disagree"


def test_a_disturbed_run_is_repeated_and_does_not_count():
    results = iter("abc")
    done = busy_guard(0.5, 0.031, 0.029).run(lambda: next(results))
    assert (done.value, done.others_share) == ("c", pytest.approx(0.029))


def test_a_machine_that_stays_busy_is_an_error_with_the_shares():
    with pytest.raises(BusyMachine, match=r"in 3 runs .* 10\.0%, 20\.0%, 30\.0% .* below 3\.0%.*--max-others"):
        busy_guard(0.1, 0.2, 0.3, attempts=3).run(lambda: None)


def test_this_process_and_those_named_are_ours_and_nobody_else():
    child = subprocess.Popen([sys.executable, "-c", "sum(range(10**7)); input()"], stdin=subprocess.PIPE)
    try:
        while (with_child := read_cpu_times([child.pid])).own - read_cpu_times([]).own < 0.05:
            time.sleep(0.01)  # its start and its sum take more than that
        assert with_child.machine >= with_child.own - 0.1
    finally:
        child.communicate(b"\n")


def test_contenders_run_in_turn_and_the_first_round_is_not_counted():
    calls, told = [], []
    rates = {"a": iter([9.0, 10.0, 30.0, 20.0]), "b": iter([9.0, 10.0, 10.0, 40.0])}

    def run(name):
        calls.append(name)
        return next(rates[name])

    contenders = [Contender(name, lambda name=name: run(name)) for name in rates]
    done = take_turns(contenders, 3, idle_guard(), told.append)
    assert calls == ["a", "b"] * 4
    assert done.rates == {"a": [10.0, 30.0, 20.0], "b": [10.0, 10.0, 40.0]}
    assert done.median("a") == 20.0
    assert told == [1, 2, 3]


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    rounds = Rounds({"a": [10.0, 30.0, 20.0], "b": [10.0, 10.0, 40.0]}, 0.0)
    assert rounds.ratio("a", "b") == 1.0


def test_a_disturbed_round_runs_again_as_a_whole():
    calls = []
    contenders = [Contender(name, lambda name=name: float(calls.append(name) or len(calls))) for name in "ab"]
    done = take_turns(contenders, 1, busy_guard(0.5, 0.0))
    assert calls == ["a", "b"] * 3, "warm-up, the disturbed one, the one that counts"
    assert done.rates == {"a": [5.0], "b": [6.0]}
