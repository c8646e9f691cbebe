"""The app: which route answers what, and what a key must be good for to be answered.

Owns the table of routes and the answers for a wrong route or method. Knows nothing of what a route does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jilju.config import KeyScope
from jilju.errors import JiljuError, MethodNotAllowed, RouteNotFound
from jilju.serve import embeddings, health, models, render, tokenize
from jilju.serve.api import Api
from jilju.serve.cancel import CancelRoute
from jilju.serve.chat.api import ChatApi
from jilju.serve.context import ServerContext
from jilju.serve.door.gate import Gate, NeedsScope
from jilju.serve.errors import shown
from jilju.serve.generate_route import GenerateRoute
from jilju.serve.live import LiveRoutes
from jilju.serve.messages.api import MessagesApi
from jilju.serve.messages.count_tokens import count_tokens
from jilju.serve.openai_completions import CompletionApi
from jilju.serve.openapi.route import OpenapiRoute
from jilju.serve.otel.origins import NotesOrigin
from jilju.serve.responses.api import ResponsesApi
from jilju.serve.runs.routes import RunRoutes
from jilju.serve.server import Server, make_server
from jilju.serve.view_files import ViewRoutes, load_view


def create_app(context: ServerContext) -> Starlette:
    return app_of(make_server(context))


def app_of(server: Server) -> Starlette:
    view = ViewRoutes(load_view(server.context.view_dir))
    apis: tuple[Api[Any], ...] = (ChatApi(), CompletionApi(), ResponsesApi(), MessagesApi())
    cancel = CancelRoute(server, [api.id_prefix for api in apis])
    runs, live = RunRoutes(server), LiveRoutes(server)
    behind_gate = [] if server.telemetry is None else [Middleware(NotesOrigin, server.telemetry.origins)]
    app = Starlette(
        routes=[
            *(_route("POST", api.path, GenerateRoute(server, api), "generate") for api in apis),
            _route("POST", "/v1/embeddings", partial(embeddings.embed, server), "generate"),
            _route("POST", "/v1/requests/{id:path}/cancel", cancel.cancel, "generate"),
            _route("GET", "/v1/models", partial(models.list_models, server), None),
            _route("GET", "/v1/models/{model:path}", partial(models.get_model, server), None),
            _route("POST", "/v1/chat/completions/render", partial(render.render_chat, server), "tokenize"),
            _route("POST", "/v1/completions/render", partial(render.render_completion, server), "tokenize"),
            _route("POST", "/v1/messages/count_tokens", partial(count_tokens, server), "tokenize"),
            _route("POST", "/tokenize", partial(tokenize.tokenize, server), "tokenize"),
            _route("POST", "/detokenize", partial(tokenize.detokenize, server), "tokenize"),
            _route("GET", "/livez", partial(health.livez, server), None),
            _route("GET", "/readyz", partial(health.readyz, server), "metrics"),
            _route("GET", "/health", partial(health.health, server), "metrics"),
            _route("GET", "/metrics", partial(health.metrics, server), "metrics"),
            _route("GET", "/version", partial(health.version, server), None),
            _route("GET", "/openapi.json", OpenapiRoute(server).get, None),
            _route("GET", "/v1/jilju/runs", runs.list_runs, "view"),
            _route("GET", "/v1/jilju/runs/{id}", runs.get_run, "view"),
            _route("GET", "/v1/jilju/steps/{serial}", runs.get_step, "view"),
            _route("GET", "/v1/jilju/events", live.events, "view"),
            _route("GET", "/v1/jilju/window", live.window, "view"),
            _route("GET", "/v1/jilju/trace", live.trace, "view"),
            _route("GET", "/", view.index, "view"),
            _route("GET", "/engine", view.engine, "view"),
            _route("GET", "/runs", view.run, "view"),
            _route("GET", "/runs/{id}", view.run, "view"),
            _route("GET", "/view/{path:path}", view.file, "view"),
        ],
        middleware=[Middleware(Gate, server=server), *behind_gate],
        exception_handlers={HTTPException: _wrong_route},
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


def _route(method: str, path: str, endpoint: Callable[..., Any], needed: KeyScope | None) -> Route:
    """`needed` of the key; None: any key will do."""
    around = [] if needed is None else [Middleware(NeedsScope, needed)]
    return Route(path, endpoint, methods=[method], middleware=around)


async def _wrong_route(request: Request, error: Exception) -> Response:
    """The router's own refusals, in our words; the gate renders them."""
    assert isinstance(error, HTTPException), f"registered for the router's errors only, given {error!r}"
    raise _in_our_words(request, error)


def _in_our_words(request: Request, error: HTTPException) -> JiljuError:
    path = request.url.path
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        request.scope["jilju.allow"] = allow.encode()
        return MethodNotAllowed(f"{shown(path)} does not take {shown(request.method)}; allowed: {allow}")
    return RouteNotFound(f"there is no route {shown(path)}; see /v1/models and the list of routes in the documentation")
