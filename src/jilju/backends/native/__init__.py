"""native: the CPU backend. A plan is encoded once, then a step is one call into C++ without the GIL.

The package imports without its compiled extension; making a `NativeExecutor` without it is a PlatformError.
"""

from jilju.backends.native.executor import NativeExecutor, StepProfile
from jilju.backends.native.packed import PackedCache, PackedFile, clear_packed, list_packed
from jilju.backends.native.probes import NativeProbes

__all__ = [
    "NativeExecutor",
    "NativeProbes",
    "PackedCache",
    "PackedFile",
    "StepProfile",
    "clear_packed",
    "list_packed",
]
