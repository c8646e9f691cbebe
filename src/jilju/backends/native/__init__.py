"""native: the CPU backend. A plan is encoded once, then a step is one call into C++ without the GIL.

The package imports without its compiled extension; making a `NativeExecutor` without it is a PlatformError.
"""

from jilju.backends.native.executor import NativeExecutor, StepProfile

__all__ = ["NativeExecutor", "StepProfile"]
