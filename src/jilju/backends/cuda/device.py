"""Devices: which NVIDIA GPUs this process may use, and whether jilju can compute on them.

Owns the questions to the driver, by its management library NVML through ctypes: no torch, and no CUDA context, which would
take memory and seconds. Owns what of libraries must be installed, too. Knows nothing of models or of what will be held.
"""

import ctypes
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import msgspec

from jilju.errors import ConfigError, PlatformError

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
LEAST_CAPABILITY = (8, 0)  # bf16 matrix products and asynchronous copies
FP8_CAPABILITY = (8, 9)  # conversions from and to e4m3
NEEDED: Mapping[str, tuple[int, int]] = {"torch": (2, 11), "triton": (3, 6)}  # the least version of each
INSTALL = "pip install 'jilju[cuda]'"
NAME_BYTES = 96  # of a name, a UUID or a version; what NVML wants at most
REASONS: Mapping[int, str] = {  # of NVML's error numbers, those that a user can do something about
    4: "no permission to use it",
    9: "the driver is not loaded",
    15: "a GPU has fallen off the bus",
    18: "driver and library are of different versions; reboot, or load the driver anew",
}


class Gpu(msgspec.Struct, frozen=True):
    """A GPU, or a part of one that is divided (MIG)."""

    index: int  # in the driver's order, as nvidia-smi counts; of a part, that of its GPU
    uuid: str
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    driver: str

    @property
    def shown(self) -> str:
        return f"{self.name}, GPU {self.index}, sm{self.capability[0]}{self.capability[1]}, driver {self.driver}"


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def kernel_set(capability: tuple[int, int], fast: bool) -> str:
    """What computes, as users see it: "cuda-sm90-invariant"."""
    return f"cuda-sm{capability[0]}{capability[1]}-{'fast' if fast else 'invariant'}"


def find_gpu(environ: Mapping[str, str] = os.environ, nvml: Any = None) -> Gpu:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, able to run the kernels. Raises PlatformError."""
    gpus = list_gpus(environ, nvml)
    if not gpus:
        named = environ.get("CUDA_VISIBLE_DEVICES")
        why = "the driver knows none" if named is None else f"CUDA_VISIBLE_DEVICES is {named!r:.200}"
        raise PlatformError(f"no GPU for --device cuda: {why}; `nvidia-smi -L` lists them, --device cpu needs none")
    gpu = gpus[0]
    if gpu.capability < LEAST_CAPABILITY:
        raise PlatformError(
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}; --device cuda needs {_dotted(LEAST_CAPABILITY)} or "
            "newer (A100, RTX 30 and later); name another GPU by CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    return gpu


def check_fp8(gpu: Gpu, where: str) -> None:
    """`where` is the setting that asks for it. Raises ConfigError."""
    if gpu.capability < FP8_CAPABILITY:
        raise ConfigError(
            f"{where} is fp8; {gpu.name} has compute capability {_dotted(gpu.capability)}, fp8 needs {_dotted(FP8_CAPABILITY)} "
            "or newer (H100, RTX 40 and later); leave it out"
        )


def check_libraries(
    is_there: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
    version_of: Callable[[str], str] = metadata.version,
) -> None:
    """What the engine will import, looked at without importing it. Raises ConfigError."""
    for name, least in NEEDED.items():
        if not is_there(name):
            raise ConfigError(f"--device cuda needs {name}, which is not installed; {INSTALL}, or use --device cpu")
        version = version_of(name)
        number, _, build = version.partition("+")
        if build.startswith(("cpu", "rocm", "xpu")):
            raise ConfigError(
                f"--device cuda needs a {name} built for CUDA, {version} is installed; uninstall it, then {INSTALL}"
            )
        found = re.match(r"(\d+)\.(\d+)", number)
        if found is None or (int(found[1]), int(found[2])) < least:
            raise ConfigError(
                f"--device cuda needs {name} {_dotted(least)} or newer, {version} is installed; {INSTALL} --upgrade"
            )


def list_gpus(environ: Mapping[str, str] = os.environ, nvml: Any = None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order. `nvml` is the library. Raises PlatformError without a driver."""
    driver = _Driver(_library() if nvml is None else nvml)
    try:
        return [driver.gpu(handle) for handle in _visible(driver, environ.get("CUDA_VISIBLE_DEVICES"))]
    finally:
        driver.close()


