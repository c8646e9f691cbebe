"""How errors look on the wire.

Owns the body, the headers and the lookup from a code back to its class. Knows nothing of routes. The tree itself, with
status, type and code, is `jilju.errors`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from jilju.errors import InternalError, JiljuError, Overloaded, StartupError

MAX_ECHO = 200  # characters of a client's input that an error may repeat
MAX_RETRY_MS = 60_000  # above that some clients give up at once
MAX_JITTER = 1.25
MESSAGE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        500: "api_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
)
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


def message_error(error: JiljuError) -> dict[str, str]:
    """Anthropic's form, on the routes of its messages: it has no place for the field but the message's beginning."""
    begins_so = error.param is None or error.message.startswith(error.param)
    message = error.message if begins_so else f"{error.param}: {error.message}"
    return {"type": MESSAGE_TYPES.get(error.status, "invalid_request_error"), "message": message}


def message_error_body(error: JiljuError, call_id: str) -> bytes:
    return msgspec.json.encode({"type": "error", "error": message_error(error), "request_id": call_id})


def retry_headers(error: JiljuError, random_bytes: Callable[[int], bytes]) -> list[tuple[bytes, bytes]]:
    """Retry-After in whole seconds and the same wait in ms: 1 to 60 s, up to a quarter of it by chance so that clients
    spread, however long the wait. An overload also says the wait that was predicted.
    """
    if error.code in NO_RETRY:
        return [(b"x-should-retry", b"false")]
    if error.status == 429 or error.code == "not_ready":
        jitter = 1 + (MAX_JITTER - 1) * random_bytes(1)[0] / 256
        wait_ms = round(min(MAX_RETRY_MS / MAX_JITTER, max(1_000, (error.retry_after_s or 1.0) * 1000)) * jitter)
        headers = [(b"retry-after", b"%d" % math.ceil(wait_ms / 1000)), (b"retry-after-ms", b"%d" % wait_ms)]
        if isinstance(error, Overloaded) and error.predicted_wait_ns is not None:
            headers.append((b"x-jilju-predicted-wait-ms", b"%d" % (error.predicted_wait_ns // 1_000_000)))
        return headers
    return []
