"""Billing: the bill of this server's calls.

Owns the bill over the engine's log, and that each call gets its share when nothing more can be charged to it: as it ends, or,
if it left a step that it was in, when that step is known. Knows nothing of how a step is split.
"""

from jilju.account.bill import Bill, Paid, Sums
from jilju.account.records import CallRecord, CallRing
from jilju.account.step_model import make_step_model
from jilju.engine.events import Watcher
from jilju.serve.context import ServerContext
from jilju.serve.ledger import Call
from jilju.serve.runs.types import CostShare
from jilju.serve.usage_log import usage_line


class Billing(Watcher):
    """A ledger listener, the first one: those after it read the call's share. Watches the engine's log."""

    def __init__(self, context: ServerContext, calls: CallRing):
        self._context, self._calls = context, calls
        self.num_output_tokens = 0
        self.bill = Bill(
            context.clock.now_ns(),
            lambda: make_step_model(context.plan, context.client.info),
            context.meter,
            num_faults=lambda: context.client.status().num_step_faults,
            is_ready=context.client.info is not None,
        )
        self._leaving: dict[int, Call] = {}  # ended, by the number of a sequence that may still be in a step
        log = context.client.log
        log.listen(self.bill.on_step)
        log.watch(self.bill)
        log.watch(self)

    def sums(self) -> Sums:
        """Whose the machine's time was up to now. To be asked on the event loop."""
        return self.bill.sums(self._context.clock.now_ns())

    def settled_sums(self) -> Sums:
        """The same up to the last step that is known: these never get smaller."""
        return self.bill.sums(self._context.clock.now_ns(), is_settled=True)

    def share_of(self, record: CallRecord) -> CostShare:
        """Of a call that still runs, so far. May be asked from any thread."""
        paid = Paid(record.machine_ns, record.joules)
        if record.state is None:
            paid = self.bill.paid([sequence.number for sequence in record.sequences])
        price = self._context.price_per_hour
        return CostShare(
            currency="USD",
            price_per_hour=price or 0.0,
            is_default=price is None,
            amount=paid.cost(price) or 0.0,
            machine_ms=paid.machine_ns / 1e6,
            joules=paid.joules,
        )

    def on_token(self, call: Call, gap_ns: int | None) -> None:
        self.num_output_tokens += 1

    def on_end(self, call: Call) -> None:
        numbers = [life.number for life in call.lives]
        if self.bill.is_final(numbers):
            self._close(call, numbers)
        else:
            call.machine_ns, call.joules = self.bill.paid(numbers)  # so far
            self._leaving |= dict.fromkeys(numbers, call)

    def on_leave(self, number: int, at_ns: int) -> None:
        call = self._leaving.pop(number, None)
        if call is None:
            return
        numbers = [life.number for life in call.lives]
        if self.bill.is_final(numbers):
            for other in numbers:
                self._leaving.pop(other, None)
            self._close(call, numbers)
            self._calls.add(call.record())  # in place of the one that it got as it ended

    def _close(self, call: Call, numbers: list[int]) -> None:
        call.machine_ns, call.joules = self.bill.close(numbers)
        context = self._context
        if context.usage_log is not None:
            context.usage_log.write(usage_line(call, context.model_name, context.price_per_hour, context.unix_time()))
