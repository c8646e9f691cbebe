"""The supervisor: what must be known when an engine dies, so that every stream stays whole.

Owns each live request with the tokens received, the epoch, the back-off, and who is suspected of a death. Does no input or
output and takes time as an argument: `engine.process` wires it to a process, a simulation to a virtual clock. Knows nothing
of what a step computes or what a token means.

A token is taken only if it is the next of its request and comes from the engine of the current epoch. So what a client has
is always a prefix of what is held here, and a new engine that is handed prompt and tokens goes on exactly where the old
one stopped: noise is keyed by (seed, position).

Quarantine: the requests in the step of a death are suspects and come back on probation: each runs alone until it has passed
the place where it was.
Who was in two deaths that work can cause, the last time alone, is not run again; nor is who was alone in three kills, which
memory pressure can cause. A death that no suspect repeats alone ends nobody.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec

from jilju.engine.client import EngineInfo, EngineState, EngineStatus
from jilju.engine.events import prefill_share_ns
from jilju.engine.link import Beat, LinkBroken, Ready, Stepped, ToServer
from jilju.engine.loop import MAX_REQUESTS, check_bound
from jilju.engine.request import (
    EngineEvent,
    PromptScored,
    Request,
    RequestAborted,
    RequestFailed,
    RequestTimes,
    TokenEvent,
    is_terminal,
)
from jilju.engine.scheduler import check_fits, deadline_event
from jilju.errors import EngineUnavailable, NotReady, RequestQuarantined
from jilju.plan import Limits

MAX_RESTARTS = 5  # in a row without a step between them
STABLE_NS = 60 * 10**9  # an engine that was ready for so long ends the row too
BACKOFF_S, BACKOFF_S_MAX = 0.1, 5.0
WATCHDOG_S = 30.0  # without a sign of life
STEP_S_MAX = 30.0  # a step in flight for longer hangs, ...
STEP_TIMES_MAX = 10  # ... unless it was expected to take more than a tenth of that
LATE_NS = 10**9  # after a deadline that an engine that is ready should have seen to
PAUSE_NS = 2 * 10**9  # a gap between two looks at the clock: this process was stopped, the engine is not to blame
NUM_PROBATION_STEPS = 2  # of a suspect, alone, from its last known token on
MAX_DEATHS = 2  # that the work can have caused, the last one alone
MAX_KILLS = 3  # alone

# "work": what a step computes can bring it about (a fault signal, an abort, a hang); "pressure": the system killed it;
# "other": anything else, such as a link that cannot be trusted. Only the first two can be held against a request.
DeathCause = Literal["work", "pressure", "other"]

_NO_STATUS = EngineStatus(
    state="loading", num_running=0, num_waiting=0, num_blocks_free=0, num_blocks_cached=0, num_blocks_held=0,
    last_step_age_s=0.0, num_restarts=0, imbalance=0,
)  # fmt: skip


@dataclass(slots=True)
class _Live:
    """A request that has no terminal event yet, with all that another engine needs to go on with it."""

    request: Request
    queued_ns: int
    tokens: list[int]  # the whole output so far
    num_scored: int = 0  # tokens of the prompt whose logprobs were received
    is_aborting: bool = False
    is_scheduled: bool = False  # it was in a step, so the time to wait for one is over
    num_deaths: int = 0  # with it in the step, that the work can have caused
    num_kills_alone: int = 0  # with it alone in the step, since its last token
    is_suspect: bool = False  # it was in the step of a death, and has made no token since
    is_over: bool = False  # its end was told; what the engine still says of it is dropped
    num_resumes: int = 0
    started: RequestTimes | None = None  # of the engine that made the first token
    stalled_ns: int = 0  # as far as the frames tell
    stalled_before_ns: int = 0  # of engines that died
    died_ns: int = 0  # a death after which no token came yet
    resume_ns: int = 0

    def resubmission(self) -> Request:
        return msgspec.structs.replace(
            self.request,
            output_ids=list(self.tokens),
            num_scored=self.num_scored,
            arrival_ns=self.request.arrival_ns or self.queued_ns,
            queue_deadline_ns=0 if self.is_scheduled else self.request.queue_deadline_ns,
            num_probation_steps=NUM_PROBATION_STEPS if self.is_suspect else 0,
        )

    def times(self, of_engine: RequestTimes | None) -> RequestTimes:
        """The engine's own account, or, if the request outlived an engine, one that spans all of them."""
        if of_engine is not None and self.num_resumes == 0:
            return of_engine
        times = of_engine if of_engine is not None else self.started or RequestTimes(queued_ns=self.queued_ns)
        first = self.started or times
        return msgspec.structs.replace(
            times,
            queued_ns=self.queued_ns,
            scheduled_ns=first.scheduled_ns,
            first_token_ns=first.first_token_ns,
            stalled_ns=self.stalled_before_ns + (of_engine.stalled_ns if of_engine is not None else 0),
            resume_ns=self.resume_ns,
            miss=first.miss,
        )


