"""Probes: what this machine can do at most, and what this backend's kernels can do at best.

Owns which number formats share a kernel. Knows nothing of models; `jilju bench` measures against these roofs.
"""

from typing import Any

from jilju.backends.native.kernels import import_kernels
from jilju.formats.ggml import GgmlType
from jilju.plan import Plan


class NativeProbes:
    """Every matrix is computed in float32 at present, so there is one family and its peak is that of FMAs."""

    families: tuple[str, ...] = ("F",)

    def __init__(self) -> None:
        self._kernels: Any = import_kernels()

    def family_of(self, type_: GgmlType) -> str:
        return "F"

    def weight_bytes(self, plan: Plan) -> dict[str, int]:
        """Weights are read as they lie in the file."""
        return {name: spec.num_bytes for name, spec in plan.weights.items()}

    def read_bandwidth(self, num_bytes: int, num_threads: int, seconds: float) -> float:
        rate: float = self._kernels.read_bandwidth(num_bytes, num_threads, seconds)
        return rate

    def fma_peak(self, num_threads: int, seconds: float) -> float:
        rate: float = self._kernels.fma_peak(num_threads, seconds)
        return rate

    def kernel_peak(self, family: str, num_threads: int, seconds: float) -> float:
        assert family in self.families, f"family {family!r} of {self.families}"
        return self.fma_peak(num_threads, seconds)
