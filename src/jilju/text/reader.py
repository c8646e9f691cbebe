"""Reader: a parser of model output, written as a program that reads on and waits where the text ends so far.

Owns the waiting, what is held back while it is not clear what it means, and the search for a marker. Text can come in any
pieces: the program sees characters. Each character is looked at a bounded number of times and held at most once. Knows
nothing of calls, thoughts or JSON.
"""

import re
from collections.abc import Generator
from itertools import groupby
from typing import TypeVar

from jilju.text.message import Part, PartKind

T = TypeVar("T")
Reading = Generator[None, None, T]  # suspended until there is more text; its value is what it has read

SPACE = " \t\r\n"
MAX_HELD_CHARS = 64 * 1024  # what is not clear by then is text


class NotMarkup(Exception):
    """What is held turned out to be text. Never leaves a parser."""


class Marker:
    """A text to look for, and the space around it that is part of it. The state of a search is how many characters of the
    marker the text so far ends with."""

    def __init__(self, text: str, space: str = SPACE):
        self.text = text
        self.space = space
        # fallback[n]: the longest beginning of the marker, shorter than n, that its first n characters end with
        self._fallback = [0, 0]
        for num in range(1, len(text)):
            matched = self._fallback[num]
            while matched and text[num] != text[matched]:
                matched = self._fallback[matched]
            self._fallback.append(matched + 1 if text[num] == text[matched] else 0)
        self.plain = re.compile(f"[^{re.escape(space + text[0])}]+")  # a run that no search begins in

    def shorter(self, matched: int) -> int:
        """The next shorter beginning that can still grow."""
        return self._fallback[matched]

    def overlap(self, text: str) -> int:
        """Length of the longest beginning of the marker, not all of it, that the text ends with."""
        return next(num for num in range(min(len(self.text) - 1, len(text)), -1, -1) if text.endswith(self.text[:num]))


class Reader:
    """Subclasses write `_program`. Laws: whatever the pieces, the joined parts are the same; nothing is raised."""

    def __init__(self) -> None:
        self._text = ""  # what came last; the program has read it up to _at
        self._at = 0
        self._ended = False
        self._held: list[str] = []
        self._num_held = 0
        self._parts: list[Part] = []
        self._running = self._program()

    def _program(self) -> Reading[None]:
        raise NotImplementedError

    def push(self, text: str) -> list[Part]:
        self._text, self._at = text, 0
        next(self._running, None)
        return self._given()

    def finish(self) -> list[Part]:
        self._text, self._at, self._ended = "", 0, True
        next(self._running, None)
        return self._given()

    def _given(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return [
            Part(kind, "".join(part.text for part in same), call)
            for (kind, call), same in groupby(parts, key=lambda part: (part.kind, part.call))
        ]

    # --- reading -------------------------------------------------------------------------------------------------

    def _peek(self) -> Reading[str]:
        """The next character, not read yet; empty where the text has ended."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _hold(self, end: int) -> None:
        """Reads up to `end` of the text at hand and holds it back. The limit falls on the same character in any pieces."""
        within = min(end, self._at + MAX_HELD_CHARS - self._num_held)
        self._held.append(self._text[self._at : within])
        self._num_held += within - self._at
        self._at = within
        if within < end:
            raise NotMarkup

    def _hold_all_of(self, characters: str) -> Reading[None]:
        while (char := (yield from self._peek())) and char in characters:
            self._hold(self._at + 1)

    def _skip_all_of(self, characters: str) -> Reading[None]:
        while (char := (yield from self._peek())) and char in characters:
            self._at += 1

    def _literal(self, text: str) -> Reading[None]:
        """Holds exactly this text. NotMarkup at the first character that differs, which is not read."""
        for wanted in text:
            if (yield from self._peek()) != wanted:
                raise NotMarkup
            self._hold(self._at + 1)

    def _until(self, marker: Marker, kind: PartKind, matched: int = 0) -> Reading[bool]:
        """Gives text out up to the marker; whether it came. Then it is held, with the space before it; if the text ended
        first, all of it is given out. `matched` characters of the marker are held already, perhaps with space before."""
        while char := (yield from self._peek()):
            while matched and char != marker.text[matched]:
                matched = marker.shorter(matched)
                self._release(kind, keep=matched)
            if char == marker.text[matched] or char in marker.space:
                if self._num_held == MAX_HELD_CHARS:
                    self._release(kind, keep=matched)
                matched += char == marker.text[matched]
                self._hold(self._at + 1)
                if matched == len(marker.text):
                    return True
            else:
                self._release(kind)
                plain = marker.plain.match(self._text, self._at)
                assert plain is not None, f"{char!r} is neither space nor the beginning of {marker.text!r}"
                self._give(kind, plain[0])
                self._at = plain.end()
        self._release(kind)
        return False

    # --- giving --------------------------------------------------------------------------------------------------

    def _give(self, kind: PartKind, text: str, call: int = 0) -> None:
        if text:
            self._parts.append(Part(kind, text, call))

    def _release(self, kind: PartKind, keep: int = 0) -> None:
        """Gives out what is held, all but the last `keep` characters."""
        if self._num_held > keep:
            held = "".join(self._held)
            self._give(kind, held[: len(held) - keep])
            self._held = [held[len(held) - keep :]]
            self._num_held = keep

    def _release_but(self, marker: Marker, kind: PartKind) -> int:
        """Gives out what is held but what may be the beginning of the marker, with the space before; how much of it."""
        held = "".join(self._held)
        matched = marker.overlap(held[-len(marker.text) :])
        before = held[: len(held) - matched]
        self._release(kind, keep=len(held) - len(before.rstrip(marker.space)))
        return matched

    def _discard(self) -> None:
        """What is held was markup."""
        self._held.clear()
        self._num_held = 0
