"""Parsers: how each family's answers are read.

Owns where a call may stand and what markup is around it. Knows nothing of prompts or grammars.
"""

from collections.abc import Sequence

from jilju.text.reader import SPACE, Marker, NotMarkup, Reading
from jilju.text.tools.call_parser import CallParser
from jilju.text.tools.spec import ToolSpec

FENCE_LANGUAGES = ("", "json", "tool_code")


class BareParser(CallParser):
    """{…} as the whole answer, or after a marker: one call or several, with `;` or a new line between. With fences a code
    block may be around them."""

    def __init__(self, tools: Sequence[ToolSpec], marker: str, *, fences: bool = False):
        super().__init__(tools)
        self.marker = Marker(marker)
        self._fences = fences

    def _first_calls(self) -> Reading[None]:
        yield from self._space()
        if self._fences and (yield from self._peek()) == "`":
            yield from self._literal("```")
            if (yield from self._word()) not in FENCE_LANGUAGES:
                raise NotMarkup
            yield from self._calls(bare=True)
            yield from self._fence_end()
        else:
            yield from self._calls(bare=True)

    def _marked_calls(self) -> Reading[None]:
        yield from self._calls(bare=False)
        if self._fences:
            yield from self._fence_end()

    def _calls(self, bare: bool) -> Reading[None]:
        yield from self._space()
        while True:
            yield from (self._bare_object() if bare else self._object())
            self._discard()
            yield from self._hold_all_of(SPACE + ";")
            if (yield from self._peek()) != "{":
                return

    def _fence_end(self) -> Reading[None]:
        if (yield from self._peek()):
            yield from self._literal("```")
            yield from self._skip_all_of(SPACE)


class TaggedParser(BareParser):
    """<tool_call>{…}</tool_call>, anywhere in the answer. Small models forget the tags: an object or a code block as the
    beginning of the answer is a call, too."""

    def __init__(self, tools: Sequence[ToolSpec], open_: str, close: str):
        super().__init__(tools, open_, fences=True)
        self._close = close

    def _marked_calls(self) -> Reading[None]:
        yield from self._space()
        yield from self._object()
        self._discard()
        yield from self._space()
        if (yield from self._peek()):
            yield from self._literal(self._close)
            yield from self._skip_all_of(SPACE)


class MistralParser(CallParser):
    """[TOOL_CALLS] [{…}, …], or [TOOL_CALLS]name[ARGS]{…} once a call, with [CALL_ID]… after the name in some models."""

    marker = Marker("[TOOL_CALLS]")

    def _marked_calls(self) -> Reading[None]:
        yield from self._space()
        if (yield from self._peek()) == "[":
            yield from self._list()
        else:
            yield from self._named()
        self._discard()
        yield from self._skip_all_of(SPACE)

    def _list(self) -> Reading[None]:
        yield from self._expect("[")
        while True:
            yield from self._space()
            yield from self._object()
            self._discard()
            yield from self._space()
            if (yield from self._peek()) != ",":
                break
            yield from self._expect(",")
        yield from self._expect("]")

    def _named(self) -> Reading[None]:
        name = yield from self._word()
        if name not in self._names:
            raise NotMarkup
        if (yield from self._peek()) == "[":
            yield from self._expect("[")
            if (yield from self._peek()) == "C":
                yield from self._literal("CALL_ID]")
                yield from self._word()
                yield from self._expect("[")
            yield from self._literal("ARGS]")
        yield from self._space()
        yield from self._call(name)
