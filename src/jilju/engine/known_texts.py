"""Known texts: what a prefix cache has seen, so that it can say why it has no more of a prompt than it has.

Owns a bounded memory of which tokens followed which block, kept after the block itself is evicted; the longest unused are
forgotten first. Answers are about texts of the asking tenant alone, whoever shares the cache. Knows nothing of blocks that are held
or free, and decides nothing: without it the same blocks are found.
"""

from collections import OrderedDict

import numpy as np

from jilju.engine.request import CacheMiss

MAX_TEXTS = 32_768  # some 10 MB; a text is at most a block long


class KnownTexts:
    """A parent is the chained hash of all tokens before a text, the salt included."""

    def __init__(self, max_texts: int = MAX_TEXTS):
        self._max_texts = max_texts
        self._after: dict[bytes, dict[bytes, str]] = {}  # parent -> its texts -> tenant
        self._order: OrderedDict[tuple[bytes, bytes], None] = (
            OrderedDict()
        )  # (parent, text), the next to be forgotten first
        self._salted: dict[
            tuple[str, bytes], bytes
        ] = {}  # (tenant, first block) -> the newest parent, which is a salt's

    def __len__(self) -> int:
        return len(self._order)

    def add(self, parent: bytes, text: bytes, tenant: str, *, is_first: bool) -> None:
        """Tokens (int32) that follow a parent: a whole block, or the tail of a sequence. `is_first`: nothing is before them."""
        self._after.setdefault(parent, {})[text] = tenant
        self._order[parent, text] = None
        self._order.move_to_end((parent, text))
        if is_first:
            self._salted[tenant, text] = parent
        if len(self._order) > self._max_texts:
            self._forget_oldest()

    def explain(
        self, parent: bytes, rest: np.ndarray, position: int, block_size: int, tenant: str, *, salt_only: bool
    ) -> CacheMiss:
        """Why no block with the tokens `rest` (up to a block of them) was found after a parent, whose last token is before `position`.

        `salt_only`: the parent is a salt, nothing is before `position`.
        """
        wanted = rest.tobytes()
        texts = [text for text, owner in self._after.get(parent, {}).items() if owner == tenant]
        is_whole = len(rest) == block_size
        if is_whole and wanted in texts:
            return CacheMiss(reason="evicted", position=position)
        if is_whole and salt_only and self._salted.get((tenant, wanted), parent) != parent:
            return CacheMiss(reason="salt", position=position)
        closest, num_common = b"", -1
        for text in texts:
            common = _num_common(text, wanted)
            if common >= num_common:
                closest, num_common = text, common
        if num_common < 0 or (salt_only and num_common == 0):
            return CacheMiss(reason="never_seen", position=position)
        if 4 * num_common in (len(closest), len(wanted)):  # one of them ends here
            return CacheMiss(reason="block_tail", position=position)
        earlier = int(np.frombuffer(closest, np.int32)[num_common])
        return CacheMiss(reason="diverged", position=position + num_common, earlier_id=earlier)

    def _forget_oldest(self) -> None:
        (parent, text), _ = self._order.popitem(last=False)
        texts = self._after[parent]
        tenant = texts.pop(text)
        if not texts:
            del self._after[parent]
        if self._salted.get((tenant, text)) == parent:
            del self._salted[tenant, text]


def _num_common(a: bytes, b: bytes) -> int:
    """Leading tokens that are equal."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    return int(np.argmax(np.frombuffer(a[:size], np.int32) != np.frombuffer(b[:size], np.int32)))
