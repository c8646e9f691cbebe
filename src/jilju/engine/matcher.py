"""Matcher: what keeps an answer to its grammar, token by token.

Owns the protocols, and a sequence's place in its grammar. A place moves in a commit and nowhere else, so a step that raised
can be run again, and a sequence that was preempted goes on where it was. The text of a grammar means something to the one who implements
the protocols, and nothing here; a matcher in turn knows of no end ids: it says what its grammar takes, and when the answer may end.
"""

import logging
from typing import Protocol

import numpy as np

from jilju.engine.request import Request

logger = logging.getLogger(__name__)


class Matcher(Protocol):
    """One answer's place in its grammar. One thread at a time; a defect or a limit shows as `error`, never as an exception."""

    @property
    def error(self) -> str:
        """Why it cannot go on; empty: it can. For good: nothing is allowed any more."""
        ...

    @property
    def is_accepting(self) -> bool:
        """The answer so far is a whole one."""
        ...

    @property
    def is_stopped(self) -> bool:
        """It is a whole one and nothing can follow. May be false of an answer without a token, though nothing can follow."""
        ...

    def fill(self, mask: np.ndarray) -> None:
        """Set the bits of the tokens that the grammar takes next, and clear all others: uint32 [words]. Changes nothing else."""
        ...

    def take(self, token_id: int) -> bool:
        """Go on by a token; False, and `error`, if the grammar does not take it."""
        ...


class MatcherSource(Protocol):
    def make(self, grammar: str) -> Matcher:
        """A new one, at its begin; for a wrong grammar, one with `error`. From any thread, and it may take a second."""
        ...

    def close(self) -> None:
        """Give back what it holds. Its matchers are not used after that."""
        ...


class Grammar:
    """A sequence's place in its grammar, and what else its request says of the next token."""

    def __init__(self, matcher: Matcher, request: Request):
        self._matcher = matcher
        self._end_ids = np.array(sorted(request.end_ids), np.int64)
        self._end_mask: np.ndarray | None = None  # of them, made with the first mask
        self._defect = ""
        self.is_empty = False  # no token is left in the mask that was filled last
        for token_id in request.output_ids:
            if not self.take(token_id):
                break

    @property
    def error(self) -> str:
        return self._defect or self._matcher.error

    @property
    def is_complete(self) -> bool:
        """The answer so far is one of the grammar's."""
        return not self.error and self._matcher.is_accepting

    @property
    def is_stopped(self) -> bool:
        """It is, and nothing can follow."""
        return not self.error and self._matcher.is_stopped

    def take(self, token_id: int) -> bool:
        """Go on by a token; False if it cannot."""
        return not self.error and self._matcher.take(token_id)

    def fill(self, mask: np.ndarray, allowed: np.ndarray | None, banned_ids: np.ndarray) -> None:
        """Set the bits of the tokens that may come next: uint32 [words]. `allowed` is a mask that may be shorter.

        End ids are among them once the answer is complete, whether or not the grammar has a place for them.
        """
        try:
            self._matcher.fill(mask)
            if self.is_complete:
                mask |= self._ends(len(mask))
            if allowed is not None:
                mask[: len(allowed)] &= allowed
                mask[len(allowed) :] = 0
            if len(banned_ids):
                np.bitwise_and.at(mask, banned_ids // 32, ~_bits(banned_ids))
        except Exception as error:  # a defect, which must not cost the neighbours their step
            logger.exception("a mask could not be filled")
            self._defect = f"its mask could not be filled: {error}"
            mask[:] = 0
        self.is_empty = not mask.any()

    def _ends(self, num_words: int) -> np.ndarray:
        if self._end_mask is None:
            self._end_mask = np.zeros(num_words, np.uint32)
            np.bitwise_or.at(self._end_mask, self._end_ids // 32, _bits(self._end_ids))
        return self._end_mask


def _bits(ids: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32))
