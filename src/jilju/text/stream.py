"""The text of an answer: token ids in, pieces of text out, up to a stop string.

One pipeline for whole and streamed answers, so that they cannot differ: bytes, characters, stop strings. Each token gives one
piece, empty while its text is held back. Knows nothing of requests, HTTP or engines.
"""

from collections.abc import Iterable
from typing import TypedDict, Unpack

import msgspec

from jilju.text.detokenizer import Detokenizer
from jilju.text.stops import StopMatcher, StopStrings
from jilju.text.tokenizer import Tokenizer


class Piece(msgspec.Struct, frozen=True):
    text: str
    stop: str | None = None  # the stop string that was found; nothing at or after it leaves


class TextOptions(TypedDict, total=False):
    stop: StopStrings | tuple[str, ...]
    min_tokens: int  # so many first tokens give their text unmatched: no part of it counts towards a stop string
    skip_special_tokens: bool  # true: control tokens have no text
    shown_ids: frozenset[int]  # control tokens that have theirs nevertheless: a parser of the text needs it
    include_stop: bool  # the stop string itself leaves, as the last that does


class TextStream:
    """One answer. The token that ends a sequence by its id is not pushed, unless its text is wanted."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        **options: Unpack[TextOptions],
    ):
        skip = options.get("skip_special_tokens", True)
        self._detokenizer = Detokenizer(tokenizer, skip, options.get("shown_ids", frozenset()))
        self._stops = StopMatcher(options.get("stop", ()), options.get("include_stop", False))
        self._num_unmatched = options.get("min_tokens", 0)

    def push(self, token_id: int) -> Piece:
        """The text that leaves with this token. After a stop string every piece is empty and names it."""
        text = self._detokenizer.push(token_id)
        if self._num_unmatched > 0:
            self._num_unmatched -= 1
            return Piece(text)
        return Piece(self._stops.push(text), self._stops.matched)

    def finish(self) -> Piece:
        """The text that was held back. A stop string can still be found in it, if it holds U+FFFD. No push after it."""
        text = self._stops.push(self._detokenizer.finish())
        return Piece(text + self._stops.finish(), self._stops.matched)

    def whole(self, token_ids: Iterable[int]) -> Piece:
        """The answer at once: what pushing each of these tokens and finishing gives, joined."""
        pieces: list[str] = []
        for token_id in token_ids:
            piece = self.push(token_id)
            pieces.append(piece.text)
            if piece.stop is not None:
                break
        pieces.append((last := self.finish()).text)
        return Piece("".join(pieces), last.stop)
