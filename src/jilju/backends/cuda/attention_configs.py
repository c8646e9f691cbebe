"""Which tiles attention takes: by mode, head size and number of rows, from measurements, without a GPU or torch.

Owns AttentionConfig and what follows from one: how many tokens a tile holds, how many splits a row's keys make. Knows
nothing of tensors.
"""

from typing import Literal

import msgspec

Mode = Literal["invariant", "fast"]


class AttentionConfig(msgspec.Struct, frozen=True):
    """A tile is block_m query rows (tokens times the heads that share a KV head) by block_n keys."""

    block_m: int
    block_n: int
    split_keys: (
        int  # a multiple of block_n: keys [s * split_keys, (s + 1) * split_keys) are summed apart. 0: all at once
    )
    num_warps: int
    num_stages: int

    def tokens_per_tile(self, group: int) -> int:
        return self.block_m // group

    def num_splits(self, num_keys: int, num_tokens: int = 1, window: int = 0) -> int:
        """Splits that a tile of num_tokens has at most, where num_keys is the number of its last token's keys and all before."""
        if self.split_keys == 0:
            return 1
        most = -(-num_keys // self.split_keys)
        if window:
            most = min(most, -(-(window + num_tokens - 2) // self.split_keys) + 1)
        return most


def attention_config(
    mode: Mode, head_dim: int, group: int, num_rows: int, is_prefill: bool, kv_dtype: str
) -> AttentionConfig:
    """kv_dtype "half" or "float8". In invariant mode num_rows and is_prefill change nothing: one tile gives the same bits to all."""
    wide = head_dim > 128
    block_n, num_stages = (32, 2) if wide else (64, 3)
    rows = max(64, 1 << (group - 1).bit_length())  # what wgmma multiplies at once, or all heads of a token
    is_fp8 = kv_dtype == "float8"
    # Measured on an H200 at 1k of context with heads of 128, four of them to a KV head.
    if mode == "invariant":
        if is_fp8 and not wide and rows == 64:
            return AttentionConfig(rows, 128, 256, 4, 2)
        return AttentionConfig(rows, block_n, 256, 8 if wide or rows > 64 else 4, num_stages)
    if is_prefill:
        if is_fp8 and not wide and rows == 64:
            return AttentionConfig(rows, 128, 0, 4, 2)
        return AttentionConfig(max(128, rows), block_n, 0, 8, num_stages)
    block_m = 16 if group <= 16 else rows
    if num_rows <= 4:
        return AttentionConfig(block_m, block_n, 128, 4, 3)
    if num_rows < 32:
        return AttentionConfig(block_m, 2 * block_n if is_fp8 and group <= 16 else block_n, 256, 4, 3)
    # enough rows to fill the device: one program walks all keys of a row
    if is_fp8 or num_rows < 64 or wide or group > 16:
        return AttentionConfig(block_m, block_n, 0, 4, 3)
    return AttentionConfig(block_m, 32, 0, 2, 4)
