"""Call parser: what the families' parsers of answers with calls have in common.

Owns the syntax of JSON, read as it comes, and of the object that names a function and its arguments. A call is given out as
soon as its name is known and its arguments begin; what turns out to be no call is text. Knows nothing of schemas: that the
arguments fit theirs is the grammar's matter.
"""

import json
import re
from collections.abc import Sequence

from jilju.text.message import Part
from jilju.text.reader import SPACE, Marker, NotMarkup, Reader, Reading
from jilju.text.tools.spec import ToolSpec

ARGUMENTS = ("arguments", "parameters")  # what the families call them
MAX_DEPTH = 128  # arrays and objects inside each other; clients' parsers fail on some hundreds
NAME_RUN = re.compile(r"[A-Za-z0-9_.-]+")
STRING_RUN = re.compile(r'[^"\\\x00-\x1f]+')
SCALAR_RUN = re.compile(r"[-+.0-9A-Za-z]+")
SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
ESCAPES = frozenset('"\\/bfnrtu')


class CallParser(Reader):
    """Subclasses read a family's calls: `_first_calls` at the beginning of an answer, `_marked_calls` after `marker`. Both
    end where calls end, or raise NotMarkup. Names outside `tools` make no call."""

    marker: Marker

    def __init__(self, tools: Sequence[ToolSpec]):
        super().__init__()
        self._names = frozenset(tool.name for tool in tools)
        self._num_calls = 0
        self._in_arguments = False  # what is read then leaves at once

    def _program(self) -> Reading[None]:
        matched = yield from self._attempted(self._first_calls())
        while (yield from self._until(self.marker, "text", matched)):
            matched = yield from self._attempted(self._marked_calls())

    def _first_calls(self) -> Reading[None]:
        yield from ()

    def _marked_calls(self) -> Reading[None]:
        raise NotImplementedError

    def _attempted(self, calls: Reading[None]) -> Reading[int]:
        """Tries to read calls; how many characters of the next marker are held then."""
        try:
            yield from calls
        except NotMarkup:
            self._in_arguments = False
            return self._release_but(self.marker, "text")
        self._discard()
        return 0

    # --- calls ---------------------------------------------------------------------------------------------------

    def _object(self) -> Reading[None]:
        """{"name": …, "arguments": {…}}: keys in any order, once each; others are passed over."""
        yield from self._expect("{")
        yield from self._members(None)

    def _bare_object(self) -> Reading[None]:
        """The same without markup: only its beginning tells it from an answer in JSON. So the name comes first, without
        escapes, and text is held no longer than it reads like that."""
        yield from self._expect("{")
        yield from self._space()
        yield from self._literal('"name"')
        yield from self._colon()
        yield from self._expect('"')
        name = yield from self._word()
        yield from self._expect('"')
        if name not in self._names:
            raise NotMarkup
        yield from self._space()
        yield from self._expect(",")
        yield from self._members(name)

    def _members(self, name: str | None) -> Reading[None]:
        arguments: str | None = None  # that came before the name
        num_calls = self._num_calls
        while True:
            yield from self._space()
            key = yield from self._quoted()
            yield from self._colon()
            if key == "name":
                if name is not None:
                    raise NotMarkup
                name = yield from self._quoted()
                if name not in self._names:
                    raise NotMarkup
                if arguments is not None:
                    self._open_call(name)
                    self._give("arguments", arguments, num_calls)
            elif key in ARGUMENTS:
                if arguments is not None or num_calls < self._num_calls:
                    raise NotMarkup
                if name is None:
                    arguments = yield from self._held_arguments()
                else:
                    yield from self._call(name)
            else:
                yield from self._value()
            yield from self._space()
            if (yield from self._peek()) != ",":
                break
            yield from self._expect(",")
        yield from self._expect("}")
        if num_calls == self._num_calls:
            raise NotMarkup

    def _call(self, name: str) -> Reading[None]:
        """A call whose arguments begin here."""
        if (yield from self._peek()) != "{":
            raise NotMarkup
        self._open_call(name)
        self._in_arguments = True
        yield from self._value()
        self._in_arguments = False

    def _open_call(self, name: str) -> None:
        self._discard()
        self._parts.append(Part("call", name, self._num_calls))
        self._num_calls += 1

    def _held_arguments(self) -> Reading[str]:
        if (yield from self._peek()) != "{":
            raise NotMarkup
        start = len(self._held)
        yield from self._value()
        return "".join(self._held[start:])

    # --- JSON ----------------------------------------------------------------------------------------------------

    def _value(self) -> Reading[None]:
        """One value of any depth. NotMarkup where it is not JSON."""
        closing: list[str] = []
        while True:
            yield from self._space()
            char = yield from self._peek()
            if char in ("{", "["):
                if len(closing) == MAX_DEPTH:
                    raise NotMarkup
                yield from self._expect(char)
                closing.append("}" if char == "{" else "]")
                yield from self._space()
                if (yield from self._peek()) != closing[-1]:
                    if char == "{":
                        yield from self._key()
                    continue
            elif char == '"':
                yield from self._string()
            else:
                yield from self._scalar()
            while closing:
                yield from self._space()
                if (yield from self._peek()) == ",":
                    yield from self._expect(",")
                    if closing[-1] == "}":
                        yield from self._space()
                        yield from self._key()
                    break
                yield from self._expect(closing.pop())
            else:
                return

    def _key(self) -> Reading[None]:
        yield from self._string()
        yield from self._colon()

    def _colon(self) -> Reading[None]:
        yield from self._space()
        yield from self._expect(":")
        yield from self._space()

    def _string(self) -> Reading[None]:
        yield from self._expect('"')
        while (char := (yield from self._peek())) != '"':
            if char == "\\":
                yield from self._escape()
            elif run := STRING_RUN.match(self._text, self._at):
                self._take(run.end())
            else:
                raise NotMarkup
        self._take(self._at + 1)

    def _escape(self) -> Reading[None]:
        yield from self._expect("\\")
        if (char := (yield from self._peek())) not in ESCAPES:
            raise NotMarkup
        self._take(self._at + 1)
        for _ in range(4 if char == "u" else 0):
            if (yield from self._peek()) not in HEX_DIGITS:
                raise NotMarkup
            self._take(self._at + 1)

    def _quoted(self) -> Reading[str]:
        """What a string says. Only outside of arguments, where what is read is held."""
        start = len(self._held)
        yield from self._string()
        value: str = json.loads("".join(self._held[start:]))
        return value

    def _word(self) -> Reading[str]:
        """A name without quotes; empty if none begins here."""
        start = len(self._held)
        while (yield from self._peek()) and (run := NAME_RUN.match(self._text, self._at)):
            self._hold(run.end())
        return "".join(self._held[start:])

    def _scalar(self) -> Reading[None]:
        pieces: list[str] = []
        while (yield from self._peek()) and (run := SCALAR_RUN.match(self._text, self._at)):
            pieces.append(run[0])
            self._take(run.end())
        if SCALAR.fullmatch("".join(pieces)) is None:
            raise NotMarkup

    def _space(self) -> Reading[None]:
        while (char := (yield from self._peek())) and char in SPACE:
            self._take(self._at + 1)

    def _expect(self, char: str) -> Reading[None]:
        if (yield from self._peek()) != char:
            raise NotMarkup
        self._take(self._at + 1)

    def _take(self, end: int) -> None:
        if self._in_arguments:
            self._give("arguments", self._text[self._at : end], self._num_calls - 1)
            self._at = end
        else:
            self._hold(end)
