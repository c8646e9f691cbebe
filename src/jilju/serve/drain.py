"""Drain: how a server stops taking calls and lets those it has come to an end.

Owns the state (serving, draining) and the wait for the live calls. Knows nothing of signals, sockets or the engine: the
runner moves it.
"""

import asyncio

from jilju.errors import NotReady
from jilju.serve.ledger import Call, Ledger, LedgerListener


class Drain(LedgerListener):
    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._empty = asyncio.Event()
        self.begun = asyncio.Event()
        ledger.listen(self)

    @property
    def draining(self) -> bool:
        return self.begun.is_set()

    def begin(self) -> None:
        """New calls are refused from now on, /readyz says so."""
        self.begun.set()
        self._look()

    def check(self) -> None:
        if self.draining:
            raise NotReady(
                "the server is shutting down; call another one, or this one when it is back", retry_after_s=5.0
            )

    def cut_live(self) -> None:
        """End every live call with an error."""
        for call in list(self._ledger.live.values()):
            if call.cut is not None:
                call.cut(
                    NotReady("the server is shutting down and the answer is not complete; ask again", retry_after_s=5.0)
                )

    async def empty(self, timeout_s: float) -> bool:
        """Whether no call was live within that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def on_end(self, call: Call) -> None:
        self._look()

    def _look(self) -> None:
        if self.draining and not self._ledger.live:
            self._empty.set()
