"""Prefix cache: which full block holds which tokens.

Owns the index from a chained keyed hash over (salt, parent, tokens) to the block with that content. Only full, computed
blocks are in it; a hit compares the tokens and the parent, so that a collision is a miss and never a wrong answer. Knows
nothing of who holds a block or when it is evicted; that is `blocks`.
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

from jilju.engine.sequence import Sequence

KEY_BYTES = 16  # two contents collide by chance once in 2^64 blocks; on purpose only with the hash key in hand

Hash = Callable[[bytes], bytes]


class _Entry(NamedTuple):
    key: bytes
    parent: bytes
    tokens: bytes  # int32 [block_size]


class PrefixIndex:
    def __init__(self, block_size: int, hash_key: bytes = b"", digest: Hash | None = None):
        self._block_size = block_size
        self._digest: Hash = digest or (lambda data: blake2b(data, digest_size=KEY_BYTES, key=hash_key).digest())
        self._block_of: dict[bytes, int] = {}
        self._entry_of: dict[int, _Entry] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    def match(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Blocks that hold the longest known prefix of the sequence within its first max_tokens tokens, in order."""
        block_ids: list[int] = []
        for index in range(max_tokens // self._block_size):
            parent, tokens, key = self._content(sequence, index)
            block_id = self._block_of.get(key)
            if block_id is None or not self._holds(block_id, parent, tokens):
                break
            block_ids.append(block_id)
        return block_ids

    def add(self, sequence: Sequence, index: int) -> None:
        """Enter block `index` of the sequence, which is full and computed. A content that is known keeps its first block."""
        parent, tokens, key = self._content(sequence, index)
        if key not in self._block_of:
            block_id = sequence.block_ids[index]
            assert block_id not in self._entry_of, f"block {block_id} is entered for a second content"
            self._block_of[key] = block_id
            self._entry_of[block_id] = _Entry(key, parent, tokens)

    def remove(self, block_id: int) -> None:
        entry = self._entry_of.pop(block_id, None)
        if entry is not None:
            del self._block_of[entry.key]

    def check(self) -> None:
        """Deep audit, for tests."""
        assert len(self._block_of) == len(self._entry_of), f"{len(self._block_of)} keys, {len(self._entry_of)} entries"
        for block_id, entry in self._entry_of.items():
            assert self._block_of[entry.key] == block_id, f"block {block_id} is not the one of its key"
            assert len(entry.tokens) == 4 * self._block_size, f"block {block_id} is entered but not full"
            assert self._digest(entry.parent + entry.tokens) == entry.key, (
                f"block {block_id}: key differs from its content"
            )

    def _content(self, sequence: Sequence, index: int) -> tuple[bytes, bytes, bytes]:
        """Parent key, tokens and key of a full block; keys are made once a sequence and kept, its tokens never change."""
        keys = sequence.block_keys
        assert index <= len(keys), f"block {index} is asked for before block {len(keys)}"
        start = index * self._block_size
        tokens = sequence.tokens[start : start + self._block_size].tobytes()
        parent = keys[index - 1] if index else self._digest(b"salt" + sequence.request.salt)
        if index == len(keys):
            keys.append(self._digest(parent + tokens))
        return parent, tokens, keys[index]

    def _holds(self, block_id: int, parent: bytes, tokens: bytes) -> bool:
        entry = self._entry_of[block_id]
        return entry.tokens == tokens and entry.parent == parent
