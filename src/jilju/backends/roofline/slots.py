"""Slots: the simulated KV cache, a word of the hash chain in each slot of each block.

Owns the words, and per block their sum with weights of their places in it, so that the blocks before a row are read as one
number each, through its block table. A row reads what lay in its blocks before the step, and of the block that it begins
in, the slots before its start alone. Knows nothing of sampling, time or sequences.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jilju.backends.roofline.chain import (
    FIRST,
    MASK,
    RATIO,
    SECOND,
    Words,
    mixed_words,
    position_keys,
    powers,
    token_keys,
)
from jilju.plan import Batch, Limits

POISON = 0xDEADDEADDEADDEAD

Ints = npt.NDArray[np.int32]


class Slots:
    def __init__(self, limits: Limits):
        self._num_blocks, self._block_size = limits.num_blocks, limits.block_size
        self._max_context = limits.max_context
        num_columns = -(-limits.max_context // limits.block_size)

        self._powers = powers(RATIO, num_columns * limits.block_size)  # weight of each position
        self._position_keys = position_keys(limits.max_context)
        self._factors = self._powers[:: limits.block_size].copy()  # of a block's sum, by its column
        self._weights = self._powers[: limits.block_size].copy()  # of a slot, by its place in the block
        self._weights_before = np.tril(np.broadcast_to(self._weights, (limits.block_size, limits.block_size)), -1)
        self._columns = np.arange(num_columns, dtype=np.int32)
        self._rows = np.arange(limits.max_rows)

        self._words = np.empty((limits.num_blocks, limits.block_size), np.uint64)
        self._flat_words = self._words.reshape(-1)
        self._sums = np.zeros(limits.num_blocks + 1, np.uint64)  # the last stands for no block and stays 0
        self.poison(range(limits.num_blocks))

    def poison(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks that nobody holds."""
        blocks = np.array(block_ids, np.intp)
        self._words[blocks] = POISON
        self._sum_blocks(blocks)

    def word(self, block_id: int, offset: int) -> int:
        return int(self._words[block_id, offset])

    def overwrite(self, block_id: int, offset: int, word: int) -> None:
        """Change one slot behind the engine's back."""
        self._words[block_id, offset] = word & MASK
        self._sum_blocks(np.array([block_id], np.intp))

    def append(self, batch: Batch) -> Words:
        """The words of the batch's tokens, which are then in their slots: [num_tokens]"""
        starts, counts, tables = batch.starts, batch.counts, batch.block_tables
        num_rows, num_tokens = batch.num_rows, batch.num_tokens
        each = counts.tolist()
        assert min(each) >= 1 and sum(each) == num_tokens, f"rows of {each} tokens, the batch has {num_tokens}"
        ends = starts + counts
        longest = max(ends.tolist())
        assert longest <= self._max_context, f"a row ends at {longest}; the context is {self._max_context}"
        assert tables.shape[1] * self._block_size >= longest, f"{tables.shape[1]} blocks do not cover {longest} tokens"

        has_chunks = num_tokens > num_rows  # some row has more than one token
        rows, positions = self._rows[:num_rows], starts
        if has_chunks:
            firsts = np.cumsum(counts, dtype=np.intp) - counts
            rows = np.repeat(rows, counts)
            positions = np.arange(num_tokens) - (firsts - starts)[rows]
        columns = positions // self._block_size
        offsets = positions - columns * self._block_size
        blocks = tables[rows, columns]
        self._check_writes(blocks, offsets)

        keys = token_keys(batch.token_ids)
        keys += self._position_keys.take(positions)
        if not has_chunks:
            words = self._sums_before(tables, columns, blocks, offsets)
            words += keys
            words = mixed_words(words)
            self._words[blocks, offsets] = words
            self._sum_blocks(blocks)
            return words
        before = self._sums_before(tables, columns[firsts], blocks[firsts], offsets[firsts])
        words = np.empty(num_tokens, np.uint64)
        words[firsts] = mixed_words(before + keys[firsts])
        for row in np.flatnonzero(counts > 1).tolist():
            first, start, end = int(firsts[row]), int(starts[row]), int(ends[row])
            self._extend(int(before[row]), start, words[first : first + end - start], keys[first : first + end - start])
        self._words[blocks, offsets] = words
        is_last = offsets == self._block_size - 1  # of the row's tokens in a block
        is_last[firsts + (counts - 1)] = True
        self._sum_blocks(blocks[is_last])
        return words

    def _extend(self, before: int, start: int, words: Words, keys: Words) -> None:
        """Fill `words` of a row from the second on; `before` is the sum before the first. The formulas of the chain, in line."""
        end = start + len(words)
        word, weight = int(words[0]), int(self._powers[start])
        made = []
        for key, next_weight in zip(keys[1:].tolist(), self._powers[start + 1 : end].tolist(), strict=True):
            before = before + weight * word & MASK
            x = before + key & MASK
            x = (x ^ x >> 32) * FIRST & MASK
            x = (x ^ x >> 29) * SECOND & MASK
            word, weight = x ^ x >> 32, next_weight
            made.append(word)
        words[1:] = made

    def _sums_before(self, tables: Ints, columns: Ints, blocks: Ints, offsets: Ints) -> Words:
        """The weighted sums of all slots before the rows' first tokens, which are at these places: [num_rows]"""
        num_full = max(columns.tolist())
        is_full = self._columns[:num_full] < columns[:, None]
        ids = np.where(is_full, tables[:, :num_full], self._num_blocks)
        assert num_full == 0 or ids.min() >= 0, "a row lacks a block that it reads"
        sums: Words = self._sums.take(ids) @ self._factors[:num_full]
        if self._block_size > 1:
            part = np.vecdot(self._words.take(blocks, axis=0), self._weights_before.take(offsets, axis=0))
            part *= self._factors.take(columns)
            sums += part
        return sums

    def _check_writes(self, blocks: Ints, offsets: Ints) -> None:
        slots = (blocks * self._block_size + offsets).tolist()
        assert min(slots) >= 0, "a row lacks a block that it writes"
        assert max(slots) < len(self._flat_words), f"there are {self._num_blocks} blocks; a row writes beyond them"
        assert len(set(slots)) == len(slots), "two tokens of a step write one slot"

    def _sum_blocks(self, blocks: npt.NDArray[np.integer]) -> None:
        self._sums[blocks] = np.vecdot(self._words.take(blocks, axis=0), self._weights)
