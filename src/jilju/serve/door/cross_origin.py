"""Pages of other origins: which may call, and the headers by which a browser hands them the answer (CORS).

Owns the list of origins and the answer to a preflight. No credentials of the browser's own are ever asked for: a page brings
its key. Knows nothing of keys or routes.
"""

import re

from starlette.datastructures import Headers

from jilju.errors import Forbidden
from jilju.serve.door.auth import same_origin
from jilju.serve.errors import shown

ANY_ORIGIN = "*"
EXPOSED = (
    b"x-request-id, request-id, x-client-request-id, retry-after, retry-after-ms, x-should-retry, "
    b"x-jilju-ignored, x-jilju-predicted-wait-ms"
)
MAX_AGE = b"600"  # seconds for which a browser need not ask again
HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(, ?[A-Za-z0-9-]{1,64}){0,63}")


class CrossOrigin:
    def __init__(self, allowed: frozenset[str]):
        self._allowed = allowed

    def check(self, headers: Headers, host: str) -> str | None:
        """The origin of a page elsewhere that may call; None: of no page, or of one of this server's. Raises Forbidden."""
        origins = headers.getlist("origin")
        elsewhere = [origin for origin in origins if not same_origin(origin, host)]
        for origin in elsewhere:
            if len(origins) > 1 or not self._allowed & {ANY_ORIGIN, origin.lower()}:
                raise Forbidden(
                    f"pages of {shown(origin)} may not call this server; start it with --allow-origin ORIGIN if they shall"
                )
        return elsewhere[0] if elsewhere else None

    def answer_headers(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """Of every answer, refusals too: a page may read those as well."""
        if not self._allowed:
            return []
        vary = (b"vary", b"Origin")
        if origin is None:
            return [vary]
        allowed = b"*" if ANY_ORIGIN in self._allowed else origin.encode("latin-1")
        return [vary, (b"access-control-allow-origin", allowed), (b"access-control-expose-headers", EXPOSED)]


def is_preflight(method: str, headers: Headers) -> bool:
    return method == "OPTIONS" and "access-control-request-method" in headers


def preflight_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Any header may be sent: clients add their own, and none of them lets anybody in but the key."""
    wanted = headers.get("access-control-request-headers", "")
    names = wanted if HEADER_NAMES.fullmatch(wanted) else "authorization, content-type, x-api-key"
    return [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", names.encode()),
        (b"access-control-max-age", MAX_AGE),
    ]
