"""GPUs as the driver tells of them, by a library of the same functions: which are visible, and what is refused."""

import ctypes
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import pytest

from jilju.backends.cuda.device import (
    FP8_CAPABILITY,
    Gpu,
    Readings,
    check_fp8,
    check_libraries,
    find_gpu,
    kernel_set,
    list_gpus,
)
from jilju.errors import ConfigError, PlatformError

GIB = 1 << 30


class FakeNvml:
    """What is used of NVML, on GPUs (uuid, name, capability, GiB); `parts` are MIG instances by UUID with their GPU's place."""

    def __init__(
        self,
        *gpus: tuple[str, str, tuple[int, int], int],
        parts: Mapping[str, int] = {},
        failing: Mapping[str, int] = {},
    ):
        self.gpus, self.parts, self.failing = gpus, dict(parts), dict(failing)
        self.num_open = 0
        self.used_bytes, self.energy_mj = GIB, 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if status := self.failing.get(name):
                return status
            return getattr(self, "_" + name.removeprefix("nvml"))(*arguments) or 0

        return call

    def _Init_v2(self):
        self.num_open += 1

    def _Shutdown(self):
        self.num_open -= 1

    def _SystemGetDriverVersion(self, buffer, size):
        buffer.value = b"570.86.10"

    def _DeviceGetCount_v2(self, count):
        count._obj.value = len(self.gpus)

    def _DeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1  # a null pointer is no GPU

    def _DeviceGetHandleByUUID(self, uuid, handle):
        uuids = [gpu[0] for gpu in self.gpus]
        if uuid.decode() in uuids:
            handle._obj.value = 1 + uuids.index(uuid.decode())
            return 0
        if uuid.decode() not in self.parts:
            return 6
        handle._obj.value = 1000 + list(self.parts).index(uuid.decode())
        return 0

    def _DeviceGetDeviceHandleFromMigDeviceHandle(self, part, handle):
        handle._obj.value = 1 + self.parts[list(self.parts)[part.value - 1000]]

    def _DeviceGetMigMode(self, handle, now, after):
        now._obj.value = after._obj.value = int(handle.value - 1 in self.parts.values())
        return 0 if self.parts else 3

    def _DeviceGetUUID(self, handle, buffer, size):
        part = handle.value >= 1000
        uuid = list(self.parts)[handle.value - 1000] if part else self.gpus[handle.value - 1][0]
        buffer.value = uuid.encode()

    def _DeviceGetName(self, handle, buffer, size):
        buffer.value = b"a part" if handle.value >= 1000 else self.gpus[handle.value - 1][1].encode()

    def _DeviceGetIndex(self, handle, index):
        index._obj.value = handle.value - 1

    def _DeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = self.gpus[handle.value - 1][2]

    def _DeviceGetMemoryInfo(self, handle, memory):
        gib = 16 if handle.value >= 1000 else self.gpus[handle.value - 1][3]
        memory._obj.total, memory._obj.used = gib * GIB, self.used_bytes
        memory._obj.free = gib * GIB - self.used_bytes

    def _DeviceGetTotalEnergyConsumption(self, handle, energy):
        if handle.value >= 1000:
            return 3  # of the whole GPU only
        energy._obj.value = self.energy_mj
        return 0


H200 = ("GPU-aaaa-1", "NVIDIA H200", (9, 0), 141)
A100 = ("GPU-aabb-2", "NVIDIA A100", (8, 0), 80)
T4 = ("GPU-cccc-3", "Tesla T4", (7, 5), 16)


def visible(named: str | None, *gpus: tuple) -> list[int]:
    environ = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    return [gpu.index for gpu in list_gpus(environ, FakeNvml(*(gpus or (H200, A100, T4))))]


def test_what_is_told_of_a_gpu():
    nvml = FakeNvml(H200)
    assert list_gpus({}, nvml) == [
        Gpu(0, "GPU-aaaa-1", "NVIDIA H200", (9, 0), 141 * GIB, 140 * GIB, "570.86.10"),
    ]
    assert nvml.num_open == 0
    assert find_gpu({}, nvml).shown == "NVIDIA H200, GPU 0, sm90, driver 570.86.10"


