"""The scrape: what /metrics reads when it is asked, put together.

Owns the order of what is shown, and which sets are. Reads what lies ready: it asks no process and waits for nothing, so it
takes a millisecond. Knows nothing of HTTP.
"""

from jilju.account.records import CallRing
from jilju.serve.billing import Billing
from jilju.serve.context import ServerContext
from jilju.serve.drain import Drain
from jilju.serve.ledger import Ledger
from jilju.serve.loop_lag import LoopLag
from jilju.serve.metrics import own
from jilju.serve.metrics.folds import Folds
from jilju.serve.metrics.memory import Memory
from jilju.serve.metrics.text import Exposition
from jilju.serve.metrics.vllm import show_vllm
from jilju.serve.runs.store import RunStore


class Metrics:
    def __init__(
        self,
        context: ServerContext,
        ledger: Ledger,
        drain: Drain,
        loop_lag: LoopLag,
        calls: CallRing,
        runs: RunStore,
        billing: Billing,
    ):
        self._context, self._ledger, self._drain, self._loop_lag = context, ledger, drain, loop_lag
        self._billing = billing
        self.memory = Memory(context, calls, runs)
        self.folds = Folds(context.max_context, context.client.log)
        ledger.listen(self.folds)
        context.client.log.listen(self.folds.on_step)

    def expose(self) -> bytes:
        context, folds, draining = self._context, self.folds, self._drain.draining
        status, info = context.client.status(), context.client.info
        out = Exposition("jilju_", {"model": context.model_name})
        own.show_state(out, status, folds, draining)
        imbalance = self._ledger.imbalance() + status.imbalance + context.client.log.num_failures
        own.show_calls(out, self._ledger, folds, imbalance)
        own.show_tokens(out, folds)
        own.show_engine(out, status, folds, context.num_dropped_log_lines())
        own.show_blocks(out, status)
        own.show_machine(out, context, info, self.memory.owned(), self._loop_lag.worst_s)
        own.show_roofs(out, info, folds, context.clock.now_ns())
        own.show_bill(out, self._billing.settled_sums(), context.price_per_hour)
        own.show_histograms(out, folds)
        text = out.text()
        if context.metrics_compat == "vllm":
            alias = Exposition("vllm:", {"model_name": context.model_name, "engine": "0"})
            show_vllm(alias, context, status, info, folds, draining)
            text += alias.text()
        return text.encode()
