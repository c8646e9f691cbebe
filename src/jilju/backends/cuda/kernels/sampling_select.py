"""Selection: of a row with filters the last key that is kept, and the id too where all that is kept is in the row's list.

One program a row. It bisects over the keys of the list; where none could be made (ties), or top-p turns out to end beyond it,
over the whole row. Which it is follows from the row alone, and changes nothing but the time.
"""

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.sampling_draw import place_of, report
from jilju.backends.cuda.kernels.sampling_filters import FIRST, K_BIN, K_WANT, LAST, NEEDS_MASS, NUM_LISTED, SPOT
from jilju.backends.cuda.kernels.sampling_keys import (
    FILTERED,
    HIGHEST,
    KIND,
    LOWEST,
    MIN_P,
    RECORD,
    STATS,
    TOP_K,
    TOP_P,
    bin_of,
    id_of,
    key_of,
    mass_of,
    number,
    share_of,
    value_of,
)


@triton.jit
def least_mass(top_p, total):
    """What a prefix must reach: top_p * total, rounded up; the mass of the first id at least"""
    share = top_p.to(tl.float64) * total.to(tl.float64)
    return tl.minimum(tl.maximum(tl.ceil(share).to(tl.int64), 1), total)


@triton.jit
def last_key(keys, measures, lowest, want):
    """The largest of the keys, from `lowest` on, such that it and those above it come to `want`, which all of them do. The
    bounds of the bisection are keys, so that it ends where one is left."""
    low, high = lowest, tl.max(keys, axis=0)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        if tl.sum(tl.where(keys >= middle, measures, 0), axis=0) >= want:
            low = tl.min(tl.where(keys >= middle, keys, HIGHEST), axis=0)
        else:
            high = tl.max(tl.where(keys < middle, keys, LOWEST), axis=0)
    return low


