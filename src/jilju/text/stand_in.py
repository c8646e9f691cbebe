"""The stand-in: text of a folder that has dummy weights and no tokenizer.

Ids below 256 are bytes, the others are written <|id|>. What config.json calls eos is a control token, so where it is below 256
it is that byte no more. Nothing is known of a chat. Knows nothing of weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jilju.errors import ModelFileError
from jilju.text.hf_tokenizer import CONFIG, TOKENIZER, end_ids_of_configs
from jilju.text.template import ChatTemplate
from jilju.text.tokenizer import Tokenizer, TokenTable
from jilju.text.vocabulary import CONTROL, NORMAL, VocabularyTokenizer, table_of

NUM_BYTES = 256


class ByteScheme:
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def token_bytes(self, token: str) -> bytes:
        id_ = int(token[2:-2])
        return bytes([id_]) if id_ < NUM_BYTES else token.encode()


class StandInText:
    """See `text.text_files.TextFiles`."""

    def __init__(self, folder: Path, vocab_size: int):
        if vocab_size < NUM_BYTES:
            allowed = f"at least {NUM_BYTES}, an id for every byte, where there is no {TOKENIZER}"
            raise ModelFileError(str(folder / CONFIG), "vocab_size", vocab_size, allowed)
        self._eos_ids = tuple(dict.fromkeys(end_ids_of_configs(folder, vocab_size)))
        self._tokens = [f"<|{id_}|>" for id_ in range(vocab_size)]
        self._types = [CONTROL if id_ in self._eos_ids else NORMAL for id_ in range(vocab_size)]

    def tokenizer(self) -> Tokenizer:
        return VocabularyTokenizer(
            ByteScheme(), self._tokens, self._types, bos_id=None, eos_ids=self._eos_ids, add_bos=False, add_eos=False
        )

    def token_table(self) -> TokenTable:
        return table_of(self._tokens, self._types, ByteScheme().token_bytes, self._eos_ids)

    def template(self, token_bytes: Callable[[int], bytes], source: str | None = None) -> ChatTemplate | None:
        return None if source is None else ChatTemplate(source, file="the request")
