"""Who may call: keys and what each is good for, host names, origins, and whether an address may be bound at all.

Owns the keys in force, and the comparisons. Knows nothing of routes, of files, or of HTTP messages beyond the header values
it is given.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from jilju.config import ApiKey, KeyScope
from jilju.errors import ConfigError, Forbidden, InvalidValue

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: Sequence[ApiKey], insecure: bool) -> None:
    """Refuses to serve strangers without a key."""
    if keys or insecure or is_loopback(host):
        return
    raise ConfigError(
        f"--host is {host}, which other machines can reach, and no API key is set; "
        "set one with --api-key, bind 127.0.0.1, or say --insecure if everybody may call"
    )


def host_name(header: str) -> str:
    """The name of a Host header, lower case, without port and brackets; "" if it is none."""
    try:
        parts = urlsplit("//" + header)
        _ = parts.port  # a ValueError if there is something else
        return (parts.hostname or "") if parts.netloc == header and "@" not in header else ""
    except ValueError:
        return ""


def same_origin(origin: str, host_header: str) -> bool:
    """Whether a page at `origin` was served by this very host and port."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host_header.lower()


def presented_keys(authorization: str | None, x_api_key: str | None) -> list[str]:
    """The secrets that a call shows: Bearer, x-api-key, or the password of HTTP Basic."""
    found = [] if x_api_key is None else [x_api_key]
    scheme, _, rest = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(rest.strip())
    elif scheme.lower() == "basic":
        try:
            _, colon, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return found
        if colon:
            found.append(password)
    return found


class KeyRing:
    """The keys in force; without any, everybody may call."""

    def __init__(self, keys: Sequence[ApiKey]):
        self.replace(keys)

    def replace(self, keys: Sequence[ApiKey]) -> None:
        self._known = tuple((_digest(key.secret), key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._known)

    def match(self, presented: Sequence[str]) -> ApiKey | None:
        """Compares every key with every secret shown, each in constant time, whatever matched before."""
        shown = [_digest(secret) for secret in presented]
        match: ApiKey | None = None
        for digest, key in self._known:
            for given in shown:
                if hmac.compare_digest(digest, given):
                    match = match or key
        return match


def check_scope(key: ApiKey | None, scope: KeyScope) -> None:
    """Without keys everybody may do everything."""
    if key is not None and scope not in key.scopes:
        raise Forbidden(
            f"this route needs a key with the scope {scope}; the key {key.name} has: {', '.join(sorted(key.scopes))}"
        )


def priority_of(key: ApiKey | None, given: int | None) -> int:
    """The priority of a call: as given (lower runs first), else 0, or the key's floor where that is higher."""
    if key is None or key.min_priority is None:
        return given or 0
    if given is None:
        return max(0, key.min_priority)
    if given < key.min_priority:
        raise InvalidValue(
            f"priority is {given}; the key {key.name} allows {key.min_priority} and above (lower runs first)",
            param="priority",
        )
    return given


def cache_salt(key: ApiKey | None, given: str | None = None, *, is_shared: bool = False) -> bytes:
    """Salt of the prefix cache: calls of different keys, or with different salts of their own, never share blocks.

    `is_shared`: the key does not count.
    """
    salt = b""
    if key is not None and not is_shared:
        salt = hashlib.blake2b(key.secret.encode(), digest_size=16, person=b"jilju-salt").digest()
    if given is None:
        return salt
    return hashlib.blake2b(given.encode(), key=salt, digest_size=16, person=b"jilju-given").digest()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
