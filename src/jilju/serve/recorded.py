"""Recorded: the engine page over an event-log file, on loopback.

Owns the app of `jilju view`: the page's files, /v1/jilju/window and the ops of a step, with the answers of a live server. Texts and
tokens are in no such file, so there are no runs; nothing happens any more, so there are no events. Knows nothing of how a file is read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from importlib.resources.abc import Traversable

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from jilju.account.recording import Recording, Viewer
from jilju.account.waterfalls import Waterfalls
from jilju.account.window import make_frame
from jilju.errors import Forbidden, JiljuError, MethodNotAllowed, RouteNotFound, RunNotFound
from jilju.serve.door.auth import LOOPBACK_HOSTS, host_name
from jilju.serve.errors import error_body, shown
from jilju.serve.health import json_response
from jilju.serve.live import DEFAULT_SECONDS, MAX_SECONDS, checked_query, seconds_of, window_end_ns
from jilju.serve.runner import address_of, bind
from jilju.serve.runs.ops import step_ops
from jilju.serve.view_files import ViewRoutes, load_view

SEES_ALL = Viewer(sees_all=True)  # who has the file


def serve_recording(recording: Recording, view_dir: Traversable, port: int, on_ready: Callable[[str], None]) -> None:
    """Until it is interrupted. Raises ConfigError if the port cannot be had."""
    listener = bind("127.0.0.1", port)
    config = uvicorn.Config(
        recorded_app(recording, view_dir),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    on_ready(address_of(listener))
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def recorded_app(recording: Recording, view_dir: Traversable) -> Starlette:
    routes, view = _Routes(recording), ViewRoutes(load_view(view_dir))
    found: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        ("/", _to_engine),
        ("/engine", view.engine),
        ("/view/{path:path}", view.file),
        ("/v1/jilju/window", routes.window),
        ("/v1/jilju/steps/{serial}", routes.step),
        ("/v1/jilju/events", _no_events),
        ("/runs", _no_runs),
        ("/runs/{id}", _no_runs),
        ("/v1/jilju/runs", _no_runs),
        ("/v1/jilju/runs/{path:path}", _no_runs),
    ]
    return Starlette(
        routes=[Route(path, _of_this_host(endpoint), methods=["GET"]) for path, endpoint in found],
        exception_handlers={JiljuError: _refused, HTTPException: _wrong_route},
    )


class _Routes:
    def __init__(self, recording: Recording):
        self._recording, self._bars = recording, Waterfalls()
        self._one_at_a_time = asyncio.Lock()

    async def window(self, request: Request) -> Response:
        query = checked_query(request.query_params.multi_items(), ("seconds", "end_ms"))
        seconds = seconds_of(query.get("seconds"), DEFAULT_SECONDS, MAX_SECONDS)
        end_ns = window_end_ns(query.get("end_ms"), self._recording)
        begin_ns = end_ns - seconds * 10**9
        async with self._one_at_a_time:
            frame = await asyncio.to_thread(
                make_frame, self._recording, begin_ns, end_ns, SEES_ALL, waterfalls=self._bars
            )
        return json_response(frame)

    async def step(self, request: Request) -> Response:
        serial = request.path_params["serial"]
        logged = self._recording.log.step(int(serial)) if serial.isdecimal() and len(serial) < 19 else None
        if logged is None:
            raise RunNotFound(f"there is no step {shown(serial)} in this file")
        return json_response(step_ops(logged, self._recording.step_model))


def _of_this_host(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """A page elsewhere whose name leads here is turned away."""

    async def checked(request: Request) -> Response:
        host = request.headers.get("host", "")
        if host_name(host) not in LOOPBACK_HOSTS:
            raise Forbidden(f"the host {shown(host)} is not this machine; open http://127.0.0.1 and the port")
        return await endpoint(request)

    return checked


async def _to_engine(request: Request) -> Response:
    return RedirectResponse("/engine")


async def _no_events(request: Request) -> Response:
    raise RouteNotFound("a recorded file has no live events; ask /v1/jilju/window")


async def _no_runs(request: Request) -> Response:
    raise RunNotFound(
        "texts and tokens are not in an event log, so a recorded file has no pages of runs; `jilju trace --run` has its times"
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, JiljuError), f"registered for our errors only, given {error!r}"
    return Response(error_body(error), error.status, media_type="application/json")


async def _wrong_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"registered for the router's errors only, given {error!r}"
    path = shown(request.url.path)
    if error.status_code == 405:
        return await _refused(request, MethodNotAllowed(f"{path} takes GET alone"))
    return await _refused(request, RouteNotFound(f"there is no route {path}: this is a recorded file; see /engine"))
