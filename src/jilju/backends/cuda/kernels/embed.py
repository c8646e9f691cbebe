"""Embedding: rows of the table of token embeddings, half or fp8 with a scale a row, as float32.

Knows nothing of what the ids mean.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # columns a program: eight for each of 128 threads


@triton.jit
def embed_kernel(
    table,  # [vocab, width]
    table_scale,  # float32 [vocab], or none
    ids,  # int32 [num_tokens]
    out,  # float32 [num_tokens, width]
    scale,
    width,
    HAS_TABLE_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    id_ = tl.load(ids + token).to(tl.int64)
    value = tl.load(table + id_ * width + columns, mask=mask).to(tl.float32)
    if HAS_TABLE_SCALE:
        value *= tl.load(table_scale + id_)
    tl.store(out + token * width + columns, value * scale, mask=mask)


def embed(
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    table_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out [T, D] float32 = table[ids] (* table_scale[ids]) * scale; table [V, D] half, or float8 with table_scale [V]"""
    num_tokens, width = out.shape
    assert table.shape[1] == width and len(ids) == num_tokens and table.is_contiguous(), f"{table.shape}, {out.shape}"
    if not num_tokens:
        return
    embed_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
        table, table_scale, ids, out, scale, width, HAS_TABLE_SCALE=table_scale is not None,
        BLOCK=BLOCK, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
