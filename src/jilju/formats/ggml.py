"""The number formats of GGUF tensors: ids, block sizes and bytes.

Source: the GGUF specification and ggml's public type table. Only the formats listed here are read; any other id is
refused by name. Unpacking to float32 is `formats/quants.py`. Knows nothing of files.
"""

from enum import IntEnum
from typing import NamedTuple


class GgmlType(IntEnum):
    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


class BlockLayout(NamedTuple):
    block_elements: int  # elements that share one block
    block_bytes: int  # bytes of that block, scales included


BLOCK_LAYOUTS: dict[GgmlType, BlockLayout] = {
    GgmlType.F32: BlockLayout(1, 4),
    GgmlType.F16: BlockLayout(1, 2),
    GgmlType.BF16: BlockLayout(1, 2),
    GgmlType.Q4_0: BlockLayout(32, 2 + 16),  # d, 32 nibbles
    GgmlType.Q4_1: BlockLayout(32, 2 + 2 + 16),  # d, m, 32 nibbles
    GgmlType.Q5_0: BlockLayout(32, 2 + 4 + 16),  # d, 32 high bits, 32 nibbles
    GgmlType.Q5_1: BlockLayout(32, 2 + 2 + 4 + 16),  # d, m, 32 high bits, 32 nibbles
    GgmlType.Q8_0: BlockLayout(32, 2 + 32),  # d, 32 bytes
    GgmlType.Q4_K: BlockLayout(256, 2 + 2 + 12 + 128),  # d, dmin, 8 x (6-bit scale, 6-bit min), nibbles
    GgmlType.Q5_K: BlockLayout(256, 2 + 2 + 12 + 32 + 128),  # as Q4_K, with 256 high bits
    GgmlType.Q6_K: BlockLayout(256, 128 + 64 + 16 + 2),  # low nibbles, high pairs, 16 int8 scales, d
}


def row_bytes(type_: GgmlType, num_columns: int) -> int:
    """Bytes of one row of `num_columns` elements. The block size must divide the row."""
    block_elements, block_bytes = BLOCK_LAYOUTS[type_]
    assert num_columns % block_elements == 0, (
        f"{num_columns} columns are no multiple of {type_.name}'s block of {block_elements}"
    )
    return num_columns // block_elements * block_bytes
