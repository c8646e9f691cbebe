"""Automaton: the grammars of the simulation, small enough to be drawn, and to run into dead ends.

Owns their text, a matcher that walks one token at a time, and the slow and simple way to say what may follow some tokens, which
the engine's is compared with. Knows nothing of scripts or engines.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

NOWHERE = -1


class Automaton(msgspec.Struct, frozen=True):
    """Begins in state 0. A token goes by its id, modulo the number of classes."""

    steps: list[list[int]]  # by state and class: the next state, or NOWHERE
    is_accepting: list[bool]  # by state

    def next(self, state: int, token_id: int) -> int:
        return self.steps[state][token_id % len(self.steps[state])]

    def is_stopped(self, state: int) -> bool:
        return self.is_accepting[state] and all(following == NOWHERE for following in self.steps[state])

    def to_text(self) -> str:
        return msgspec.json.encode(self).decode()


def from_text(grammar: str) -> Automaton:
    return msgspec.json.decode(grammar, type=Automaton)


class AutomatonMatcher:
    """See `engine.matcher.Matcher`."""

    def __init__(self, automaton: Automaton, vocab_size: int):
        self._automaton, self._vocab_size = automaton, vocab_size
        self._state = 0
        self.error = ""

    @property
    def is_accepting(self) -> bool:
        return self._automaton.is_accepting[self._state]

    @property
    def is_stopped(self) -> bool:
        return self._automaton.is_stopped(self._state)

    def fill(self, mask: np.ndarray) -> None:
        bits = np.zeros(len(mask) * 32, np.uint8)
        steps = np.array(self._automaton.steps[self._state]) != NOWHERE
        bits[: self._vocab_size] = np.resize(steps, self._vocab_size)  # repeated
        mask[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def take(self, token_id: int) -> bool:
        following = self._automaton.next(self._state, token_id)
        if following == NOWHERE:
            self.error = f"{token_id} leads nowhere from state {self._state}"
        else:
            self._state = following
        return not self.error


class AutomatonSource:
    """See `engine.matcher.MatcherSource`."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def make(self, grammar: str) -> AutomatonMatcher:
        return AutomatonMatcher(from_text(grammar), self._vocab_size)

    def close(self) -> None:
        pass


def place_after(grammar: str, tokens: Sequence[int], vocab_size: int) -> tuple[set[int], bool, bool]:
    """The ids that the grammar takes after these tokens, whether they are a whole answer, and whether nothing can follow."""
    automaton, state = from_text(grammar), 0
    for token_id in tokens:
        state = automaton.next(state, token_id)
    taken = {token_id for token_id in range(vocab_size) if automaton.next(state, token_id) != NOWHERE}
    return taken, automaton.is_accepting[state], automaton.is_stopped(state)
