"""JSON schemas as the grammar compiler takes them: what is enforced, and nothing that is not.

Owns local references, and what can be told of a schema without compiling it: references that never move on, values without an
end, alternatives that may overlap. Nothing is ever fetched. Knows nothing of llguidance beyond what it cannot hold an answer
to, nor of tokens or fields of an API.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.schema_nodes import BOUNDS, MAX_SCHEMA_DEPTH, TYPES, Node, at, read_schemas, short

MAX_ONE_OF = 256


def translate_schema(text: str | bytes) -> dict[str, Any]:
    """The schema with what is enforced and nothing else. Raises InvalidGrammar or GrammarTooComplex that names keyword and
    path."""
    try:
        given = msgspec.json.decode(text)
    except RecursionError:
        raise GrammarTooComplex(f"the schema nests more than {MAX_SCHEMA_DEPTH} deep") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidGrammar(f"the schema is not JSON: {str(error)[:200]}") from None
    nodes = read_schemas(given)
    root = nodes[""]
    for node in nodes.values():
        if node.ref is not None:
            node.ref = _target(node, nodes)
            nodes[node.ref].is_target = True
    _refuse_idle_references(nodes)
    _refuse_endless_values(nodes)
    for node in nodes.values():
        _refuse_overlap(node, nodes)
        _refuse_uncountable(node)
    _step_off_whole_bounds(nodes)
    return _written(root, nodes)


# ---- references ------------------------------------------------------------------------------------------------------


def _target(node: Node, nodes: Mapping[str, Node]) -> str:
    assert node.ref is not None, "a target is asked for where a reference stands"
    path = unquote(node.ref[1:])
    if not node.ref.startswith("#") or (path and not path.startswith("/")):
        raise InvalidGrammar(
            f"$ref at {at(node)} is {short(node.ref)}; allowed: # or #/… inside this schema; nothing is fetched"
        )
    if path not in nodes:
        raise InvalidGrammar(f"$ref at {at(node)} is {short(node.ref)}, where no schema stands")
    return path


def _beside(node: Node, nodes: Mapping[str, Node]) -> Iterator[Node]:
    """Schemas that hold for the same value as this one."""
    if node.ref is not None:
        yield nodes[node.ref]
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield from node.of(keyword)


def _refuse_idle_references(nodes: Mapping[str, Node]) -> None:
    """A schema that leads back to itself without a step into the value says nothing, or something else than it seems to."""
    done: set[str] = set()
    for start in nodes.values():
        open_: dict[str, Iterator[Node]] = {start.path: _beside(start, nodes)} if start.path not in done else {}
        while open_:
            path, rest = next(reversed(open_.items()))
            following = next(rest, None)
            if following is None:
                done.add(path)
                del open_[path]
            elif following.path in open_:
                raise InvalidGrammar(
                    f"the schema at {at(following)} refers to itself without a property or item in between"
                )
            elif following.path not in done:
                open_[following.path] = _beside(following, nodes)


def _refuse_endless_values(nodes: Mapping[str, Node]) -> None:
    """A schema must have a value that ends: not an object that needs an object of its own kind inside, and so on."""
    can_end: set[str] = set()
    order = list(nodes.values())[::-1]
    is_changed = True
    while is_changed:
        is_changed = False
        for node in order:
            if node.path not in can_end and _ends(node, nodes, can_end):
                can_end.add(node.path)
                is_changed = True
        order.reverse()
    endless = next((node for node in nodes.values() if node.path not in can_end), None)
    if endless is not None:
        raise InvalidGrammar(
            f"the schema at {at(endless)} has no value that ends: what it requires requires itself again; make that optional"
        )


def _ends(node: Node, nodes: Mapping[str, Node], can_end: set[str]) -> bool:
    def all_end(schemas: Iterable[Node]) -> bool:
        return all(schema.path in can_end for schema in schemas)

    if not isinstance(node.given, dict):
        return True  # true, or a contradiction that the compiler sees
    if node.ref is not None and node.ref not in can_end:
        return False
    if not all_end(node.of("allOf")):
        return False
    for keyword in ("anyOf", "oneOf"):
        if (choices := node.of(keyword)) and not any(choice.path in can_end for choice in choices):
            return False
    for name in _types(node):
        if name == "object":
            properties = node.inner.get("properties", {})
            assert isinstance(properties, dict), "properties were read as a mapping"
            if all_end(properties[key] for key in node.get("required", []) if key in properties):
                return True
        elif name == "array":
            num_items = node.get("minItems", 0)
            first = node.of("prefixItems")
            if all_end(first[:num_items]) and (num_items <= len(first) or all_end(node.of("items"))):
                return True
        else:
            return True
    return False


def _types(node: Node) -> list[str]:
    given = node.get("type")
    if given is None:
        literals = _literals(node)
        return sorted(TYPES) if literals is None else sorted({_type_of(value) for value in literals})
    return given if isinstance(given, list) else [given]


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else names[type(value)]


# ---- what grammars cannot say ----------------------------------------------------------------------------------------


def _refuse_overlap(node: Node, nodes: Mapping[str, Node]) -> None:
    """oneOf is written as a choice, so two of its schemas must never hold at once."""
    if len(node.of("oneOf")) > MAX_ONE_OF:
        raise GrammarTooComplex(f"oneOf at {at(node)} has more than {MAX_ONE_OF} schemas; use anyOf")
    facts = [_facts(choice, nodes) for choice in node.of("oneOf")]
    for second, one in enumerate(facts):
        for first, other in enumerate(facts[:second]):
            if not one.excludes(other):
                raise InvalidGrammar(
                    f"oneOf at {at(node)}: its schemas {first} and {second} may both hold for a value; use anyOf, or give them "
                    "different types or a required property with different constants"
                )


@dataclass(slots=True)
class _Facts:
    """What is sure of a schema's values."""

    types: frozenset[str]
    values: frozenset[str] | None  # the only ones
    tags: Mapping[str, "frozenset[str] | None"]  # of required properties, their only values

    def excludes(self, other: "_Facts") -> bool:
        if not _widened(self.types) & _widened(other.types):
            return True
        if self.values is not None and other.values is not None:
            return not self.values & other.values
        if self.types != {"object"} and other.types != {"object"}:
            return False
        pairs = ((values, other.tags.get(name)) for name, values in self.tags.items())
        return any(one is not None and two is not None and not one & two for one, two in pairs)


