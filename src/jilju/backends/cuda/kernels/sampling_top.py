"""Alternatives: the most probable ids of a row, in order, with their logprobs.

The num_top-th largest of the chunks' largest keys bounds what can be among them; a chunk gives its keys from that bound
on, and one program a row merges them.
"""

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.sampling import log_prob
from jilju.backends.cuda.kernels.sampling_keys import (
    LARGEST,
    LOG_SUM,
    LOWEST,
    NUM_TOP,
    RECORD,
    STATS,
    id_of,
    key_of,
    value_of,
)


@triton.jit
def top_of_chunk_kernel(
    inputs,
    logits,  # float32 [num_rows, vocab]
    stride,
    keys,  # int64 [num_rows, num_chunks]  the chunks' largest
    top_keys,  # int64 [num_rows, num_chunks, TOP]
    vocab,
    num_chunks,
    TOP: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_top = tl.load(inputs + row * RECORD + NUM_TOP)
    if num_top == 0:
        return
    chunks = tl.arange(0, CHUNKS)
    largest = tl.load(keys + row * num_chunks + chunks, mask=chunks < num_chunks, other=LOWEST)
    rank = tl.sum((largest[None, :] > largest[:, None]).to(tl.int32), axis=1)
    bound = tl.max(tl.where((rank >= num_top - 1) & (chunks < num_chunks), largest, LOWEST), axis=0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=0.0)
    left = key_of(x, ids)
    left = tl.where((ids < vocab) & (left >= bound), left, LOWEST)
    lanes = tl.arange(0, TOP)
    found = tl.full([TOP], LOWEST, tl.int64)
    num_found = 0
    best = tl.max(left, axis=0)
    while (num_found < num_top) & (best > LOWEST):
        found = tl.where(lanes == num_found, best, found)
        left = tl.where(left == best, LOWEST, left)
        best = tl.max(left, axis=0)
        num_found += 1
    tl.store(top_keys + (row * num_chunks + chunk) * TOP + lanes, found)


@triton.jit
def merge_top_kernel(
    inputs,
    stats,
    top_keys,  # int64 [num_rows, num_chunks, TOP]
    top_ids,  # int32 [num_rows, MAX_TOP]
    top_logprobs,  # float32 [num_rows, MAX_TOP]
    num_chunks,
    MAX_TOP: tl.constexpr,
    TOP: tl.constexpr,
    KEYS: tl.constexpr,  # num_chunks * TOP, to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    num_top = tl.load(inputs + row * RECORD + NUM_TOP)
    places = tl.arange(0, KEYS)
    mask = (places < num_chunks * TOP) & (num_top > 0)
    left = tl.load(top_keys + row * num_chunks * TOP + places, mask=mask, other=LOWEST)
    lanes = tl.arange(0, TOP)
    found = tl.full([TOP], LOWEST, tl.int64)
    i = 0
    while i < num_top:
        best = tl.max(left, axis=0)
        found = tl.where(lanes == i, best, found)
        left = tl.where(left == best, LOWEST, left)
        i += 1
    there = found > LOWEST
    largest, log_sum = tl.load(stats + row * STATS + LARGEST), tl.load(stats + row * STATS + LOG_SUM)
    logprob = tl.where(there, log_prob(value_of(found), largest, log_sum), 0.0)
    tl.store(top_ids + row * MAX_TOP + lanes, tl.where(there, id_of(found), -1), mask=lanes < MAX_TOP)
    tl.store(top_logprobs + row * MAX_TOP + lanes, logprob, mask=lanes < MAX_TOP)
