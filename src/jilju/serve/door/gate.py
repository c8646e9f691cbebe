"""The gate: what every call passes on its way in, and every answer on its way out.

Owns ids, the checks of host, origin, key and scope, the headers that every answer carries, and the rendering of whatever is
raised behind it. Default deny: a route behind the gate needs a key when keys are set, /livez alone does not. Knows nothing of
bodies.
"""

import logging
import urllib.parse
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jilju.config import ApiKey, KeyScope
from jilju.errors import Forbidden, InternalError, InvalidApiKey, JiljuError
from jilju.serve.body import ClientLeft
from jilju.serve.door.auth import LOOPBACK_HOSTS, check_scope, host_name, presented_keys
from jilju.serve.door.cross_origin import CrossOrigin, is_preflight, preflight_headers
from jilju.serve.errors import error_body, message_error_body, retry_headers, shown
from jilju.serve.request_log import log_arrival
from jilju.serve.server import Server

logger = logging.getLogger("jilju.serve")

OPEN_PATHS = frozenset({"/livez"})
PAGES = frozenset({"/", "/engine", "/runs"})
PAGE_PREFIXES = ("/view/", "/runs/")
MESSAGES_PATH = "/v1/messages"  # its errors and the name of its id's header are Anthropic's
MAX_LABEL = 128
MAX_IGNORED = 1024  # characters of the header that names ignored fields
IGNORED = "jilju.ignored"  # in the scope


@dataclass(slots=True, eq=False)
class Arrival:
    """A call as the gate saw it."""

    id: str
    received_ns: int
    label: str | None
    key: ApiKey | None = None
    accepted: bool = False  # it has a ledger record, which logs and counts it


def arrival_of(scope: Scope) -> Arrival:
    arrival = scope["jilju.arrival"]
    assert isinstance(arrival, Arrival), "every route lies behind the gate"
    return arrival


def ignored_of(scope: Scope) -> list[str] | None:
    """Where the unknown fields of this call are put down (`fields.take_fields`); None: the server is strict."""
    ignored = scope[IGNORED]
    assert ignored is None or isinstance(ignored, list), "the gate has put it there"
    return ignored


class NeedsScope:
    """Around a route: the key of the call must be good for it."""

    def __init__(self, app: ASGIApp, needed: KeyScope):
        self._app, self._needed = app, needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_scope(arrival_of(scope).key, self._needed)
        await self._app(scope, receive, send)


class Gate:
    """The outermost middleware of the app."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server
        self._context, self._ledger = server.context, server.ledger
        self._hosts = LOOPBACK_HOSTS | {host.strip("[]").lower() for host in server.context.allowed_hosts}
        self._origins = CrossOrigin(server.context.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            assert scope["type"] in ("lifespan", "websocket"), f"an unknown kind of scope: {scope['type']}"
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        arrival = Arrival(self._context.mint_id(), self._context.clock.now_ns(), client_label(headers))
        scope["jilju.arrival"] = arrival
        ignored: list[str] = []
        scope[IGNORED] = ignored if self._context.lenient else None
        outgoing = _Outgoing(send, arrival, ignored, of_messages=_is_of_messages(scope))
        error: JiljuError | None = None
        try:
            origin = self._origins.check(headers, self._check_host(headers))
            outgoing.cors = self._origins.answer_headers(origin)
            if origin is not None and is_preflight(scope["method"], headers):
                await _preflight(outgoing, headers)
            else:
                arrival.key = self._check_key(scope["path"], headers)
                await self._app(scope, receive, outgoing)
        except ClientLeft:
            pass  # logged below: no status
        except JiljuError as raised:
            error = raised
        except Exception:
            logger.exception("call %s failed", arrival.id)
            error = InternalError(f"an error inside the server; its log names it by {arrival.id}")
        if error is not None:
            if not arrival.accepted:
                self._ledger.refuse(error.code, error.status)
            if not outgoing.status:
                await self._send_error(outgoing, scope, error)
            error = None  # it holds this frame, and all of the call below it
        self._ledger.num_ignored_fields += len(ignored)
        if not arrival.accepted:
            log_arrival(
                call_id=arrival.id,
                method=scope["method"],
                path=scope["path"],
                key_name=arrival.key.name if arrival.key else None,
                status=outgoing.status,
                ms=(self._context.clock.now_ns() - arrival.received_ns) / 1e6,
            )

    def _check_host(self, headers: Headers) -> str:
        hosts = headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        if host_name(host) not in self._hosts:
            raise Forbidden(
                f"the host {shown(host)} is not one that this server answers to; "
                f"start it with --allow-host {host_name(host)[:200] or 'NAME'}"
            )
        return host

    def _check_key(self, path: str, headers: Headers) -> ApiKey | None:
        keys = self._server.keys
        if not keys:
            return None
        key = keys.match(presented_keys(headers.get("authorization"), headers.get("x-api-key")))
        if key is None and path not in OPEN_PATHS:
            raise InvalidApiKey("no API key, or none that is known; send Authorization: Bearer KEY or x-api-key: KEY")
        return key

    async def _send_error(self, send: Send, scope: Scope, error: JiljuError) -> None:
        body = message_error_body(error, arrival_of(scope).id) if _is_of_messages(scope) else error_body(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *retry_headers(error, self._context.random_bytes),
        ]
        if error.status == 401:
            page = scope["path"] in PAGES or scope["path"].startswith(PAGE_PREFIXES)
            challenge = b'Basic realm="jilju", charset="UTF-8"' if page else b'Bearer realm="jilju"'
            headers.append((b"www-authenticate", challenge))
        if error.status in (408, 413):
            headers.append((b"connection", b"close"))
        if allow := scope.get("jilju.allow"):
            headers.append((b"allow", allow))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


class _Outgoing:
    """`send` with the headers that every answer carries; remembers the status."""

    def __init__(self, send: Send, arrival: Arrival, ignored: list[str], of_messages: bool):
        self._send, self._arrival, self._ignored, self._of_messages = send, arrival, ignored, of_messages
        self.cors: list[tuple[bytes, bytes]] = []
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._arrival.id
            if self._of_messages:
                headers["request-id"] = self._arrival.id
            if self._arrival.label is not None:
                headers["x-client-request-id"] = self._arrival.label
            headers.setdefault("x-content-type-options", "nosniff")
            if self._ignored:
                headers["x-jilju-ignored"] = listed(self._ignored)
            headers.raw.extend(self.cors)
        await self._send(message)


def _is_of_messages(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/")


async def _preflight(send: Send, headers: Headers) -> None:
    """A browser asks beforehand whether a page elsewhere may call; it sends no key with that."""
    await send({"type": "http.response.start", "status": 204, "headers": preflight_headers(headers)})
    await send({"type": "http.response.body"})


def listed(paths: list[str]) -> str:
    """Paths of fields as a header's value: separated by commas, all but plain characters %-encoded, bounded."""
    text = ""
    for path in paths:
        entry = (", " if text else "") + urllib.parse.quote(path, safe="[]")
        if len(text) + len(entry) > MAX_IGNORED:
            return text + ", ..."
        text += entry
    return text


def client_label(headers: Headers) -> str | None:
    """The client's own id, as a label: printable ASCII without spaces, bounded."""
    given = headers.get("x-client-request-id") or headers.get("x-request-id")
    if not given:
        return None
    return "".join(char for char in given[: MAX_LABEL * 4] if "!" <= char <= "~")[:MAX_LABEL] or None
