"""Histograms: counts by bucket, and the edges that ours have.

Owns the edges, which are those of vLLM and finer ones below them. Knows nothing of what is counted or how it is shown.
"""

from bisect import bisect_left
from itertools import accumulate

LATENCY_S = (.005, .01, .025, .05, .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
             1920, 7680)  # fmt: skip
FIRST_TOKEN_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
                 2560)  # fmt: skip
BETWEEN_TOKENS_S = (.0005, .001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40,
                    80)  # fmt: skip
# Of work before and after the model, which is short.
FRONTEND_S = (.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30)  # fmt: skip
ETA_ERROR_S = (-300, -60, -30, -10, -5, -2, -1, -.5, -.2, -.1, -.05, -.02, 0, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60,
               300)  # fmt: skip
STEP_ERROR = (-.75, -.5, -.3, -.2, -.1, -.05, 0, .05, .1, .2, .3, .5, 1, 2, 5)  # fmt: skip
STEP_TOKENS = (1, *(8 << shift for shift in range(12)))  # 1, 8, 16 … 16384
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)


def token_edges(max_tokens: int) -> tuple[float, ...]:
    """1, 2, 5, 10 … up to the context's length."""
    edges = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return (*(edge for edge in edges if edge < max_tokens), max_tokens)


class Histogram:
    """An edge belongs to the bucket below it."""

    def __init__(self, edges: tuple[float, ...]):
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self.edge_texts = (*(repr(float(edge)) for edge in edges), "+Inf")
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self.sum += value

    @property
    def has_sum(self) -> bool:
        """A sum that may fall is no counter, so it is not shown."""
        return self._edges[0] >= 0

    def totals(self) -> list[int]:
        """Of each bucket and those below it; the last is the count of all."""
        return list(accumulate(self._counts))
