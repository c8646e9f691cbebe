"""Between the QKV product and attention: sum the product's parts, bias, norm of each head, rope, and the write of K and V.

One kernel, one pass over a token's heads. Its tile is the same for every number of tokens, so a token's bits depend on the
token alone. Knows nothing of layers, rows or block tables: a token comes with its position and its slot.
"""

import torch
import triton
import triton.language as tl

from jilju.backends.cuda.kernels.kv import KvLayer, on_fp8_grid

HEADS_PER_PROGRAM = 8  # for every shape: the norm's order of summing follows from the tile
NUM_WARPS = 4


@triton.jit
def pairs_at(x, rows, present, HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs that rope turns, float32 [rows, HALF_PAD] twice, of the vectors at offsets `rows` of x."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF_PAD)
        mask = present[:, None] & (column < 2 * HALF)[None, :]
        both = tl.load(x + rows[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [rows.shape[0], HALF_PAD, 2]))
    else:
        column = tl.arange(0, HALF_PAD)
        mask = present[:, None] & (column < HALF)[None, :]
        at = x + rows[:, None] + column[None, :]
        a = tl.load(at, mask=mask, other=0).to(tl.float32)
        b = tl.load(at + HALF, mask=mask, other=0).to(tl.float32)
    return a, b


@triton.jit
def put_pairs(out, rows, a, b, present, HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    a = a.to(out.dtype.element_ty)
    b = b.to(out.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF_PAD)
        mask = present[:, None] & (column < 2 * HALF)[None, :]
        tl.store(out + rows[:, None] + column[None, :], tl.interleave(a, b), mask=mask)
    else:
        column = tl.arange(0, HALF_PAD)
        mask = present[:, None] & (column < HALF)[None, :]
        at = out + rows[:, None] + column[None, :]
        tl.store(at, a, mask=mask)
        tl.store(at + HALF, b, mask=mask)


@triton.jit
def normed(a, b, weight, eps, chosen, HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The chosen heads' pairs (a, b) over the root of their mean square, times weight; the others as they are."""
    mean_square = tl.sum(tl.fma(a, a, b * b), axis=1) / (2 * HALF)
    rstd = tl.math.div_rn(tl.full(mean_square.shape, 1.0, tl.float32), tl.math.sqrt_rn(mean_square + eps))[:, None]
    nowhere = tl.arange(0, 1) * 0
    weight_a, weight_b = pairs_at(weight, nowhere, nowhere == 0, HALF, HALF_PAD, INTERLEAVED)  # [1, HALF_PAD]
    chosen = chosen[:, None]
    return tl.where(chosen, a * rstd * weight_a, a), tl.where(chosen, b * rstd * weight_b, b)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_and_write_kernel(
    parts,  # [NUM_PARTS, num_tokens, WIDTH]
    bias,
    q_norm,
    k_norm,
    eps,
    cos,
    sin,
    positions,
    slots,
    q_out,
    keys,
    values,
    key_scales,
    value_scales,
    num_tokens,
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,  # of a head's columns
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * KV_HEADS) * DIM
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # query heads, then K's, then V's
    pair = tl.arange(0, HALF_PAD)
    real = pair < HALF
    present = head < NUM_HEADS + 2 * KV_HEADS

    row = head * DIM
    x = parts + token.to(tl.int64) * WIDTH
    a, b = pairs_at(x, row, present, HALF, HALF_PAD, INTERLEAVED)
    for part in tl.static_range(1, NUM_PARTS):
        more_a, more_b = pairs_at(x + part * num_tokens.to(tl.int64) * WIDTH, row, present, HALF, HALF_PAD, INTERLEAVED)
        a += more_a
        b += more_b
    if HAS_BIAS:
        bias_a, bias_b = pairs_at(bias, row, present, HALF, HALF_PAD, INTERLEAVED)
        a += bias_a
        b += bias_b

    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + KV_HEADS)
    is_v = (head >= NUM_HEADS + KV_HEADS) & (head < NUM_HEADS + 2 * KV_HEADS)
    if HAS_Q_NORM:
        a, b = normed(a, b, q_norm, eps, is_q, HALF, HALF_PAD, INTERLEAVED)
    if HAS_K_NORM:
        a, b = normed(a, b, k_norm, eps, is_k, HALF, HALF_PAD, INTERLEAVED)

    position = tl.load(positions + token)
    c = tl.load(cos + position * HALF + pair, mask=real, other=0)[None, :]
    s = tl.load(sin + position * HALF + pair, mask=real, other=0)[None, :]
    turns = (is_q | is_k)[:, None]
    turned_a = tl.where(turns, tl.fma(a, c, -(b * s)), a)
    b = tl.where(turns, tl.fma(b, c, a * s), b)
    a = turned_a

    q_row = (token.to(tl.int64) * NUM_HEADS + head) * DIM
    put_pairs(q_out, q_row, a, b, is_q, HALF, HALF_PAD, INTERLEAVED)

    slot = tl.load(slots + token)
    is_k = is_k & (slot >= 0)
    is_v = is_v & (slot >= 0)
    kv_head = tl.where(is_v, head - NUM_HEADS - KV_HEADS, head - NUM_HEADS)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    kv_row = (block * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    if FP8:
        top = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1)
        scale = tl.math.div_rn(top, tl.full([HEADS], 448.0, tl.float32))
        scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)  # the smallest normal number
        divisor = tl.where(scale == 0.0, float("inf"), scale)[:, None]
        divisor = tl.broadcast_to(divisor, [HEADS, HALF_PAD])
        a = on_fp8_grid(tl.math.div_rn(a, divisor))
        b = on_fp8_grid(tl.math.div_rn(b, divisor))
        tl.store(key_scales + kv_row, scale, mask=is_k)
        tl.store(value_scales + kv_row, scale, mask=is_v)
    put_pairs(keys, kv_row * DIM, a, b, is_k, HALF, HALF_PAD, INTERLEAVED)
    put_pairs(values, kv_row * DIM, a, b, is_v, HALF, HALF_PAD, INTERLEAVED)


def rope_and_write(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    style: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q_out: torch.Tensor,
    layer: KvLayer,
    *,
    pdl: bool = False,
) -> None:
    """Q of each token to q_out, K and V to the token's slot of the layer; slot -1: K and V of that token are written nowhere.

    parts [S, T, (H + 2 KH) * d], float32, or half with S == 1: their sum over S is x = [q | k | v].   x += bias
    q_norm, k_norm float32 [d] or None: head = head / sqrt(mean(head^2) + eps) * norm, before rope
    cos, sin float32 [max_context, d/2]; style "halves" pairs (i, i + d/2), "interleaved" (2i, 2i + 1)
    positions, slots int32 [T]; bias float32 or None; q_out [T, H, d] half
    """
    num_parts, num_tokens, _ = parts.shape
    _, num_heads, dim = q_out.shape
    _, num_kv_heads, block_size, _ = layer.keys.shape
    fp8 = layer.key_scales is not None
    grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))
    rope_and_write_kernel[grid](
        parts,
        parts if bias is None else bias,
        cos if q_norm is None else q_norm,
        cos if k_norm is None else k_norm,
        eps,
        cos,
        sin,
        positions,
        slots,
        q_out,
        layer.keys,
        layer.values,
        layer.key_scales if fp8 else cos,
        layer.value_scales if fp8 else cos,
        num_tokens,
        NUM_PARTS=num_parts,
        NUM_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HALF=dim // 2,
        HALF_PAD=triton.next_power_of_2(dim // 2),
        HEADS=HEADS_PER_PROGRAM,
        INTERLEAVED=style == "interleaved",
        HAS_BIAS=bias is not None,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        FP8=fp8,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
