"""Over 200 JSON schemas of many kinds, and a validator that is not ours: what an answer held to a schema must satisfy.

Each is named by its family and number. They are data: nothing here knows how a schema is enforced.
"""

import ipaddress
import json
import re
import uuid
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import jsonschema

Schema = dict[str, Any]
STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": name} for name in ("string", "integer", "number", "boolean", "null"))


def obj(required: str = "", /, *, extra: Any = False, **properties: Any) -> Schema:
    """An object of these properties, those named in `required` required, others as `extra` says."""
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": extra}
    return schema | ({"required": required.split()} if required else {})


def tagged(tag: str, **properties: Any) -> Schema:
    return obj(" ".join(["kind", *properties]), kind={"const": tag}, **properties)


def strings() -> Iterable[Schema]:
    yield STRING
    for low, high in [(0, 0), (1, 1), (0, 3), (2, 5), (4, None), (None, 6), (3, 40)]:
        yield (
            STRING | ({"minLength": low} if low is not None else {}) | ({"maxLength": high} if high is not None else {})
        )
    for pattern in [
        "^[a-z]+$", "^[A-Z]{3}-[0-9]{4}$", "a", "^a", "b$", "^a|b$", "^(red|green|blue)$", r"^\d{2,4}$", r"^\w+@\w+\.com$",
        "^$", "^.{2}$", r"^[^\"\\]*$", "[0-9]{3}", r"^\s?x\s?$", "^(?:ab)+$", "^(a|aa)+$", "^é+$", "^/[a-z/]*$", r"^\+?[0-9 ]{6,12}$",
        "^(a+)+b$", r"^v\d+(\.\d+){2}$", "^[가-힣]{2,4}$", r"^#[0-9a-fA-F]{6}$", "x{2,}", "^(?:(?:1|2)(?:a|b)){1,3}$",
    ]:  # fmt: skip
        yield STRING | {"pattern": pattern}
    yield STRING | {"pattern": "^[a-z]+$", "minLength": 3, "maxLength": 5}
    yield STRING | {"pattern": "ab", "maxLength": 6}
    yield STRING | {"title": "Name", "description": "of a person", "default": "x", "examples": ["y"], "readOnly": True}
    yield {"minLength": 2, "maxLength": 3}
    for name in FORMATS:
        yield STRING | {"format": name, "examples": ["ab@c.de"]}


def numbers() -> Iterable[Schema]:
    yield INTEGER
    yield NUMBER
    for low, high in [
        (0, 10),
        (-5, 5),
        (1, 1),
        (100, 999),
        (-1000, -1),
        (0, None),
        (None, 0),
        (17, 4711),
        (-(2**53), 2**53),
    ]:
        bounds = ({"minimum": low} if low is not None else {}) | ({"maximum": high} if high is not None else {})
        yield INTEGER | bounds
        yield NUMBER | bounds
    for low, high in [(0, 1), (0, 0.5), (-0.5, 0), (0.5, 0.75), (1, 3), (-1, 0.25), (9.9, 10.1), (0, 1e-6), (2, 2.5)]:
        yield NUMBER | {"exclusiveMinimum": low, "exclusiveMaximum": high}
        yield NUMBER | {"exclusiveMinimum": low, "maximum": high}
        yield NUMBER | {"minimum": low, "exclusiveMaximum": high}
    yield INTEGER | {"exclusiveMinimum": 5, "exclusiveMaximum": 7}
    yield INTEGER | {"minimum": -1.5, "maximum": 1.5}
    for step in (2, 3, 7, 10, 100, 2.5):
        yield INTEGER | {"multipleOf": step}
    for step in (0.5, 0.25, 0.01, 0.1, 3):
        yield NUMBER | {"multipleOf": step}
    yield INTEGER | {"multipleOf": 5, "minimum": 12, "maximum": 31}
    yield {"minimum": 3}
    yield INTEGER | {"format": "uint8"}


