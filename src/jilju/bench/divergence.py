"""Divergence: how far the distributions of one engine are from another's, over a text.

Owns the estimate of the Kullback-Leibler divergence KL(p || q) = E_p[log p(x) - log q(x)], in nats, without whole distributions ever
leaving a backend: at each place the reference draws ids x by its own p, and others say log q(x). What is averaged is
q/p - 1 - log(q/p): its mean is the same, for E_p[q/p] = 1, but it is never negative and hardly varies, so that a few thousand draws
give a divergence of 1e-3 to some percent. Knows nothing of backends or tokenizers.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from jilju.bench.batches import LogitRows, Sampling, batch_of
from jilju.plan import Batch, Executor, Limits, Plan

Table = list[list[float]]  # [places][ids of a place]


class Scorer(Protocol):
    def logprobs(self, token_ids: list[int], targets: list[list[int]]) -> Table:
        """Of each target of the last len(targets) places, after the tokens up to and with that place."""
        ...


class Drawn(NamedTuple):
    ids: list[list[int]]  # [places][1 + draws]: the one that was given, then those that were drawn
    logprobs: Table


class Drawer(Protocol):
    def draw(self, token_ids: list[int], following: list[int], num_draws: int, seed: int) -> Drawn:
        """At each of the last len(following) places: that id, and others by the model's own distribution."""
        ...


class Compared(msgspec.Struct, frozen=True):
    name: str
    perplexity: float
    kl: float | None  # from the reference, mean over places; None for itself
    kl_error: float | None  # standard error of that mean


def compare(
    reference: Drawer,
    others: Mapping[str, Scorer],
    windows: Sequence[list[int]],
    *,
    draws: int = 2,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Compared]:
    """The reference first. Places are those after the middle of each window, as in `measure_quality`."""
    first = "float32 reference"
    scores: dict[str, list[float]] = {name: [] for name in (first, *others)}
    gaps: dict[str, list[float]] = {name: [] for name in others}
    for index, window in enumerate(windows):
        token_ids, following = window[:-1], window[len(window) // 2 + 1 :]
        drawn = reference.draw(token_ids, following, draws, seed=index * (draws + 1))
        scores[first] += [place[0] for place in drawn.logprobs]
        for name, scorer in others.items():
            theirs = scorer.logprobs(token_ids, drawn.ids)
            scores[name] += [place[0] for place in theirs]
            for ours, place in zip(drawn.logprobs, theirs, strict=True):
                gaps[name] += [q - p for p, q in zip(ours[1:], place[1:], strict=True)]
        progress(index + 1, len(windows), "windows")
    return [
        Compared(name, math.exp(-statistics.fmean(own)), *divergence(gaps.get(name, [])))
        for name, own in scores.items()
    ]


def divergence(gaps: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Mean and standard error of q/p - 1 - log(q/p), given log q - log p at ids that p drew."""
    if not gaps:
        return None, None
    terms = [math.expm1(gap) - gap for gap in gaps]
    return statistics.fmean(terms), statistics.stdev(terms) / math.sqrt(len(terms)) if len(terms) > 1 else math.inf


class ExecutorScores:
    """Scores and draws of a loaded executor, one row whose tokens begin at position 0."""

    def __init__(self, executor: Executor, plan: Plan, limits: Limits):
        self._executor, self._limits, self._vocab_size = executor, limits, plan.vocab_size

    def logprobs(self, token_ids: list[int], targets: list[list[int]]) -> Table:
        return self._run(token_ids, targets, seed=0).logprobs

    def draw(self, token_ids: list[int], following: list[int], num_draws: int, seed: int) -> Drawn:
        return self._run(token_ids, [[id_, *[-1] * num_draws] for id_ in following], seed)

    def _run(self, token_ids: list[int], targets: list[list[int]], seed: int) -> Drawn:
        """In steps whose logit rows, too, are within the limits. A target of -1 is drawn, the k-th of its place with seed + k."""
        ids: list[list[int]] = []
        logprobs: Table = []
        first, width = len(token_ids) - len(targets), len(targets[0])
        step = self._limits.max_tokens // width
        for start in range(0, len(token_ids), step):
            end = min(len(token_ids), start + step)
            places = list(range(max(start, first), end))
            wanted = [targets[place - first] for place in places]
            self._executor.launch(self._batch(token_ids[start:end], start, places, wanted, seed))
            result = self._executor.wait()
            ids += result.token_ids.reshape(-1, width).tolist()
            logprobs += result.logprobs.reshape(-1, width).tolist()
        return Drawn(ids, logprobs)

    def _batch(self, token_ids: list[int], start: int, places: list[int], targets: list[list[int]], seed: int) -> Batch:
        """A logit row for every target; temperature 1 and no filter, so that draws follow the model's own distribution."""
        width = len(targets[0]) if targets else 0
        num_blocks = -(-(start + len(token_ids)) // self._limits.block_size)
        logits = LogitRows(
            tokens=[place - start for place in places for _ in range(width)],
            positions=[place + 1 for place in places for _ in range(width)],
            targets=[target for place in targets for target in place],
            seeds=[seed + k for _ in places for k in range(width)],
        )
        blocks = np.arange(num_blocks, dtype=np.int32)[None, :]
        return batch_of(
            np.array(token_ids), [start], [len(token_ids)], blocks, logits, Sampling(temperature=1.0), self._vocab_size
        )
