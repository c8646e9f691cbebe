"""POST /v1/messages/count_tokens: how many tokens of input a message would have.

Owns nothing but the way there, which is that of /v1/messages up to the prompt's ids: so both count the same. Knows nothing of
the engine.
"""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jilju.serve.body import read_fields
from jilju.serve.door.auth import cache_salt
from jilju.serve.door.gate import arrival_of, ignored_of
from jilju.serve.health import json_response
from jilju.serve.messages.api import MessagesApi, parse_messages
from jilju.serve.messages.types import CountedTokens
from jilju.serve.sampling import check_model, sampling_params
from jilju.serve.server import Server
from jilju.serve.timings import Marks


async def count_tokens(server: Server, request: Request) -> Response:
    """Under the salt of the message itself: an answer that was given under it may stand for other ids than its text's plain
    ones."""
    context, arrival = server.context, arrival_of(request.scope)
    take = partial(parse_messages, ignored=ignored_of(request.scope), needs_max_tokens=False)
    fields = await read_fields(request, context.limits, take)
    check_model(fields.model, context)
    salt = cache_salt(arrival.key, fields.cache_salt, is_shared=context.shared_prefix_cache)
    (prompt,) = await MessagesApi().prompts(fields, context, Marks(received_ns=arrival.received_ns), salt)
    # for its checks: what the message would be refused for is refused here
    sampling_params(fields, context, max_tokens=fields.max_tokens or context.context_tokens(), logprobs=None, seed=0)
    return json_response(CountedTokens(input_tokens=len(prompt.ids)))
