"""Linears: out = x weight^T by the kernel that a configuration names, and the gated linear unit right behind one.

Owns the launches and the quantization of activations for fp8 products. Knows nothing of which configuration is good.
gemv and tiles sum in float32 and leave float32 parts [S, T, N]; whoever reads them adds the parts in ascending order.
matmul leaves the product itself, as half. Nothing here allocates: outputs and workspaces are given.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from jilju.backends.cuda.kernels.linear_gemv import MAX_TOKENS, gemv_glu_kernel, gemv_kernel
from jilju.backends.cuda.kernels.linear_tiles import GROUP, tiles_glu_kernel, tiles_kernel
from jilju.backends.cuda.tuning import LinearConfig

FP8 = torch.float8_e4m3fn


class Quantized(NamedTuple):
    """Where matmul puts the quantized activations of an fp8 product; may be larger than the step needs."""

    values: torch.Tensor  # [>= T * K] float8_e4m3fn
    scales: torch.Tensor  # [>= T] float32


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    config: LinearConfig,
    *,
    pdl: bool = False,
    quantized: Quantized | None = None,
) -> None:
    """x [T, K] half, weight [N, K] half or fp8, scale [N] float32 of fp8; out [S, T, N] float32, of matmul [1, T, N] half.

    S is 1, or num_splits of tiles. `quantized` is needed by matmul with fp8 weights alone.
    """
    (num_tokens, num_columns), num_rows = x.shape, weight.shape[0]
    _check(x, weight, scale)
    num_parts = out.shape[0]
    assert out.shape == (num_parts, num_tokens, num_rows) and out.is_contiguous(), f"out {tuple(out.shape)}"
    if config.kind == "matmul":
        _matmul(x, weight, scale, out[0], quantized, pdl)
    elif config.kind == "gemv":
        assert num_tokens <= MAX_TOKENS and num_parts == 1, f"gemv of {num_tokens} tokens into {num_parts} parts"
        gemv_kernel[(triton.cdiv(num_rows, config.block_n),)](
            x, weight, scale, out, num_rows, num_columns, NUM_TOKENS=num_tokens, **_gemv_options(weight, config, pdl)
        )
    else:
        assert num_parts in (1, config.num_splits), f"{num_parts} parts of {config.num_splits} splits"
        num_tiles = triton.cdiv(num_rows, config.block_n) * triton.cdiv(num_tokens, config.block_t)
        tiles_kernel[(num_tiles, num_parts)](
            x, weight, *_tiles(x, weight, config), scale, out, num_tokens, num_rows, num_columns,
            INLINE=num_parts == 1 and config.num_splits > 1, **_tiles_options(weight, config, pdl),
        )  # fmt: skip


def linear_glu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    config: LinearConfig,
    activation: str,
    *,
    pdl: bool = False,
) -> None:
    """activation(gate) * up: x [T, K] half, weight [2F, K], gates first, scale [2F]; out [T, F] half. By gemv or tiles."""
    (num_tokens, num_columns), width = x.shape, weight.shape[0] // 2
    _check(x, weight, scale)
    assert out.shape == (num_tokens, width) and out.is_contiguous(), f"out {tuple(out.shape)}"
    if config.kind == "gemv":
        assert num_tokens <= MAX_TOKENS, f"gemv of {num_tokens} tokens"
        gemv_glu_kernel[(triton.cdiv(2 * width, config.block_n),)](
            x, weight, scale, out, width, num_columns,
            ACTIVATION=activation, NUM_TOKENS=num_tokens, **_gemv_options(weight, config, pdl),
        )  # fmt: skip
    else:
        assert config.kind == "tiles", f"linear_glu by {config.kind}; use gemv or tiles"
        tiles_glu_kernel[(triton.cdiv(width, config.block_n) * triton.cdiv(num_tokens, config.block_t),)](
            x, weight, *_tiles(x, weight, config), scale, out, num_tokens, width, num_columns,
            ACTIVATION=activation, **_tiles_options(weight, config, pdl),
        )  # fmt: skip


def _check(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    assert x.shape[1] == weight.shape[1], f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert x.is_contiguous() and weight.is_contiguous(), "rows must lie one behind the other"
    assert (scale is not None) == (weight.dtype == FP8), f"weights of {weight.dtype} with scale {scale is not None}"


def _gemv_options(weight: torch.Tensor, config: LinearConfig, pdl: bool) -> dict[str, object]:
    num_columns = weight.shape[1]
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "VECTOR": 16 // weight.element_size(),
        "NUM_STAGES": config.num_stages,
        "HAS_SCALE": weight.dtype == FP8,
        "EVEN_K": num_columns % config.block_k == 0,
        "PDL": pdl,
        "num_warps": config.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    }


def _tiles_options(weight: torch.Tensor, config: LinearConfig, pdl: bool) -> dict[str, object]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_T": config.block_t,
        "NUM_SPLITS": config.num_splits,
        "GROUP": GROUP,
        "HAS_SCALE": weight.dtype == FP8,
        "EVEN_K": weight.shape[1] % config.block_k == 0,
        "PDL": pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,  # a part times its scale is rounded before it is added, wherever that happens
        **({"launch_pdl": True} if pdl else {}),
    }


def _tiles(x: torch.Tensor, weight: torch.Tensor, config: LinearConfig) -> tuple[object, object]:
    """Descriptors for the copy engine, which wants rows of whole 16 bytes; None where pointers do."""
    if not config.tma or weight.shape[1] * weight.element_size() % 16 or x.shape[1] * x.element_size() % 16:
        return None, None
    return (
        TensorDescriptor.from_tensor(x, [config.block_t, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


def _matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,  # [T, N] half
    quantized: Quantized | None,
    pdl: bool,
) -> None:
    if scale is None:
        torch.mm(x, weight.t(), out=out)
        return
    assert quantized is not None and out.dtype == torch.bfloat16, (
        f"an fp8 product into {out.dtype} needs a workspace, and bf16"
    )
    num_tokens, num_columns = x.shape
    values = quantized.values[: num_tokens * num_columns].view(num_tokens, num_columns)
    scales = quantized.scales[:num_tokens].view(num_tokens, 1)
    quantize(x, values, scales, pdl=pdl)
    torch._scaled_mm(values, weight.t(), scales, scale.view(1, -1), out_dtype=out.dtype, out=out)


@triton.jit
def quantize_kernel(x, values, scales, num_columns, BLOCK: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    row = tl.load(x + token * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(row), axis=0)
    scale = tl.where(largest > 0.0, largest / MAX, 1.0)
    tl.store(values + token * num_columns + columns, (row / scale).to(values.dtype.element_ty), mask=mask)
    tl.store(scales + token, scale)


def quantize(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *, pdl: bool = False) -> None:
    """values = x / scale as e4m3, scale the row's largest magnitude / 448: x, values [T, K], scales [T, 1] float32"""
    num_tokens, num_columns = x.shape
    quantize_kernel[(num_tokens,)](
        x,
        values,
        scales,
        num_columns,
        BLOCK=triton.next_power_of_2(num_columns),
        MAX=448.0,
        PDL=pdl,
        num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )
