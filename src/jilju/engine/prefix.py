"""Prefix cache: which full block holds which tokens.

Owns the index from a chained keyed hash over (salt, parent, tokens) to the block with that content. Only full, computed
blocks are in it. A hit compares the tokens and the entry that it continues, back to the salt, so a collision of hashes is a
miss and never a wrong answer. Knows nothing of who holds a block or when it is evicted; that is `blocks`.

Why a match ended where it did is asked of `known_texts`, which remembers what was here.
"""

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import NamedTuple

from jilju.engine.known_texts import KnownTexts
from jilju.engine.request import CacheMiss
from jilju.engine.sequence import Sequence

KEY_BYTES = 16  # two contents collide by chance once in 2^64 blocks; on purpose only with the hash key in hand

Hash = Callable[[bytes], bytes]


class _Entry(NamedTuple):
    id: int  # never used again, unlike the block's
    key: bytes
    parent: bytes | int  # id of the entry that it continues; the salt, if it is the first block
    tokens: bytes  # int32 [block_size]
    parent_key: bytes
    tenant: str  # who computed it


class PrefixIndex:
    def __init__(self, block_size: int, hash_key: bytes = b"", digest: Hash | None = None):
        self._block_size = block_size
        self._digest: Hash = digest or (lambda data: blake2b(data, digest_size=KEY_BYTES, key=hash_key).digest())
        self._block_of: dict[bytes, int] = {}
        self._entry_of: dict[int, _Entry] = {}
        self._num_entered = 0
        self._ids: set[int] = set()  # of entries that are in the index
        self._known = KnownTexts()

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    def match(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Blocks that hold the longest known prefix of the sequence within its first max_tokens tokens, in order."""
        block_ids: list[int] = []
        sequence.prefix_ids = []
        for index in range(max_tokens // self._block_size):
            block_id = self._find(sequence, index)
            if block_id is None:
                break
            block_ids.append(block_id)
            sequence.prefix_ids.append(self._entry_of[block_id].id)
        return block_ids

    def explain(
        self, sequence: Sequence, num_hits: int, max_tokens: int, running: Iterable[Sequence] = ()
    ) -> CacheMiss:
        """Why match() found `num_hits` blocks of the sequence and no more. `running`: others, whose last blocks are not full yet.

        To be asked once for a sequence: what it has found is from now on a text of its tenant too.
        """
        for index in range(num_hits):
            entry = self._entry_of[self._block_of[sequence.block_keys[index]]]
            if entry.tenant != sequence.tenant:
                self._note(sequence, index)
        position = num_hits * self._block_size
        if position >= max_tokens:
            return CacheMiss(reason="none")
        end = min(position + self._block_size, max_tokens)
        parent = self._parent_key(sequence, num_hits)
        followers = [
            other.tokens[position : min(position + self._block_size, other.num_computed)].tobytes()
            for other in running
            if other.num_computed > position
            and other.tenant == sequence.tenant
            and self._parent_key(other, num_hits) == parent
        ]
        return self._known.explain(
            parent,
            sequence.tokens[position:end].tobytes(),
            position,
            sequence.tenant,
            is_whole=end - position == self._block_size,
            is_first=num_hits == 0,
            running=followers,
        )

    def note_tail(self, sequence: Sequence) -> None:
        """The sequence gives up its blocks: tokens of it that fill none are remembered, for who asks why they are not found."""
        num_whole, num_tail = divmod(sequence.num_computed, self._block_size)
        if num_tail:
            tail = sequence.tokens[num_whole * self._block_size : sequence.num_computed].tobytes()
            self._known.note(self._parent_key(sequence, num_whole), tail, sequence.tenant, is_first=False)

    def orphan(self, sequence: Sequence, index: int) -> int | None:
        """The block, if there is one, that has the key of block `index` of the sequence and continues an entry that is gone.

        Nothing can hit it any more, and it keeps the content from being entered anew: the caller removes it before it adds.
        """
        if len(sequence.prefix_ids) < index:
            return None
        block_id = self._block_of.get(self._key(sequence, index))
        if block_id is None:
            return None
        parent = self._entry_of[block_id].parent
        return block_id if isinstance(parent, int) and parent not in self._ids else None

    def add(self, sequence: Sequence, index: int) -> None:
        """Enter block `index` of the sequence, which is full and computed. A content that is known keeps its first block.

        After a block that could not be entered, because another content has its key or its parent is gone, no later one can be.
        """
        key = self._key(sequence, index)  # of a block that is not entered too: who asks for it is told so
        if len(sequence.prefix_ids) < index or (index and sequence.prefix_ids[index - 1] not in self._ids):
            self._note(sequence, index)
            return
        known = self._find(sequence, index)
        if known is not None:
            sequence.prefix_ids.append(self._entry_of[known].id)
            self._note(sequence, index)
        elif key in self._block_of:
            self._note(sequence, index)
        else:
            block_id = sequence.block_ids[index]
            assert block_id not in self._entry_of, f"block {block_id} is entered for a second content"
            parent, parent_key = self._parent(sequence, index), self._parent_key(sequence, index)
            tokens, tenant = self._tokens(sequence, index), sequence.tenant
            entry = _Entry(self._num_entered, key, parent, tokens, parent_key, tenant)
            self._known.hold(parent_key, tokens, tenant, is_first=index == 0)
            self._num_entered += 1
            self._block_of[key] = block_id
            self._entry_of[block_id] = entry
            self._ids.add(entry.id)
            sequence.prefix_ids.append(entry.id)

    def remove(self, block_id: int) -> None:
        entry = self._entry_of.pop(block_id, None)
        if entry is not None:
            del self._block_of[entry.key]
            self._ids.remove(entry.id)
            is_first = isinstance(entry.parent, bytes)
            self._known.note(entry.parent_key, entry.tokens, entry.tenant, is_first=is_first, has_left=True)

    def check(self) -> None:
        """Deep audit, for tests."""
        assert len(self._block_of) == len(self._entry_of), f"{len(self._block_of)} keys, {len(self._entry_of)} entries"
        assert self._ids == {entry.id for entry in self._entry_of.values()}, "ids of entries differ from the entries"
        for block_id, entry in self._entry_of.items():
            assert self._block_of[entry.key] == block_id, f"block {block_id} is not the one of its key"
            assert len(entry.tokens) == 4 * self._block_size, f"block {block_id} is entered but not full"

    def _note(self, sequence: Sequence, index: int) -> None:
        """Block `index` of the sequence is a text of its tenant, in the cache or not."""
        parent_key, tokens = self._parent_key(sequence, index), self._tokens(sequence, index)
        self._known.note(parent_key, tokens, sequence.tenant, is_first=index == 0)

    def _find(self, sequence: Sequence, index: int) -> int | None:
        """The block with the content of block `index` of the sequence, whose blocks before it are entered."""
        block_id = self._block_of.get(self._key(sequence, index))
        if block_id is None:
            return None
        entry = self._entry_of[block_id]
        is_same = entry.tokens == self._tokens(sequence, index) and entry.parent == self._parent(sequence, index)
        return block_id if is_same else None

    def _tokens(self, sequence: Sequence, index: int) -> bytes:
        return sequence.tokens[index * self._block_size : (index + 1) * self._block_size].tobytes()

    def _parent(self, sequence: Sequence, index: int) -> bytes | int:
        return sequence.prefix_ids[index - 1] if index else sequence.request.salt

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Made once a sequence and kept: the tokens of a sequence never change."""
        keys = sequence.block_keys
        assert index <= len(keys), f"block {index} is asked for before block {len(keys)}"
        if index == len(keys):
            keys.append(self._digest(self._parent_key(sequence, index) + self._tokens(sequence, index)))
        return keys[index]

    def _parent_key(self, sequence: Sequence, index: int) -> bytes:
        return sequence.block_keys[index - 1] if index else self._digest(b"salt" + sequence.request.salt)
