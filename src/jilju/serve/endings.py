"""Endings: how the calls ended that ended last.

Owns a bounded memory of them, by id and by label, and word of an ending to who waits for it. Keys see their own calls only.
Knows nothing of HTTP.
"""

import asyncio
from collections import OrderedDict
from typing import NamedTuple

from jilju.serve.ledger import Call, CallState, LedgerListener

MAX_ENDINGS = 4096


class Ending(NamedTuple):
    state: CallState
    key_name: str | None
    label: str | None


class Endings(LedgerListener):
    """A ledger listener."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, Ending] = OrderedDict()
        self._last_id: dict[tuple[str | None, str], str] = {}  # by key's name and label; each is in _by_id
        self._waited_for: dict[str, asyncio.Future[CallState]] = {}

    def by_id(self, call_id: str, key_name: str | None) -> CallState | None:
        ending = self._by_id.get(call_id)
        return ending.state if ending is not None and ending.key_name == key_name else None

    def by_label(self, label: str, key_name: str | None) -> tuple[str, CallState] | None:
        """Id and state of the last call with that label."""
        call_id = self._last_id.get((key_name, label))
        return None if call_id is None else (call_id, self._by_id[call_id].state)

    def future_of(self, call: Call) -> "asyncio.Future[CallState]":
        """The state of a live call when it ends; others may wait for the same future."""
        if call.id not in self._waited_for:
            self._waited_for[call.id] = asyncio.get_running_loop().create_future()
        return self._waited_for[call.id]

    def on_end(self, call: Call) -> None:
        assert call.state is not None, "a call that has ended has a state"
        self._by_id[call.id] = Ending(call.state, call.key_name, call.label)
        if call.label is not None:
            self._last_id[call.key_name, call.label] = call.id
        if len(self._by_id) > MAX_ENDINGS:
            gone, ending = self._by_id.popitem(last=False)
            if ending.label is not None and self._last_id.get((ending.key_name, ending.label)) == gone:
                del self._last_id[ending.key_name, ending.label]
        future = self._waited_for.pop(call.id, None)
        if future is not None:
            future.set_result(call.state)