def literals() -> Iterable[Schema]:
    for value in ["a", "", 'é\n"\\/', 0, -7, 2.5, 1e-7, True, None, [], {}, [1, "a"], {"a": {"b": [None]}}]:
        yield {"const": value}
    yield {"enum": ["red", "green", "blue"]}
    yield {"enum": [1, 2, 3]}
    yield {"enum": [1, "1", True, None, 1.5]}
    yield {"enum": [[1], {"a": 1}, "x"]}
    yield {"enum": ["a", "ab", "abc"]}
    yield STRING | {"enum": ["a", 1, "b"]}
    yield INTEGER | {"enum": [5, 2.5, 7]}
    yield {"enum": [f"value number {number}" for number in range(300)]}
    yield {"enum": ["short", "a much longer one"], "minLength": 6}


def unions() -> Iterable[Schema]:
    yield {"type": ["string", "null"]}
    yield {"type": ["integer", "string"], "minimum": 3, "maxLength": 2}
    yield {"type": ["object", "array"], "properties": {"a": INTEGER}, "items": BOOLEAN}
    yield {"type": ["string", "integer", "boolean", "null", "number"]}
    yield {"anyOf": [STRING, INTEGER]}
    yield {"anyOf": [STRING | {"maxLength": 2}, NULL]}
    yield {"anyOf": [obj("a", a=INTEGER), obj("b", b=STRING)]}
    yield {"anyOf": [{"const": "x"}, STRING | {"pattern": "^y+$"}]}
    yield {"anyOf": [INTEGER | {"maximum": 3}, INTEGER | {"minimum": 10}]}
    yield {
        "type": "object",
        "properties": {"a": INTEGER, "b": STRING},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    }
    yield {"anyOf": [INTEGER, {"anyOf": [BOOLEAN, {"anyOf": [NULL, STRING]}]}]}
    yield {"anyOf": [STRING, False]}
    yield {"oneOf": [STRING, INTEGER]}
    yield {"oneOf": [tagged("cat", lives=INTEGER), tagged("dog", name=STRING)]}
    yield {"oneOf": [{"const": "a"}, {"const": "b"}, {"const": 3}]}
    yield {"oneOf": [{"enum": ["a", "b"]}, INTEGER, NULL]}
    yield {
        "oneOf": [obj("t", t={"enum": [1, 2]}), obj("t", t={"const": 3}, u=STRING)],
        "anyOf": [obj("t", t={}, u={}), NULL],
    }
    yield {
        "oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/square"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {"circle": tagged("circle", radius=NUMBER), "square": tagged("square", side=NUMBER)},
    }
    yield {"allOf": [STRING, {"minLength": 2}, {"maxLength": 4}]}
    yield {"allOf": [INTEGER | {"minimum": 3}, {"maximum": 9}, {"multipleOf": 2}]}
    yield {"allOf": [{"exclusiveMinimum": 0}, NUMBER | {"maximum": 0.5}]}
    yield {"allOf": [obj("a", a=INTEGER, extra=True), obj("b", b=STRING, extra=True)]}
    yield {"allOf": [{"anyOf": [STRING, INTEGER]}, {"anyOf": [INTEGER, BOOLEAN]}]}
    yield {"allOf": [STRING | {"pattern": "a"}, STRING | {"pattern": "^[a-c]+$"}]}
    yield {
        "allOf": [{"$ref": "#/$defs/base"}],
        "properties": {"c": NULL},
        "$defs": {"base": obj("a", a=INTEGER, extra=True)},
    }
    yield {}
    yield {"properties": {"a": INTEGER}, "items": STRING, "minLength": 1}


def arrays() -> Iterable[Schema]:
    yield {"type": "array"}
    for items in (STRING | {"maxLength": 3}, INTEGER, BOOLEAN, {"enum": ["a", 1]}):
        for low, high in [(0, None), (1, 2), (2, 2), (0, 0), (3, None)]:
            yield {"type": "array", "items": items, "minItems": low} | ({"maxItems": high} if high is not None else {})
    yield {"type": "array", "prefixItems": [INTEGER, STRING | {"maxLength": 2}], "items": False}
    yield {"type": "array", "prefixItems": [INTEGER, BOOLEAN], "items": NULL}
    yield {"type": "array", "prefixItems": [INTEGER, BOOLEAN], "minItems": 2, "maxItems": 3}
    yield {"type": "array", "prefixItems": [{"const": 1}], "minItems": 1, "items": False}
    yield {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "maxItems": 2}
    yield {"type": "array", "items": obj("x y", x=NUMBER, y=NUMBER), "minItems": 1, "maxItems": 3}
    yield {"type": "array", "items": {"anyOf": [INTEGER, NULL]}, "maxItems": 4, "uniqueItems": False}
    yield {"maxItems": 1, "items": INTEGER}


