"""Schemas as they are read: every schema of a document by its path, each keyword known and its value checked.

Owns which keywords are held to, which are annotations, and the bounds of a document. Everything else is refused by keyword and
path, so that nothing is silently ignored. Reads 2020-12. Knows nothing of references, nor of what a document means as a whole.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.regex import check_regex

MAX_SCHEMA_DEPTH = 32  # schemas inside each other
MAX_LITERAL_DEPTH = 64  # of a const or a value of an enum
MAX_ENUM = 1024
MAX_COUNT = (1 << 31) - 1
MAX_NUMBER = 1 << 53  # beyond, a number is not what it says

TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")

ONE = frozenset({"items", "additionalProperties"})
LISTS = frozenset({"prefixItems", "allOf", "anyOf", "oneOf"})
MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
# They describe and enforce nothing, by their own definition. `discriminator` says which of oneOf's tags to look at.
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly",
                         "writeOnly", "$schema", "discriminator"})  # fmt: skip
# Values that say nothing, of keywords that are refused otherwise.
IDLE: Mapping[str, tuple[Any, ...]] = {"uniqueItems": (False,), "propertyNames": (True, {}, {"type": "string"})}
# What OpenAPI and the schema makers of some languages call whole numbers of a width. Beyond 2^53 the width is not filled.
NUMBER_FORMATS: Mapping[str, tuple[int, int]] = {
    **{f"int{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32)},
    "int64": (-MAX_NUMBER, MAX_NUMBER),
    "uint64": (0, MAX_NUMBER),
}
# Control characters that JSON has a short escape for; the grammar writes no other escapes.
UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


@dataclass(slots=True)
class Node:
    """One schema of the document. `path` is its JSON pointer behind the #."""

    path: str
    depth: int
    given: Any
    kept: Any = True  # what is left of it for the compiler
    ref: str | None = None
    inner: dict[str, "Node | list[Node] | dict[str, Node]"] = field(default_factory=dict)
    is_target: bool = False

    def of(self, keyword: str) -> "list[Node]":
        """The schemas under a keyword, in order."""
        match self.inner.get(keyword):
            case None:
                return []
            case Node() as node:
                return [node]
            case list() as nodes:
                return nodes
            case dict() as nodes:
                return list(nodes.values())

    def children(self) -> "Iterator[Node]":
        for keyword in self.inner:
            yield from self.of(keyword)

    def get(self, keyword: str, default: Any = None) -> Any:
        return self.given.get(keyword, default) if isinstance(self.given, dict) else default


def read_schemas(given: Any) -> dict[str, Node]:
    """Every schema of the document by its path, each before those inside it."""
    nodes: dict[str, Node] = {}
    waiting = [Node("", 1, given)]
    while waiting:
        node = waiting.pop()
        nodes[node.path] = node
        if node.depth > MAX_SCHEMA_DEPTH:
            raise GrammarTooComplex(f"the schema nests more than {MAX_SCHEMA_DEPTH} schemas, down to {at(node)}")
        _read_keywords(node)
        waiting += node.children()
    return nodes


def _read_keywords(node: Node) -> None:
    if isinstance(node.given, bool):
        node.kept = node.given
        return
    if not isinstance(node.given, dict):
        raise _refused(node, None, "a schema: an object, true or false")
    node.kept = {}
    for keyword, value in sorted(
        node.given.items(), key=lambda item: item[0] == "format"
    ):  # it narrows what others say
        if keyword in ANNOTATIONS or keyword.startswith("x-") or (keyword == "$id" and not node.path):
            continue
        if keyword in ONE:
            node.inner[keyword] = _child(node, value, keyword)
        elif keyword in LISTS:
            if not isinstance(value, list) or not value:
                raise _refused(node, keyword, "a list of at least one schema")
            node.inner[keyword] = [_child(node, item, keyword, str(number)) for number, item in enumerate(value)]
        elif keyword in MAPS:
            if not isinstance(value, dict):
                raise _refused(node, keyword, "an object of schemas")
            node.inner[keyword] = {name: _child(node, item, keyword, name) for name, item in value.items()}
            if keyword == "patternProperties":
                for pattern in value:
                    check_regex(pattern, f"a pattern of patternProperties at {at(node)}")
        elif keyword == "$ref":
            if not isinstance(value, str):
                raise _refused(node, keyword, "text that begins with #")
            node.ref = value
        elif any(value is idle or (value == idle and isinstance(value, dict)) for idle in IDLE.get(keyword, ())):
            continue
        elif keyword == "format" and isinstance(value, str) and value in NUMBER_FORMATS and _is_numeric(node):
            low, high = NUMBER_FORMATS[value]
            node.kept |= {
                "minimum": max(low, node.kept.get("minimum", low)),
                "maximum": min(high, node.kept.get("maximum", high)),
            }
        elif check := PLAIN.get(keyword):
            if (allowed := check(value)) is not None:
                raise _refused(node, keyword, allowed)
            if keyword == "pattern":
                check_regex(value, f"pattern at {at(node)}")
            node.kept[keyword] = value
        else:
            raise InvalidGrammar(
                f"the keyword {short(keyword)} at {at(node)} is not supported: a grammar cannot hold an answer to it; leave it out"
            )


