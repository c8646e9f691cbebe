"""POST /v1/requests/{id}/cancel: the end of a call by its caller's word.

Owns who may end what: calls of the same key and no other. Knows nothing of how a call is ended, which has a function for that.
"""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from jilju.errors import RequestCancelled, RequestNotFound
from jilju.serve.answer_types import Cancelled
from jilju.serve.door.gate import arrival_of
from jilju.serve.errors import shown
from jilju.serve.health import json_response
from jilju.serve.ledger import Call, CallState
from jilju.serve.server import Server

END_S = 1.0  # a call that was cut ends within a turn of the loop; a reader that has stalled is not waited for


class CancelRoute:
    """`prefixes` are those that answers put before an id."""

    def __init__(self, server: Server, prefixes: Sequence[str]):
        self._server, self._prefixes = server, tuple(prefixes)

    async def cancel(self, request: Request) -> Response:
        """By id one call, by label all live ones that bear it, or else the last that did."""
        given, key = request.path_params["id"], arrival_of(request.scope).key
        key_name = None if key is None else key.name
        live, endings = self._server.ledger.live, self._server.endings
        call_id = next((given[len(p) :] for p in self._prefixes if given.startswith(p)), given)
        call = live.get(call_id)
        if call is not None and self._may_end(call, key_name):
            return json_response(Cancelled(id=call_id, state=await self._end(call)))
        if (state := endings.by_id(call_id, key_name)) is not None:
            return json_response(Cancelled(id=call_id, state=state))
        calls = [call for call in live.values() if call.label == given and self._may_end(call, key_name)]
        if calls:
            states = await asyncio.gather(*map(self._end, calls))
            return json_response(Cancelled(id=calls[-1].id, state=states[-1], ids=[call.id for call in calls]))
        if (ending := endings.by_label(given, key_name)) is not None:
            return json_response(Cancelled(id=ending[0], state=ending[1], ids=[ending[0]]))
        raise RequestNotFound(
            f"this key has no call {shown(given)} that is live or has ended of late; give the x-request-id of one, "
            "or the x-client-request-id that it was sent with"
        )

    @staticmethod
    def _may_end(call: Call, key_name: str | None) -> bool:
        return call.key_name == key_name and call.cut is not None  # None: its answer is not begun

    async def _end(self, call: Call) -> CallState:
        """The state it ends in, which is another if it was faster."""
        assert call.cut is not None, f"call {call.id} has an end"
        ended = self._server.endings.future_of(call)
        call.cut(RequestCancelled("the call was cancelled, as its caller asked"))
        try:
            async with asyncio.timeout(END_S):
                return await asyncio.shield(ended)
        except TimeoutError:
            return "client_cancelled"
