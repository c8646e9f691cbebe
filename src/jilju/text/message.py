"""The parts of an assistant's message: what its text means to a client.

Owns the names of the parts and the contract of a parser that finds them in a growing text. Laws: however the text is cut into
pushes, the parts joined by kind and call are the same; every character of the text is in a part, or belongs to the markup
around one. Knows nothing of tokens, families of templates, JSON shapes or HTTP.
"""

from typing import Literal, NamedTuple, Protocol

PartKind = Literal["text", "reasoning", "call", "arguments"]


class Part(NamedTuple):
    """`call` opens a tool call and gives the function's name; its `arguments` follow as pieces of one JSON object."""

    kind: PartKind
    text: str
    call: int = 0  # number of the call, from 0; of call and arguments


class MessageParser(Protocol):
    """One answer's parser. Never raises, whatever a model writes, and looks at each character O(1) times."""

    def push(self, text: str) -> list[Part]:
        """The parts that this much more text makes sure of."""
        ...

    def finish(self) -> list[Part]:
        """What was held back: the text has ended. No push after it."""
        ...


class PlainText:
    """Parser of an answer that is nothing but text."""

    def push(self, text: str) -> list[Part]:
        return [Part("text", text)] if text else []

    def finish(self) -> list[Part]:
        return []
