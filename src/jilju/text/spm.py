"""SPM: tokens made by merging, the highest score first (`tokenizer.ggml.model` = llama, as sentencepiece's BPE does it).

A text begins as single characters, a space as U+2581. Of all neighbours that together are a token, those whose token has the
highest score are joined, the leftmost of equals; again until no neighbours are a token. A character that is no token becomes
the byte tokens of its UTF-8 form. Knows nothing of files, special tokens or bos.
"""

import heapq
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

SPACE = "\u2581"  # how a space is written in tokens
SHORT = 48  # characters up to which looking through all pairs again is cheaper than keeping a queue
PAIR_BITS = 22  # 4 MB of flags: the 200,000 pairs of a large vocabulary meet a flag of another pair in 5 % of cases


class SpmScheme:
    """Merging makes the tokens `made` alone, ids of `tokens` with one score each; `byte_ids` are those of the 256 bytes.
    `adds_space` puts a space before every text."""

    def __init__(
        self,
        tokens: Sequence[str],
        vocab: Mapping[str, int],
        scores: Sequence[float],
        made: Sequence[int],
        byte_ids: Sequence[int],
        adds_space: bool,
    ):
        assert len(scores) == len(tokens) and len(byte_ids) == 256, "one score a token, one token a byte"
        self._byte_ids = byte_ids
        self._prefix = SPACE if adds_space else ""
        self._vocab = vocab
        # Ranks by id: 0 is merged first, equal scores have equal ranks. `_none` is the id of what is no token, and its rank.
        self._none = len(tokens)
        ranks = np.full(len(tokens) + 1, self._none)
        _, ranks[made] = np.unique(-np.array(scores)[made], return_inverse=True)
        self._ranks: list[int] = ranks.tolist()
        self._within = _pairs_within(tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        written = [self._prefix + text.replace(" ", SPACE) if text else "" for text in texts]
        pieces, ends = self._independent(written)
        ids = {piece: self._piece_ids(piece) for piece in set(pieces)}
        return [
            list(chain.from_iterable(map(ids.__getitem__, pieces[start:end]))) for start, end in pairwise([0, *ends])
        ]

    def token_bytes(self, token: str) -> bytes:
        return bytes_of(token)

    def _independent(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """The texts cut wherever no token holds the two characters beside the cut: no merge reaches over it. The pieces of
        all texts, and after how many of them each text ends."""
        joined = "".join(texts)
        text_ends = np.cumsum([len(text) for text in texts])
        is_end = np.ones(len(joined) + 1, bool)  # by place: does a piece end before it
        is_end[1:-1] = ~self._within[_pair_hashes(_codes(joined))]
        is_end[text_ends] = True
        places = np.flatnonzero(is_end)  # 0 and the whole length are among them
        pieces = [joined[start:end] for start, end in pairwise(places.tolist())]
        return pieces, np.searchsorted(places, text_ends).tolist()

    def _piece_ids(self, piece: str) -> list[int]:
        ids: list[int] = []
        for part in self._merged_short(piece) if len(piece) <= SHORT else self._merged_long(piece):
            id_ = self._vocab.get(part, self._none)
            if self._ranks[id_] < self._none:
                ids.append(id_)
            else:
                ids += [self._byte_ids[byte] for byte in part.encode()]
        return ids

    def _merged_short(self, piece: str) -> list[str]:
        ranks, id_of, none = self._ranks, self._vocab.get, self._none
        parts = list(piece)
        joins = [ranks[id_of(left + right, none)] for left, right in pairwise(parts)]  # of each part with the next
        while joins and (best := min(joins)) < none:
            at = joins.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del joins[at]
            if at > 0:
                joins[at - 1] = ranks[id_of(parts[at - 1] + parts[at], none)]
            if at < len(joins):
                joins[at] = ranks[id_of(parts[at] + parts[at + 1], none)]
        return parts

    def _merged_long(self, piece: str) -> list[str]:
        """The same with a queue: n characters take the time of n log n. A part lies at the place of its first character."""
        ranks, id_of, none, num = self._ranks, self._vocab.get, self._none, len(piece)
        parts = list(piece)  # "" where a part was joined to the one before it
        before, after = list(range(-1, num - 1)), list(range(1, num + 1))
        joins = (ranks[id_of(left + right, none)] for left, right in pairwise(parts))
        queue = [rank * num + at for at, rank in enumerate(joins) if rank < none]  # ordered by rank, then from the left
        heapq.heapify(queue)
        while queue:
            rank, at = divmod(heapq.heappop(queue), num)
            right = after[at]
            if not parts[at] or right == num or ranks[id_of(joined := parts[at] + parts[right], none)] != rank:
                continue  # one of the two was joined to another meanwhile
            parts[at], parts[right] = joined, ""
            after[at] = next_ = after[right]
            if next_ < num:
                before[next_] = at
                if (rank := ranks[id_of(joined + parts[next_], none)]) < none:
                    heapq.heappush(queue, rank * num + at)
            if (left := before[at]) >= 0 and (rank := ranks[id_of(parts[left] + joined, none)]) < none:
                heapq.heappush(queue, rank * num + left)
        return [part for part in parts if part]


def bytes_of(token: str) -> bytes:
    """What a normal token, as it is written in the file, stands for."""
    return token.replace(SPACE, " ").encode()


def _codes(text: str) -> NDArray[np.uint32]:
    """Code points, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _pair_hashes(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A number below 2 ** PAIR_BITS for each two neighbours, uint32 [characters - 1]; wraps around."""
    mixed: NDArray[np.uint32] = codes[:-1] * np.uint32(0x9E3779B1) + codes[1:] * np.uint32(0x85EBCA6B)
    return mixed >> np.uint32(32 - PAIR_BITS)


def _pairs_within(tokens: Sequence[str]) -> NDArray[np.bool_]:
    """A flag by pair hash, bool [2 ** PAIR_BITS]: may a token hold this pair of neighbours. Some that none holds are flagged
    too, where hashes meet, which costs a cut and changes nothing else."""
    flags = np.zeros(1 << PAIR_BITS, bool)
    ends = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    hashes = _pair_hashes(_codes("".join(tokens)))
    flags[np.delete(hashes, ends[:-1] - 1)] = True  # without those across two tokens
    return flags
