"""The KV cache as the kernels see it: one tensor for all layers, a view a layer, and copies of single slots.

Half types are stored as they are. float8_e4m3fn goes with a float32 scale a token and head: x = stored * scale, where
scale = max|x| / 448 over the head, 0 if that is below the smallest normal number. Knows nothing of block tables or rows:
a slot is block_id * block_size + offset.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class KvLayer(NamedTuple):
    """One layer's part of the cache."""

    keys: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim], a half type or float8_e4m3fn
    values: torch.Tensor
    key_scales: torch.Tensor | None  # float32 [num_blocks, num_kv_heads, block_size], float8 alone
    value_scales: torch.Tensor | None


def kv_layer(cache: torch.Tensor, scales: torch.Tensor | None, layer: int) -> KvLayer:
    """The views of one layer of cache [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim] and of scales, which
    have no last dimension."""
    if scales is None:
        return KvLayer(cache[layer, 0], cache[layer, 1], None, None)
    return KvLayer(cache[layer, 0], cache[layer, 1], scales[layer, 0], scales[layer, 1])


@triton.jit
def on_fp8_grid(x):
    """x rounded to the nearest e4m3 number, ties to even, |x| <= 448: by hand, since the interpreter's conversion does it wrong."""
    binade = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)  # 2^-6 is the smallest normal number
    shift = (
        binade.to(tl.float32, bitcast=True) * 1572864.0
    )  # 1.5 * 2^20: what lies below three bits of x falls off the sum
    return (x + shift) - shift


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["sources", "targets"])
def copy_slots_kernel(
    cache,
    scales,
    sources,
    targets,
    num_blocks,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = tl.load(sources + tl.program_id(0))
    target = tl.load(targets + tl.program_id(0))
    if (source < 0) | (target < 0):
        return
    head = tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    plane = tl.program_id(1).to(tl.int64) * num_blocks  # a layer's keys, or its values
    from_row = ((plane + source // BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + source % BLOCK_SIZE
    to_row = ((plane + target // BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + target % BLOCK_SIZE
    mask = (head < KV_HEADS)[:, None] & (column < DIM)[None, :]
    x = tl.load(cache + from_row[:, None] * DIM + column[None, :], mask=mask)
    tl.store(cache + to_row[:, None] * DIM + column[None, :], x, mask=mask)
    if HAS_SCALES:
        tl.store(scales + to_row, tl.load(scales + from_row, mask=head < KV_HEADS), mask=head < KV_HEADS)


def copy_slots(
    cache: torch.Tensor, scales: torch.Tensor | None, sources: torch.Tensor, targets: torch.Tensor, *, pdl: bool = False
) -> None:
    """For each i, slot targets[i] becomes slot sources[i], K and V (and scales) of all layers; -1 in either: nothing.

    cache and scales as in `kv_layer`; sources, targets int32 [n]. No slot may be a target and besides a source or a target.
    """
    num_layers, _, num_blocks, num_kv_heads, block_size, dim = cache.shape
    bits = cache.view(torch.uint8 if cache.element_size() == 1 else torch.int16)
    copy_slots_kernel[(len(sources), 2 * num_layers)](
        bits,
        bits if scales is None else scales,
        sources,
        targets,
        num_blocks,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        DIM=dim,
        HAS_SCALES=scales is not None,
        HEADS=triton.next_power_of_2(num_kv_heads),
        COLUMNS=triton.next_power_of_2(dim),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