def _child(node: Node, given: Any, *steps: str) -> Node:
    return Node("/".join([node.path, *(s.replace("~", "~0").replace("/", "~1") for s in steps)]), node.depth + 1, given)


def _is_numeric(node: Node) -> bool:
    given = node.given.get("type")
    names = given if isinstance(given, list) else [given]
    return "string" not in names and ("integer" in names or "number" in names)


def _check_type(value: Any) -> str | None:
    names = value if isinstance(value, list) else [value]
    is_good = bool(names) and all(isinstance(name, str) and name in TYPES for name in names)
    return None if is_good else f"one or more of {', '.join(sorted(TYPES))}"


def _check_count(value: Any) -> str | None:
    is_good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
    return None if is_good else "a whole number from 0 to 2^31 - 1"


def _check_bound(value: Any) -> str | None:
    return None if _is_plain_number(value) else "a number within 2^53 of zero"


def _check_multiple(value: Any) -> str | None:
    return None if _is_plain_number(value) and value > 0 else "a number above 0, up to 2^53"


def _check_format(value: Any) -> str | None:
    return None if value in FORMATS else ", ".join(FORMATS)


def _check_required(value: Any) -> str | None:
    return None if isinstance(value, list) and all(isinstance(name, str) for name in value) else "a list of names"


def _check_pattern(value: Any) -> str | None:
    return None if isinstance(value, str) else "a regex"


def _check_enum(value: Any) -> str | None:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ENUM:
        return f"a list of 1 to {MAX_ENUM} values"
    return next((wrong for item in value if (wrong := _check_literal(item)) is not None), None)


def _check_literal(value: Any) -> str | None:
    """A value that an answer can hold to the letter."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_LITERAL_DEPTH:
            return f"values of at most {MAX_LITERAL_DEPTH} levels"
        match item:
            case str() if UNWRITABLE.search(item):
                return "texts without control characters other than \\b \\f \\n \\r \\t"
            case bool() | None | str():
                pass
            case int() | float() if not _is_plain_number(item):
                return "numbers within 2^53 of zero"
            case list():
                waiting += [(inner, depth + 1) for inner in item]
            case dict():
                waiting += [(inner, depth + 1) for pair in item.items() for inner in pair]
    return None


def _is_plain_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= MAX_NUMBER


# What the compiler enforces beside schemas inside schemas: keyword -> what is allowed, where a value is wrong.
PLAIN: Mapping[str, Callable[[Any], str | None]] = {
    "type": _check_type,
    "enum": _check_enum,
    "const": _check_literal,
    "required": _check_required,
    "pattern": _check_pattern,
    "format": _check_format,
    **dict.fromkeys(COUNTS, _check_count),
    **dict.fromkeys(BOUNDS, _check_bound),
    "multipleOf": _check_multiple,
}


def at(node: Node) -> str:
    return short("#" + node.path)


def short(text: str) -> str:
    """A piece of a caller's text: an error repeats two of them at most."""
    return text if len(text) <= 100 else text[:100] + "…"


def _refused(node: Node, keyword: str | None, allowed: str) -> InvalidGrammar:
    value = node.given if keyword is None else node.given[keyword]
    shown = short(msgspec.json.encode(value).decode())
    what = f"{keyword} at {at(node)}" if keyword else f"the schema at {at(node)}"
    return InvalidGrammar(f"{what} is {shown}; allowed: {allowed}")
