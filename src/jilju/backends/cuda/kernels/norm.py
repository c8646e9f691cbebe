"""Norms: RMS norm of rows, and what a linear adds to the residual stream together with the norm that reads it.

A program owns a row (or a head of it) whole, so its bits depend on nothing else. Partial sums of a linear are added in
ascending order. Knows nothing of layers.
"""

import torch
import triton
import triton.language as tl

MAX_WIDTH = 16384  # columns that a program holds in registers
EARLY_WIDTH = 8192  # ... with the weights beside them


def num_warps_of(width: int) -> int:
    """Eight columns a thread, two vector loads, as far as 32 warps go: a function of the width alone."""
    return max(1, min(32, triton.next_power_of_2(width) // 256))


@triton.jit
def normed(x, mask, weight, width, eps):
    """x / sqrt(mean(x^2) + eps) * weight, of one row"""
    mean_square = tl.sum(tl.where(mask, x * x, 0.0), axis=0) / width
    return x * (1.0 / tl.sqrt_rn(mean_square + eps)) * weight


@triton.jit
def rms_norm_kernel(
    x,  # [*, num_groups * width]
    weight,  # float32 [width]
    rows,  # int32 [num_rows], or none
    out,  # [num_rows, num_groups * width]
    x_stride,
    out_stride,
    width,
    eps,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    w = tl.load(weight + columns, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = tl.load(rows + row).to(tl.int64) if HAS_ROWS else row
    value = tl.load(x + source * x_stride + group * width + columns, mask=mask, other=0.0).to(tl.float32)
    result = normed(value, mask, w, width, eps)
    tl.store(out + row * out_stride + group * width + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_kernel(
    parts,  # [NUM_PARTS, num_tokens, width]
    bias,  # float32 [width], or none
    post_weight,  # float32 [width], or none
    residual,  # float32 [num_tokens, width]
    weight,  # float32 [width], or none
    out,  # [num_tokens, width], or none
    part_stride,
    width,
    eps,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    # What no kernel writes is read before the wait for the one that comes first, if registers hold it.
    if HAS_NORM and EARLY:
        w = tl.load(weight + columns, mask=mask, other=0.0)
    if HAS_POST and EARLY:
        post = tl.load(post_weight + columns, mask=mask, other=0.0)
    if HAS_BIAS and EARLY:
        b = tl.load(bias + columns, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    here = token * width + columns
    old = tl.load(residual + here, mask=mask, other=0.0)
    h = tl.load(parts + here, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        h += tl.load(parts + part * part_stride + here, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += b if EARLY else tl.load(bias + columns, mask=mask, other=0.0)
    if HAS_POST:
        if not EARLY:
            post = tl.load(post_weight + columns, mask=mask, other=0.0)
        h = normed(h, mask, post, width, eps)
    new = old + h
    tl.store(residual + here, new, mask=mask)
    if HAS_NORM:
        if not EARLY:
            w = tl.load(weight + columns, mask=mask, other=0.0)
        tl.store(out + here, normed(new, mask, w, width, eps).to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    rows: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """x [T, W] float32 or half, weight [n] float32: norm over each n columns; rows int32 [L]: of these rows. out [T or L, W]"""
    width = len(weight)
    num_rows = len(x) if rows is None else len(rows)
    assert out.shape == (num_rows, x.shape[1]) and x.shape[1] % width == 0, f"{out.shape} of {x.shape} by {width}"
    assert width <= MAX_WIDTH, f"a norm over {width} columns; at most {MAX_WIDTH}"
    if not num_rows:
        return
    rms_norm_kernel[(num_rows, x.shape[1] // width)](
        x, weight, rows, out, x.stride(0), out.stride(0), width, eps, HAS_ROWS=rows is not None,
        BLOCK=triton.next_power_of_2(width), PDL=pdl, num_warps=num_warps_of(width), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def add_norm(
    parts: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    post_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float,
    pdl: bool = False,
) -> None:
    """residual [T, D] float32 += h in place, h = sum of parts [S, T, D], ascending, + bias, and if post_weight its norm times
    that; out [T, D] = norm(residual) * weight, if weight."""
    num_parts, num_tokens, width = parts.shape
    assert residual.shape == (num_tokens, width) and residual.is_contiguous() and parts.is_contiguous(), "as they lie"
    assert (out is None) == (weight is None), "a weight norms the residual into out"
    assert width <= MAX_WIDTH, f"a norm over {width} columns; at most {MAX_WIDTH}"
    if not num_tokens:
        return
    add_norm_kernel[(num_tokens,)](
        parts, bias, post_weight, residual, weight, out, parts.stride(0), width, eps, NUM_PARTS=num_parts,
        HAS_BIAS=bias is not None, HAS_POST=post_weight is not None, HAS_NORM=weight is not None,
        EARLY=width <= EARLY_WIDTH, BLOCK=triton.next_power_of_2(width), PDL=pdl, num_warps=num_warps_of(width), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