def _widened(types: frozenset[str]) -> frozenset[str]:
    """Every integer is a number."""
    return types | {"number"} if "integer" in types else types


def _facts(node: Node, nodes: Mapping[str, Node]) -> _Facts:
    node = _resolved(node, nodes)
    properties = node.inner.get("properties", {})
    assert isinstance(properties, dict), "properties were read as a mapping"
    tags = {name: _values(properties[name], nodes) for name in node.get("required", []) if name in properties}
    return _Facts(frozenset(_types(node)), _values(node, nodes), tags)


def _values(node: Node, nodes: Mapping[str, Node]) -> frozenset[str] | None:
    """As far as they can be told apart: 1 is 1.0."""
    literals = _literals(_resolved(node, nodes))
    if literals is None or any(isinstance(value, list | dict) for value in literals):
        return None
    return frozenset(repr(float(value) if type(value) is int else value) for value in literals)


def _literals(node: Node) -> list[Any] | None:
    """The only values that it allows, where it lists them."""
    if not isinstance(node.given, dict):
        return None if node.given else []
    listed: list[Any] | None = [node.given["const"]] if "const" in node.given else node.given.get("enum")
    return listed


def _resolved(node: Node, nodes: Mapping[str, Node]) -> Node:
    while node.ref is not None and len(node.kept) == 0 and not node.inner:
        node = nodes[node.ref]
    return node


def _refuse_uncountable(node: Node) -> None:
    """A grammar counts members as they are written: it cannot tell an optional one that is left out, nor one written twice."""
    for keyword in ("minProperties", "maxProperties"):
        if node.get(keyword) is not None and set(node.get("properties", {})) - set(node.get("required", [])):
            raise InvalidGrammar(
                f"{keyword} at {at(node)} is supported only where all properties are required; leave it out"
            )
    needed = len(set(node.get("required", [])))
    if node.get("minProperties", 0) > needed + 1:
        raise InvalidGrammar(
            f"minProperties at {at(node)} is {node.get('minProperties')}; allowed: up to {needed + 1}, one above the required ones"
        )


def _step_off_whole_bounds(nodes: Mapping[str, Node]) -> None:
    """Where the other bound lies in the same unit, the compiler takes a whole exclusive bound for an inclusive one: over 0 and up
    to 0.5 it would allow 0. There the bound is written as an inclusive one a little further on."""
    numbers = [node.get(keyword) for node in nodes.values() for keyword in BOUNDS if node.get(keyword) is not None]
    units = {math.floor(number) for number in numbers if number != math.floor(number)}
    for node in nodes.values():
        low, high = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
        if low is not None and low == math.floor(low) and low in units:
            del node.kept["exclusiveMinimum"]
            node.kept["minimum"] = max(low + _little(low), node.get("minimum", low))
        if high is not None and high == math.floor(high) and high - 1 in units:
            del node.kept["exclusiveMaximum"]
            node.kept["maximum"] = min(high - _little(high), node.get("maximum", high))


def _little(number: float) -> float:
    return max(1e-9, 4 * math.ulp(number))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _written(root: Node, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """The document for the compiler: what is referred to stands under $defs by number, once."""
    names = {node.path: str(number) for number, node in enumerate(n for n in nodes.values() if n.is_target)}

    def place(node: Node) -> Any:
        return {"$ref": f"#/$defs/{names[node.path]}"} if node.is_target else node.kept

    for node in nodes.values():
        if not isinstance(node.kept, dict):
            continue
        for keyword, inner in node.inner.items():
            match inner:
                case _ if keyword in ("$defs", "definitions"):
                    continue
                case Node():
                    node.kept[keyword] = place(inner)
                case list():
                    node.kept["anyOf" if keyword == "oneOf" and "anyOf" not in node.inner else keyword] = [
                        *map(place, inner)
                    ]
                case dict():
                    node.kept[keyword] = {name: place(schema) for name, schema in inner.items()}
        if "oneOf" in node.kept:  # beside an anyOf
            node.kept.setdefault("allOf", []).append({"anyOf": node.kept.pop("oneOf")})
        if node.ref is not None:
            node.kept["$ref"] = f"#/$defs/{names[node.ref]}"
    document = place(root)
    if not isinstance(document, dict):
        return {} if document else {"enum": []}
    return {**document, "$defs": {name: nodes[path].kept for path, name in names.items()}} if names else document
