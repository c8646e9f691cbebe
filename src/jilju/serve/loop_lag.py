"""Loop lag: how late the server's event loop comes to what is due.

Owns a timer that notes by how much it woke late, and the worst of the last minute: what a token may have waited here.
Knows nothing of what kept the loop.
"""

import asyncio
from collections import deque

from jilju.clock import Clock

PERIOD_S = 0.5
NUM_KEPT = 120  # a minute


class LoopLag:
    def __init__(self, clock: Clock):
        self._clock = clock
        self._lags_ns: deque[int] = deque(maxlen=NUM_KEPT)

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            begin_ns = self._clock.now_ns()
            await asyncio.sleep(PERIOD_S)
            self.note(max(0, self._clock.now_ns() - begin_ns - int(PERIOD_S * 1e9)))

    def note(self, lag_ns: int) -> None:
        self._lags_ns.append(lag_ns)

    @property
    def worst_s(self) -> float | None:
        """None: nobody watches yet."""
        return max(self._lags_ns) / 1e9 if self._lags_ns else None
