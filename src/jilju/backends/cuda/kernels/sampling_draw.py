"""Drawing: the id at which the cumulative mass of those that were kept passes the row's noise.

Two kernels: the mass of each chunk, then the chunk and the place in it. Noise is Philox, keyed by (seed, position).
"""

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.sampling import log_prob
from jilju.backends.cuda.kernels.sampling_keys import (
    DRAWN,
    HIGHEST,
    KIND,
    LARGEST,
    LOG_SUM,
    MIN_P,
    POSITION,
    RECORD,
    SEED,
    STATS,
    key_of,
    mass_of,
    number,
    share_of,
)


@triton.jit
def is_over(record, finite, threshold):
    """Whether a row needs no drawing, or no more"""
    return (tl.load(record + KIND) < DRAWN) | (tl.load(finite) == 0) | (tl.load(threshold) == HIGHEST)


@triton.jit
def kept_masses(record, source, row_stats, threshold, ids, inside):
    """Masses of a row's ids, 0 of those that were not kept: int64"""
    x = tl.load(source + ids, mask=inside, other=float("-inf"))
    share = share_of(x, row_stats)
    kept = inside & (share >= number(record, MIN_P).to(tl.float64)) & (key_of(x, ids) >= threshold)
    return tl.where(kept, mass_of(share), 0)


@triton.jit
def weigh_kernel(
    inputs,
    source,  # float32 [num_rows, vocab]  changed logits
    stride,
    stats,
    thresholds,  # int64 [num_rows]  the last key that is kept; HIGHEST: the id was drawn
    finite,  # int32 [num_rows]
    chunk_masses,  # int64 [num_rows, num_chunks]
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    if is_over(record, finite + row, thresholds + row):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    masses = kept_masses(record, source + row * stride, row_stats, tl.load(thresholds + row), ids, ids < vocab)
    tl.store(chunk_masses + row * num_chunks + chunk, tl.sum(masses, axis=0))


@triton.jit
def noise(record):
    """53 random bits of the row, in the upper bits of 64"""
    key, place = record + SEED, record + POSITION
    k0, k1 = tl.load(key).to(tl.uint32, bitcast=True), tl.load(key + 1).to(tl.uint32, bitcast=True)
    c0, c1 = tl.load(place).to(tl.uint32, bitcast=True), tl.load(place + 1).to(tl.uint32, bitcast=True)
    zero = c0 ^ c0
    w0, w1, _, _ = tl.philox_impl(c0, c1, zero, zero, k0, k1)
    return (w0.to(tl.uint64) << 32) | (w1.to(tl.uint64) & 0xFFFFF800)


@triton.jit
def place_of(record, masses):
    """The first place at which the cumulative mass exceeds u * total"""
    # of integers: exceeds floor(u * total)
    target = tl.umulhi(noise(record), tl.sum(masses, axis=0).to(tl.uint64)).to(tl.int64)
    return tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)


@triton.jit
def report(row_logits, row_stats, id_, token_id, logprob):
    largest, log_sum = tl.load(row_stats + LARGEST), tl.load(row_stats + LOG_SUM)
    tl.store(token_id, id_)
    tl.store(logprob, log_prob(tl.load(row_logits + id_), largest, log_sum))


@triton.jit
def pick_kernel(
    inputs,
    logits,  # float32 [num_rows, vocab]  raw
    logits_stride,
    source,  # float32 [num_rows, vocab]  changed
    stride,
    stats,
    thresholds,
    finite,
    chunk_masses,  # int64 [num_rows, num_chunks]
    token_ids,
    logprobs,
    vocab,
    num_chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    if is_over(record, finite + row, thresholds + row):
        return
    chunks = tl.arange(0, CHUNKS)
    parts = tl.load(chunk_masses + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    total = tl.sum(parts, axis=0)
    # cumulative > u * total, of integers: cumulative > floor(u * total)
    target = tl.umulhi(noise(record), total.to(tl.uint64)).to(tl.int64)
    cumulative = tl.cumsum(parts, axis=0)
    before = cumulative <= target
    chunk = tl.sum(before.to(tl.int32), axis=0)
    target -= tl.max(tl.where(before, cumulative, 0), axis=0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    masses = kept_masses(record, source + row * stride, row_stats, tl.load(thresholds + row), ids, ids < vocab)
    id_ = chunk * CHUNK + tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    report(logits + row * logits_stride, row_stats, id_, token_ids + row, logprobs + row)
