"""Grammars kept by llguidance: a matcher for each answer, over the bytes of a model's tokens.

Owns the limits within which a matcher works: what goes beyond them is an error of that matcher, so no mask takes long. Forced
bytes are cut into the longest tokens; where that is not how the tokenizer would cut them, the answer is still one of the
grammar's. Importing this module costs 50 ms, making a source up to a second, most of it with the GIL. Knows nothing of requests
or of how a grammar is checked before.
"""

import time

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from jilju.text.tokenizer import TokenTable

SPECIAL_MARK = b"\xff"  # in front of a control token's name: no UTF-8 text has that byte
MAX_ERROR_CHARS = 200
# What a matcher may take of a processor. The library's limits count items, and those of an ambiguous rule cost ever more: a
# mask of "start: start start | ..." takes 50 us at first and 100 ms after a thousand tokens, for which neighbours would wait.
FREE_NS = 1_000_000_000
TOKEN_NS = 10_000_000


def parser_limits() -> LLParserLimits:
    """The library's own limits of a mask, which are some 15 ms of work, and less memory: a lexer state is 2 kB."""
    return LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=20_000, verbose_errors=False)


class GrammarMatcher:
    """See `engine.matcher.Matcher`. Ids that end a text are in no mask but where the grammar names them."""

    def __init__(self, inner: LLMatcher, end_mask: np.ndarray):
        self._inner = inner
        self._end_mask = end_mask  # uint32 [words]
        self._left_ns = FREE_NS
        self._is_slow = False

    @property
    def error(self) -> str:
        if self._is_slow:
            return f"it is so ambiguous that a token takes more than {TOKEN_NS // 1_000_000} ms; make it simpler"
        return self._inner.get_error().partition("\n")[0][:MAX_ERROR_CHARS] if self._inner.is_error() else ""

    @property
    def is_accepting(self) -> bool:
        return self._inner.is_accepting() and not self._is_slow

    @property
    def is_stopped(self) -> bool:
        return self._inner.is_stopped() and not self._inner.is_error() and not self._is_slow

    def fill(self, mask: np.ndarray) -> None:
        """Without the GIL but for a moment."""
        assert mask.dtype == np.uint32 and mask.shape == self._end_mask.shape and mask.flags.c_contiguous
        begin_ns = time.thread_time_ns()
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._spend(time.thread_time_ns() - begin_ns)
        if self._inner.is_error() or self._is_slow:  # with an error the library allows the end ids
            mask[:] = 0
        elif self._inner.is_accepting():
            mask &= ~self._end_mask

    def take(self, token_id: int) -> bool:
        begin_ns = time.thread_time_ns()
        is_taken = not self._is_slow and self._inner.consume_token(token_id)
        self._spend(time.thread_time_ns() - begin_ns - TOKEN_NS)
        return is_taken

    def restart(self) -> None:
        """Go back to the begin. What the tokens so far took is not given back."""
        self._inner.reset()

    def _spend(self, ns: int) -> None:
        self._left_ns = min(FREE_NS, self._left_ns - ns)
        self._is_slow |= self._left_ns < 0


class GrammarSource:
    """Matchers for masks of `vocab_size` ids, of which the table may have fewer. Each compiles its grammar anew: a lexer that
    several share would have them share its limits and its failures."""

    def __init__(self, table: TokenTable, vocab_size: int):
        end_ids = [id_ for id_ in table.eos_ids if id_ < vocab_size]
        if not end_ids:
            raise ValueError("the model has no token that ends a text, so no answer of it can be held to a grammar")
        self._text = _Text(table, vocab_size, end_ids[0])
        wrapper = TokenizerWrapper(self._text)
        self._tokenizer = LLTokenizer(wrapper, eos_token=end_ids)
        wrapper.tokens = self._text.tokens = []  # the library has copied them
        self._text.tokenizer = self._tokenizer
        self._end_mask = np.zeros(-(-vocab_size // 32), np.uint32)
        for id_ in end_ids:
            self._end_mask[id_ // 32] |= np.uint32(1 << id_ % 32)
        self._limits = parser_limits()

    def make(self, grammar: str) -> GrammarMatcher:
        """Compiles without the GIL."""
        return GrammarMatcher(LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits), self._end_mask)

    def close(self) -> None:
        self._text.tokenizer = None  # the two hold each other where no collector sees it


class _Text:
    """The table as llguidance reads it; called with text whose tokens it wants."""

    def __init__(self, table: TokenTable, vocab_size: int, end_id: int):
        tokens = [
            token if id_ not in table.special_ids else SPECIAL_MARK + token for id_, token in enumerate(table.tokens)
        ]
        self.tokens = (tokens + [b""] * (vocab_size - len(tokens)))[:vocab_size]
        self.special_token_ids = [id_ for id_ in sorted(table.special_ids) if id_ < vocab_size]
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.tokenizer: LLTokenizer | None = None

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.greedy_tokenize(text.decode()) if self.tokenizer is not None else []