class Supervisor:
    def __init__(self, now_ns: int, max_requests: int = MAX_REQUESTS):
        self.state: EngineState = "loading"
        self.info: EngineInfo | None = None
        self.epoch = 0
        self.num_restarts = 0
        self.num_resumed = 0
        self.num_quarantined = 0
        self.suspects: list[str] = []  # requests in the step that was about to run
        self._max_requests = max_requests
        self._live: dict[str, _Live] = {}  # in order of arrival
        self._status = _NO_STATUS
        self._imbalance = self._num_step_faults = 0  # of engines that died
        self._predicted_ns = 0  # of the step in flight
        self._num_failures = 0  # deaths in a row without a step
        self._ready_ns = self._heard_ns = self._ticked_ns = self._stepped_ns = now_ns
        self._step_age_ns = 0  # of the step in flight
        self._paused_ns = 0  # of it this process was stopped

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(self, request: Request, now_ns: int) -> None:
        """Take a request into care, or raise. The caller hands it to the engine."""
        if self.state == "gone":
            raise EngineUnavailable("the engine ended and was given up; start the server again")
        if self.state != "ready" or self.info is None:
            again_s = BACKOFF_S + (self.info.load_ms / 1e3 if self.info is not None else 1.0)
            raise NotReady(f"the engine is {self.state}; try again in {again_s:.1f} s", retry_after_s=again_s)
        check_bound(len(self._live), self._max_requests)
        check_fits(request, _limits_of(self.info))
        assert request.id not in self._live, f"request {request.id} is live already"
        self._live[request.id] = _Live(request, now_ns, list(request.output_ids))

    def abort(self, request_id: str) -> tuple[bool, list[EngineEvent]]:
        """True: the engine is to be told. Otherwise the events say it all."""
        live = self._live.get(request_id)
        if live is None or live.is_aborting:
            return False, []
        if self.state == "ready":
            live.is_aborting = True
            return True, []
        return False, [self._aborted(live)]

    def fail_all(self, code: str, message: str) -> list[EngineEvent]:
        self.state = "gone"
        live, self._live = self._live, {}
        waiting = [request_id for request_id, of in live.items() if not of.is_over]
        return [RequestFailed(request_id=request_id, code=code, message=message) for request_id in waiting]

    # ---- an engine's life ------------------------------------------------------------------------------------------

    def launched(self, now_ns: int) -> int:
        """A new process is started; returns its epoch."""
        if self.epoch > 0:
            self.state = "restarting"
            self.num_restarts += 1
        self.epoch += 1
        self.suspects = []
        self._heard_ns = self._ticked_ns = now_ns
        self._step_age_ns = self._paused_ns = 0
        return self.epoch

    def receive(self, epoch: int, message: ToServer, now_ns: int) -> list[EngineEvent]:
        """What a frame means for the requests. Raises LinkBroken if it cannot be true."""
        if epoch != self.epoch:
            return []
        self._heard_ns = now_ns
        if isinstance(message, Stepped):
            self._step_age_ns = self._paused_ns = 0
            return self._stepped(message, now_ns)
        if isinstance(message, Ready):
            self.state, self.info = "ready", message.info
            self._ready_ns = self._stepped_ns = now_ns
        elif isinstance(message, Beat):
            self._step_age_ns = message.step_age_ns
        return []

    def resubmissions(self) -> list[Request]:
        """What a new engine is handed, in the old order."""
        self.num_resumed += sum(bool(live.tokens) for live in self._live.values())
        return [live.resubmission() for live in self._live.values()]

    def ended(self, now_ns: int, cause: DeathCause = "other") -> tuple[float | None, list[EngineEvent]]:
        """The engine is dead. Seconds to wait before the next one, or None: it is given up, and so is every request."""
        if self.state == "ready" and now_ns - self._ready_ns > STABLE_NS:
            self._num_failures = 0
        self._num_failures += 1
        for request_id in [request_id for request_id, live in self._live.items() if live.is_over]:
            del self._live[request_id]
        self._imbalance += self._status.imbalance
        self._num_step_faults += self._status.num_step_faults
        self._status = _NO_STATUS
        self.state = "restarting"
        events: list[EngineEvent] = self._suspect(cause)
        if events:  # who was to blame is gone, so this death comes no more
            self._num_failures = 0
        for live in list(self._live.values()):
            live.num_resumes += 1
            live.stalled_before_ns = live.stalled_ns
            if live.is_aborting:
                events.append(self._aborted(live))
            elif live.started is not None and not live.died_ns:
                live.died_ns = now_ns
        if self._num_failures > MAX_RESTARTS:
            message = f"the engine died {self._num_failures} times in a row without a step and was given up"
            return None, events + self.fail_all(EngineUnavailable.code, message)
        return min(BACKOFF_S * 2 ** (self._num_failures - 1), BACKOFF_S_MAX), events

    def _suspect(self, cause: DeathCause) -> list[EngineEvent]:
        """Hold a death against those in its step; who is to blame for sure ends."""
        events: list[EngineEvent] = []
        is_alone = len(self.suspects) == 1
        for request_id in self.suspects if cause != "other" else ():
            live = self._live.get(request_id)
            if live is None:
                continue
            live.is_suspect = True
            live.num_deaths += cause == "work"
            live.num_kills_alone += cause == "pressure" and is_alone
            is_guilty = live.num_deaths >= MAX_DEATHS if cause == "work" else live.num_kills_alone >= MAX_KILLS
            if is_alone and is_guilty:
                del self._live[request_id]
                self.num_quarantined += 1
                message = (
                    f"the engine died {live.num_deaths + live.num_kills_alone} times while it computed this request, the"
                    " last time this request alone; it is not run again; please report it with its prompt and parameters"
                )
                events.append(RequestFailed(request_id=request_id, code=RequestQuarantined.code, message=message))
        self.suspects = []
        return events

    def expired(self, now_ns: int) -> list[EngineEvent]:
        """End what is late while no engine sees to it: none is ready, or it has not done so for LATE_NS.

        Of an engine that is ready the caller asks for an abort; what it still says of these requests is dropped.
        """
        events: list[EngineEvent] = []
        is_ready = self.state == "ready"
        by_ns = now_ns - LATE_NS if is_ready else now_ns
        for live in list(self._live.values()):
            request = live.request
            is_late = 0 < request.deadline_ns <= by_ns
            is_waiting = not live.is_scheduled and not live.tokens
            if not live.is_over and (is_late or (is_waiting and 0 < request.queue_deadline_ns <= by_ns)):
                when_ns = request.deadline_ns if is_late else request.queue_deadline_ns
                events.append(deadline_event(request.id, when_ns - (request.arrival_ns or live.queued_ns), is_late))
                live.is_over = True
                if not is_ready:
                    del self._live[request.id]
        return events

    def tick(self, now_ns: int) -> str | None:
        """To be called twice a second while a process lives; the reason to kill it, if there is one."""
        if now_ns - self._ticked_ns > PAUSE_NS:  # its frames lie unread, and it may have stood still as we did
            self._heard_ns = now_ns
            self._paused_ns += now_ns - self._ticked_ns
        self._ticked_ns = now_ns
        silent_s = (now_ns - self._heard_ns) / 1e9
        if silent_s > WATCHDOG_S:
            return f"no sign of life for {silent_s:.0f} s"
        if self._status.is_stuck:
            return "requests wait and it runs none"
        if self._step_age_ns - self._paused_ns > max(STEP_S_MAX * 1e9, STEP_TIMES_MAX * self._predicted_ns):
            return f"a step is in flight for {self._step_age_ns / 1e9:.0f} s"
        return None

    def status(self, now_ns: int) -> EngineStatus:
        return msgspec.structs.replace(
            self._status,
            state=self.state,
            num_waiting=self._status.num_waiting if self.state == "ready" else len(self._live),
            last_step_age_s=(now_ns - self._stepped_ns) / 1e9,
            num_restarts=self.num_restarts,
            num_resumed=self.num_resumed,
            imbalance=self._imbalance + self._status.imbalance,
            num_quarantined=self.num_quarantined,
            num_step_faults=self._num_step_faults + self._status.num_step_faults,
        )

    # ---- events ----------------------------------------------------------------------------------------------------

    def _stepped(self, message: Stepped, now_ns: int) -> list[EngineEvent]:
        self._check(message.events)
        self._status = message.status
        self.suspects = message.next_ids
        self._predicted_ns = message.predicted_ns
        stalled_ns = 0
        for record in message.records:
            self._num_failures = 0
            self._stepped_ns = now_ns
            stalled_ns += prefill_share_ns(
                record.begin_ns, record.done_ns, record.num_prefill_tokens, record.num_decode_tokens
            )
        events = [taken for event in message.events if (taken := self._taken(event, stalled_ns, now_ns)) is not None]
        for request_id in message.next_ids:
            if request_id in self._live:
                self._live[request_id].is_scheduled = True
        return events

    def _check(self, events: list[EngineEvent]) -> None:
        """Each event must be the next of a live request; a frame counts whole or not at all."""
        next_index: dict[str, int] = {}
        next_scored: dict[str, int] = {}
        ended: set[str] = set()
        for event in events:
            request_id = event.request_id
            live = self._live.get(request_id)
            if live is None or request_id in ended:
                raise LinkBroken(f"an event of request {request_id} came, which is not live")
            if isinstance(event, TokenEvent):
                index = next_index.get(request_id, len(live.tokens))
                if event.index != index:
                    raise LinkBroken(f"token {event.index} of {request_id} came, {index} was next")
                next_index[request_id] = index + 1
            elif isinstance(event, PromptScored):
                start = next_scored.get(request_id, live.num_scored) + 1
                end = event.start + len(event.logprobs)
                wanted = live.request.num_prompt_tokens if live.request.prompt_logprobs is not None else 0
                if event.start != start or not start < end <= wanted:
                    raise LinkBroken(
                        f"scores {event.start} to {end} of {request_id} came, {start} of {wanted} was next"
                    )
                next_scored[request_id] = end - 1
            if is_terminal(event):
                ended.add(request_id)

    def _taken(self, event: EngineEvent, stalled_ns: int, now_ns: int) -> EngineEvent | None:
        """The event as it goes on to the client, if there is one."""
        live = self._live[event.request_id]
        if isinstance(event, TokenEvent):
            if event.index == 0:
                if live.num_resumes:
                    event = msgspec.structs.replace(event, times=live.times(event.times))
                live.started = event.times
            live.is_suspect = False  # it has passed the place where it was: kills there were not its doing
            live.num_kills_alone = 0
            live.tokens.append(event.token_id)
            if live.died_ns:
                live.resume_ns += now_ns - live.died_ns
                live.died_ns = 0
            elif event.index > 0:
                live.stalled_ns += stalled_ns
        elif isinstance(event, PromptScored):
            live.num_scored += len(event.logprobs)
        if is_terminal(event):
            del self._live[event.request_id]
            if live.num_resumes and not isinstance(event, RequestFailed | PromptScored):
                event = msgspec.structs.replace(event, times=live.times(event.times))
        return None if live.is_over else event

    def _aborted(self, live: _Live) -> EngineEvent:
        del self._live[live.request.id]
        return RequestAborted(request_id=live.request.id, num_tokens=len(live.tokens), times=live.times(None))


def _limits_of(info: EngineInfo) -> Limits:
    return Limits(
        num_blocks=info.num_blocks, block_size=info.block_size, max_rows=info.max_rows, max_tokens=info.step_tokens,
        max_context=info.max_context, num_threads=info.num_threads,
    )  # fmt: skip
