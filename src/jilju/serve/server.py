"""A server's parts that live as long as it: context, keys, ledger, admission, quotas, drain, endings, metrics.

Owns their making, and nothing else; routes are handed one of these. Knows nothing of HTTP.
"""

from dataclasses import dataclass

from jilju.engine.admission import Admission
from jilju.serve.context import ServerContext
from jilju.serve.door.auth import KeyRing
from jilju.serve.door.quota import Quotas
from jilju.serve.drain import Drain
from jilju.serve.endings import Endings
from jilju.serve.ledger import Ledger
from jilju.serve.metrics import Metrics
from jilju.serve.request_log import CallLog


@dataclass(frozen=True, slots=True)
class Server:
    context: ServerContext
    keys: KeyRing
    ledger: Ledger
    admission: Admission
    quotas: Quotas
    drain: Drain
    endings: Endings
    metrics: Metrics


def make_server(context: ServerContext) -> Server:
    ledger = Ledger(context.clock)
    admission = Admission(context.limits.queue_requests, context.limits.queue_pools)
    quotas, drain, endings = Quotas(context.clock), Drain(ledger), Endings()
    metrics = Metrics(context, ledger, drain)
    for listener in (metrics, CallLog(), quotas, endings):
        ledger.listen(listener)
    context.client.log.listen(metrics.on_step)
    return Server(context, KeyRing(context.keys), ledger, admission, quotas, drain, endings, metrics)
