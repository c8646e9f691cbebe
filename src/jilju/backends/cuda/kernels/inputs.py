"""Inputs of a decode step: from the arrays that were uploaded to those that a captured graph reads.

One program a row of the graph's bucket. Rows beyond the step's are made to do nothing: no slot, no tile.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "width", "vocab_size"])
def _expand(
    heads, given_tables, sampled_ids, token_ids, positions, slots, counts, tile_rows, tables, num_rows, width, vocab_size,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    is_row = row < num_rows
    source = tl.load(heads + row, mask=is_row, other=-1)
    token_id = tl.load(heads + num_rows + row, mask=is_row, other=0)
    position = tl.load(heads + 2 * num_rows + row, mask=is_row, other=0)
    sampled = tl.load(sampled_ids + tl.maximum(source, 0), mask=is_row & (source >= 0), other=0)
    sampled = tl.minimum(tl.maximum(sampled, 0), vocab_size - 1)  # of a row without finite logits it may be anything
    tl.store(token_ids + row, tl.where(source >= 0, sampled, token_id))
    tl.store(positions + row, position)
    block = tl.load(given_tables + row * width + position // BLOCK_SIZE, mask=is_row, other=0)
    tl.store(slots + row, tl.where(is_row, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(counts + row, tl.where(is_row, 1, 0))
    tl.store(tile_rows + row, tl.where(is_row, row, -1))
    for first in range(0, width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = is_row & (places < width)
        entries = tl.load(given_tables + row * width + places, mask=inside, other=0)
        tl.store(tables + row.to(tl.int64) * TABLE_WIDTH + places, entries, mask=inside)


def expand(
    heads: torch.Tensor,
    given_tables: torch.Tensor,
    sampled_ids: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    tile_rows: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
    vocab_size: int,
) -> None:
    """heads int32 [3, num_rows]: of each row the place of its id among sampled_ids or -1, the id otherwise, its position;
    given_tables int32 [num_rows, width]. All others have the bucket's length: int32 [bucket], tables [bucket, max_blocks]."""
    num_rows, width = given_tables.shape
    _expand[(len(token_ids),)](
        heads, given_tables, sampled_ids, token_ids, positions, slots, counts, tile_rows, tables, num_rows, width, vocab_size,
        TABLE_WIDTH=tables.stride(0), BLOCK_SIZE=block_size, BLOCK=128, num_warps=4,
    )  # fmt: skip