def objects() -> Iterable[Schema]:
    yield {"type": "object"}
    yield {"type": "object", "additionalProperties": False}
    yield {"type": "object", "additionalProperties": INTEGER, "propertyNames": STRING}
    for extra in (True, False, STRING | {"maxLength": 2}):
        for required in ("", "a", "b", "a b"):
            yield obj(required, a=INTEGER, b=BOOLEAN, extra=extra)
    yield obj("", **{"a b": INTEGER, "é": STRING, '"q"': NULL, "\\": BOOLEAN, "/": NULL, "\n": NULL, "": INTEGER})
    yield {"type": "object", "required": ["z"], "properties": {"a": INTEGER}}
    yield {"type": "object", "required": ["z"], "additionalProperties": INTEGER}
    yield {"type": "object", "patternProperties": {"^x-": INTEGER}, "additionalProperties": False}
    yield {"type": "object", "patternProperties": {"^x-": INTEGER, "^y-": STRING}, "additionalProperties": BOOLEAN}
    yield {"type": "object", "properties": {"x-a": {}}, "patternProperties": {"^x-": INTEGER}, "required": ["x-a"]}
    yield {"type": "object", "patternProperties": {"^[a-z]$": {"enum": [1, 2]}}, "additionalProperties": False}
    yield {"type": "object", "maxProperties": 2, "additionalProperties": INTEGER}
    yield {"type": "object", "minProperties": 1, "additionalProperties": INTEGER}
    yield {"type": "object", "minProperties": 1, "maxProperties": 1}
    yield {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "minProperties": 2, "maxProperties": 3}
    yield obj("a", a=obj("b", b=obj("c", c=obj("d", d=INTEGER))))
    yield obj("", **{f"field_{number}": {"type": ["string", "null"], "maxLength": 2} for number in range(20)})
    yield obj(" ".join(f"f{n}" for n in range(12)), **{f"f{number}": BOOLEAN for number in range(12)})
    yield {"properties": {"a": INTEGER}, "required": ["a"]}


def references() -> Iterable[Schema]:
    yield {"$ref": "#/$defs/a", "$defs": {"a": INTEGER}}
    yield {"$ref": "#/definitions/a~1b%25", "definitions": {"a/b%": STRING | {"maxLength": 2}}}
    yield obj("a", a=INTEGER | {"maximum": 9}, b={"$ref": "#/properties/a"})
    yield {"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": STRING | {"minLength": 2}}}
    yield {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}
    yield obj("value", value=INTEGER, next={"$ref": "#"})
    yield obj("value", value=INTEGER, next={"anyOf": [{"$ref": "#"}, NULL]})
    yield {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": obj(
                "name",
                name=STRING | {"maxLength": 3},
                children={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            )
        },
    }
    yield {"anyOf": [INTEGER, {"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": 2}]}
    yield {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": obj("", b={"$ref": "#/$defs/b"}),
            "b": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 1},
        },
    }
    yield {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {"enum": ["x", "y"]}},
    }
    yield {
        "allOf": [{"$ref": "#/$defs/low"}, {"$ref": "#/$defs/high"}],
        "$defs": {"low": INTEGER | {"minimum": 3}, "high": {"maximum": 5}},
    }


