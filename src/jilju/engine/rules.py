"""Rules: what the tokens of an answer so far forbid next, and whether they have begun to repeat themselves.

Owns the index of bad words and the counts of repeated patterns. Both are functions of the tokens alone, so that a sequence
that is preempted keeps them and one that is resumed makes them anew. Knows nothing of sequences, steps or the vocabulary.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jilju.engine.request import RepetitionDetection

_ID_BYTES = 4


class BadWords:
    """Sequences of ids that must not come whole. A word of one id is banned always, others once all but their last is there."""

    def __init__(self, words: Iterable[Sequence[int]]):
        self.always: set[int] = set()
        self._by_last: dict[int, list[tuple[bytes, int]]] = {}  # of what comes before the last id, by the last of that
        self._longest = 0  # bytes
        for word in dict.fromkeys(tuple(word) for word in words):
            if len(word) == 1:
                self.always.add(word[0])
                continue
            before = np.array(word[:-1], np.int32).tobytes()
            self._by_last.setdefault(word[-2], []).append((before, word[-1]))
            self._longest = max(self._longest, len(before))

    def after(self, output: np.ndarray) -> set[int]:
        """Ids that would end a word of two ids or more: int32 [tokens so far]"""
        words = self._by_last.get(int(output[-1])) if len(output) else None
        if words is None:
            return set()
        tail = output[-(self._longest // _ID_BYTES) :].tobytes()
        return {last for before, last in words if tail.endswith(before)}


class Repetition:
    """Watches an answer for a pattern at its end. The last p tokens have come c times in a row if each of the last p (c - 1)
    equals the one p before it: that run is kept for every p, so a token costs one look at the last few hundred."""

    def __init__(self, wanted: RepetitionDetection, output: np.ndarray):
        self._largest = wanted.max_pattern_size
        sizes = np.arange(wanted.min_pattern_size, self._largest + 1)
        self._sizes = sizes
        self._needed = sizes * (wanted.min_count - 1)
        self._runs = np.array([_run(output, int(size)) for size in sizes], np.int64)

    def add(self, output: np.ndarray) -> None:
        """`output` has one more token at its end: int32 [tokens]"""
        num_sizes = min(len(self._sizes), max(0, len(output) - int(self._sizes[0])))  # whose earlier token exists
        earlier = len(output) - 1 - self._sizes[:num_sizes]
        self._runs[:num_sizes] += 1
        self._runs[:num_sizes] *= output[earlier] == output[-1]

    @property
    def is_found(self) -> bool:
        return bool((self._runs >= self._needed).any())


def _run(output: np.ndarray, size: int) -> int:
    """How many of the last tokens equal the one `size` before them, without a gap."""
    differs = np.flatnonzero(output[size:] != output[:-size])
    compared = max(0, len(output) - size)
    return compared - 1 - int(differs[-1]) if len(differs) else compared
