"""Filters: the last key that top-k and top-p keep of a row, without sorting it.

A histogram of counts and masses over bins of logits says in which bin it lies; the ids of that bin are listed, and one
program a row bisects over their keys. Where too many are in a bin (ties), it goes over the whole row instead. Ids whose
mass is 0 are never drawn, so they are left out from the start: whether they are kept changes nothing.
"""

import triton
import triton.language as tl

from jilju.backends.cuda import sampling_memory
from jilju.backends.cuda.kernels.sampling_keys import (
    FILTERED,
    HIGHEST,
    KIND,
    LOWEST,
    RECORD,
    STATS,
    TOP_K,
    TOP_P,
    bin_of,
    key_of,
    mass_of,
    number,
    share_of,
)

# Where the filters of a row end, int32
SPOT = tl.constexpr(sampling_memory.SPOT_WORDS)
K_BIN = tl.constexpr(0)  # the bin in which top-k ends, or -2
P_FIRST = tl.constexpr(1)  # the bins in one of which top-p ends
P_LAST = tl.constexpr(2)


@triton.jit
def least_mass(top_p, total):
    """What a prefix must reach: top_p * total, rounded up; the mass of the first id at least"""
    share = top_p.to(tl.float64) * total.to(tl.float64)
    return tl.minimum(tl.maximum(tl.ceil(share).to(tl.int64), 1), total)


