"""Grammars over the fake backend's few tokens, and requests that are held to them."""

from functools import cache

import msgspec
from llguidance import LLMatcher

from jilju.engine.request import Request
from jilju.text.matcher import GrammarSource
from jilju.text.tokenizer import TokenTable
from tests.engine.fakes import VOCAB, request

PIECES = [*'{}[]":, abcxyz0125.-_', '{"', '":', '",', '"}', ": ", "ab", "abc", "xyz", "true", "false", "null", "12", "no", "noa"]  # fmt: skip
END, OTHER_END = VOCAB - 1, VOCAB - 2
TOKENS = [piece.encode() for piece in PIECES] + [b""] * (VOCAB - 2 - len(PIECES)) + [b"<end>", b"<eot>"]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": [True, "x", 12]}, "maxItems": 3}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": LLMatcher.grammar_from_json_schema(SCHEMA),
    "object": LLMatcher.grammar_from_json_schema({"type": "object", "additionalProperties": {"type": "boolean"}}),
    "regex": LLMatcher.grammar_from_regex("[abc]{2,6}-[0-2]{1,5}"),
    "choice": 'start: "xyz" | "no" | "az" | "noa"',
    "recursive": 'start: "[" start "]" | "x"',
}


class SharedSource(GrammarSource):
    def close(self) -> None:
        """It serves the engines of all tests."""


@cache
def source() -> SharedSource:
    return SharedSource(TokenTable(TOKENS, frozenset({END, OTHER_END}), (END, OTHER_END)), VOCAB + 2)


def held(id: str, name: str, prompt=(1, 2, 3), max_tokens: int = 40, **options) -> Request:
    options.setdefault("end_ids", (END, OTHER_END))
    grammar = GRAMMARS.get(name, name)
    return msgspec.structs.replace(request(id, list(prompt), max_tokens, **options), grammar=grammar)
