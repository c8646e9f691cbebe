"""Known texts: what a prefix cache has seen, so that it can say why it has no more of a prompt than it has.

Owns which tokens followed which block: of what is in the cache all, of what has left it, or fills no block, the newest. Each
tenant has texts of its own: answers are of the asking tenant's alone, whoever shares the cache. Knows nothing of blocks that are
held or free, and decides nothing: without it the same blocks are found.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from jilju.engine.request import CacheMiss

MAX_GONE = 32_768  # texts that are not in the cache: 20 to 40 MB; a text is at most a block long


class KnownTexts:
    """A parent is the chained hash of all tokens before a text, the salt included. Texts are int32 tokens as bytes."""

    def __init__(self, max_gone: int = MAX_GONE):
        self._max_gone = max_gone
        self._after: dict[bytes, list[bytes]] = {}  # parent and tenant -> texts, sorted
        self._gone: OrderedDict[tuple[bytes, bytes], bytes | None] = OrderedDict()  # -> the parent, if it is a salt's
        self._salts: dict[bytes, set[bytes]] = {}  # tenant and first block -> the salts' parents that it is known under

    def __len__(self) -> int:
        return sum(map(len, self._after.values()))

    def hold(self, parent: bytes, text: bytes, tenant: str, *, is_first: bool) -> None:
        """A block has entered the cache. `is_first`: nothing is before it."""
        branch = parent + tenant.encode()
        self._add(branch, text)
        self._gone.pop((branch, text), None)
        if is_first:
            self._salts.setdefault(tenant.encode() + text, set()).add(parent)

    def note(self, parent: bytes, text: bytes, tenant: str, *, is_first: bool, has_left: bool = False) -> None:
        """Tokens that are not in the cache: the tail of a sequence, a block that was not entered, or, `has_left`, one that was."""
        branch = parent + tenant.encode()
        if not self._add(branch, text) and not has_left and (branch, text) not in self._gone:
            return  # it is held
        self._gone[branch, text] = parent if is_first else None
        self._gone.move_to_end((branch, text))
        if is_first:
            self._salts.setdefault(tenant.encode() + text, set()).add(parent)
        if len(self._gone) > self._max_gone:
            self._forget_oldest()

    def explain(
        self, parent: bytes, wanted: bytes, position: int, tenant: str, *, is_whole: bool, is_first: bool, running: Iterable[bytes] = ()
    ) -> CacheMiss:  # fmt: skip
        """Why no block with the tokens `wanted` was found after a parent, whose last token is before `position`.

        `is_whole`: they fill a block. `running`: what follows the parent in sequences that go on.
        """
        texts = self._after.get(parent + tenant.encode(), [])
        place = bisect_left(texts, wanted)
        if is_whole and texts[place : place + 1] == [wanted]:
            return CacheMiss(reason="evicted", position=position)
        if is_whole and is_first and self._salts.get(tenant.encode() + wanted, set()) - {parent}:
            return CacheMiss(reason="salt", position=position)
        # In their order those that have most in common with it are next to it.
        nearest = [(_num_common(text, wanted), text) for text in (*texts[max(0, place - 1) : place + 1], *running)]
        num_common = max([common for common, _ in nearest], default=0)
        if not nearest or (is_first and num_common == 0):
            return CacheMiss(reason="never_seen", position=position)
        goes_on = [text for common, text in nearest if common == num_common and len(text) > 4 * common]
        if not goes_on or len(wanted) == 4 * num_common:
            return CacheMiss(reason="block_tail", position=position)
        earlier = int.from_bytes(goes_on[-1][4 * num_common : 4 * num_common + 4], "little", signed=True)
        return CacheMiss(reason="diverged", position=position + num_common, earlier_id=earlier)

    def _add(self, branch: bytes, text: bytes) -> bool:
        """Whether it is new."""
        texts = self._after.get(branch)
        if texts is None:
            self._after[branch] = [text]
            return True
        place = bisect_left(texts, text)
        is_new = texts[place : place + 1] != [text]
        if is_new:
            texts.insert(place, text)
        return is_new

    def _forget_oldest(self) -> None:
        (branch, text), salt_parent = self._gone.popitem(last=False)
        texts = self._after[branch]
        del texts[bisect_left(texts, text)]
        if not texts:
            del self._after[branch]
        if salt_parent is not None:
            first = branch[len(salt_parent) :] + text
            self._salts[first].discard(salt_parent)
            if not self._salts[first]:
                del self._salts[first]


def _num_common(a: bytes, b: bytes) -> int:
    """Leading tokens that are equal."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    return int(np.argmax(np.frombuffer(a[:size], np.int32) != np.frombuffer(b[:size], np.int32)))
