"""Ended calls: their marks go to the ring that folds over the log read.

A ledger listener. Knows nothing of text.
"""

from jilju.account.records import CallRing
from jilju.serve.ledger import Call, LedgerListener


class EndedCalls(LedgerListener):
    def __init__(self, calls: CallRing):
        self._calls = calls

    def on_end(self, call: Call) -> None:
        self._calls.add(call.record())
