"""The pages a person sees, as static files: plain ES modules, no build step, no foreign request.

Owns the files and where they lie: a folder for each page with its `index.html`, what all pages share beside them, and what
others wrote in `vendor/`, listed there. Every file is at `/view/<path>`. They keep to a strict content security policy (no inline
script or style, no eval, HTML from a text by the sanitizer alone), which the server sends. Knows nothing of HTTP, requests or
engines.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent
