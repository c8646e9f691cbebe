"""The tokenizer as the rest of jilju sees it: text to token ids, a token to its bytes.

Owns the contract alone. Ids are positions in the model's vocabulary; a token is bytes, not text, since one character may
span several tokens. Knows nothing of files, chats, engines or HTTP.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec


class Tokenizer(Protocol):
    """Immutable once built, so threads share it."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]  # every id that ends a turn or a text, the model's own eos first
    add_bos: bool  # whether the model wants bos in front of a text
    special_ids: frozenset[int]  # control tokens: left out of answers
    special_texts: Mapping[str, int]  # their texts: ids only where `parse_special` is set

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False, after_special: bool = False
    ) -> list[int]:
        """Ids of `text`. `add_special_tokens` puts bos and eos where the model wants them; `parse_special` reads texts
        of control tokens as these tokens, otherwise they are text like any other. `after_special`: the text follows a control
        token, so what a tokenizer puts before the first text alone is left out. InvalidValue for a lone surrogate."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text. InvalidValue for an id outside the vocabulary."""
        ...

    def token_text(self, token_id: int) -> str:
        """For display: the text, U+FFFD where the bytes are none by themselves; control tokens by their name."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the joined bytes, U+FFFD for what is no UTF-8."""
        ...


class TokenTable(msgspec.Struct, frozen=True):
    """What each id stands for: all that is to be known of a tokenizer to go from ids to bytes."""

    tokens: list[bytes]
    special_ids: frozenset[int]  # as of the tokenizer
    eos_ids: tuple[int, ...]
