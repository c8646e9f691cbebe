"""Batches: a step made by hand, without an engine.

Owns the defaults: no penalty, no bias, no ban, no mask, no alternatives. Knows nothing of what the step is for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jilju.plan import Batch


class Sampling(NamedTuple):
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class LogitRows(NamedTuple):
    """One entry a logit row each."""

    tokens: Sequence[int]  # index into the batch's tokens
    positions: Sequence[int]  # of the token to be sampled
    targets: Sequence[int]  # -1: sample
    seeds: Sequence[int]


def batch_of(
    token_ids: np.ndarray,
    starts: Sequence[int],
    counts: Sequence[int],
    block_tables: np.ndarray,
    logits: LogitRows,
    sampling: Sampling,
) -> Batch:
    """`token_ids` of all rows one after another; row r has tokens [starts[r], starts[r] + counts[r]) of its sequence."""
    n = len(logits.tokens)

    def floats(value: float) -> np.ndarray:
        return np.full(n, value, np.float32)

    no_ids, no_lists = np.empty(0, np.int32), np.zeros(n + 1, np.int32)
    return Batch(
        token_ids=token_ids.astype(np.int32, copy=False),
        starts=np.array(starts, np.int32),
        counts=np.array(counts, np.int32),
        block_tables=block_tables,
        logit_tokens=np.array(logits.tokens, np.int32),
        targets=np.array(logits.targets, np.int32),
        positions=np.array(logits.positions, np.int64),
        seeds=np.array(logits.seeds, np.uint64),
        temperatures=floats(sampling.temperature),
        top_ks=np.full(n, sampling.top_k, np.int32),
        top_ps=floats(sampling.top_p),
        min_ps=floats(sampling.min_p),
        num_top=np.zeros(n, np.int32),
        repetition_penalties=floats(1),
        presence_penalties=floats(0),
        frequency_penalties=floats(0),
        penalty_starts=no_lists,
        penalty_ids=no_ids,
        penalty_counts=no_ids,
        bias_starts=no_lists,
        bias_ids=no_ids,
        biases=np.empty(0, np.float32),
        banned_starts=no_lists,
        banned_ids=no_ids,
        mask_rows=np.full(n, -1, np.int32),
        masks=np.empty((0, 0), np.uint32),
    )
