"""Bodies: bytes of the wire to a JSON object, strictly.

Owns size, time, media type and JSON itself: UTF-8, no duplicate keys, bounded depth, finite numbers of at most 40 digits,
no lone surrogates. Knows nothing of what the fields mean.
"""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from jilju.errors import BodyTooLarge, InvalidJson, InvalidValue, RequestTimeout, UnsupportedMediaType
from jilju.serve.context import ServeLimits
from jilju.serve.errors import shown

T = TypeVar("T")

MAX_DIGITS = 40
DISCARD_S = 1.0
OFF_LOOP_BYTES = 64 << 10  # a body above this is parsed in a thread: about 1 ms of work
MAX_PARTS = 200_000  # lists and objects, and fields: 2048 messages of 30 parts stay below, and 0.2 s to build
LONG_NUMBER = re.compile(rb"[-+.0-9eE]{%d}" % (MAX_DIGITS + 1))
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # possessive, and the end closes it: linear


class ClientLeft(Exception):
    """The peer closed, reset, or stopped reading: there is nobody to answer."""


async def read_fields(
    request: Request,
    limits: ServeLimits,
    take: Callable[[dict[str, Any]], T],
    on_body: Callable[[], None] = lambda: None,
) -> T:
    """What `take` makes of the body of a POST, a JSON object. Of a long one it is made in a thread, like the object.

    `on_body` is called when all of the body is there.
    """
    _check_media_type(request)
    raw = await _read(request, limits)
    on_body()

    def taken() -> T:
        value = parse_json(raw, limits.json_depth)
        if not isinstance(value, dict):
            raise InvalidJson(f"the body is {shown(value)}; it must be a JSON object")
        return take(value)

    return await asyncio.to_thread(taken) if len(raw) > OFF_LOOP_BYTES else taken()


def _check_media_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    media_type, _, parameters = content_type.partition(";")
    charset = parameters.replace('"', "").replace(" ", "").lower()
    if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", "charset=utf8"):
        given = shown(content_type) if content_type else "missing"
        raise UnsupportedMediaType(f"content-type is {given}; send application/json in UTF-8")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedMediaType(f"content-encoding is {shown(encoding)}; send the body as it is, without encoding")


async def _read(request: Request, limits: ServeLimits) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared[:20]) > limits.body_bytes
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_s):
            while not too_large:
                chunk, more = await _chunk(request)
                chunks.append(chunk)
                size += len(chunk)
                too_large = size > limits.body_bytes
                if not more and not too_large:
                    return b"".join(chunks)
    except TimeoutError:
        raise RequestTimeout(
            f"{size} bytes of the body came within {limits.body_s:g} s and it is not complete; send it faster"
        ) from None
    await _discard(request, limits)
    raise BodyTooLarge(f"the body is larger than {limits.body_bytes} bytes, the most that is allowed; send less")


async def _discard(request: Request, limits: ServeLimits) -> None:
    """Drops a moment's worth of the rest: most clients read an answer only when all of theirs is sent."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while more and size < 4 * limits.body_bytes:
                chunk, more = await _chunk(request)
                size += len(chunk)


async def _chunk(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    return message.get("body", b""), message.get("more_body", False)


def parse_json(raw: bytes, max_depth: int = 64) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8 at byte {error.start}") from None
    bare = STRING.sub(b"", raw)
    _check_structure(bare, max_depth)
    number = _number if LONG_NUMBER.search(bare) else None  # None: the parser's own, much faster
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    _check_values(value, "")
    return value


def _check_structure(bare: bytes, max_depth: int) -> None:
    """Before parsing, so that no input decides how deep we recurse or how much we build. `bare` has no strings left."""
    codes = np.frombuffer(bare, np.uint8)
    opens = (codes == ord("[")) | (codes == ord("{"))
    closes = (codes == ord("]")) | (codes == ord("}"))
    depth = int(np.cumsum(opens.view(np.int8) - closes.view(np.int8), dtype=np.int32).max(initial=0))
    if depth > max_depth:
        raise InvalidJson(f"the body is nested {depth} deep; at most {max_depth} is allowed")
    for what, count in (("lists and objects", np.count_nonzero(opens)), ("fields", bare.count(b":"))):
        if count > MAX_PARTS:
            raise InvalidJson(f"the body has {count} {what}; at most {MAX_PARTS} are allowed")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJson(
                    f"the key {shown(key)} stands twice in one object; give it once", param=shown_name(key)
                )
            seen.add(key)
    return value


def _number(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        return math.inf  # refused below, where the path is known
    return int(digits) if digits.lstrip("-").isdecimal() else float(digits)


def _check_values(value: Any, path: str) -> None:
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            path = shown_name(path)
            raise InvalidValue(
                f"{path or 'the body'} is no finite number of at most {MAX_DIGITS} digits", param=path or None
            )
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if type(item) is not int:
                _check_values(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, path)
            _check_values(item, f"{path}.{shown_name(key)}" if path else shown_name(key))


def _check_text(text: str, path: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            path = shown_name(path)
            raise InvalidValue(
                f"{path or 'the body'} holds a lone surrogate at character {error.start}; send whole characters",
                param=path or None,
            ) from None


def shown_name(name: str) -> str:
    """A field's name, or the path of one, as an error may repeat it."""
    return name.encode("utf-8", "replace").decode()[:200]
