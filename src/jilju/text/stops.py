"""Stop strings: where a growing text first holds one.

An Aho-Corasick automaton over characters: each costs O(1) on average, however many stop strings there are and however they
overlap. Text is held back only while it can still become a stop string. The match that ends first wins; of matches that end
together, the one that begins first. Knows nothing of tokens or requests.
"""

from collections import deque
from collections.abc import Iterable

from jilju.errors import InvalidValue


class StopStrings:
    """The automaton of some stop strings, made once and shared by the matchers of many texts. States are their beginnings."""

    def __init__(self, stops: Iterable[str]):
        # parallel lists, one entry a state; state 0 is the empty beginning
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]  # characters of the beginning
        self.longest: list[str | None] = [None]  # longest stop string that ends here
        self._fallback = [0]  # longest other beginning that this one ends with
        for stop in stops:
            if not stop:
                raise InvalidValue("a stop string is empty; allowed: at least one character", param="stop")
            self._add(stop)
        self._link()

    def __len__(self) -> int:
        """States besides the empty beginning."""
        return len(self._next) - 1

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.longest.append(None)
                self._fallback.append(0)
            state = self._next[state][char]
        self.longest[state] = stop

    def _link(self) -> None:
        """Fallbacks in order of depth, so that each is found through shorter ones."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                # A stop string that ends with another one is longer, so it begins earlier: its own entry stays.
                self.longest[child] = self.longest[child] or self.longest[self._fallback[child]]
                waiting.append(child)

    def step(self, state: int, char: str) -> int:
        """The longest beginning that a text ends with, one character after it ended with that of `state`."""
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)


class StopMatcher:
    """One text's matcher; its state is the longest beginning of a stop string that the text ends with."""

    def __init__(self, stops: StopStrings | Iterable[str], is_included: bool = False):
        self._strings = stops if isinstance(stops, StopStrings) else StopStrings(stops)
        self._is_included = is_included  # the stop string itself leaves, as the last that does
        self._state = 0
        self._held = ""  # the last depth[state] characters, not given out yet
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can leave now. Nothing leaves from the start of a match on."""
        if self.matched is not None:
            return ""
        if not len(self._strings):
            return text
        state = self._state
        for index, char in enumerate(text):
            state = self._strings.step(state, char)
            if (stop := self._strings.longest[state]) is not None:
                self.matched = stop
                whole = self._held + text[: index + 1]
                self._held = ""
                return whole if self._is_included else whole[: len(whole) - len(stop)]
        self._state = state
        whole = self._held + text
        leaving = len(whole) - self._strings.depth[state]
        self._held = whole[leaving:]
        return whole[:leaving]

    def finish(self) -> str:
        """What was held back: the text ends, so it becomes no stop string any more."""
        held, self._held, self._state = self._held, "", 0
        return held
