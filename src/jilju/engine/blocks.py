"""Blocks: who holds which part of the KV cache.

Owns the pool, the reference counts and the order of eviction. Knows nothing of backends, steps, text or time. A block is
free (nobody holds it, its content means nothing), cached (nobody holds it, its content is in the prefix index) or held.
Invariant after every commit: num_free + num_cached + num_held == num_blocks.

Eviction takes the block that was released first, with two exceptions. A block whose content was found again is hot and
outlives those that were not, so that a crowd of prompts seen once does not flush a shared one; hot blocks are at most half of
the pool, then a tenant's oldest is like any other. And no tenant loses its last cached blocks to another: half of the pool,
shared out evenly, is each one's floor, as long as anything else can be evicted.
"""

from jilju.engine.prefix import PrefixIndex


class _Cached:
    """The cached blocks of one tenant, in order of release; values are numbers of releases."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.hot: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.seen) + len(self.hot)


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int, prefix: PrefixIndex):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_held = 0
        self.num_cached = 0
        self._prefix = prefix
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last given back is the next taken
        self._cached: dict[str, _Cached] = {}  # by tenant, none of them empty
        self._tenant_of: dict[int, str] = {}  # of each cached block
        self._is_hot = [False] * num_blocks  # its content was found again
        self._num_hot = 0  # of those that are cached
        self._num_releases = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        return len(self._free) + self.num_cached

    @property
    def free_ids(self) -> list[int]:
        return list(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_holders(self, block_id: int) -> int:
        return self._refs[block_id]

    def is_cached(self, block_id: int) -> bool:
        return block_id in self._tenant_of

    def take(self, tenant: str = "") -> int:
        """A block to write to, held once: a free one, or else a cached one, which is evicted."""
        if self._free:
            block_id = self._free.pop()
        else:
            assert self.num_cached, f"no block is free or cached, {self.num_held} of {self.num_blocks} are held"
            block_id = self._choose(tenant)
            self._uncache(block_id)
            self._prefix.remove(block_id)
        self._refs[block_id] = 1
        self._is_hot[block_id] = False
        self.num_held += 1
        return block_id

    def share(self, block_id: int) -> None:
        """One more holder of a block whose content is in the prefix index."""
        assert block_id in self._prefix, f"block {block_id} is shared but not in the prefix index"
        if self._refs[block_id] == 0:
            self._uncache(block_id)
            self.num_held += 1
        self._refs[block_id] += 1
        self._is_hot[block_id] = True

    def release(self, block_ids: list[int], tenant: str = "") -> None:
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
                    self._cache(block_id, tenant)
                else:
                    self._free.append(block_id)

    def discard(self, block_ids: list[int], num_trusted: int = 0, tenant: str = "") -> None:
        """As release, for blocks whose content, but for the first `num_trusted`, is not to be trusted: they leave the prefix
        index first."""
        for block_id in block_ids[num_trusted:]:
            self._prefix.remove(block_id)
        self.release(block_ids, tenant)

    def forget(self, block_id: int) -> None:
        """The content of a block is of no use to anybody: it leaves the index, and is free unless somebody holds it."""
        self._prefix.remove(block_id)
        if block_id in self._tenant_of:
            self._uncache(block_id)
            self._free.append(block_id)

    def tenant_floor(self) -> int:
        """Cached blocks that a tenant keeps while others have more."""
        return self.num_blocks // (2 * max(1, len(self._cached)))

    def _choose(self, tenant: str) -> int:
        """The cached block to evict for `tenant`."""
        allowed = list(self._cached.items())
        if len(allowed) > 1:
            floor = self.tenant_floor()
            allowed = [(name, cached) for name, cached in allowed if name == tenant or len(cached) > floor] or allowed
        queues = [cached.seen for _, cached in allowed if cached.seen] or [cached.hot for _, cached in allowed]
        oldest = min([next(iter(queue.items())) for queue in queues], key=lambda item: item[1])
        return oldest[0]

    def _cache(self, block_id: int, tenant: str) -> None:
        cached = self._cached.setdefault(tenant, _Cached())
        self._num_releases += 1
        self._tenant_of[block_id] = tenant
        self.num_cached += 1
        if not self._is_hot[block_id]:
            cached.seen[block_id] = self._num_releases
            return
        cached.hot[block_id] = self._num_releases
        self._num_hot += 1
        if 2 * self._num_hot > self.num_blocks:
            oldest = next(iter(cached.hot))
            del cached.hot[oldest]
            self._num_hot -= 1
            self._is_hot[oldest] = False
            cached.seen[oldest] = self._num_releases

    def _uncache(self, block_id: int) -> None:
        tenant = self._tenant_of.pop(block_id)
        cached = self._cached[tenant]
        if cached.seen.pop(block_id, None) is None:
            del cached.hot[block_id]
            self._num_hot -= 1
        if not cached:
            del self._cached[tenant]
        self.num_cached -= 1

    def is_balanced(self) -> bool:
        return len(self._free) + self.num_cached + self.num_held == self.num_blocks

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
        num_held = sum(1 for n in refs if n)
        assert self.num_held == num_held, f"{self.num_held} held, tables say {num_held}"
        assert self.is_balanced(), self.describe()
        cached = [b for c in self._cached.values() for queue in (c.seen, c.hot) for b in queue]
        num_hot = sum(len(c.hot) for c in self._cached.values())
        assert num_hot == self._num_hot and 2 * num_hot <= self.num_blocks, f"{num_hot} hot, counted {self._num_hot}"
        assert len(cached) == self.num_cached and set(cached) == set(self._tenant_of), "cached blocks are miscounted"
        assert sorted(self._free + cached) == [b for b in range(self.num_blocks) if not refs[b]], (
            "a block is idle twice, or idle and held"
        )
        assert all(b in self._prefix for b in cached), "a cached block is not in the prefix index"
        assert not any(b in self._prefix for b in self._free), "a free block is in the prefix index"
        self._prefix.check()
