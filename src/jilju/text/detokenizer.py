"""Detokenizer: token ids to text, one id at a time.

A token is bytes, so a character may end in a later token than it began in: its bytes are held until they are whole or can no
longer become so. Law: the joined pieces are the decoded whole, and U+FFFD stands only for bytes that no later one completes.
Knows nothing of stop strings, streams or requests.
"""

import codecs

from jilju.text.tokenizer import Tokenizer


class Detokenizer:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, shown_ids: frozenset[int] = frozenset()):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD if the last character never became whole. No push after it."""
        return self._decoder.decode(b"", final=True)
