"""The pages a person sees, as static files: plain ES modules, one stylesheet, no build step, no foreign request.

Owns the files and what a server must know to hand them out: where they lie, their media types, and the content security
policy they are written for. `index.html` is the page at `/`; every other file is at `/view/<name>`. Knows nothing of HTTP
frameworks, requests or engines.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent

# Only these are assets; anything else in the folder (this module, bytecode) is not handed out.
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The pages hold to it: no inline script or style, no eval, no HTML made from strings (trusted types), no foreign origin.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'"
)