@triton.jit
def select_in_list(
    record, row_logits, row_stats, spot, row_list, above_k, above_p, token_id, logprob,
    NUM_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The threshold, HIGHEST if the id was drawn, and whether the list sufficed"""
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.load(spot + NUM_LISTED)
    keys = tl.load(row_list + lanes, mask=inside, other=LOWEST)
    x = tl.where(inside, value_of(keys), float("-inf"))
    share = share_of(x, row_stats)
    masses = mass_of(share)
    # the larger the logit, the larger its share: of min-p, too, the last key that it keeps says which it keeps
    in_min_p = tl.min(tl.where(share >= number(record, MIN_P).to(tl.float64), keys, HIGHEST), axis=0)
    lowest = tl.min(tl.where(inside, keys, HIGHEST), axis=0)
    last, k_bin = tl.load(spot + LAST), tl.load(spot + K_BIN)
    threshold, suffices = tl.full([], LOWEST, tl.int64), tl.full([], True, tl.int1)
    if k_bin < NUM_BINS:
        threshold = last_key(keys, tl.full([BLOCK], 1, tl.int64), lowest, tl.load(spot + K_WANT))
    top_p = number(record, TOP_P)
    if top_p < 1.0:
        bins = bin_of(x, row_stats, NUM_BINS)
        is_known = (bins == k_bin) | (tl.load(spot + NEEDS_MASS) == 0)
        total = above_k + tl.sum(tl.where(is_known & (keys >= threshold), masses, 0), axis=0)
        want = least_mass(top_p, total) - above_p
        suffices = (want > 0) & (want <= tl.sum(tl.where(bins <= last, masses, 0), axis=0))
        if suffices:
            threshold = tl.maximum(threshold, last_key(keys, masses, lowest, want))
    if suffices & (tl.load(spot + FIRST) == 0) & (last >= 0):
        place = place_of(record, tl.where(keys >= tl.maximum(threshold, in_min_p), masses, 0))
        report(row_logits, row_stats, id_of(tl.load(row_list + place)), token_id, logprob)
        threshold = tl.full([], HIGHEST, tl.int64)
    return threshold, suffices


@triton.jit
def measured(row_source, row_stats, begin, vocab, BY_MASS: tl.constexpr, NUM_BINS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row: its keys, which of them have mass, and their measures"""
    ids = begin + tl.arange(0, BLOCK)
    x = tl.load(row_source + ids, mask=ids < vocab, other=float("-inf"))
    measures = mass_of(share_of(x, row_stats)) if BY_MASS else tl.full([BLOCK], 1, tl.int64)
    return key_of(x, ids), bin_of(x, row_stats, NUM_BINS) >= 0, measures


@triton.jit
def last_key_of_row(
    row_source, row_stats, vocab, want, BY_MASS: tl.constexpr, NUM_BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """As last_key, over a whole row"""
    low, high = tl.full([], LOWEST, tl.int64), tl.full([], HIGHEST, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        total = tl.full([], 0, tl.int64)
        above, below = tl.full([], HIGHEST, tl.int64), tl.full([], LOWEST, tl.int64)
        begin = 0
        while begin < vocab:
            keys, hit, measures = measured(row_source, row_stats, begin, vocab, BY_MASS, NUM_BINS, BLOCK)
            is_above = hit & (keys >= middle)
            total += tl.sum(tl.where(is_above, measures, 0), axis=0)
            above = tl.minimum(above, tl.min(tl.where(is_above, keys, HIGHEST), axis=0))
            below = tl.maximum(below, tl.max(tl.where(hit & (keys < middle), keys, LOWEST), axis=0))
            begin += BLOCK
        if total >= want:
            low = above
        else:
            high = below
    return low


@triton.jit
def select_in_row(record, row_source, row_stats, spot, vocab, NUM_BINS: tl.constexpr, BLOCK: tl.constexpr):
    """The threshold"""
    threshold = tl.full([], LOWEST, tl.int64)
    if tl.load(spot + K_BIN) < NUM_BINS:
        want = tl.load(record + TOP_K).to(tl.int64)
        threshold = last_key_of_row(row_source, row_stats, vocab, want, False, NUM_BINS, BLOCK)
    top_p = number(record, TOP_P)
    if top_p < 1.0:
        total = tl.full([], 0, tl.int64)
        begin = 0
        while begin < vocab:
            keys, hit, masses = measured(row_source, row_stats, begin, vocab, True, NUM_BINS, BLOCK)
            total += tl.sum(tl.where(hit & (keys >= threshold), masses, 0), axis=0)
            begin += BLOCK
        key = last_key_of_row(row_source, row_stats, vocab, least_mass(top_p, total), True, NUM_BINS, BLOCK)
        threshold = tl.maximum(threshold, key)
    return threshold


@triton.jit
def select_kernel(
    inputs,
    logits,  # float32 [num_rows, vocab]  raw
    logits_stride,
    source,  # float32 [num_rows, vocab]  changed
    stride,
    stats,
    finite,
    spots,  # int32 [num_rows, SPOT]
    lists,  # int64 [num_rows, CAPACITY]
    above,  # int64 [num_rows, num_chunks, 2]
    thresholds,  # int64 [num_rows]  the last key that is kept; HIGHEST: the id was drawn
    token_ids,
    logprobs,
    vocab,
    num_chunks,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SHORT: tl.constexpr,  # ids of a list that is gone over faster
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    record, row_stats, spot = inputs + row * RECORD, stats + row * STATS, spots + row * SPOT
    if (tl.load(record + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    row_logits, row_list = logits + row * logits_stride, lists + row * CAPACITY
    num_listed = tl.load(spot + NUM_LISTED)
    threshold, is_done = tl.full([], LOWEST, tl.int64), tl.full([], False, tl.int1)
    if num_listed >= 0:
        chunks = tl.arange(0, CHUNKS)
        here = above + (row * num_chunks + chunks) * 2
        mask = (chunks < num_chunks) & (tl.load(spot + NEEDS_MASS) == 1)
        above_k = tl.sum(tl.load(here, mask=mask, other=0), axis=0)
        above_p = tl.sum(tl.load(here + 1, mask=mask, other=0), axis=0)
        if num_listed <= SHORT:
            threshold, is_done = select_in_list(
                record, row_logits, row_stats, spot, row_list, above_k, above_p, token_ids + row, logprobs + row, NUM_BINS, SHORT,
            )  # fmt: skip
        else:
            threshold, is_done = select_in_list(
                record, row_logits, row_stats, spot, row_list, above_k, above_p, token_ids + row, logprobs + row, NUM_BINS, CAPACITY,
            )  # fmt: skip
    if not is_done:
        threshold = select_in_row(record, source + row * stride, row_stats, spot, vocab, NUM_BINS, BLOCK)
    tl.store(thresholds + row, threshold)
