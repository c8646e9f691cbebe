"""A server's parts that live as long as it: context, keys, ledger, billing, admission, quotas, drain, endings, runs, metrics,
recordings.

Owns their making, and nothing else; routes are handed one of these. Knows nothing of HTTP.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jilju.account.records import CallRing
from jilju.engine.admission import Admission
from jilju.serve.billing import Billing
from jilju.serve.context import ServerContext
from jilju.serve.door.auth import KeyRing
from jilju.serve.door.quota import Quotas
from jilju.serve.drain import Drain
from jilju.serve.endings import Endings
from jilju.serve.event_file import EventFile, make_event_file
from jilju.serve.ledger import Ledger
from jilju.serve.loop_lag import LoopLag
from jilju.serve.metrics.scrape import Metrics
from jilju.serve.recordings import Recordings
from jilju.serve.request_log import CallLog
from jilju.serve.runs.ended import EndedCalls
from jilju.serve.runs.store import RunStore

if TYPE_CHECKING:
    from jilju.serve.otel.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Server:
    context: ServerContext
    keys: KeyRing
    ledger: Ledger
    billing: Billing
    admission: Admission
    quotas: Quotas
    drain: Drain
    endings: Endings
    calls: CallRing  # that ended, for folds over the log
    runs: RunStore
    metrics: Metrics
    loop_lag: LoopLag
    recordings: Recordings
    event_file: EventFile | None  # None: nobody wants it
    telemetry: "Telemetry | None"  # None: nobody wants it


def make_server(context: ServerContext) -> Server:
    ledger = Ledger(context.clock)
    admission = Admission(context.limits.queue_requests, context.limits.queue_pools)
    quotas, drain, endings = Quotas(context.clock), Drain(ledger), Endings()
    loop_lag = LoopLag(context.clock)
    calls, runs = CallRing(), RunStore(context.run_store_bytes)
    billing = Billing(context, calls)
    ledger.listen(billing)  # first: others tell what a call has cost
    metrics = Metrics(context, ledger, drain, loop_lag, calls, runs, billing)
    telemetry = _make_telemetry(context, runs)
    if telemetry is not None:
        ledger.listen(telemetry)  # before a run may leave the store
    for listener in (CallLog(context.price_per_hour), quotas, endings, EndedCalls(calls), runs):
        ledger.listen(listener)
    keys = KeyRing(context.keys)
    recordings = Recordings(context, ledger, calls, admission, drain, billing, metrics.memory)
    event_file = make_event_file(context.event_log, context.event_log_bytes, recordings)
    return Server(
        context, keys, ledger, billing, admission, quotas, drain, endings, calls, runs, metrics, loop_lag, recordings,
        event_file, telemetry,
    )  # fmt: skip


def _make_telemetry(context: ServerContext, runs: RunStore) -> "Telemetry | None":
    if context.telemetry is None:
        return None
    from jilju.serve.otel.telemetry import Telemetry  # its library is there only where it is wanted

    return Telemetry(context, context.telemetry, runs)
