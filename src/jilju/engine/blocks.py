"""Blocks: who holds which part of the KV cache.

Owns the pool, the reference counts and the order of reuse. Knows nothing of backends, steps, text or time. A block is
free (nobody holds it, its content means nothing), cached (nobody holds it, its content is in the prefix index) or held.
Invariant after every commit: num_free + num_cached + num_held == num_blocks.
"""

from jilju.engine.prefix import PrefixIndex


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int, prefix: PrefixIndex):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_held = 0
        self._prefix = prefix
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last given back is the next taken
        self._cached: dict[int, None] = {}  # in order of release: the first is evicted first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def free_ids(self) -> list[int]:
        return list(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def is_cached(self, block_id: int) -> bool:
        return block_id in self._cached

    def take(self) -> int:
        """A block to write to, held once: a free one, or else the cached one that was released first."""
        if self._free:
            block_id = self._free.pop()
        else:
            assert self._cached, f"no block is free or cached, {self.num_held} of {self.num_blocks} are held"
            block_id = next(iter(self._cached))
            del self._cached[block_id]
            self._prefix.remove(block_id)
        self._refs[block_id] = 1
        self.num_held += 1
        return block_id

    def share(self, block_id: int) -> None:
        """One more holder of a block whose content is in the prefix index."""
        assert block_id in self._prefix, f"block {block_id} is shared but not in the prefix index"
        if self._refs[block_id] == 0:
            del self._cached[block_id]
            self.num_held += 1
        self._refs[block_id] += 1

    def release(self, block_ids: list[int]) -> None:
        """One holder less of each block of a sequence.

        They are given back last block first: among cached blocks tails are then evicted before what they continue, so
        that prefixes, which more requests can share and without which a tail is no use, live longest.
        """
        for block_id in reversed(block_ids):
            assert self._refs[block_id] > 0, f"block {block_id} is released but nobody holds it"
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self.num_held -= 1
                if block_id in self._prefix:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def discard(self, block_ids: list[int]) -> None:
        """As release, for blocks whose content is not to be trusted: they leave the prefix index first."""
        for block_id in block_ids:
            self._prefix.remove(block_id)
        self.release(block_ids)

    def is_balanced(self) -> bool:
        return len(self._free) + len(self._cached) + self.num_held == self.num_blocks

    def describe(self) -> str:
        return f"{self.num_free} free + {self.num_cached} cached + {self.num_held} held, of {self.num_blocks}"

    def check(self, tables: list[list[int]]) -> None:
        """Deep audit against the block tables of all sequences, for tests."""
        refs = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table names a block twice: {table}"
            for block_id in table:
                refs[block_id] += 1
        assert refs == self._refs, f"references {self._refs}, tables say {refs}"
        assert self.num_held == sum(1 for n in refs if n), (
            f"{self.num_held} held, tables say {sum(1 for n in refs if n)}"
        )
        assert self.is_balanced(), self.describe()
        idle = self._free + list(self._cached)
        assert sorted(idle) == [b for b in range(self.num_blocks) if not refs[b]], (
            "a block is idle twice, or idle and held"
        )
        assert all(b in self._prefix for b in self._cached), "a cached block is not in the prefix index"
        assert not any(b in self._prefix for b in self._free), "a free block is in the prefix index"
        self._prefix.check()
