"""Vocabularies: the tokens of a model with their types, and a tokenizer over them.

Owns what tokenizers of every kind of file share: special tokens inside text, bos and eos, which tokens end a turn, ids to
bytes. How plain text becomes ids is a `Scheme`. Knows nothing of files or chats.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jilju.errors import InvalidValue
from jilju.text.specials import longest_of
from jilju.text.tokenizer import TokenTable

# Types of tokens; the numbers are those of the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end an answer by their text, since files name only one eos: the list llama.cpp goes by. The last eight
# are those of code models, where the next file or repository begins.
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<|file_sep|>",
)


class Scheme(Protocol):
    """What kinds of tokenizer differ in."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: none holds special tokens, they stand between. The first begins what is read."""
        ...

    def token_bytes(self, token: str) -> bytes:
        """What a normal token, as it is written in the file, stands for."""
        ...


class VocabularyTokenizer:
    """See `text.tokenizer.Tokenizer`."""

    def __init__(
        self,
        scheme: Scheme,
        tokens: list[str],
        types: list[int],
        *,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        add_bos: bool,
        add_eos: bool,
        adds_space: bool = False,
    ):
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.special_ids = frozenset(ids_of(types, CONTROL, UNKNOWN))
        self.special_texts: Mapping[str, int] = {tokens[id_]: id_ for id_ in sorted(self.special_ids)}
        user_texts = {tokens[id_]: id_ for id_ in ids_of(types, USER_DEFINED)}
        self._scheme = scheme
        self._adds_space = adds_space
        self._tokens = tokens
        self._types = types
        self._marked_ids = {**self.special_texts, **user_texts}
        self._user_defined = longest_of(user_texts)
        self._any_marked = longest_of(self._marked_ids)

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False, after_special: bool = False
    ) -> list[int]:
        _check_unicode(text)
        marked = self._any_marked if parse_special else self._user_defined
        ids: list[int] = []
        if add_special_tokens and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        # Texts and marked tokens take turns, a text first and last: the pattern is one group, so `split` keeps what it matched.
        pieces = marked.split(text) if marked else [text]
        texts = self._scheme.encode(["", *pieces[::2]])[1:] if after_special else self._scheme.encode(pieces[::2])
        ids += texts[0]
        for mark, following in zip(pieces[1::2], texts[1:], strict=True):
            ids.append(self._marked_ids[mark])
            ids += following
        if add_special_tokens and self.add_eos and self.eos_ids:
            ids.append(self.eos_ids[0])
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return bytes_of_token(self._token(token_id), self._types[token_id], self._scheme.token_bytes)

    def token_text(self, token_id: int) -> str:
        shown = self.token_bytes(token_id).decode(errors="replace")
        return shown or self._token(token_id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = (id_ for id_ in ids if not (skip_special_tokens and id_ in self.special_ids))
        text = b"".join(map(self.token_bytes, kept)).decode(errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def _token(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            raise InvalidValue(f"token id {token_id} is outside the vocabulary; allowed: 0 to {self.vocab_size - 1}")
        return self._tokens[token_id]


def bytes_of_token(token: str, type_: int, bytes_of_normal: Callable[[str], bytes]) -> bytes:
    match type_:
        case 1:  # NORMAL
            return bytes_of_normal(token)
        case 5:  # UNUSED: padding of the embedding table, stands for nothing
            return b""
        case 6:  # BYTE: its form was checked
            return bytes([int(token[3:5], 16)])
        case _:
            return token.encode()


def table_of(
    tokens: Sequence[str], types: Sequence[int], bytes_of_normal: Callable[[str], bytes], eos_ids: tuple[int, ...]
) -> TokenTable:
    return TokenTable(
        [bytes_of_token(token, type_, bytes_of_normal) for token, type_ in zip(tokens, types, strict=True)],
        frozenset(ids_of(types, CONTROL, UNKNOWN)),
        eos_ids,
    )


def ids_of(types: Sequence[int], *wanted: int) -> list[int]:
    ids: list[int] = np.flatnonzero(np.isin(types, wanted)).tolist()
    return ids


def end_ids(named: Iterable[int | None], vocab: Mapping[str, int], types: Sequence[int]) -> tuple[int, ...]:
    """The ids that a file names, then the control tokens with an end text. A token of that text that is no control token is
    ordinary: `</s>` in a vocabulary for code closes an HTML element."""
    by_text = [vocab[text] for text in END_TEXTS if text in vocab and types[vocab[text]] == CONTROL]
    return tuple(dict.fromkeys([*(id_ for id_ in named if id_ is not None), *by_text]))


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}; "
            "allowed: Unicode text that has a UTF-8 form"
        ) from None
