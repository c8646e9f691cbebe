"""Sampling from the hash chain: a StepResult of the words that a step made.

Owns which fields of a batch enter a token: the word, seed and position unless greedy, penalties, biases, bans and masks.
Temperature above greedy, top-k, top-p and min-p do not. Knows nothing of slots, time or sequences.
"""

import numpy as np
import numpy.typing as npt

from jilju.backends.roofline.chain import (
    Words,
    bias_terms,
    draw_words,
    logprob_words,
    noise_words,
    penalty_keys,
    penalty_terms,
)
from jilju.plan import Batch, StepResult
from jilju.plan.batch import MAX_TOP

Ints = npt.NDArray[np.int32]


def sample(words: Words, batch: Batch, vocab_size: int) -> StepResult:
    """`words` are of the batch's tokens: [num_tokens]"""
    n = batch.num_logits
    order = batch.logit_tokens.tolist()
    assert all(map(int.__lt__, order, order[1:])), f"logit rows ascend; given {order}"
    words = words.take(batch.logit_tokens)
    x = noise_words(batch.seeds, batch.positions, batch.temperatures)
    x += words
    if len(batch.penalty_ids):
        x += _penalties(batch)
    if len(batch.bias_ids):
        x += _row_sums(bias_terms(batch.bias_ids, batch.biases), batch.bias_starts)
    draws = draw_words(x)
    finite = np.ones(n, np.bool_)
    if len(batch.banned_ids) or len(batch.masks):
        token_ids = _constrained(draws, batch, vocab_size, finite)
    else:
        token_ids = (draws % np.uint64(vocab_size)).astype(np.int32)
    is_scored = batch.targets >= 0
    np.copyto(token_ids, batch.targets, where=is_scored)
    finite |= is_scored
    top_ids, top_logprobs = _tops(words, batch.num_top, vocab_size)
    wanted_logprobs = logprob_words(np.repeat(words, np.diff(batch.wanted_starts)), batch.wanted_ids)
    return StepResult(token_ids, logprob_words(words, token_ids), top_ids, top_logprobs, wanted_logprobs, finite)


def _penalties(batch: Batch) -> Words:
    columns = (batch.repetition_penalties, batch.presence_penalties, batch.frequency_penalties)
    keys = np.repeat(penalty_keys(*columns), np.diff(batch.penalty_starts))
    return _row_sums(penalty_terms(keys, batch.penalty_ids, batch.penalty_counts), batch.penalty_starts)


def _row_sums(terms: Words, starts: Ints) -> Words:
    """Sums of the terms of each row, which are those of [starts[i], starts[i + 1])."""
    sums = np.zeros(len(terms) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    return np.diff(sums.take(starts))


def _constrained(draws: Words, batch: Batch, vocab_size: int, finite: npt.NDArray[np.bool_]) -> Ints:
    """Ids among those that masks and bans leave; `finite` becomes False where they leave none."""
    banned_ids, starts, mask_rows = batch.banned_ids.tolist(), batch.banned_starts.tolist(), batch.mask_rows.tolist()
    token_ids = np.zeros(len(draws), np.int32)
    for i, draw in enumerate(draws.tolist()):
        banned = sorted(b for b in banned_ids[starts[i] : starts[i + 1]] if b < vocab_size)
        if mask_rows[i] < 0:
            num_allowed = vocab_size - len(banned)
            if num_allowed:
                token_ids[i] = _nth_besides(draw % num_allowed, banned)
        else:
            bits = np.unpackbits(batch.masks[mask_rows[i]].view(np.uint8), count=vocab_size, bitorder="little")
            bits[banned] = 0
            allowed = np.flatnonzero(bits)
            num_allowed = len(allowed)
            if num_allowed:
                token_ids[i] = allowed[draw % num_allowed]
        finite[i] = num_allowed > 0
    return token_ids


def _nth_besides(n: int, banned: list[int]) -> int:
    """Id number n of those that are not banned, in ascending order."""
    for token_id in banned:
        if token_id > n:
            break
        n += 1
    return n


def _tops(words: Words, num_top: Ints, vocab_size: int) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Alternatives of each logit row, most probable first, ties to the lowest id: [num_logits, MAX_TOP] each"""
    top_ids, top_logprobs = np.full((len(words), MAX_TOP), -1, np.int32), np.zeros((len(words), MAX_TOP), np.float32)
    wanted = num_top.tolist()
    if any(wanted):
        every = np.arange(vocab_size, dtype=np.int32)
        for i, num in enumerate(wanted):
            logprobs = logprob_words(words[i : i + 1], every)
            best = np.argsort(-logprobs, kind="stable")[:num]
            top_ids[i, : len(best)], top_logprobs[i, : len(best)] = best, logprobs[best]
    return top_ids, top_logprobs
