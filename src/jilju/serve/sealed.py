"""Sealed thoughts: reasoning in an opaque form that a client keeps and sends back.

Owns the form: base64url of a version byte, a checksum and the text. It tells our own from what other servers made, and an
altered one from a whole one. It hides nothing: the text is the caller's own. Knows nothing of items or requests.
"""

import base64
import hashlib

VERSION = b"\x01"
CHECKSUM_BYTES = 8


def sealed(text: str) -> str:
    data = text.encode()
    return base64.urlsafe_b64encode(VERSION + _checksum(data) + data).decode()


def unsealed(given: str) -> str | None:
    """The text; None if this is not what `sealed` makes."""
    try:
        raw = base64.b64decode(given, altchars=b"-_", validate=True)
        head, data = raw[: 1 + CHECKSUM_BYTES], raw[1 + CHECKSUM_BYTES :]
        return data.decode() if head == VERSION + _checksum(data) else None
    except ValueError:  # no base64, or no UTF-8
        return None


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES, person=b"jilju-thoughts").digest()
