"""The app: which route answers what.

Owns the table of routes and the answers for a wrong route or method. Knows nothing of what a route does.
"""

from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jilju.errors import JiljuError, MethodNotAllowed, RouteNotFound
from jilju.serve import health, models, tokenize
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.gate import Gate
from jilju.serve.generate_route import GenerateRoute
from jilju.serve.openai_chat import ChatApi
from jilju.serve.openai_completions import CompletionApi
from jilju.serve.server import Server, make_server
from jilju.serve.view_files import ViewRoutes, load_view


def create_app(context: ServerContext) -> Starlette:
    return app_of(make_server(context))


def app_of(server: Server) -> Starlette:
    view = ViewRoutes(load_view(server.context.view_dir))
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", GenerateRoute(server, ChatApi()), methods=["POST"]),
            Route("/v1/completions", GenerateRoute(server, CompletionApi()), methods=["POST"]),
            Route("/v1/models", partial(models.list_models, server), methods=["GET"]),
            Route("/v1/models/{model:path}", partial(models.get_model, server), methods=["GET"]),
            Route("/tokenize", partial(tokenize.tokenize, server), methods=["POST"]),
            Route("/detokenize", partial(tokenize.detokenize, server), methods=["POST"]),
            Route("/livez", partial(health.livez, server), methods=["GET"]),
            Route("/readyz", partial(health.readyz, server), methods=["GET"]),
            Route("/health", partial(health.health, server), methods=["GET"]),
            Route("/metrics", partial(health.metrics, server), methods=["GET"]),
            Route("/version", partial(health.version, server), methods=["GET"]),
            Route("/", view.index, methods=["GET"]),
            Route("/view/{path:path}", view.file, methods=["GET"]),
        ],
        middleware=[Middleware(Gate, context=server.context, ledger=server.ledger)],
        exception_handlers={HTTPException: _wrong_route},
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


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
