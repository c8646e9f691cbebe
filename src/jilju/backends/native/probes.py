"""Probes: what this machine can do at most, and what this backend's kernels can do at best.

Owns which number formats share a kernel. Knows nothing of models; `jilju bench` measures against these roofs.
"""

import os
from typing import Any

from jilju.backends.native.encode import encode_plan
from jilju.backends.native.kernels import import_kernels
from jilju.formats.ggml import GgmlType
from jilju.plan import Plan


class NativeProbes:
    """`families` are the kinds of kernel that matrices are multiplied by; "F" computes in float32, its peak is that of FMAs."""

    def __init__(self) -> None:
        self._kernels: Any = import_kernels()
        self._isa = os.environ.get("JILJU_ISA", "")
        self.families: tuple[str, ...] = self._kernels.FAMILIES

    def family_of(self, type_: GgmlType) -> str:
        family: str = self._kernels.family_of(type_)
        return family

    def weight_bytes(self, plan: Plan) -> dict[str, int]:
        """As the kernels read them: packed where linear ops use them, otherwise as in the file."""
        encoded = encode_plan(plan)
        _version, entries = self._kernels.packed_layout(encoded.ints, encoded.reals)
        packed = {encoded.weight_names[weight]: size for weight, _offset, size in entries}
        return {name: packed.get(name, spec.num_bytes) for name, spec in plan.weights.items()}

    def read_bandwidth(self, num_bytes: int, num_threads: int, seconds: float) -> float:
        rate: float = self._kernels.read_bandwidth(num_bytes, num_threads, seconds)
        return rate

    def fma_peak(self, num_threads: int, seconds: float) -> float:
        rate: float = self._kernels.fma_peak(num_threads, seconds)
        return rate

    def kernel_peak(self, family: str, num_threads: int, seconds: float) -> float:
        assert family in self.families, f"family {family!r} of {self.families}"
        if family == "F":
            return self.fma_peak(num_threads, seconds)
        rate: float = self._kernels.kernel_peak(self._isa, family, num_threads, seconds)
        return rate
