"""Clocks: time as a parameter.

One monotonic clock serves the server and the engine process of a host (CLOCK_MONOTONIC is common to both); tests and
simulation hand in a clock that they move themselves. Knows nothing of requests or steps. Unit: integer nanoseconds.
"""

import time
from typing import Protocol


class Clock(Protocol):
    def now_ns(self) -> int:
        """Nanoseconds since an arbitrary moment; never goes back."""
        ...


class WallClock:
    def now_ns(self) -> int:
        return time.monotonic_ns()


class VirtualClock:
    """Stands still until `advance_ns`."""

    def __init__(self, start_ns: int = 0):
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance_ns(self, delta_ns: int) -> None:
        assert delta_ns >= 0, f"a clock does not go back, given {delta_ns} ns"
        self._now_ns += delta_ns
