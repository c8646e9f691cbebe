"""Gated linear units: activation(gate) * up, alone and as the epilogue of a linear.

Owns the activations' arithmetic, in float32, so that a fused and a separate GLU give the same bits. Knows nothing of the
products that make gate and up.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # columns a program: eight of each half for each of 128 threads


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, as `plan.ops.Glu` defines it; tanh by way of exp: g / 2 * (1 + tanh(u)) = g / (1 + exp(-2 u))."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu_tanh")
    # 1.59... is 2 sqrt(2 / pi)
    exponent = gate if ACTIVATION == "silu" else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-exponent)) * up


@triton.jit
def glu_kernel(
    parts,  # [NUM_PARTS, num_tokens, 2 * width]
    out,  # [num_tokens, width]
    part_stride,
    width,
    NUM_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gates = parts + token * 2 * width + columns
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        gate += tl.load(gates + part * part_stride, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(gates + part * part_stride + width, mask=mask, other=0.0).to(tl.float32)
    product = activate(gate, up, ACTIVATION)
    tl.store(out + token * width + columns, product.to(out.dtype.element_ty), mask=mask)


def glu(parts: torch.Tensor, out: torch.Tensor, activation: str, *, pdl: bool = False) -> None:
    """out = activation(gate) * up, [gate | up] the sum of parts      parts [S, T, 2F], out [T, F]"""
    num_parts, num_tokens, _ = parts.shape
    width = out.shape[1]
    assert parts.shape[1:] == (num_tokens, 2 * width) and parts.is_contiguous(), f"parts {tuple(parts.shape)}"
    assert out.shape == (num_tokens, width) and out.is_contiguous(), f"out {tuple(out.shape)}"
    glu_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
        parts,
        out,
        parts.stride(0),
        width,
        NUM_PARTS=num_parts,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        enable_fp_fusion=False,  # or a fused epilogue could round otherwise
        **({"launch_pdl": True} if pdl else {}),
    )
