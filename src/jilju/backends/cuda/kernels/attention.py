"""Attention over the paged cache: rows of any start and count, decode and prefill in one kernel, and the merge of splits.

A program holds one tile of a row's queries, block_m of (token, head) for one KV head, and walks the row's keys in tiles of
block_n. Keys fall into splits at fixed absolute positions. Each split has a softmax of its own, merged in ascending order: by
the program that walks them all, or where every split has a program, by the last of them to end. Both run `merged`, so the bits
are equal, and a token's bits depend on its keys and the config alone: not on the other tokens of its tile, nor on the number of
splits.
So that the compiler cannot make a difference either, products and sums are fused where `tl.fma` stands, nowhere else.
Knows nothing of how the cache was filled.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from jilju.backends.cuda.attention_configs import AttentionConfig
from jilju.backends.cuda.kernels.kv import KvLayer

# A float8 cache is multiplied as float16, the type it converts to in one instruction. Probabilities times value scales would
# be small there and lose bits, so they are lifted. A value scale is max|v| / 448: float16 values never overflow, bfloat16 ones
# from 1.8 million on.
LIFT_FLOAT16 = tl.constexpr(256.0)
LIFT_BFLOAT16 = tl.constexpr(16.0)
MERGED_AT_ONCE = 8  # splits whose loads a merge has in flight, at most,
MERGED_VALUES = 64  # and their values that a thread holds


@triton.jit
def nothing(ROWS: tl.constexpr, DIM_PAD: tl.constexpr):
    """A softmax over no keys: m [rows] maxima in base 2, total [rows] sums, acc [rows, d] weighted values."""
    return (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, DIM_PAD], tl.float32),
    )


@triton.jit
def merged(one, other):
    """Two softmaxes over different keys as one. Over no keys in `other`, it is `one`, bit by bit."""
    m_a, total_a, acc_a = one
    m_b, total_b, acc_b = other
    m = tl.maximum(m_a, m_b)
    finite = tl.where(m == float("-inf"), 0.0, m)
    a = tl.exp2(m_a - finite)
    b = tl.exp2(m_b - finite)
    total = tl.fma(total_a, a, total_b * b)
    acc = tl.fma(acc_a, tl.broadcast_to(a[:, None], acc_a.shape), acc_b * b[:, None])
    return m, total, acc


@triton.jit
def quotient(softmax, out, FP8: tl.constexpr):
    _, total, acc = softmax
    if FP8:
        total = total * (LIFT_FLOAT16 if out.dtype.element_ty == tl.float16 else LIFT_BFLOAT16)
    return (acc / total[:, None]).to(out.dtype.element_ty)


@triton.jit
def merge_splits(
    part_acc,
    part_stats,
    out,
    first_token,  # of the tile, in q
    tile_count,
    num_active,
    num_splits,
    kv_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FP8: tl.constexpr,
):
    """Writes a tile's rows, ROWS at a time, from what its splits left. Other SMs wrote it: loads pass by the L1."""
    column = tl.arange(0, DIM_PAD)[None, :]
    for begin in tl.range(0, tile_count * GROUP, ROWS):
        # where fewer are left, the last once more
        in_tile = tl.minimum(begin + tl.arange(0, ROWS), tile_count * GROUP - 1)
        q_row = (first_token + in_tile // GROUP).to(tl.int64) * NUM_HEADS + kv_head * GROUP + in_tile % GROUP
        softmax = nothing(ROWS, DIM_PAD)
        for some in tl.range(0, num_active, AT_ONCE):
            part = q_row * num_splits + some
            stats, of_row = part_stats + part * 2, part_acc + part[:, None] * DIM + column
            parts = ()
            for down in tl.static_range(AT_ONCE):
                i = AT_ONCE - 1 - down
                if i == 0:
                    # The merges need the first split, and its loads stay behind this: so all of them are under way at once.
                    # Else the compiler merges between the loads, and waits again and again.
                    tl.debug_barrier()
                here = some + i < num_active
                mask = here if DIM == DIM_PAD else here & (column < DIM)
                acc = tl.load(of_row + i * DIM, mask=mask, other=0, cache_modifier=".cg")
                m = tl.load(stats + i * 2, mask=here, other=float("-inf"), cache_modifier=".cg")
                total = tl.load(stats + i * 2 + 1, mask=here, other=0, cache_modifier=".cg")
                parts = ((m, total, acc),) + parts  # type: ignore[assignment]  # noqa: RUF005  # Triton unpacks no stars
            for i in tl.static_range(AT_ONCE):
                softmax = merged(softmax, parts[i])
        tl.store(out + q_row[:, None] * DIM + column, quotient(softmax, out, FP8), mask=column < DIM)


@triton.jit
def tile_of(tile, starts, counts, tile_rows, tile_tokens, window, TOKENS: tl.constexpr, WINDOWED: tl.constexpr):
    """(row, first token within the row, number of tokens, position of the first, first key of any token, end of keys)"""
    row = tl.load(tile_rows + tile)
    first = tl.load(tile_tokens + tile)
    start = tl.load(starts + tl.maximum(row, 0))
    count = tl.load(counts + tl.maximum(row, 0))
    num_tokens = tl.where(row < 0, 0, tl.minimum(count - first, TOKENS))
    position = start + first
    low = tl.maximum(position - window + 1, 0) if WINDOWED else 0
    return row, first, num_tokens, position, low, position + num_tokens


@triton.jit
def walk(
    query,
    softmax,
    begin,
    end,
    bounds,  # position [rows], low, last, window: keys outside [low, last] are read as the nearest in it
    scaling,  # what makes a product a score in base 2 [rows], and the lift of float8 values
    cache,  # keys, values, key_scales, value_scales, the row's block table, kv_head
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    FP8: tl.constexpr,
    LARGE: tl.constexpr,
):
    """The softmax goes on over keys [begin, end), begin a multiple of BLOCK_N."""
    m, total, acc = softmax
    position, low, last, window = bounds
    scale, lift = scaling
    keys, values, key_scales, value_scales, table, kv_head = cache
    column = tl.arange(0, DIM_PAD)
    in_tile = tl.arange(0, BLOCK_N)
    key = tl.maximum(tl.minimum(begin + in_tile, last), low)
    block = tl.load(table + key // BLOCK_SIZE)
    for tile_begin in tl.range(begin, end, BLOCK_N):
        if LARGE:
            block = block.to(tl.int64)
        kv_row = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        at = kv_row[:, None] * DIM + column[None, :]
        # the next tile's blocks are asked for one round ahead: their addresses are needed as soon as that round begins
        key = tl.maximum(tl.minimum(tile_begin + BLOCK_N + in_tile, last), low)
        block = tl.load(table + key // BLOCK_SIZE)
        k = tl.load(keys + at) if DIM == DIM_PAD else tl.load(keys + at, mask=column[None, :] < DIM, other=0.0)
        s = tl.dot(query, tl.trans(k.to(query.dtype)))
        if FP8:
            s = s * tl.load(key_scales + kv_row)[None, :]
        if MASKED:
            here = tile_begin + in_tile
            seen = here[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (here[None, :] > position[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(tl.fma(s, tl.broadcast_to(scale[:, None], s.shape), tl.broadcast_to(-finite[:, None], s.shape)))
        alpha = tl.exp2(m - finite)
        total = tl.fma(total, alpha, tl.sum(p, axis=1))
        m = m_new
        acc = acc * alpha[:, None]
        if FP8:
            p = p * (tl.load(value_scales + kv_row) * lift)[None, :]
        v = tl.load(values + at) if DIM == DIM_PAD else tl.load(values + at, mask=column[None, :] < DIM, other=0.0)
        acc = tl.dot(p.to(query.dtype), v.to(query.dtype), acc)
    return m, total, acc


@triton.jit
def walk_all(
    query,
    softmax,
    begin,
    end,
    clear,  # [begin, end) of the keys that every token of the tile sees
    bounds,
    scaling,
    cache,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOWED: tl.constexpr,
    FP8: tl.constexpr,
    LARGE: tl.constexpr,
):
    """`walk` over [begin, end): with a mask, unless it can do without for a part that is worth a loop of its own."""
    if not DECODE:
        clear_begin, clear_end = clear
        if WINDOWED:
            middle = tl.minimum(tl.maximum(clear_begin, begin), end)
            softmax = walk(
                query, softmax, begin, middle, bounds, scaling, cache,
                KV_HEADS, BLOCK_SIZE, DIM, DIM_PAD, BLOCK_N, True, WINDOWED, FP8, LARGE,
            )  # fmt: skip
            begin = middle
        middle = tl.maximum(tl.minimum(clear_end, end), begin)
        softmax = walk(
            query, softmax, begin, middle, bounds, scaling, cache,
            KV_HEADS, BLOCK_SIZE, DIM, DIM_PAD, BLOCK_N, False, WINDOWED, FP8, LARGE,
        )  # fmt: skip
        begin = middle
    return walk(
        query, softmax, begin, end, bounds, scaling, cache,
        KV_HEADS, BLOCK_SIZE, DIM, DIM_PAD, BLOCK_N, True, WINDOWED, FP8, LARGE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["table_width", "window"],
    do_not_specialize_on_alignment=[
        "tables",
        "starts",
        "first_tokens",
        "counts",
        "tile_rows",
        "tile_tokens",
        "counters",
    ],
)
def attention_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    starts,
    first_tokens,
    counts,
    tile_rows,
    tile_tokens,
    out,
    part_acc,
    part_stats,
    counters,
    scale,  # times log2(e)
    table_width,
    window,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,  # 0: one split
    INLINE: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_AT_ONCE: tl.constexpr,
    DECODE: tl.constexpr,  # one token a row: one loop over a tile's keys, all with a mask
    WINDOWED: tl.constexpr,
    FP8: tl.constexpr,
    LARGE: tl.constexpr,  # offsets in a layer need 64 bits
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tokens have most keys: they go first
    kv_head = tl.program_id(1)
    row, first, tile_count, tile_position, low, end = tile_of(
        tile, starts, counts, tile_rows, tile_tokens, window, TOKENS, WINDOWED
    )
    if tile_count <= 0:
        return
    last = end - 1
    clear_begin = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N if WINDOWED else 0
    clear = (clear_begin, (tile_position + 1) // BLOCK_N * BLOCK_N)
    begin = low // BLOCK_N * BLOCK_N
    if SPLIT_KEYS > 0:
        first_split = low // SPLIT_KEYS
        end_split = tl.cdiv(end, SPLIT_KEYS)
        if not INLINE:
            split = first_split + tl.program_id(2)
            if split >= end_split:
                return
            begin = tl.maximum(begin, split * SPLIT_KEYS)
            end = tl.minimum(end, (split + 1) * SPLIT_KEYS)

    in_tile = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DIM_PAD)
    token = in_tile // GROUP
    head = kv_head * GROUP + in_tile % GROUP
    real = token < tile_count  # the others have zeros for a query, and the keys of the last
    position = tile_position + tl.minimum(token, tile_count - 1)
    mask = real[:, None] & (column < DIM)[None, :]
    q_row = (tl.load(first_tokens + row) + first + token).to(tl.int64) * NUM_HEADS + head
    query = tl.load(q + q_row[:, None] * DIM + column[None, :], mask=mask, other=0)
    row_scale = tl.full([BLOCK_M], 0.0, tl.float32) + scale
    if FP8:  # as float16, whatever their size: divided by the power of two of the row's largest
        exact = query.to(tl.float32)
        binade = tl.max(tl.abs(exact), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.maximum(binade, 0x00800000).to(tl.float32, bitcast=True)
        query = (exact / power[:, None]).to(tl.float16)
        row_scale = row_scale * power

    bounds = (position, low, last, window)
    scaling = (row_scale, LIFT_FLOAT16 if q.dtype.element_ty == tl.float16 else LIFT_BFLOAT16)
    cache = (keys, values, key_scales, value_scales, tables + row.to(tl.int64) * table_width, kv_head)
    softmax = nothing(BLOCK_M, DIM_PAD)
    if INLINE and SPLIT_KEYS > 0:
        for s in tl.range(first_split, end_split):
            of_split = walk_all(
                query, nothing(BLOCK_M, DIM_PAD), tl.maximum(begin, s * SPLIT_KEYS), tl.minimum(end, (s + 1) * SPLIT_KEYS),
                clear, bounds, scaling, cache,
                KV_HEADS, BLOCK_SIZE, DIM, DIM_PAD, BLOCK_N, DECODE, WINDOWED, FP8, LARGE,
            )  # fmt: skip
            softmax = merged(softmax, of_split)
    else:
        softmax = walk_all(
            query, softmax, begin, end, clear, bounds, scaling, cache,
            KV_HEADS, BLOCK_SIZE, DIM, DIM_PAD, BLOCK_N, DECODE, WINDOWED, FP8, LARGE,
        )  # fmt: skip

    # from the number of the first token anew: addresses held over the loops would cost them registers
    first_token = tl.load(first_tokens + row, volatile=True) + first
    q_row = (first_token + token).to(tl.int64) * NUM_HEADS + head
    q_at = q_row[:, None] * DIM + column[None, :]
    if INLINE:
        tl.store(out + q_at, quotient(softmax, out, FP8), mask=mask)
    else:
        num_active, num_splits = end_split - first_split, tl.num_programs(2)
        if num_active == 1:
            tl.store(out + q_at, quotient(merged(nothing(BLOCK_M, DIM_PAD), softmax), out, FP8), mask=mask)
        else:
            m, total, acc = softmax
            part = q_row * num_splits + tl.program_id(2)
            tl.store(part_acc + part[:, None] * DIM + column[None, :], acc, mask=mask)
            tl.store(part_stats + part * 2, m, mask=real)
            tl.store(part_stats + part * 2 + 1, total, mask=real)
            # One thread counts for all: what they wrote comes before, what they read of the other programs after
            tl.debug_barrier()
            counter = counters + tile * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_active - 1:
                merge_splits(
                    part_acc, part_stats, out, first_token, tile_count, num_active, num_splits, kv_head,
                    NUM_HEADS, GROUP, DIM, DIM_PAD, MERGE_ROWS, MERGE_AT_ONCE, FP8,
                )  # fmt: skip
                tl.store(counter, 0)  # for the next launch


class Partials(NamedTuple):
    """What the programs of a tile's splits leave each other. Counters are zero before a launch, and zero again after it."""

    acc: torch.Tensor  # float32 [T, H, num_splits, d]
    stats: torch.Tensor  # float32 [T, H, num_splits, 2]
    counters: torch.Tensor  # int32, at least one for each tile and KV head: how many of the splits are done


def attention(
    q: torch.Tensor,
    layer: KvLayer,
    block_tables: torch.Tensor,
    starts: torch.Tensor,
    first_tokens: torch.Tensor,
    counts: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_tokens: torch.Tensor,
    out: torch.Tensor,
    config: AttentionConfig,
    *,
    scale: float,
    window: int,
    num_splits: int,
    partials: Partials | None = None,
    pdl: bool = False,
) -> None:
    """out = softmax(scale * q K^T) V, causal by position, of every tile's tokens; K and V of the step are in the cache already.

    q, out [T, H, d] half; block_tables int32 [R, W]; starts, first_tokens, counts int32 [R]: row r computes positions
    [starts, starts + counts), its first token is q[first_tokens]. Tile i holds the row's tokens from tile_tokens[i] on,
    config.tokens_per_tile(group) of them, of row tile_rows[i]; -1: nothing. window > 0: keys (position - window, position].
    num_splits 1: each program walks all keys. Else program s does the s-th split of the tile's keys, and num_splits is at
    least config.num_splits() of every tile.
    """
    num_tokens, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = layer.keys.shape
    fp8 = layer.key_scales is not None
    inline = num_splits == 1
    assert inline or (partials is not None and config.split_keys), "splits need a size and a place for their parts"
    acc, stats, counters = partials if partials is not None else (out, out, tile_rows)
    assert inline or len(counters) >= len(tile_rows) * num_kv_heads, "splits of each tile and KV head are counted apart"
    dim_pad = max(16, triton.next_power_of_2(dim))
    decode = num_tokens == len(starts)
    merge_rows = triton.next_power_of_2(num_heads // num_kv_heads) if decode else min(16, config.block_m)
    merge_values = max(1, merge_rows * dim_pad // (32 * config.num_warps))
    attention_kernel[(len(tile_rows), num_kv_heads, num_splits)](
        q,
        layer.keys,
        layer.values,
        layer.key_scales if fp8 else q,
        layer.value_scales if fp8 else q,
        block_tables,
        starts,
        first_tokens,
        counts,
        tile_rows,
        tile_tokens,
        out,
        acc,
        stats,
        counters,
        scale * math.log2(math.e),
        block_tables.shape[1],
        window,
        NUM_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        DIM=dim,
        DIM_PAD=dim_pad,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT_KEYS=config.split_keys,
        INLINE=inline,
        MERGE_ROWS=merge_rows,
        MERGE_AT_ONCE=max(1, min(MERGED_AT_ONCE, MERGED_VALUES // merge_values)),
        DECODE=decode,
        WINDOWED=window > 0,
        FP8=fp8,
        LARGE=layer.keys.numel() >= 2**31,
        PDL=pdl,
        launch_pdl=pdl,
        enable_fp_fusion=False,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