class Readings:
    """What a GPU says while it computes, of everybody who uses it; None: it does not say.

    Keeps NVML open, whose start takes longer than all its answers; for one process that lives as long.
    """

    def __init__(self, uuid: str, nvml: Any = None):
        try:
            self._driver = _Driver(_library() if nvml is None else nvml)
            self._handle = self._driver.by_uuid(uuid)
        except PlatformError:
            self._handle = None

    def used_bytes(self) -> int | None:
        return None if self._handle is None else self._driver.used_bytes(self._handle)

    def energy_uj(self) -> int | None:
        """Since the driver was loaded. GPUs older than Volta and parts of divided ones have no such counter."""
        return None if self._handle is None else self._driver.energy_uj(self._handle)


def _library() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        raise PlatformError(
            f"--device cuda needs NVIDIA's driver: {LIBRARY} is not there; install the driver (in a container: start it "
            "with --gpus all), or use --device cpu"
        ) from None


def _visible(driver: "_Driver", named: str | None) -> list[ctypes.c_void_p]:
    """As CUDA reads it: numbers or UUIDs, of which a beginning is enough; the first that names nothing ends the list, and
    one that is named twice leaves none."""
    handles = driver.handles()
    if named is None:
        return handles
    uuids = [driver.text("nvmlDeviceGetUUID", handle) for handle in handles]
    found: list[tuple[str, ctypes.c_void_p]] = []
    for item in map(str.strip, named.split(",")):
        if item.startswith("MIG-"):
            part = driver.by_uuid(item)
            if part is None:
                break
            found.append((item, part))
        elif item.isascii() and item.isdigit() and int(item) < len(handles):
            found.append((uuids[int(item)], handles[int(item)]))
        elif item.startswith("GPU-") and sum(uuid.startswith(item) for uuid in uuids) == 1:
            index = next(index for index, uuid in enumerate(uuids) if uuid.startswith(item))
            found.append((uuids[index], handles[index]))
        else:
            break
    names = [name for name, _ in found]
    return [handle for _, handle in found] if len(set(names)) == len(names) else []


class _Driver:
    """NVML between its init and its shutdown."""

    def __init__(self, nvml: Any):
        self._nvml = nvml
        self._call("nvmlInit_v2")
        buffer = ctypes.create_string_buffer(NAME_BYTES)
        self._call("nvmlSystemGetDriverVersion", buffer, NAME_BYTES)
        self._version = buffer.value.decode(errors="replace")

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def handles(self) -> list[ctypes.c_void_p]:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = [ctypes.c_void_p() for _ in range(count.value)]
        for index, handle in enumerate(found):
            self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
        return found

    def by_uuid(self, uuid: str) -> ctypes.c_void_p | None:
        handle = ctypes.c_void_p()
        status = self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        return handle if status == 0 else None

    def gpu(self, handle: ctypes.c_void_p) -> Gpu:
        uuid, whole, memory = self.text("nvmlDeviceGetUUID", handle), handle, _Memory()
        if uuid.startswith("MIG-"):
            whole = ctypes.c_void_p()
            self._call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, ctypes.byref(whole))
        elif self._is_divided(handle):
            raise PlatformError(
                f"GPU {uuid} is divided (MIG); name one of its parts: CUDA_VISIBLE_DEVICES=MIG-..., `nvidia-smi -L` lists them"
            )
        index, major, minor = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetIndex", whole, ctypes.byref(index))
        self._call("nvmlDeviceGetCudaComputeCapability", whole, ctypes.byref(major), ctypes.byref(minor))
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        name = self.text("nvmlDeviceGetName", handle)
        return Gpu(
            index.value, uuid, name, (major.value, minor.value), int(memory.total), int(memory.free), self._version
        )

    def used_bytes(self, handle: ctypes.c_void_p) -> int | None:
        memory = _Memory()
        status = self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return int(memory.total - memory.free) if status == 0 else None

    def energy_uj(self, handle: ctypes.c_void_p) -> int | None:
        energy_mj = ctypes.c_ulonglong()
        status = self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy_mj))
        return energy_mj.value * 1000 if status == 0 else None

    def text(self, function: str, handle: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(NAME_BYTES)
        self._call(function, handle, buffer, NAME_BYTES)
        return buffer.value.decode(errors="replace")

    def _is_divided(self, handle: ctypes.c_void_p) -> bool:
        now, after = ctypes.c_uint(), ctypes.c_uint()
        status = self._nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(now), ctypes.byref(after))
        return status == 0 and now.value == 1

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._nvml, function)(*arguments)
        if status != 0:
            why = REASONS.get(status, f"error {status}")
            raise PlatformError(
                f"NVIDIA's driver does not answer {function}: {why}; `nvidia-smi` tells more, --device cpu needs no driver"
            )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
