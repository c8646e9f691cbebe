"""The roofs of a machine: the probes themselves, and the tables against probes of known rates."""

import pytest

from jilju.backends.native import NativeProbes
from jilju.bench.machine import measure_machine
from jilju.bench.report import machine_groups, machine_table
from jilju.formats.ggml import GgmlType
from tests.bench.fakes import KnownProbes, busy_guard, idle_guard


@pytest.fixture
def probes():
    return NativeProbes()


def test_medians_stand_by_size_and_by_threads():
    told = []
    machine = measure_machine(
        KnownProbes(), 2, guard=idle_guard(), working_sets_mb=(8, 64), num_rounds=3, progress=lambda *done: told.append(done)
    )  # fmt: skip
    assert [(row.working_set_mb, row.gb_s) for row in machine.bandwidth] == [(8, [108.0, 208.0]), (64, [164.0, 264.0])]
    assert machine.fma_gflop_s == [50.0, 100.0]
    assert machine.kernel_gop_s == {"A": [10.0, 20.0], "B": [40.0, 80.0]}
    assert told[-1] == (10, 10, "B"), "two sizes, FMA and two families, each on one and on two threads"


def test_table_and_chart_hold_every_figure():
    machine = measure_machine(KnownProbes(), 2, guard=idle_guard(), working_sets_mb=(8,), num_rounds=1)
    columns = [list(column.cells) for column in machine_table(machine).columns]
    assert columns[0] == ["read, working set 8 MB", "float32 FMA", "linear kernel A", "linear kernel B"]
    assert columns[1:] == [
        ["108.0", "50", "10", "40"],
        ["208.0", "100", "20", "80"],
        ["GB/s", "GFLOP/s", "GOP/s", "GOP/s"],
    ]
    groups = machine_groups(machine)
    assert [bar.value for group in groups for bar in group.bars] == [108.0, 208.0, 50.0, 100.0, 10.0, 20.0, 40.0, 80.0]


def test_probes_run_on_every_number_of_threads(probes):
    for num_threads in (1, 2, 3):
        assert probes.read_bandwidth(3 << 20, num_threads, 0.01) > 0
        assert probes.fma_peak(num_threads, 0.01) > 0


@pytest.mark.parametrize(
    ("size", "threads", "seconds", "text"),
    [(1000, 1, 0.1, "1000 bytes"), (1 << 20, 0, 0.1, "0 threads"), (1 << 20, 1, 0.0, "0.0+ seconds")],
)
def test_what_cannot_be_measured_is_refused(probes, size, threads, seconds, text):
    with pytest.raises(ValueError, match=text):
        probes.read_bandwidth(size, threads, seconds)


def test_every_number_format_has_a_family_with_a_peak(probes):
    for type_ in GgmlType:
        assert probes.family_of(type_) in probes.families
    for family in probes.families:
        assert probes.kernel_peak(family, 1, 0.02) > 0


def test_the_worst_disturbance_is_told():
    machine = measure_machine(
        KnownProbes(), 1, guard=busy_guard(0.01, 0.02, 0.0, 0.0), working_sets_mb=(8,), num_rounds=1
    )
    assert machine.others_share == pytest.approx(0.02)
