"""The pages' static files: GET /, /engine, /runs/{id} and /view/*.

Owns their headers: ETag, a strict content security policy, no sniffing. Files are read once, at start; a path is a key of
that table and never reaches a file system. Knows nothing of what the pages do.
"""

import hashlib
import mimetypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from jilju.errors import RouteNotFound
from jilju.serve.errors import shown

# HTML from text is made in one place only, by the sanitizer, whose policy for trusted types bears its name.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".json": "application/json",
}
NOT_SERVED = (".py", ".pyc")


@dataclass(frozen=True, slots=True)
class ViewFile:
    data: bytes
    content_type: str
    etag: str


def load_view(directory: Traversable | None) -> Mapping[str, ViewFile]:
    """Every file below the directory by its path there: "base.css", "chat/index.html"."""
    if directory is None:
        return {}
    return {path: _view_file(path, file.read_bytes()) for path, file in _walk(directory, "")}


def _walk(directory: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in directory.iterdir():
        if entry.name.startswith((".", "__")) or entry.name.endswith(NOT_SERVED):
            continue
        path = prefix + entry.name
        if entry.is_dir():
            yield from _walk(entry, path + "/")
        else:
            yield path, entry


def _view_file(path: str, data: bytes) -> ViewFile:
    suffix = "." + path.rpartition(".")[2]
    content_type = TYPES.get(suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"
    if content_type.startswith("text/"):
        content_type += "; charset=utf-8"
    return ViewFile(data, content_type, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


class ViewRoutes:
    def __init__(self, files: Mapping[str, ViewFile]):
        self._files = files

    async def index(self, request: Request) -> Response:
        return self._respond(request, "chat/index.html")

    async def engine(self, request: Request) -> Response:
        return self._respond(request, "engine/index.html")

    async def run(self, request: Request) -> Response:
        """The same page for every id; what is known of a run, and whether the key may see it, is said by the API."""
        return self._respond(request, "run/index.html")

    async def file(self, request: Request) -> Response:
        return self._respond(request, request.path_params["path"])

    def _respond(self, request: Request, path: str) -> Response:
        file = self._files.get(path)
        if file is None:
            raise RouteNotFound(f"there is no page {shown(path)}")
        headers = {
            "etag": file.etag,
            "cache-control": "no-cache",  # ask again, and get 304
            "content-security-policy": POLICY,
            "referrer-policy": "no-referrer",
        }
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers=headers | {"content-type": file.content_type})
