"""Sampling, what every row needs: a pass over its logits in chunks, changes to them, and the row's numbers from its chunks'.

Owns the log softmax, the check that logits are finite, the greedy choice, and the changes by biases, penalties, bans and
masks. One program reads a chunk of a row; the bits of a row depend on nothing but the row. `plan.ops.Sample` says the steps.
"""

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.sampling_keys import (
    BANNED,
    BIASES,
    BIN_REACH,
    BIN_SCALE,
    FREQUENCY,
    INVERSE,
    KIND,
    LARGEST,
    LOG_SUM,
    LOWEST,
    MASK_ROW,
    PEAK,
    PENALTIES,
    PRESENCE,
    REACH,
    RECORD,
    REPETITION,
    SCORED,
    STATS,
    SUM_ONE,
    TARGET,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    VOCAB_REACH,
    WANTED,
    id_of,
    key_of,
    number,
    value_of,
)

LIST_BLOCK = 512  # ids of a row's list that are changed at once
MAX_WANTED_BLOCK = 128


@triton.jit(do_not_specialize=["copies"])
def scan_kernel(
    logits,  # float32 [num_rows, vocab]
    stride,
    keys,  # int64 [num_rows, num_chunks]
    sums,  # int64 [num_rows, num_chunks]  of exp(l - the chunk's largest) in units of 1 / SUM_ONE; -1: not finite
    lows,  # float32 [num_rows, num_chunks]
    work,  # float32 [num_rows, vocab]
    vocab,
    num_chunks,
    copies,  # whether some row of the call is changed
    CHUNK: tl.constexpr,
):
    """Of each chunk the largest key, the sum of exponentials and the least logit; and if rows change, a copy into `work`."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    x = tl.load(logits + row * stride + ids, mask=inside, other=0.0)
    best = tl.max(tl.where(inside, key_of(x, ids), LOWEST), axis=0)
    share = tl.exp(x - value_of(best))
    share = tl.where(inside & (share <= 1.0), share, 0.0)
    total = tl.sum((share * SUM_ONE).to(tl.int64), axis=0)
    is_bad = tl.max((inside & ~(tl.abs(x) < float("inf"))).to(tl.int32), axis=0)
    here = row * num_chunks + chunk
    tl.store(keys + here, best)
    tl.store(sums + here, tl.where(is_bad > 0, -1, total))
    tl.store(lows + here, tl.min(tl.where(inside, x, float("inf")), axis=0))
    if copies:
        tl.store(work + row * vocab + ids, x, mask=inside)


@triton.jit
def within_range(x):
    """The nearest finite number"""
    return tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)


@triton.jit
def change_kernel(inputs, work, vocab, BLOCK: tl.constexpr):
    """Biases, then penalties, then bans of a row's copy, by their lists; each id is at most once in a list."""
    row = tl.program_id(0).to(tl.int64)
    record = inputs + row * RECORD
    if tl.load(record + KIND) == SCORED:
        return
    x = work + row * vocab
    lanes = tl.arange(0, BLOCK)
    first_bias, end_bias = tl.load(record + BIASES), tl.load(record + BIASES + 1)
    to_bias = tl.load(record + BIASES + 2)
    begin = first_bias
    while begin < end_bias:
        at = begin + lanes
        mask = at < end_bias
        ids = tl.load(inputs + at, mask=mask, other=0)
        bias = tl.load(inputs + at + to_bias, mask=mask, other=0).to(tl.float32, bitcast=True)
        tl.store(x + ids, tl.load(x + ids, mask=mask) + bias, mask=mask)
        begin += BLOCK
    tl.debug_barrier()
    repetition = number(record, REPETITION)
    frequency, presence = number(record, FREQUENCY), number(record, PRESENCE)
    first, end = tl.load(record + PENALTIES), tl.load(record + PENALTIES + 1)
    to_count = tl.load(record + PENALTIES + 2)
    begin = first
    while begin < end:
        at = begin + lanes
        mask = at < end
        ids = tl.load(inputs + at, mask=mask, other=0)
        count = tl.load(inputs + at + to_count, mask=mask, other=0)
        value = tl.load(x + ids, mask=mask, other=0.0)
        value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = value - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
        tl.store(x + ids, within_range(value), mask=mask)
        begin += BLOCK
    tl.debug_barrier()
    begin = first_bias
    while begin < end_bias:
        at = begin + lanes
        mask = at < end_bias
        ids = tl.load(inputs + at, mask=mask, other=0)
        tl.store(x + ids, within_range(tl.load(x + ids, mask=mask, other=0.0)), mask=mask)
        begin += BLOCK
    tl.debug_barrier()
    first, end = tl.load(record + BANNED), tl.load(record + BANNED + 1)
    begin = first
    while begin < end:
        at = begin + lanes
        mask = at < end
        ids = tl.load(inputs + at, mask=mask, other=0)
        tl.store(x + ids, tl.full([BLOCK], float("-inf"), tl.float32), mask=mask)

        begin += BLOCK


