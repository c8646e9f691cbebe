"""A server's parts that live as long as it: context, ledger, admission, drain, metrics.

Owns their making, and nothing else; routes are handed one of these. Knows nothing of HTTP.
"""

from dataclasses import dataclass

from jilju.engine.admission import Admission
from jilju.serve.context import ServerContext
from jilju.serve.drain import Drain
from jilju.serve.ledger import Ledger
from jilju.serve.metrics import Metrics
from jilju.serve.request_log import CallLog


@dataclass(frozen=True, slots=True)
class Server:
    context: ServerContext
    ledger: Ledger
    admission: Admission
    drain: Drain
    metrics: Metrics


def make_server(context: ServerContext) -> Server:
    ledger = Ledger(context.clock)
    admission = Admission(context.limits.queue_requests, context.limits.queue_pools)
    drain = Drain(ledger)
    metrics = Metrics(context, ledger, drain)
    ledger.listen(metrics)
    ledger.listen(CallLog())
    context.client.log.listen(metrics.on_step)
    return Server(context, ledger, admission, drain, metrics)
