"""The pages a person sees, as static files: plain ES modules, one stylesheet, no build step, no foreign request.

Owns the files and where they lie: `index.html` is the page at `/`, every other file is at `/view/<name>`. They keep to a strict
content security policy (no inline script or style, no eval, no HTML made from strings), which the server sends. Knows nothing
of HTTP, requests or engines.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent
