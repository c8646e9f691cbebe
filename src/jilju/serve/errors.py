"""How errors look on the wire.

Owns the body, the headers and the lookup from a code back to its class. Knows nothing of routes. The tree itself, with
status, type and code, is `jilju.errors`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from jilju.errors import InternalError, JiljuError, StartupError

MAX_ECHO = 200  # characters of a client's input that an error may repeat
NO_RETRY = frozenset({"engine_unavailable", "deadline_exceeded", "request_quarantined"})


def _tree(base: type[JiljuError]) -> Iterator[type[JiljuError]]:
    yield base
    for child in base.__subclasses__():
        if not issubclass(child, StartupError):
            yield from _tree(child)


BY_CODE: Mapping[str, type[JiljuError]] = MappingProxyType({cls.code: cls for cls in reversed([*_tree(JiljuError)])})


def error_of(code: str, message: str) -> JiljuError:
    """The error that the engine meant: it sends codes, not classes. A code without a class is our fault, a 500."""
    cls = BY_CODE.get(code)
    return cls(message) if cls is not None else InternalError(f"{code}: {message}")


def shown(value: object) -> str:
    """A client's value, short enough to be repeated to it."""
    text = value if isinstance(value, str) and len(value) > MAX_ECHO else _json(value)
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "…"


def _json(value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (UnicodeEncodeError, OverflowError):
        return ascii(value)


def error_object(error: JiljuError) -> dict[str, str | None]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def error_body(error: JiljuError) -> bytes:
    return msgspec.json.encode({"error": error_object(error)})


def retry_headers(error: JiljuError, random_bytes: Callable[[int], bytes]) -> list[tuple[bytes, bytes]]:
    """Retry-After in whole seconds and the same wait in ms, jittered upward by at most a quarter so that clients spread."""
    if error.code in NO_RETRY:
        return [(b"x-should-retry", b"false")]
    if error.status == 429 or error.code == "not_ready":
        jitter = 1 + random_bytes(1)[0] / 1024
        wait_ms = min(60_000, max(1_000, round((error.retry_after_s or 1.0) * jitter * 1000)))
        seconds = math.ceil(wait_ms / 1000)
        return [(b"retry-after", b"%d" % seconds), (b"retry-after-ms", b"%d" % wait_ms)]
    return []
