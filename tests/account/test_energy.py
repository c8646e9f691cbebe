"""Energy counters, read from a folder like the system's."""

from pathlib import Path

import pytest

from jilju.account.energy import DeclaredPower, find_meter


def make_zone(folder: Path, zone: str, name: str, energy_uj: int, range_uj: int = 1000) -> Path:
    path = folder / zone
    path.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (path / file).write_text(f"{value}\n")
    return path


def test_packages_and_memory_are_added_up(tmp_path):
    first = make_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    make_zone(tmp_path, "intel-rapl:0:0", "core", 5)  # a part of the package
    memory = make_zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    second = make_zone(tmp_path, "intel-rapl:1", "package-1", 20)
    make_zone(tmp_path, "intel-rapl:2", "psys", 900)  # packages and more
    make_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)  # the same again
    meter = find_meter(None, tmp_path)
    assert meter is not None and meter.source == "RAPL package and memory counters" and meter.watts is None
    assert meter.read_uj() == 0
    for path, value in ((first, 130), (memory, 8), (second, 24)):
        (path / "energy_uj").write_text(str(value))
    assert meter.read_uj() == 30 + 1 + 4


def test_a_counter_that_goes_on_from_0(tmp_path):
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0", 900, range_uj=1000)
    meter = find_meter(None, tmp_path)
    assert meter is not None and meter.source == "RAPL package counter"
    for value, total in ((950, 50), (30, 130), (31, 131), (10, 1110)):
        (zone / "energy_uj").write_text(str(value))
        assert meter.read_uj() == total


@pytest.mark.parametrize("missing", ["energy_uj", "max_energy_range_uj"])
def test_counters_that_may_not_be_read_are_none(tmp_path, missing):
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0", 900)
    (zone / missing).unlink()
    (zone / missing).mkdir()  # cannot be read by anybody
    assert find_meter(None, tmp_path) is None
    assert find_meter(45.5, tmp_path) == DeclaredPower(45.5)


def test_counters_that_go_away(tmp_path):
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0", 900)
    meter = find_meter(20.0, tmp_path)  # what was declared is not asked where there are counters
    assert meter is not None and meter.watts is None
    (zone / "energy_uj").unlink()
    assert meter.read_uj() is None


def test_no_counters(tmp_path):
    assert find_meter(None, tmp_path / "none") is None
    declared = find_meter(12.0, tmp_path)
    assert declared == DeclaredPower(12.0) and declared is not None and declared.read_uj() is None


class Gpu:
    """A counter that somebody else reads."""

    def __init__(self, energy_uj: int | None):
        self.energy_uj = energy_uj

    def __call__(self) -> int | None:
        return self.energy_uj


def test_a_gpu_counts_beside_the_packages(tmp_path):
    zone, gpu = make_zone(tmp_path, "intel-rapl:0", "package-0", 100), Gpu(7_000_000)
    meter = find_meter(50.0, tmp_path, gpu)
    assert meter is not None and meter.source == "RAPL package counter, NVML GPU counter" and meter.watts is None
    assert meter.read_uj() == 0
    (zone / "energy_uj").write_text("130")
    gpu.energy_uj = 7_000_500
    assert meter.read_uj() == 530
    gpu.energy_uj = 20  # the driver was loaded anew: what was used in between is not known
    assert meter.read_uj() == 530
    gpu.energy_uj = 25
    assert meter.read_uj() == 535
    gpu.energy_uj = None
    assert meter.read_uj() is None


def test_a_gpu_alone(tmp_path):
    gpu = Gpu(1 << 62)
    meter = find_meter(50.0, tmp_path, gpu)
    assert meter is not None and meter.source == "NVML GPU counter" and meter.watts is None
    gpu.energy_uj = (1 << 62) + 3
    assert meter.read_uj() == 3


def test_a_gpu_without_a_counter(tmp_path):
    assert find_meter(None, tmp_path, Gpu(None)) is None
    assert find_meter(50.0, tmp_path, Gpu(None)) == DeclaredPower(50.0)
    make_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    meter = find_meter(None, tmp_path, Gpu(None))
    assert meter is not None and meter.source == "RAPL package counter" and meter.read_uj() == 0
