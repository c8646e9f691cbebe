"""Recordings: the server's log and ledger as folds take them.

Owns what a recording of this moment is made of. Knows nothing of what is folded, nor of HTTP.
"""

from collections import Counter

from jilju.account.bill import make_cost, make_energy
from jilju.account.frame import Counts
from jilju.account.log_file import About
from jilju.account.recording import BlockCounts, Now, Outages, Recording, Restarts, Viewer, first_moment
from jilju.account.records import CallRecord, CallRing
from jilju.account.step_model import StepModel, make_step_model
from jilju.config import ApiKey
from jilju.engine.admission import Admission
from jilju.engine.client import EngineInfo
from jilju.engine.events import EventLog
from jilju.serve.billing import Billing
from jilju.serve.context import ServerContext
from jilju.serve.drain import Drain
from jilju.serve.ledger import Ledger
from jilju.serve.metrics.memory import Memory


class Recordings:
    def __init__(
        self,
        context: ServerContext,
        ledger: Ledger,
        calls: CallRing,
        admission: Admission,
        drain: Drain,
        billing: Billing,
        memory: Memory,
    ):
        self.ledger, self._context, self._calls = ledger, context, calls
        self._admission, self._drain, self._billing, self._memory = admission, drain, billing, memory
        self._started_ns = context.clock.now_ns()
        self._restarts = Restarts(self.log)
        self._outages = Outages(self.log, self._started_ns, is_ready=self._is_ready())
        self._model: StepModel | None = None  # made with what the first engine tells of itself

    @property
    def log(self) -> EventLog:
        return self._context.client.log

    @property
    def info(self) -> EngineInfo | None:
        return self._context.client.info

    def now_ns(self) -> int:
        return self._context.clock.now_ns()

    def recording(self) -> Recording:
        """Up to now. Of the log and the calls it sees what comes later: who hands it to a thread takes a part of them."""
        context, now_ns = self._context, self.now_ns()
        live = [call.record() for call in self.ledger.live.values()]
        return Recording(
            model=context.model_name,
            version=context.version,
            log=self.log,
            calls=list(self._calls),
            live=lambda: live,
            refusals=list(self.ledger.refusals),
            restarts=self._restarts.found,
            outages=self._outages.found,
            info=self.info,
            step_model=self.step_model(),
            counts=self._counts(),
            started_ns=self._started_ns,
            first_ns=first_moment(self.log, self._started_ns, self._calls.dropped_ns),
            now_ns=now_ns,
            unix_ns=int(context.unix_time() * 1e9),
            now=self._now(live),
        )

    def about(self, *, is_first: bool) -> About:
        """For a file that begins now, or, if it is the first, with the server: nothing has happened yet."""
        context, now_ns = self._context, self.now_ns()
        begun_ns = self._started_ns if is_first else now_ns
        return About(
            model=context.model_name,
            version=context.version,
            started_ns=self._started_ns,
            begun_ns=begun_ns,
            unix_ns=int(context.unix_time() * 1e9) - (now_ns - begun_ns),
            counts=self._counts(),
            is_ready=self._is_ready(),
            plan=context.plan,
        )

    def _is_ready(self) -> bool:
        return self._context.client.status().state == "ready"

    def step_model(self) -> StepModel:
        """One for all folds of this server."""
        if self.info is None:
            return make_step_model(None, None)
        if self._model is None:
            self._model = make_step_model(self._context.plan, self.info)
        return self._model

    def _now(self, live: list[CallRecord]) -> Now:
        context, status, sums = self._context, self._context.client.status(), self._billing.sums()
        state = "draining" if self._drain.draining and status.state == "ready" else status.state
        num_tokens = self._billing.num_output_tokens
        return Now(
            state=state,
            imbalance=status.imbalance + self.ledger.imbalance() + self.log.num_failures,
            blocks=BlockCounts(status.num_blocks_held, status.num_blocks_cached, status.num_blocks_free),
            predicted_starts=self._predicted_starts(live),
            memory=self._memory.owned,
            cost=make_cost(sums, context.price_per_hour, num_tokens),
            energy=make_energy(sums, num_tokens),
        )

    def _predicted_starts(self, live: list[CallRecord]) -> dict[int, int]:
        """Of sequences that the engine has not told anything of yet."""
        found: dict[int, int] = {}
        for call in live:
            for sequence in call.sequences:
                if not sequence.queued_ns:
                    at_ns = self._admission.predicted_start_ns(f"{call.id}-{sequence.index}")
                    if at_ns is not None:
                        found[sequence.number] = at_ns
        return found

    def _counts(self) -> Counts:
        ended: Counter[str] = Counter()
        for (state, _), count in self.ledger.num_ended.items():
            ended[state] += count
        return Counts(
            accepted=self.ledger.num_accepted.total(),
            live=len(self.ledger.live),
            completed=ended["completed"],
            cancelled=ended["client_cancelled"],
            deadline=ended["deadline"],
            shed=ended["shed"],
            failed=ended["failed"],
            refused=self.ledger.num_refused.total(),
            restarts=self._context.client.status().num_restarts,
        )


def viewer_of(key: ApiKey | None) -> Viewer:
    return Viewer(key_name=None if key is None else key.name)
