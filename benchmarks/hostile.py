"""Grammars that are meant to hurt: deep, exploding, ambiguous, huge. Each call gets others of the same kinds, so that none is remembered.

Owns the forms that calls ask for. Knows nothing of how they are sent or refused.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

DEPTH = 30_000
KIB = 1 << 10


def lark(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"grammar": text}}


def regex(pattern: str) -> dict[str, Any]:
    return {"structured_outputs": {"regex": pattern}}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}}


def nested(depth: int, number: float) -> dict[str, Any]:
    """As a text, which the bound on a body's own depth does not see."""
    text = '{"properties":{"a":' * depth + f'{{"const":{number}}}' + "}}" * depth
    return {"structured_outputs": {"json": text}}


def wide(count: int, rng: random.Random) -> dict[str, Any]:
    """Every property optional, each with a pattern of its own."""
    pattern = {"type": "string", "pattern": "^[a-z]{1,40}[0-9]{1,40}$"}
    return {
        "type": "object",
        "properties": {f"p{rng.random()}": pattern for _ in range(count)},
        "additionalProperties": False,
    }


KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "30,000 brackets": lambda rng: lark(f'start: {"(" * DEPTH}"{rng.random()}"{")" * DEPTH}'),
    "30,000 rules": lambda rng: lark("\n".join([f'start: r0 "{rng.random()}"', *(f"r{n}: r{n + 1}" for n in range(DEPTH)), f'r{DEPTH}: "a"'])),
    "20,000 alternatives": lambda rng: lark("start: " + " | ".join(f'"{rng.randrange(10**6)}"' for _ in range(20_000))),
    "a rule of itself": lambda rng: lark(f'start: start start | "a" | "{rng.random()}"'),
    "ambiguous": lambda rng: lark(f'start: "a" x x x x "{rng.random()}"\nx: ("a" | x y)*\ny: "a" x | "a"'),
    "(a+)+b": lambda rng: regex(f"(a+)+b{rng.random()}"),
    "(.*)*": lambda rng: regex(f"(.*)*{rng.random()}"),
    "(a|aa)+": lambda rng: regex(f"(a|aa)+{rng.random()}"),
    "words": lambda rng: regex(rf"\w{{5000}}{rng.random()}"),
    "powers": lambda rng: regex(f"(x+x+)+y{rng.random()}" + "(.*.*)*z" * 40),
    "counted": lambda rng: regex(f"((a{{1,100}}){{1,100}}){{1,100}}{rng.random()}"),
    "a far letter": lambda rng: regex(f".*a.{{{rng.randrange(20, 400)}}}"),
    "overlap": lambda rng: regex("(" + "|".join(f"[a-z]{{1,{rng.randrange(100, 900)}}}{n}" for n in range(100)) + "){1,50}"),
    "backreference": lambda rng: regex(rf"(a+){rng.random()}\1"),
    "lookbehind": lambda rng: regex(f"(?<=a){rng.random()}b"),
    "deep schema": lambda rng: nested(4000, rng.random()),
    "a schema of 15 levels": lambda rng: nested(15, rng.random()),
    "allOf": lambda rng: schema({"allOf": [{"type": "integer", "minimum": rng.randrange(1000)} for _ in range(1000)]}),
    "10,000 values": lambda rng: schema({"enum": [f"{rng.random()}" for _ in range(10_000)]}),
    "1,000 patterns": lambda rng: schema(wide(1000, rng)),
    "long text": lambda rng: schema({"type": "string", "minLength": 10**6, "title": str(rng.random())}),
    "many items": lambda rng: schema({"type": "array", "minItems": 10**7, "title": str(rng.random())}),
    "pattern in a pattern": lambda rng: schema({"type": "string", "pattern": f"^((a*)*)*{rng.random()}$", "maxLength": 10**5}),
    "a bomb of references": lambda rng: schema(references(14, rng)),
    "250 KiB": lambda rng: schema({"properties": {f"p{n}": {"const": f"{rng.random()}" * 4} for n in range(2500)}}),
}  # fmt: skip


def references(levels: int, rng: random.Random) -> dict[str, Any]:
    """Each level is two of the one below: small as written, 2 ** levels when written out."""
    levels_ = {
        f"l{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/l{n + 1}"}] * 2, "minItems": 2, "items": False}
        for n in range(levels)
    }
    return {"$ref": "#/$defs/l0", "$defs": {**levels_, f"l{levels}": {"const": rng.random()}}}


def forms(rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and form of one call after another, for ever: each kind once, then again in another order."""
    while True:
        for kind in rng.sample(sorted(KINDS), len(KINDS)):
            yield kind, KINDS[kind](rng)
