"""What a pass of the model reads: arrays of a step's tokens, rows and tiles, on the device.

Owns how a batch becomes tiles of attention, and over how many programs a row's keys are split. Knows nothing of kernels,
graphs or sampling.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jilju.backends.cuda.attention_configs import AttentionConfig
from jilju.backends.cuda.lowering import Decoder
from jilju.backends.cuda.memory import PARTIAL_TOKENS
from jilju.backends.cuda.run_ahead import first_tokens
from jilju.backends.cuda.uploads import Uploads
from jilju.plan import Batch, Limits

SPLIT_TILES = 256  # keys are split over more programs where a step has fewer tiles than fill the device


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Arrays of one pass, on the device. All int32."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T], -1: written nowhere
    starts: torch.Tensor  # [R]
    counts: torch.Tensor  # [R]
    first_tokens: torch.Tensor  # [R]
    tables: torch.Tensor  # [R, blocks]
    tile_rows: torch.Tensor  # [tiles], -1: nothing
    tile_tokens: torch.Tensor  # [tiles], first token of the tile in its row
    num_splits: int  # of attention's keys over programs; 1: one walks all of them
    is_prefill: bool

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class InputMaker:
    """`attention_config(num_rows, is_prefill)` says how attention is tiled; `buffers` are those of memory.buffers()."""

    def __init__(
        self,
        decoder: Decoder,
        buffers: Mapping[str, torch.Tensor],
        uploads: Uploads,
        limits: Limits,
        attention_config: Callable[[int, bool], AttentionConfig],
    ):
        op = decoder.layers[0].attention
        self._num_heads, self._num_kv_heads = op.num_heads, op.num_kv_heads
        self._buffers, self._uploads, self._limits = buffers, uploads, limits
        self._attention_config = attention_config

    def decode(self, bucket: int, num_splits: int) -> StepInputs:
        """The arrays that graphs read, of which expand() fills all but two."""
        b = self._buffers
        return StepInputs(
            token_ids=b["token_ids"][:bucket], positions=b["positions"][:bucket], slots=b["slots"][:bucket],
            starts=b["positions"][:bucket], counts=b["counts"][:bucket], first_tokens=b["decode_rows"][:bucket],
            tables=b["tables"][:bucket], tile_rows=b["tile_rows"][:bucket], tile_tokens=b["tile_tokens"][:bucket],
            num_splits=num_splits, is_prefill=False,
        )  # fmt: skip

    def mixed(self, batch: Batch) -> StepInputs:
        """Rows of any number of tokens: every tile holds neighbouring tokens of one row."""
        firsts, block_size = first_tokens(batch), self._limits.block_size
        per_tile = self._attention_config(batch.num_rows, True).tokens_per_tile(self._num_heads // self._num_kv_heads)
        rows = np.repeat(np.arange(batch.num_rows), batch.counts)
        positions = np.arange(batch.num_tokens) - firsts[rows] + batch.starts[rows]
        slots = batch.block_tables[rows, positions // block_size] * block_size + positions % block_size
        num_tiles = -(-batch.counts // per_tile)
        tile_rows = np.repeat(np.arange(batch.num_rows), num_tiles)
        tile_tokens = (np.arange(len(tile_rows)) - (np.cumsum(num_tiles) - num_tiles)[tile_rows]) * per_tile
        arrays = (
            batch.token_ids, positions, slots, batch.starts, batch.counts, firsts, batch.block_tables, tile_rows, tile_tokens,
        )  # fmt: skip
        num_splits = self.num_splits(len(tile_rows), batch, is_prefill=True)
        return self._put([a.astype(np.int32) for a in arrays], num_splits)

    def nothing(self, num_tokens: int, num_splits: int) -> StepInputs:
        """Of a prompt of that size that is written nowhere and attends to nothing."""
        zeros, nowhere = np.zeros(num_tokens, np.int32), np.full(num_tokens, -1, np.int32)
        row = zeros[:1]
        return self._put((zeros, zeros, nowhere, row, row, row, row[:, None], nowhere[:1], row), num_splits)

    def can_split(self, num_rows: int, is_prefill: bool) -> bool:
        """num_rows: of a prefill its tokens"""
        if is_prefill and num_rows > PARTIAL_TOKENS:
            return False
        return self._attention_config(num_rows, is_prefill).split_keys > 0

    def num_splits(self, num_tiles: int, batch: Batch, is_prefill: bool = False) -> int:
        """Programs over which the keys of a row are split: a power of two, 1 where the tiles alone fill the device."""
        if num_tiles * self._num_kv_heads >= SPLIT_TILES or batch.num_tokens > PARTIAL_TOKENS:
            return 1
        longest = int((batch.starts + batch.counts).max())
        wanted: int = 1 << (self._attention_config(num_tiles, is_prefill).num_splits(longest) - 1).bit_length()
        num_tokens = max(num_tiles, batch.num_tokens)
        return wanted if wanted * num_tokens * self._num_heads * 2 <= len(self._buffers["attention_stats"]) else 1

    def _put(self, arrays: Sequence[np.ndarray], num_splits: int) -> StepInputs:
        """In the order of StepInputs' fields."""
        token_ids, positions, slots, starts, counts, firsts, tables, tile_rows, tile_tokens = self._uploads.put(arrays)
        return StepInputs(
            token_ids, positions, slots, starts, counts, firsts, tables, tile_rows, tile_tokens, num_splits, True
        )