@triton.jit
def count_kernel(
    inputs,
    source,  # float32 [num_rows, vocab]  changed logits
    stride,
    stats,
    finite,
    bin_counts,  # int32 [num_rows, NUM_BINS]  zeros
    bin_masses,  # int64 [num_rows, NUM_BINS]  zeros
    vocab,
    NUM_BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Fill the bins: counts of rows with top-k, masses of rows with top-p."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    if (tl.load(record + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(source + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    bins = bin_of(x, row_stats, NUM_BINS)
    if tl.load(record + TOP_K) > 0:
        tl.atomic_add(bin_counts + row * NUM_BINS + bins, 1, mask=bins >= 0, sem="relaxed")
    if number(record, TOP_P) < 1.0:
        tl.atomic_add(
            bin_masses + row * NUM_BINS + bins, mass_of(share_of(x, row_stats)), mask=bins >= 0, sem="relaxed"
        )


@triton.jit
def bin_before(cumulative, want):
    """The bin in which the cumulative numbers reach what is wanted, and what is before it"""
    short = cumulative < want
    return tl.sum(short.to(tl.int32), axis=0), tl.max(tl.where(short, cumulative, 0), axis=0)


@triton.jit
def locate_kernel(
    inputs,
    finite,
    bin_counts,
    bin_masses,
    spots,  # int32 [num_rows, SPOT]
    NUM_BINS: tl.constexpr,
):
    """Bins that hold the last id of top-k and of top-p. How much top-k keeps is known up to the mass of its last bin."""
    row = tl.program_id(0).to(tl.int64)
    record = inputs + row * RECORD
    if (tl.load(record + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    bins = tl.arange(0, NUM_BINS)
    masses = tl.load(bin_masses + row * NUM_BINS + bins)
    mass_before = tl.cumsum(masses, axis=0)
    least = tl.sum(masses, axis=0)
    most = least
    k_bin, top_k = -2, tl.load(record + TOP_K)
    counts = tl.load(bin_counts + row * NUM_BINS + bins)
    if (top_k > 0) & (top_k <= tl.sum(counts, axis=0)):
        k_bin, _ = bin_before(tl.cumsum(counts, axis=0), top_k)
        most = tl.sum(tl.where(bins <= k_bin, masses, 0), axis=0)
        least = tl.sum(tl.where(bins < k_bin, masses, 0), axis=0)
    p_first, p_last, top_p = NUM_BINS, -2, number(record, TOP_P)
    if top_p < 1.0:
        p_first, _ = bin_before(mass_before, least_mass(top_p, tl.maximum(least, 1)))
        p_last, _ = bin_before(mass_before, least_mass(top_p, most))
    tl.store(spots + row * SPOT + K_BIN, k_bin)
    tl.store(spots + row * SPOT + P_FIRST, p_first)
    tl.store(spots + row * SPOT + P_LAST, p_last)


@triton.jit
def list_kernel(
    inputs,
    source,
    stride,
    stats,
    finite,
    spots,
    lists,  # int32 [num_rows, CAPACITY]
    list_counts,  # int32 [num_rows]  zeros; may come to exceed CAPACITY
    vocab,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """List the ids of the bins that were located, in any order."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    if (tl.load(record + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(source + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    bins, spot = bin_of(x, row_stats, NUM_BINS), spots + row * SPOT
    in_range = (bins >= tl.load(spot + P_FIRST)) & (bins <= tl.load(spot + P_LAST))
    hit = in_range | (bins == tl.load(spot + K_BIN))
    num_hits = tl.sum(hit.to(tl.int32), axis=0)
    if num_hits > 0:
        place = tl.atomic_add(list_counts + row, num_hits, sem="relaxed") + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        tl.store(lists + row * CAPACITY + place, ids, mask=hit & (place < CAPACITY))


@triton.jit
def members(source, row_stats, ids_list, begin, num, in_list, bin_, NUM_BINS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's list, or of the row itself: the logits, their keys, and which of them are in the bin"""
    at = begin + tl.arange(0, BLOCK)
    inside = at < num
    ids = tl.load(ids_list + at, mask=inside & in_list, other=0)
    ids = tl.where(in_list, ids, at)
    x = tl.load(source + ids, mask=inside, other=float("-inf"))
    return x, key_of(x, ids), bin_of(x, row_stats, NUM_BINS) == bin_


@triton.jit
def last_key(
    source,
    row_stats,
    ids_list,
    num,
    in_list,
    bin_,
    want,
    BY_MASS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key of the bin such that it and those above it come to `want`, by count or by mass. The bounds
    of the bisection become keys of the bin, so that it ends where one is left."""
    low, high = tl.full([], LOWEST, tl.int64), tl.full([], HIGHEST, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        total = tl.full([], 0, tl.int64)
        above, below = tl.full([], HIGHEST, tl.int64), tl.full([], LOWEST, tl.int64)
        begin = 0
        while begin < num:
            x, keys, hit = members(source, row_stats, ids_list, begin, num, in_list, bin_, NUM_BINS, BLOCK)
            is_above = hit & (keys >= middle)
            measure = mass_of(share_of(x, row_stats)) if BY_MASS else tl.full([BLOCK], 1, tl.int64)
            total += tl.sum(tl.where(is_above, measure, 0), axis=0)
            above = tl.minimum(above, tl.min(tl.where(is_above, keys, HIGHEST), axis=0))
            below = tl.maximum(below, tl.max(tl.where(hit & (keys < middle), keys, LOWEST), axis=0))
            begin += BLOCK
        if total >= want:
            low = above
        else:
            high = below
    return low


@triton.jit
def select_kernel(
    inputs,
    source,
    stride,
    stats,
    finite,
    bin_counts,
    bin_masses,
    spots,
    lists,
    list_counts,
    thresholds,  # int64 [num_rows]
    vocab,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last key that is kept: of top-k, and of top-p among those."""
    row = tl.program_id(0).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    if (tl.load(record + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    x, ids_list = source + row * stride, lists + row * CAPACITY
    num = tl.load(list_counts + row)
    in_list = num <= CAPACITY
    num = tl.where(in_list, num, vocab)
    bins = tl.arange(0, NUM_BINS)
    masses = tl.load(bin_masses + row * NUM_BINS + bins)
    threshold = tl.full([], LOWEST, tl.int64)
    total = tl.sum(masses, axis=0)
    k_bin, top_p = tl.load(spots + row * SPOT + K_BIN), number(record, TOP_P)
    if k_bin >= 0:
        counts = tl.load(bin_counts + row * NUM_BINS + bins)
        want = (tl.load(record + TOP_K) - tl.sum(tl.where(bins < k_bin, counts, 0), axis=0)).to(tl.int64)
        threshold = last_key(x, row_stats, ids_list, num, in_list, k_bin, want, False, NUM_BINS, BLOCK)
        if top_p < 1.0:
            total = tl.sum(tl.where(bins < k_bin, masses, 0), axis=0)
            begin = 0
            while begin < num:
                value, keys, hit = members(x, row_stats, ids_list, begin, num, in_list, k_bin, NUM_BINS, BLOCK)
                mass = mass_of(share_of(value, row_stats))
                total += tl.sum(tl.where(hit & (keys >= threshold), mass, 0), axis=0)
                begin += BLOCK
    if top_p < 1.0:
        want = least_mass(top_p, total)
        p_bin, before = bin_before(tl.cumsum(masses, axis=0), want)
        key = last_key(x, row_stats, ids_list, num, in_list, p_bin, want - before, True, NUM_BINS, BLOCK)
        threshold = tl.maximum(threshold, key)
    tl.store(thresholds + row, threshold)
