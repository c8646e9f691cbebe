"""Who may call: keys, host names, origins, and whether an address may be bound at all.

Owns the comparisons and nothing else. Knows nothing of routes or HTTP messages beyond the header values it is given.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from jilju.config import ApiKey
from jilju.errors import ConfigError

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


def match_key(keys: Sequence[ApiKey], presented: Sequence[str]) -> ApiKey | None:
    """Compares every key with every secret shown, each in constant time, whatever matched before."""
    match: ApiKey | None = None
    for key in keys:
        for secret in presented:
            if hmac.compare_digest(_digest(key.secret), _digest(secret)):
                match = match or key
    return match


def cache_salt(key: ApiKey | None, given: str | None = None) -> bytes:
    """Salt of the prefix cache: calls of different keys, or with different salts of their own, never share blocks."""
    salt = b"" if key is None else hashlib.blake2b(key.secret.encode(), digest_size=16, person=b"jilju-salt").digest()
    if given is None:
        return salt
    return hashlib.blake2b(given.encode(), key=salt, digest_size=16, person=b"jilju-given").digest()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
