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
    if mode == "invariant":
        return AttentionConfig(64, 32 if wide else 64, 256, 8 if wide else 4, 2 if wide else 3)
    if is_prefill:
        return AttentionConfig(128, 32 if wide else 64, 0, 8, 2 if wide else 3)
    block_m = 16 if group <= 16 else 64
    split_keys = 128 if num_rows <= 4 else 256 if num_rows <= 16 else 512
    return AttentionConfig(block_m, 32 if wide else 64, split_keys, 4, 3)