def realistic() -> Iterable[Schema]:
    address = obj(
        "street city",
        street=STRING | {"maxLength": 8},
        city=STRING | {"maxLength": 8},
        zip=STRING | {"pattern": "^[0-9]{5}$"},
    )
    yield {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/person", "title": "Person"} | obj(
        "name age", name=STRING | {"minLength": 1, "maxLength": 12}, age=INTEGER | {"minimum": 0, "maximum": 150},
        email={"anyOf": [STRING | {"format": "email"}, NULL], "default": None}, address=address,
    )  # fmt: skip
    yield obj(
        "location", location=STRING | {"maxLength": 12}, unit={"enum": ["celsius", "fahrenheit"], "default": "celsius"}
    )
    line = obj("sku quantity price", sku=STRING | {"pattern": "^[A-Z]{2}[0-9]{3}$"}, quantity=INTEGER | {"minimum": 1, "maximum": 99},
               price=NUMBER | {"exclusiveMinimum": 0, "multipleOf": 0.01, "maximum": 9999})  # fmt: skip
    yield obj("number date lines", number=STRING | {"pattern": "^INV-[0-9]{4}$"}, date=STRING | {"format": "date"},
              lines={"type": "array", "items": line, "minItems": 1, "maxItems": 2}, paid=BOOLEAN)  # fmt: skip
    yield obj(
        "sentiment confidence",
        sentiment={"enum": ["positive", "negative", "neutral"]},
        confidence=NUMBER | {"minimum": 0, "maximum": 1},
    )
    yield obj(
        "steps answer",
        steps={"type": "array", "items": obj("thought", thought=STRING | {"maxLength": 10}), "maxItems": 3},
        answer=NUMBER,
    )
    yield obj("op", op={"enum": ["add", "remove"]}, path=STRING | {"pattern": "^(/[a-z]+)+$"}, value={})
    yield obj(
        "events",
        events={
            "type": "array",
            "maxItems": 2,
            "items": {
                "oneOf": [
                    tagged("open", at=STRING | {"format": "date-time"}),
                    tagged("close", code=INTEGER | {"minimum": 0, "maximum": 9}),
                ]
            },
        },
    )
    yield {
        "type": "object",
        "additionalProperties": {"type": "array", "items": STRING | {"maxLength": 2}, "maxItems": 2},
        "maxProperties": 2,
    }
    yield obj(
        "query",
        query=STRING | {"maxLength": 9},
        limit=INTEGER | {"minimum": 1, "maximum": 100, "default": 10},
        filters=obj(
            "",
            tags={"type": "array", "items": STRING | {"maxLength": 3}, "maxItems": 2},
            since=STRING | {"format": "date"},
        ),
    )
    yield obj(
        "host port",
        host=STRING | {"format": "hostname"},
        port=INTEGER | {"minimum": 1, "maximum": 65535},
        addresses={"type": "array", "items": STRING | {"format": "ipv4"}, "maxItems": 2},
    )
    yield obj("id user", id=STRING | {"format": "uuid"}, user={"$ref": "#/$defs/user"}) | {
        "$defs": {
            "user": obj("name", name=STRING | {"maxLength": 5}, manager={"anyOf": [{"$ref": "#/$defs/user"}, NULL]})
        }
    }
    yield obj("이름 나이", 이름=STRING | {"pattern": "^[가-힣]{2,4}$"}, 나이=INTEGER | {"minimum": 0, "maximum": 99})


def is_address(kind: Any) -> Any:
    def check(value: object) -> bool:
        try:
            kind(value)
        except ValueError:
            return False
        return True

    return check


def matches(pattern: str) -> Any:
    return lambda value: re.fullmatch(pattern, value, re.ASCII) is not None


DATE, TIME = (
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|z|[+-]([01]\d|2[0-3]):[0-5]\d)",
)
FORMATS = {
    "date": matches(DATE),
    "time": matches(TIME),
    "date-time": matches(f"{DATE}[Tt ]{TIME}"),
    "duration": matches(r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?)"),
    "email": matches(r"\S+@\S+"),
    "hostname": matches(
        r"(?=.{1,253}\Z)[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*"
    ),
    "ipv4": is_address(ipaddress.IPv4Address),
    "ipv6": is_address(ipaddress.IPv6Address),
    "uri": matches(r"[A-Za-z][A-Za-z0-9+.-]*:\S*"),
    "uuid": is_address(uuid.UUID),
}
FAMILIES = (strings, numbers, literals, unions, arrays, objects, references, realistic)
SCHEMAS: list[tuple[str, Schema]] = [
    (f"{family.__name__}-{number}", schema) for family in FAMILIES for number, schema in enumerate(family())
]


def violation(schema: Schema, text: str) -> str | None:
    """What the text, read as JSON, breaks of the schema; None if it is valid. Numbers are exact."""
    checker = jsonschema.FormatChecker(formats=())
    for name, check in FORMATS.items():
        checker.checks(name)(lambda value, check=check: not isinstance(value, str) or check(value))
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    try:
        jsonschema.Draft202012Validator(exact, format_checker=checker).validate(json.loads(text, parse_float=Decimal))
    except jsonschema.ValidationError as error:
        return error.message
    return None
