"""Batches: a step made by hand, without an engine.

Owns how every logit row of it samples. Lists and masks are random but fixed: how long they are matters to speed, not what is in
them. Knows nothing of what the step is for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jilju.plan import Batch


class Sampling(NamedTuple):
    """How every row samples, and how many ids its lists have. The default is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_top: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_penalized: int = 0
    num_biases: int = 0
    allowed_share: float | None = None  # of the vocabulary, by a mask a row; None: no mask


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
    vocab_size: int,
) -> Batch:
    """`token_ids` of all rows one after another; row r has tokens [starts[r], starts[r] + counts[r]) of its sequence."""
    n = len(logits.tokens)

    def floats(value: float) -> np.ndarray:
        return np.full(n, value, np.float32)

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
        num_top=np.full(n, sampling.num_top, np.int32),
        repetition_penalties=floats(sampling.repetition_penalty),
        presence_penalties=floats(sampling.presence_penalty),
        frequency_penalties=floats(sampling.frequency_penalty),
        penalty_starts=_starts(n, sampling.num_penalized),
        penalty_ids=_lists(n, sampling.num_penalized, vocab_size),
        penalty_counts=np.ones(n * sampling.num_penalized, np.int32),
        bias_starts=_starts(n, sampling.num_biases),
        bias_ids=_lists(n, sampling.num_biases, vocab_size),
        biases=np.ones(n * sampling.num_biases, np.float32),
        banned_starts=_starts(n, 0),
        banned_ids=_lists(n, 0, vocab_size),
        wanted_starts=_starts(n, 0),
        wanted_ids=_lists(n, 0, vocab_size),
        mask_rows=np.arange(n, dtype=np.int32) if sampling.allowed_share is not None else np.full(n, -1, np.int32),
        masks=_masks(n, sampling.allowed_share, vocab_size),
    )


def _starts(num_rows: int, length: int) -> np.ndarray:
    return np.arange(num_rows + 1, dtype=np.int32) * np.int32(length)


def _lists(num_rows: int, length: int, vocab_size: int) -> np.ndarray:
    """So many ids a row, each once in a row: int32 [num_rows * length]"""
    rng = np.random.default_rng(length)
    rows = [rng.permutation(vocab_size)[:length] for _ in range(num_rows)] if length else []
    return np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)


def _masks(num_rows: int, share: float | None, vocab_size: int) -> np.ndarray:
    """uint32 [num_rows, words of the vocabulary]; no row if there is no mask"""
    num_words = -(-vocab_size // 32)
    if share is None:
        return np.zeros((0, num_words), np.uint32)
    bits = np.random.default_rng(0).random((num_rows, 32 * num_words)) < share
    bits[:, 0] = True  # at least one id may be sampled
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