@pytest.mark.parametrize(
    ("named", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("GPU-aaaa-1", [0]),
        ("GPU-c,GPU-aab", [2, 1]),
        ("GPU-aa", []),  # of two
        ("1,7,0", [1]),  # what comes after one that is not there is not seen
        ("-1", []),
        ("NoDevFiles", []),
        ("1,1", []),
        ("0,GPU-aaaa-1", []),  # the same one
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(named, indices):
    assert visible(named) == indices


def test_a_part_of_a_divided_gpu_is_named_by_its_uuid():
    nvml = FakeNvml(A100, H200, parts={"MIG-1": 1, "MIG-2": 1})
    (part,) = list_gpus({"CUDA_VISIBLE_DEVICES": "MIG-2"}, nvml)
    assert (part.index, part.uuid, part.capability, part.total_bytes) == (1, "MIG-2", (9, 0), 16 * GIB)
    assert list_gpus({"CUDA_VISIBLE_DEVICES": "MIG-3,MIG-1"}, nvml) == []
    assert [gpu.index for gpu in list_gpus({"CUDA_VISIBLE_DEVICES": "0"}, nvml)] == [0]
    with pytest.raises(PlatformError, match=r"GPU-aaaa-1 is divided.*CUDA_VISIBLE_DEVICES=MIG-"):
        find_gpu({"CUDA_VISIBLE_DEVICES": "1"}, nvml)
    assert nvml.num_open == 0


def test_the_first_that_is_visible_is_taken():
    assert find_gpu({"CUDA_VISIBLE_DEVICES": "1,0"}, FakeNvml(H200, A100)).name == "NVIDIA A100"


@pytest.mark.parametrize(
    ("nvml", "environ", "words"),
    [
        (FakeNvml(), {}, ["no GPU", "the driver knows none", "--device cpu"]),
        (FakeNvml(H200), {"CUDA_VISIBLE_DEVICES": "3"}, ["no GPU", "CUDA_VISIBLE_DEVICES is '3'", "nvidia-smi -L"]),
        (FakeNvml(T4, H200), {}, ["Tesla T4", "7.5", "8.0", "CUDA_VISIBLE_DEVICES", "--device cpu"]),
        (FakeNvml(failing={"nvmlInit_v2": 9}), {}, ["the driver is not loaded", "--device cpu"]),
        (FakeNvml(H200, failing={"nvmlDeviceGetMemoryInfo": 999}), {}, ["nvmlDeviceGetMemoryInfo", "error 999"]),
    ],
)
def test_refusals_say_what_is_needed(nvml, environ, words):
    with pytest.raises(PlatformError) as caught:
        find_gpu(environ, nvml)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_readings_are_of_the_moment():
    nvml = FakeNvml(A100, H200)
    readings = Readings("GPU-aaaa-1", nvml)
    assert (readings.used_bytes(), readings.energy_uj()) == (GIB, 0)
    nvml.used_bytes, nvml.energy_mj = 120 * GIB, 1 << 62
    assert (readings.used_bytes(), readings.energy_uj()) == (120 * GIB, 1000 << 62)
    assert nvml.num_open == 1, "it stays open"
    nvml.failing = {"nvmlDeviceGetMemoryInfo": 15, "nvmlDeviceGetTotalEnergyConsumption": 15}
    assert readings.used_bytes() is None and readings.energy_uj() is None


def test_a_part_of_a_divided_gpu_has_memory_and_no_counter_of_energy():
    readings = Readings("MIG-1", FakeNvml(H200, parts={"MIG-1": 0}))
    assert readings.used_bytes() == GIB and readings.energy_uj() is None


@pytest.mark.parametrize(
    "nvml", [FakeNvml(H200, failing={"nvmlInit_v2": 9}), FakeNvml(A100)], ids=["no driver", "no such GPU"]
)
def test_readings_that_cannot_be_had(nvml):
    readings = Readings("GPU-aaaa-1", nvml)
    assert readings.used_bytes() is None and readings.energy_uj() is None


def test_no_driver(monkeypatch):
    monkeypatch.setattr("jilju.backends.cuda.device.LIBRARY", "libno-such-library.so.1")
    with pytest.raises(PlatformError, match=r"libno-such-library.so.1 is not there.*--gpus all.*--device cpu"):
        list_gpus({})
    assert Readings("GPU-aaaa-1").used_bytes() is None


def test_the_structure_of_memory_is_that_of_the_library():
    from jilju.backends.cuda.device import _Memory

    assert ctypes.sizeof(_Memory) == 24 and _Memory.free.offset == 8


def test_fp8_needs_a_newer_gpu():
    check_fp8(find_gpu({}, FakeNvml(H200)), "--kv-dtype")
    check_fp8(find_gpu({}, FakeNvml(("GPU-d", "L4", FP8_CAPABILITY, 24))), "--kv-dtype")
    with pytest.raises(ConfigError, match=r"--kv-dtype is fp8; NVIDIA A100 has compute capability 8.0.*8.9"):
        check_fp8(find_gpu({}, FakeNvml(A100)), "--kv-dtype")


def test_kernel_sets_are_named_by_architecture_and_mode():
    assert kernel_set((9, 0), fast=False) == "cuda-sm90-invariant"
    assert kernel_set((8, 9), fast=True) == "cuda-sm89-fast"


def check(**versions: str) -> None:
    check_libraries(versions.__contains__, versions.__getitem__)


def test_libraries_that_suffice():
    check(torch="2.11.0+cu128", triton="3.6.0")
    check(torch="2.11.0", triton="3.6.0")
    check(torch="3.0.0a0+git12", triton="3.10.1")


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({}, ["needs torch", "not installed", "pip install 'jilju[cuda]'", "--device cpu"]),
        ({"torch": "2.11.0"}, ["needs triton", "not installed", "pip install 'jilju[cuda]'"]),
        ({"torch": "2.10.1", "triton": "3.6.0"}, ["torch 2.11 or newer", "2.10.1 is installed"]),
        ({"torch": "2.11.0", "triton": "3.5.9"}, ["triton 3.6 or newer", "3.5.9 is installed"]),
        ({"torch": "2.13.0+cpu", "triton": "3.6.0"}, ["torch built for CUDA", "2.13.0+cpu is installed", "uninstall"]),
        ({"torch": "2.13.0+rocm6.4", "triton": "3.6.0"}, ["torch built for CUDA", "2.13.0+rocm6.4"]),
        ({"torch": "unknown", "triton": "3.6.0"}, ["torch 2.11 or newer", "unknown is installed"]),
    ],
)
def test_libraries_that_lack_are_named(versions, words):
    with pytest.raises(ConfigError) as caught:
        check(**versions)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_installed_versions_are_found_without_an_import():
    """The real lookup, of whatever this environment has."""
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        with pytest.raises(ConfigError, match="needs torch, which is not installed"):
            check_libraries()
    else:
        pytest.skip("torch is installed here; what is said of it depends on its build")
