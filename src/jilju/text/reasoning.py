"""Reasoning: the part of an answer in which a model thinks before it speaks.

Owns how a chat template shows that its model does so, and the parser that takes the thoughts off the beginning of an answer.
Knows nothing of tools: what follows the thoughts is another parser's.
"""

import re

import msgspec

from jilju.text.message import MessageParser, Part
from jilju.text.reader import SPACE, Marker, NotMarkup, Reader, Reading

MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# The template's variables that turn thinking on and off: the first must stand anywhere, the second, a plain word, in a tag.
SWITCHES = (
    ("enable_thinking", re.compile(r"\benable_thinking\b")),
    ("thinking", re.compile(r"\{%-?\s*(?:if|elif|set)\b[^%'\"]*\bthinking\b")),
)
NEWLINES = "\n"  # those around the markers are part of them


class ReasoningStyle(msgspec.Struct, frozen=True):
    """`open` and `close` stand around the thoughts; either may be a control token, so a parser must be shown both."""

    open: str
    close: str
    starts_inside: bool = False  # the generation prompt ends with `open`: the answer begins with thoughts
    switch: str | None = None  # the template's variable that turns thinking on and off

    @property
    def shown_specials(self) -> tuple[str, ...]:
        return (self.open, self.close)

    def after(self, prompt: str) -> "ReasoningStyle":
        """The style of an answer to this rendered prompt: its end says whether thoughts are open, whatever a switch did."""
        return msgspec.structs.replace(self, starts_inside=prompt.rstrip().endswith(self.open))


def reasoning_of(template_source: str) -> ReasoningStyle | None:
    """The style of a template's model; None if the template knows of no thoughts."""
    for open_, close in MARKERS:
        if open_ in template_source or close in template_source:
            _, _, end = template_source.rpartition("add_generation_prompt")
            _, inside, after = end.rpartition(open_)
            switch = next((name for name, used in SWITCHES if used.search(template_source)), None)
            return ReasoningStyle(open_, close, bool(inside) and close not in after, switch)
    return None


class ReasoningParser(Reader):
    """Thoughts at the beginning of an answer, then whatever `rest` finds."""

    def __init__(self, style: ReasoningStyle, rest: MessageParser):
        super().__init__()
        self._style = style
        self._close = Marker(style.close, NEWLINES)
        self._rest = rest
        self._in_rest = False

    def push(self, text: str) -> list[Part]:
        if self._in_rest:
            return self._rest.push(text)
        return super().push(text) + self._handed_on()

    def finish(self) -> list[Part]:
        parts = [] if self._in_rest else super().finish() + self._handed_on()
        return parts + self._rest.finish()

    def _handed_on(self) -> list[Part]:
        if not self._in_rest:
            return []
        self._held.append(self._text[self._at :])
        return self._rest.push("".join(self._held))

    def _program(self) -> Reading[None]:
        matched = 0
        try:
            if self._style.starts_inside:
                yield from self._skip_all_of(NEWLINES)
            else:
                yield from self._hold_all_of(SPACE)
            yield from self._literal(self._style.open)
            self._discard()
            yield from self._skip_all_of(NEWLINES)
        except NotMarkup:
            if not self._style.starts_inside:
                self._in_rest = True
                return
            matched = self._release_but(self._close, "reasoning")
        if (yield from self._until(self._close, "reasoning", matched)):
            self._discard()
            yield from self._skip_all_of(NEWLINES)
        self._in_rest = True
