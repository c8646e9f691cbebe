"""Trial of a grammar: compiled and followed for a few tokens, to see that it can be and within which bounds.

Owns the walk and the sorting of what goes wrong into wrong and too complex. It may take any time and memory, so it belongs into a
process that can be killed. Knows nothing of where a grammar came from.
"""

import random
import re

import numpy as np

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.matcher import GrammarMatcher
from jilju.text.matcher import GrammarSource as Matchers

NUM_STEPS = 16  # some grammars come apart only after a few tokens
NUM_WALKS = 8  # and only on some ways
# The library's own words for what it has no room for.
TOO_COMPLEX = re.compile(
    r"too (?:many|large|big|deep|complex)|max is|fuel|exceed|unable to determine|panic", re.IGNORECASE
)


def try_out(grammar: str, matchers: Matchers, vocab_size: int) -> None:
    """Raises InvalidGrammar or GrammarTooComplex. Equal grammars are tried in equal steps."""
    matcher = matchers.make(grammar)
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    choice = random.Random(len(grammar))
    for _ in range(NUM_WALKS):
        _walk(matcher, mask, choice)
        matcher.restart()


def _walk(matcher: GrammarMatcher, mask: np.ndarray, choice: random.Random) -> None:
    for _ in range(NUM_STEPS):
        _check(matcher.error)
        matcher.fill(mask)
        _check(matcher.error)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if len(allowed) == 0:
            if not matcher.is_accepting:
                raise InvalidGrammar("the grammar comes to a point where no token is allowed")
            return
        matcher.take(int(allowed[choice.randrange(len(allowed))]))


def _check(error: str) -> None:
    if error:
        kind = GrammarTooComplex if TOO_COMPLEX.search(error) else InvalidGrammar
        raise kind(f"the grammar does not compile: {error}")