@triton.jit
def scan_changed_kernel(
    inputs,
    work,  # float32 [num_rows, vocab]
    masks,  # int32 [num_masks, num_words]; of no meaning if no row has a mask
    keys,  # int64 [num_rows, num_chunks]
    lows,  # float32 [num_rows, num_chunks]
    vocab,
    num_words,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """Leave out what the row's mask does; of each chunk the largest key and the least logit of those that are left."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    x = tl.load(work + row * vocab + ids, mask=inside, other=0.0)
    mask_row = tl.load(inputs + row * RECORD + MASK_ROW).to(tl.int64)
    if mask_row >= 0:
        words = tl.load(masks + mask_row * num_words + (ids >> 5), mask=inside, other=0)
        x = tl.where((words >> (ids & 31)) & 1 == 1, x, float("-inf"))
        tl.store(work + row * vocab + ids, x, mask=inside)
    here = row * num_chunks + chunk
    tl.store(keys + here, tl.max(tl.where(inside, key_of(x, ids), LOWEST), axis=0))
    tl.store(lows + here, tl.min(tl.where(inside & (x > float("-inf")), x, float("inf")), axis=0))


@triton.jit
def log_prob(x, largest, log_sum):
    return (x.to(tl.float64) - largest - log_sum).to(tl.float32)


@triton.jit(do_not_specialize=["is_changed", "is_filtered"])
def settle_kernel(
    inputs,
    logits,  # float32 [num_rows, vocab]
    stride,
    keys,  # int64 [num_rows, num_chunks]
    sums,  # int64 [num_rows, num_chunks]
    changed_keys,  # int64 [num_rows, num_chunks]
    lows,  # float32 [num_rows, num_chunks]
    stats,  # float64 [num_rows, STATS]
    thresholds,  # int64 [num_rows]
    token_ids,  # int32 [num_rows]
    logprobs,  # float32 [num_rows]
    finite,  # int32 [num_rows]
    wanted,  # float32 [num_wanted]
    num_chunks,
    is_changed,  # whether some row of the call is, so that changed_keys says what is left
    is_filtered,
    CHUNKS: tl.constexpr,  # a power of two
    NUM_BINS: tl.constexpr,
    WANTED_BLOCK: tl.constexpr,
):
    """A row from its chunks: its log softmax, whether it is finite, and the id and logprob of all that are not drawn."""
    row = tl.program_id(0).to(tl.int64)
    record, row_stats = inputs + row * RECORD, stats + row * STATS
    chunks = tl.arange(0, CHUNKS)
    mask = chunks < num_chunks
    key = tl.load(keys + row * num_chunks + chunks, mask=mask, other=LOWEST)
    part = tl.load(sums + row * num_chunks + chunks, mask=mask, other=0)
    best = tl.max(key, axis=0)
    is_finite = tl.min(part, axis=0) >= 0
    largest = value_of(best).to(tl.float64)
    depth = tl.where(mask & is_finite, value_of(key).to(tl.float64) - largest, 0.0)
    terms = (part.to(tl.float64) * tl.exp(depth) + 0.5).to(tl.int64)
    log_sum = tl.log(tl.sum(tl.where(mask & is_finite, terms, 0), axis=0).to(tl.float64) / SUM_ONE)
    kind = tl.load(record + KIND)
    if is_changed:
        best = tl.max(tl.load(changed_keys + row * num_chunks + chunks, mask=mask, other=LOWEST), axis=0)
    peak = value_of(best)
    is_finite = is_finite & ((kind == SCORED) | (peak > float("-inf")))
    id_ = tl.where(kind == SCORED, tl.load(record + TARGET), id_of(best))
    id_ = tl.where(is_finite, id_, 0)
    logprob = log_prob(tl.load(logits + row * stride + id_), largest, log_sum)
    tl.store(token_ids + row, id_)
    tl.store(logprobs + row, tl.where(is_finite, logprob, 0.0))
    tl.store(finite + row, is_finite.to(tl.int32))
    tl.store(row_stats + LARGEST, largest)
    tl.store(row_stats + LOG_SUM, log_sum)
    first, end = tl.load(record + WANTED), tl.load(record + WANTED + 1)
    if first < end:
        lanes = tl.arange(0, WANTED_BLOCK)
        ids = tl.load(inputs + first + lanes, mask=first + lanes < end, other=0)
        x = tl.load(logits + row * stride + ids)
        place = tl.load(record + WANTED + 2) + lanes
        value = tl.where(is_finite, log_prob(x, largest, log_sum), 0.0)
        tl.store(wanted + place, value, mask=first + lanes < end)
    tl.store(row_stats + PEAK, peak.to(tl.float64))
    tl.store(row_stats + INVERSE, 1.0 / tl.maximum(number(record, TEMPERATURE), 1e-30).to(tl.float64))
    tl.store(thresholds + row, LOWEST)
    if is_filtered:
        reach = number(record, TEMPERATURE) * REACH
        low = tl.min(tl.load(lows + row * num_chunks + chunks, mask=mask, other=float("inf")), axis=0)
        span, top_p = tl.minimum(peak - low, reach), number(record, TOP_P)
        if (tl.load(record + TOP_K) == 0) & (top_p < 1.0):
            # further down all ids together have less than what top-p leaves out: the last bin may hold them all
            span = tl.minimum(span, number(record, TEMPERATURE) * (VOCAB_REACH - tl.log(tl.maximum(1.0 - top_p, 1e-7))))
        span = tl.maximum(span, 1e-30)
        tl.store(row_stats + BIN_SCALE, (1.0 / span * NUM_BINS).to(tl.float64))
        tl.store(row_stats + BIN_REACH, reach.to(tl.float64))
