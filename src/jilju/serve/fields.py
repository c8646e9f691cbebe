"""Fields: which are taken, which have no effect, which are refused, and what is wrong with a value.

Owns the rule of the API that nothing is accepted and ignored, at every depth, and the one translation from a failed
conversion to an error that names the path, what was given and what is allowed. Knows nothing of a field's meaning.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from jilju.errors import InvalidValue, MissingParameter, UnknownParameter, UnsupportedContent, UnsupportedParameter
from jilju.serve.body import shown_name
from jilju.serve.errors import shown

T = TypeVar("T")
ANY = object()  # in place of the values of a no-op: whatever it holds has no effect

WHAT_AND_PATH = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
NAMED_FIELD = re.compile(r"Object (?P<how>missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL)
STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+)\]")
VALUE = "[...]"  # the step to a value of an object without fields of its own: by which name is not told


@dataclass(frozen=True, slots=True)
class Rules:
    """What an object may hold besides the fields of its type."""

    fields: frozenset[str]
    no_ops: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({})
    )  # name -> ANY or values without effect
    later: Mapping[str, tuple[Any, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )  # name -> values meaning off
    content: frozenset[str] = frozenset()  # kinds of content that are not taken

    @classmethod
    def of(cls, struct: type[msgspec.Struct], **rest: Any) -> "Rules":
        return cls(frozenset(struct.__struct_encode_fields__), **rest)


def take_fields(
    value: Mapping[str, Any], rules: Rules, path: str = "", ignored: list[str] | None = None
) -> dict[str, Any]:
    """The fields to convert; a null and a value that means "off" are dropped, all else that is not taken is refused.

    `ignored` is the call's (`gate.ignored_of`): None where a server is strict; a list of a lenient one takes the paths of
    unknown fields, which are dropped. Only those: what is known and not supported is refused by both.
    """
    taken: dict[str, Any] = {}
    for name, given in value.items():
        where = f"{path}.{shown_name(name)}" if path else shown_name(name)
        if name in rules.fields:
            if given is not None:
                taken[name] = given
        elif name in rules.no_ops:
            allowed = rules.no_ops[name]
            if allowed is not ANY and given is not None:
                _refuse_unless_off(where, given, allowed)
        elif name in rules.later:
            if given is not None:
                _refuse_unless_off(where, given, rules.later[name])
        elif name in rules.content:
            if given is not None:
                raise UnsupportedContent(f"{where} is not supported: this server takes text only", param=where)
        elif ignored is not None:
            ignored.append(where)
        else:
            raise UnknownParameter(f"{where} is no field of this route; leave it out", param=where)
    return taken


def _refuse_unless_off(where: str, given: Any, off: tuple[Any, ...]) -> None:
    if any(_same(given, value) for value in off):
        return
    allowed = " or ".join([*(shown(value) for value in off), "null"])
    raise UnsupportedParameter(
        f"{where} is {shown(given)}; this server takes only {allowed}; leave it out", param=where
    )


def _same(given: Any, value: Any) -> bool:
    """Equal as JSON: true is not 1."""
    if isinstance(given, bool) or isinstance(value, bool):
        return given is value
    return bool(given == value)


def convert(value: Any, to: type[T]) -> T:
    """Checked conversion; an error names path, given and allowed."""
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise _translated(str(error), value, to) from None


def _translated(message: str, root: Any, to: Any) -> InvalidValue | MissingParameter | UnknownParameter:
    parts = WHAT_AND_PATH.fullmatch(message)
    assert parts is not None, f"the pattern matches every text, given {message!r}"
    what, steps = parts["what"], parts["path"] or ""
    of_values, steps = VALUE in steps, steps.partition(VALUE)[0]
    path = steps.lstrip(".")
    if named := NAMED_FIELD.fullmatch(what):
        name = shown_name(named["name"])
        where = f"{path}.{name}" if path else name
        if named["how"] == "contains unknown":
            return UnknownParameter(f"{where} is no field of this object; leave it out", param=where)
        return MissingParameter(f"{where} is missing; it is required", param=where)
    given: Any = root
    kinds: list[inspect.Type] = [inspect.type_info(to)]
    for step in STEP.finditer(steps):
        given = given[step["name"]] if step["name"] is not None else given[int(step["index"])]
        kinds = [inner for kind in kinds for inner in _inner_types(kind, step["name"])]
    words = [shown_word for kind in kinds for shown_word in _words(kind)]
    allowed = what.removeprefix("Expected ").split(", got ")[0].replace("`", "")
    if words and isinstance(given, str):
        allowed = ", ".join(words)
    if of_values:
        allowed = f"an object whose values are {allowed}"
    return InvalidValue(f"{path or 'the body'} is {shown(given)}; allowed: {allowed}", param=path or None)


def _inner_types(kind: inspect.Type, name: str | None) -> list[inspect.Type]:
    """Of a field, or of the items of a list."""
    match kind:
        case inspect.UnionType():
            return [inner for one in kind.types for inner in _inner_types(one, name)]
        case inspect.Metadata():
            return _inner_types(kind.type, name)
        case inspect.StructType():
            return [field.type for field in kind.fields if field.encode_name == name]
        case inspect.ListType():
            return [kind.item_type]
    return []


def _words(kind: inspect.Type) -> list[str]:
    """The texts that a field is one of."""
    match kind:
        case inspect.UnionType():
            return [word for one in kind.types for word in _words(one)]
        case inspect.Metadata():
            return _words(kind.type)
        case inspect.LiteralType():
            return [value for value in kind.values if isinstance(value, str)]
    return []


def refuse(path: str, given: Any, allowed: str) -> InvalidValue:
    return InvalidValue(f"{path} is {shown(given)}; allowed: {allowed}", param=path)
