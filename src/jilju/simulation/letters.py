"""Letters: the text of the simulation, so that stop strings have something to be found in.

Owns a tokenizer whose tokens are letters, and the slow and simple way to look for stop strings, which production's is compared
with. Knows nothing of scripts.
"""

import codecs
from collections.abc import Mapping, Sequence


def letter(token_id: int) -> str:
    return chr(ord("a") + token_id % 26)


class Letters:
    """A tokenizer whose tokens are letters; of a large vocabulary the last two are halves of a two-byte one."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos = False
    special_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.special_texts: Mapping[str, int] = {}

    def token_bytes(self, token_id: int) -> bytes:
        halves = self.vocab_size - token_id
        if self.vocab_size >= 16 and halves <= 2:
            return b"\xc3" if halves == 2 else b"\xa9"
        return letter(token_id).encode()

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False, after_special: bool = False
    ) -> list[int]:
        return [ord(char) - ord("a") for char in text]

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


def text_before_stop(tokens: list[bytes], stops: tuple[str, ...], min_tokens: int) -> str:
    """The text of these tokens up to the stop string that ends first, looked for at every place; the slow and simple way."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    free = "".join(decoder.decode(token) for token in tokens[:min_tokens])
    rest = "".join(decoder.decode(token) for token in tokens[min_tokens:]) + decoder.decode(b"", final=True)
    for end in range(1, len(rest) + 1):
        found = [stop for stop in stops if rest[:end].endswith(stop)]
        if found:
            return free + rest[: end - max(map(len, found))]
    return free + rest
