"""Filters: the ids of a row among which top-k and top-p end, in a short list, without sorting the row and without atomics.

Each chunk counts its ids in bins of logits; the counts say in which bins the filters end, and where each chunk's part of the
list begins. Most often everything that is kept fits into the list, and all else is done there (sampling_select.py). Ids whose
mass is 0 are never drawn, so they are left out from the start: whether they are kept changes nothing.
"""

import triton
import triton.language as tl

from jilju.backends.cuda import sampling_memory
from jilju.backends.cuda.kernels.sampling_keys import (
    BIN_SCALE,
    FILTERED,
    INVERSE,
    KIND,
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
FIRST = tl.constexpr(0)  # bins that are listed; from 0 on: all that is kept is in the list
LAST = tl.constexpr(1)
K_BIN = tl.constexpr(2)  # the bin in which top-k ends, listed too; the number of bins if it leaves out nothing
K_WANT = tl.constexpr(3)  # how many of those that are listed it keeps
NUM_LISTED = tl.constexpr(4)  # -1: too many for a list
NEEDS_MASS = tl.constexpr(5)  # 1: top-p goes by masses that are not all in the list


@triton.jit
def count_kernel(
    inputs,
    source,  # float32 [num_rows, vocab]  changed logits
    stride,
    stats,
    finite,
    bin_counts,  # int32 [num_rows, num_chunks, NUM_BINS]
    vocab,
    num_chunks,
    NUM_BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(inputs + row * RECORD + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(source + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    bins = bin_of(x, stats + row * STATS, NUM_BINS)
    counts = tl.histogram(bins, NUM_BINS, mask=bins >= 0)
    tl.store(bin_counts + (row * num_chunks + chunk) * NUM_BINS + tl.arange(0, NUM_BINS), counts)


@triton.jit
def bin_before(cumulative, want):
    """The bin in which the cumulative numbers reach what is wanted, and what is before it"""
    short = cumulative < want
    return tl.sum(short.to(tl.int32), axis=0), tl.max(tl.where(short, cumulative, 0), axis=0)


@triton.jit
def bins_of_top_p(counts, kept, bins, top_p, width, capacity, NUM_BINS: tl.constexpr):
    """First and last bin to list for top-p of `kept` ids a bin, each `width` temperatures wide; last < first: none will do.

    All bins up to one that is surely the end or beyond, by the bounds of each bin's mass; if those are too many ids, as many
    as there is room for around the likely end. Whether it is among them is checked later, by exact masses.
    """
    largest = (bins == 0).to(tl.float32)  # an id whose mass is known: 1
    rest = tl.maximum(kept.to(tl.float32) - largest, 0.0)
    most = largest + rest * tl.exp(-width * bins.to(tl.float32))
    least = largest + rest * tl.exp(-width * (bins.to(tl.float32) + 1.0))
    beyond = tl.sum(most, axis=0) - tl.cumsum(most, axis=0)
    is_short = (1.0 - top_p) * tl.cumsum(least, axis=0) < top_p * beyond
    last = tl.minimum(tl.sum(is_short.to(tl.int32), axis=0), NUM_BINS - 1)
    first = last * 0
    if tl.sum(tl.where(bins <= last, counts, 0), axis=0) > capacity:
        likely = largest + rest * tl.exp(-width * (bins.to(tl.float32) + 0.5))
        likely = tl.where(bins < NUM_BINS - 1, likely, 0.0)  # the last one's ids may lie far below it
        want = top_p * tl.sum(likely, axis=0)
        end, before = bin_before(tl.cumsum(likely, axis=0), want)
        is_end = bins == end
        part = (want - before) / tl.maximum(tl.sum(tl.where(is_end, likely, 0.0), axis=0), 1e-30)
        in_end = tl.sum(tl.where(is_end, counts, 0), axis=0).to(tl.float32)
        place = tl.sum(tl.where(bins < end, counts, 0), axis=0) + (part * in_end).to(tl.int32)
        reached = tl.cumsum(counts, axis=0)
        has_room = (reached - counts >= place - capacity // 2) & (reached <= place + capacity // 2)
        first = tl.min(tl.where(has_room, bins, NUM_BINS), axis=0)
        last = tl.max(tl.where(has_room, bins, -1), axis=0)
        if (end < first) | (end > last):
            first = end
            last = tl.where(in_end <= capacity, end, end - 1)
    return first, last


@triton.jit
def locate_kernel(
    inputs,
    stats,
    finite,
    bin_counts,  # int32 [num_rows, num_chunks, NUM_BINS]
    spots,  # int32 [num_rows, SPOT]
    places,  # int32 [num_rows, num_chunks + 1]  where in the list each chunk's ids begin
    num_chunks,
    CHUNKS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Which bins to list."""
    row = tl.program_id(0).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    if (tl.load(record + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    bins, chunks = tl.arange(0, NUM_BINS), tl.arange(0, CHUNKS)
    table = tl.load(
        bin_counts + (row * num_chunks + chunks[:, None]) * NUM_BINS + bins[None, :],
        mask=(chunks < num_chunks)[:, None],
        other=0,
    )
    counts = tl.sum(table, axis=0)
    top_k, top_p = tl.load(record + TOP_K), number(record, TOP_P)
    k_bin, k_want, num_to_k, num_at_k = NUM_BINS, 0, CAPACITY + 1, 0
    if (top_k > 0) & (top_k <= tl.sum(counts, axis=0)):
        k_bin, before = bin_before(tl.cumsum(counts, axis=0), top_k)
        k_want = top_k - before
        num_at_k = tl.sum(tl.where(bins == k_bin, counts, 0), axis=0)
        num_to_k = before + num_at_k
    first, last, needs_mass = 0, -1, 0
    if num_to_k <= CAPACITY:
        last = k_bin
    else:
        if top_p < 1.0:
            needs_mass = 1
            kept = tl.where(bins < k_bin, counts, tl.where(bins == k_bin, k_want, 0))
            width = (tl.load(row_stats + INVERSE) / tl.load(row_stats + BIN_SCALE)).to(tl.float32)
            first, last = bins_of_top_p(counts, kept, bins, top_p, width, CAPACITY - num_at_k, NUM_BINS)
        else:
            first, last = k_bin, k_bin
            if k_bin == NUM_BINS:
                last = -1
    is_listed = ((bins >= first) & (bins <= last)) | (bins == k_bin)
    num_of_chunk = tl.sum(tl.where(is_listed[None, :], table, 0), axis=1)
    ends = tl.cumsum(num_of_chunk, axis=0)
    num_listed = tl.sum(num_of_chunk, axis=0)
    if (num_listed > CAPACITY) | ((last < first) & (needs_mass == 1)):
        num_listed = -1
    tl.store(places + row * (num_chunks + 1), 0)
    tl.store(places + row * (num_chunks + 1) + 1 + chunks, ends, mask=chunks < num_chunks)
    spot = spots + row * SPOT
    tl.store(spot + FIRST, first)
    tl.store(spot + LAST, last)
    tl.store(spot + K_BIN, k_bin)
    tl.store(spot + K_WANT, k_want + tl.sum(tl.where(is_listed & (bins < k_bin), counts, 0), axis=0))
    tl.store(spot + NUM_LISTED, num_listed)
    tl.store(spot + NEEDS_MASS, needs_mass)


@triton.jit
def list_kernel(
    inputs,
    source,
    stride,
    stats,
    finite,
    spots,
    places,
    lists,  # int64 [num_rows, CAPACITY]  keys, in ascending order of ids
    above,  # int64 [num_rows, num_chunks, 2]  mass of bins before K_BIN, and before FIRST
    vocab,
    num_chunks,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(inputs + row * RECORD + KIND) != FILTERED) | (tl.load(finite + row) == 0):
        return
    spot = spots + row * SPOT
    begin = tl.load(places + row * (num_chunks + 1) + chunk)
    end = tl.load(places + row * (num_chunks + 1) + chunk + 1)
    needs_mass = tl.load(spot + NEEDS_MASS)
    if (tl.load(spot + NUM_LISTED) < 0) | ((begin == end) & (needs_mass == 0)):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(source + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    row_stats = stats + row * STATS
    bins, first, k_bin = bin_of(x, row_stats, NUM_BINS), tl.load(spot + FIRST), tl.load(spot + K_BIN)
    if begin < end:
        hit = ((bins >= first) & (bins <= tl.load(spot + LAST))) | (bins == k_bin)
        place = begin + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        tl.store(lists + row * CAPACITY + place, key_of(x, ids), mask=hit)
    if needs_mass == 1:
        masses = mass_of(share_of(x, row_stats))
        here = above + (row * num_chunks + chunk) * 2
        tl.store(here, tl.sum(tl.where((bins >= 0) & (bins < k_bin), masses, 0), axis=0))
        tl.store(here + 1, tl.sum(tl.where((bins >= 0) & (bins < first), masses, 0), axis=0))
