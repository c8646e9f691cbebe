"""Byte-level BPE (`tokenizer.ggml.model` = gpt2): text is cut by patterns, then bytes are merged in the order of a list.

Owns the pre-tokenizers by name (`tokenizer.ggml.pre`) and the alphabet that bytes are written in; merging itself is done by
the `tokenizers` library. Knows nothing of files, special tokens or bos.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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
        # one by one: the library would put threads of its own to a batch, beside those of the engine
        return [self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else [] for text in texts]

    def token_bytes(self, token: str) -> bytes:
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # written as plain text in the file
            return token.encode()
