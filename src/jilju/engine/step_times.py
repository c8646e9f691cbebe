"""Step times: how long a step will take, learnt from the steps that were measured.

Owns one linear model, t = base + per_token * T + per_pair * S, of T tokens (one that costs more may count as more) and S
query-key pairs (the query at position p sees p + 1 keys), fitted by recursive least squares that forgets slowly, times the pace
of the machine: the running mean of measured over fitted time, which forgets fast, for neighbours come and go within seconds and
change all three alike. The budget of a step, the wait that admission predicts and the watchdog all ask it. Knows nothing of
rows, requests or kernels. Times are ns.
"""

import math

from jilju.plan import StepShape

FORGET = 0.995  # weight of a step against the one after it: some 200 steps are remembered
OUTLIER = 8.0  # a step this much longer than predicted was disturbed from outside: it teaches no more than this
MAX_SPREAD = (
    100.0  # of what is known, against the prior: steps of one kind alone teach nothing of others, nor unteach it
)
MAX_OUTLIERS = 8  # in a row: then they are what steps take now
LEAST_NS = 1000.0  # no step takes less
QUANTILE = 0.97  # of the steps that are cut to a time take no longer than that
FIRST_HEADROOM, HEADROOM_STEP, MAX_HEADROOM = 1.15, 0.05, 2.0
MIN_SAMPLES = 8  # before so many steps there is no talk of outliers or of a pace
PACE_WEIGHT = 1 / 8  # of the newest step in the pace: a neighbour is noticed within a second of 100 ms steps
MAX_PACE = 3.0  # of a single step, up or down: what is more was no neighbour
_SCALES = (1.0, 1e-2, 1e-4)  # brings (1, T, S) to like magnitudes, or the sums lose their digits

Coefficients = tuple[float, float, float]  # ns: base, a token, a query-key pair


class StepTimes:
    """A model of the time of a step. `prior` holds until steps were measured; `is_measured`: it was made of some."""

    def __init__(self, prior: Coefficients = (1e6, 1e6, 0.0), *, is_measured: bool = False):
        self.coefficients = prior  # pace included
        self.num_samples = MIN_SAMPLES if is_measured else 0
        self._num_outliers = 0  # in a row
        self.headroom = (
            FIRST_HEADROOM if is_measured else 1.0
        )  # what a step that is cut to a time takes of it, but for one in QUANTILE; at least all of it
        self._pace = 1.0
        self._theta = [c / s for c, s in zip(prior, _SCALES, strict=True)]
        weight = max(self._theta[0], self._theta[1], 1.0) ** 2
        self._max_spread = MAX_SPREAD * weight
        self._spread = [[weight if i == j else 0.0 for j in range(3)] for i in range(3)]  # of theta, relative to noise
        self._noise = weight * 1e-4

    def predict_ns(self, num_tokens: float, num_pairs: int) -> int:
        base, per_token, per_pair = self.coefficients
        return int(base + per_token * num_tokens + per_pair * num_pairs)

    def chunk_within(self, left_ns: float, start: int, max_count: int, weight: float = 1.0) -> int:
        """The most tokens, from position `start` on, that add no more than `left_ns` to a step; each counts as `weight` tokens."""
        if left_ns <= 0:
            return 0
        _, per_token, per_pair = self.coefficients
        linear, square = per_token * weight + per_pair * (start + 0.5), per_pair / 2  # t(q) = linear q + square q^2
        divisor = linear + math.sqrt(linear * linear + 4 * square * left_ns)  # the form without cancellation
        count = int(min(2 * left_ns / divisor, max_count)) if divisor > 0 else max_count
        while count > 0 and self.chunk_ns(start, count, weight) > left_ns:  # rounding
            count -= 1
        return count

    def chunk_ns(self, start: int, count: int, weight: float = 1.0) -> float:
        """What a chunk adds to a step."""
        _, per_token, per_pair = self.coefficients
        return per_token * weight * count + per_pair * num_pairs(start, count)

    def observe(self, num_tokens: float, num_pairs: int, measured_ns: int) -> None:
        """One measured step."""
        x = [_SCALES[0], num_tokens * _SCALES[1], num_pairs * _SCALES[2]]
        predicted = sum(t * v for t, v in zip(self._theta, x, strict=True))
        measured = float(measured_ns)
        if self.num_samples >= MIN_SAMPLES:
            expected = sum(max(0.0, t) * v for t, v in zip(self._theta, x, strict=True))
            most = OUTLIER * max(expected, LEAST_NS)
            self._num_outliers = self._num_outliers + 1 if measured > most else 0
            if self._num_outliers < MAX_OUTLIERS:
                measured = min(measured, most)
        self.num_samples += 1
        spread = self._spread
        gain = [sum(spread[i][j] * x[j] for j in range(3)) for i in range(3)]
        total = FORGET * self._noise + sum(g * v for g, v in zip(gain, x, strict=True))
        for i in range(3):
            self._theta[i] += gain[i] / total * (measured - predicted)
        for i in range(3):
            for j in range(3):
                spread[i][j] = (spread[i][j] - gain[i] * gain[j] / total) / FORGET
        limit = max(spread[0][0], spread[1][1], spread[2][2])
        if limit > self._max_spread:
            self._spread = [[value * self._max_spread / limit for value in row] for row in spread]
        fitted = [max(0.0, t) * s for t, s in zip(self._theta, _SCALES, strict=True)]
        if self.num_samples > MIN_SAMPLES:
            fitted_ns = max(fitted[0] + fitted[1] * num_tokens + fitted[2] * num_pairs, 1.0)
            share = min(max(measured_ns / fitted_ns, 1 / MAX_PACE), MAX_PACE)
            self._pace += PACE_WEIGHT * (share - self._pace)
        self.coefficients = (self._pace * fitted[0], self._pace * fitted[1], self._pace * fitted[2])

    def note_cut(self, predicted_ns: int, measured_ns: int) -> None:
        """A step that was cut to a time took so long: how much room to leave is learnt, as a running quantile."""
        is_longer = measured_ns > self.headroom * max(predicted_ns, LEAST_NS)
        step = HEADROOM_STEP * (QUANTILE if is_longer else QUANTILE - 1)
        self.headroom = min(max(self.headroom + step, 1.0), MAX_HEADROOM)


def num_pairs(start: int, count: int) -> int:
    """Query-key pairs of the positions [start, start + count)."""
    return count * start + count * (count + 1) // 2


def shape_pairs(shape: StepShape) -> int:
    return sum(map(num_pairs, shape.starts, shape.counts))
