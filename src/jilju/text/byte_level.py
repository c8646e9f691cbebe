"""Byte-level BPE (`tokenizer.ggml.model` = gpt2): text is cut by patterns, then bytes are merged in the order of a list.

Owns the pre-tokenizers by name (`tokenizer.ggml.pre`) and the alphabet that bytes are written in; merging itself is done by
the `tokenizers` library. Knows nothing of files, special tokens or bos.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LONG = 1 << 17  # characters from which on looking for words that return pays: less up to 60,000, 2.4 times at a million
# Every pre-tokenizer cuts between a letter and what is none: no pattern goes on from the one to the other, none looks back,
# and what looks ahead looks from white space. So the text from such a place on has the same ids without what is before it.
# The letters here are some that are letters in every version of Unicode, and only ASCII counts as what is none.
_LETTERS = (
    r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
)
_INDEPENDENT = re.compile(rf"(?:[^{_LETTERS}]*+[{_LETTERS}]++)+?(?=[\x00-\x7f]|\Z)|[\s\S]+")


class PreTokenizer(NamedTuple):
    """How text is cut before merging: each pattern cuts what the one before it left; text between matches is a piece."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((_CONTRACTIONS + _WORDS + r"\p{N}" + _REST,))

# Each of these names is compared with llama.cpp over the corpus in tests/golden/tokenizer.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
}


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: a printable Latin-1 byte is its own character, the others are U+0100 upwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR: Mapping[str, int] = _byte_of_char()


class ByteLevelScheme:
    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer):
        self._bpe = LibraryTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._ids(text) if len(text) < LONG else self._ids_of_long(text) for text in texts]

    def _ids(self, text: str) -> list[int]:
        # one by one: the library would put threads of its own to a batch, beside those of the engine
        ids: list[int] = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []
        return ids

    def _ids_of_long(self, text: str) -> list[int]:
        """The same, each piece of words that return computed once. Piece by piece: to find all in one call would keep every
        other thread waiting for as long, which for some MiB is half a second."""
        ids: list[int] = []
        known: dict[str, list[int]] = {}
        for found in _INDEPENDENT.finditer(text):
            piece = found[0]
            if (piece_ids := known.get(piece)) is None:
                piece_ids = known[piece] = self._ids(piece)
            ids += piece_ids
        return ids

    def token_bytes(self, token: str) -> bytes:
        return bytes_of(token)


def bytes_of(token: str) -> bytes:
    """What a normal token, as it is written in the file, stands for."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # written as plain text in the file
        return token.encode()
