"""ToolSpec: a function that a model may call, as the text side sees it.

Owns its name and the rule that arguments are an object. Knows nothing of the APIs a tool comes in by, nor of how a family of
models writes a call.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from jilju.errors import InvalidValue

MAX_NAME_CHARS = 64
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # what every family's format can carry


class ToolSpec(msgspec.Struct, frozen=True):
    """`parameters` is the JSON schema of the arguments' object; an empty one allows any object. `strict` is the caller's
    word that the schema says everything: calls are held to the schema in either case."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise InvalidValue(
                f"a tool's name is {self.name[:80]!r}; allowed: 1 to {MAX_NAME_CHARS} of A-Z a-z 0-9 _ . -",
                param="tools",
            )
        kind = self.parameters.get("type", "object")
        if kind != "object":
            raise InvalidValue(
                f'the parameters of tool {self.name!r} have type {kind!r:.80}; allowed: "object"', param="tools"
            )

    @property
    def schema(self) -> dict[str, Any]:
        """Schema of the arguments: an object in any case."""
        return {**self.parameters, "type": "object"}


def template_tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """The tools as chat templates and models read them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema},
        }
        for tool in tools
    ]
