"""The engine: schedule, run, commit; one step at a time.

Owns the order of a step and its record in the log. Knows nothing of what it is called from: a thread beside a server's
event loop, the main loop of an engine process, a plain script or a simulation on a virtual clock.
"""

import logging

from jilju.clock import Clock
from jilju.engine.client import EngineInfo, EngineStatus
from jilju.engine.cost import StepCost
from jilju.engine.events import EventLog, StepRecord, pack_row
from jilju.engine.grammars import Grammars
from jilju.engine.pack import pack
from jilju.engine.request import EngineEvent, Request, RequestAborted, is_terminal
from jilju.engine.scheduler import Row, Scheduler, Step, check_fits
from jilju.engine.step_times import StepTimes
from jilju.errors import DeviceLost, InternalError, Overloaded
from jilju.plan import Executor, Limits, Plan
from jilju.plan.cost import Roofs

logger = logging.getLogger(__name__)

MAX_REQUESTS = 4096  # live requests of an engine; each holds its prompt, so some bound there must be
STUCK_TURNS = 8  # with work and without a step


class StepRaised(Exception):
    """Packing or the backend raised in a step; the cause says what."""


class Engine:
    """`executor` has loaded `plan` within `limits`. `hash_key` keys the prefix cache's hash; a secret one where salts matter.

    `held_plan` is the plan with its weights as the backend holds them, if that is another form than the file's: it is what steps
    are counted by. `times` is the model of step times to begin with, `gap_ms` what a step beside a
    stream is to take at most; 0: no bound.
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        limits: Limits,
        clock: Clock,
        *,
        log: EventLog | None = None,
        hash_key: bytes = b"",
        max_requests: int = MAX_REQUESTS,
        load_ms: float = 0.0,
        times: StepTimes | None = None,
        gap_ms: float = 0.0,
        grammars: Grammars | None = None,
        roofs: Roofs | None = None,
        held_plan: Plan | None = None,
    ):
        self.limits = limits
        self.log = log if log is not None else EventLog()
        self.imbalance = 0
        self.num_step_faults = 0
        self.step_times = times if times is not None else StepTimes()
        held_plan = held_plan if held_plan is not None else plan
        self._cost = StepCost(
            held_plan, executor.kv_bytes_per_token(plan, limits.kv_dtype) // plan.kv.elements_per_token
        )
        self.scheduler = Scheduler(
            limits, hash_key, vocab_size=plan.vocab_size, times=self.step_times, gap_ns=int(gap_ms * 1e6) or None,
            score_work=self._cost.score_work,
        )  # fmt: skip
        self.info = _info(held_plan, executor, limits, load_ms, gap_ms, self._cost.score_work, roofs)
        self._num_idle_turns = 0  # in a row, with work
        self.executor = executor
        self.grammars = grammars
        self._vocab_size = plan.vocab_size
        self._clock = clock
        self._max_requests = max_requests
        self._num_aborted = 0  # since the last record
        self._num_accepted = self._num_ended = 0
        self._step_end_ns = clock.now_ns()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ContextLengthExceeded, KvCapacityExceeded or Overloaded; what is taken gets one terminal event."""
        self.check(request, self.scheduler.num_live)
        making = None
        if request.grammar and request.params.max_tokens > len(request.output_ids):
            assert self.grammars is not None, "checked"
            making = self.grammars.make(request)
        self.scheduler.submit(request, self._clock.now_ns(), making)
        self._num_accepted += 1

    def check(self, request: Request, num_live: int) -> None:
        """What submit() raises, for one who submits from another thread and has `num_live` requests under way."""
        check_bound(num_live, self._max_requests)
        check_fits(request, self.limits)
        if request.grammar and self.grammars is None:
            raise InternalError(
                "this engine was made without a source of matchers, so it can hold no answer to a grammar"
            )

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request before the next step; unknown ids are ignored."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work

    def now_ns(self) -> int:
        """Of the clock by which its records are timed."""
        return self._clock.now_ns()

    def step(self) -> list[EngineEvent]:
        """One step, from decision to events; nothing runs if there is nothing to do."""
        step, events = self.begin()
        return events + self.run(step)

    def begin(self) -> tuple[Step, list[EngineEvent]]:
        """The first half: apply aborts and deadlines, decide what runs. The link tells the server in between."""
        begin_ns = self._clock.now_ns()
        events = self.scheduler.settle(begin_ns)
        self._num_aborted += sum(isinstance(event, RequestAborted) for event in events)
        self._audit(events)
        step = self.scheduler.schedule(begin_ns)
        is_idle = not step.rows and self.has_work() and not self.only_makes_grammars
        self._num_idle_turns = self._num_idle_turns + 1 if is_idle else 0
        if self._num_idle_turns == STUCK_TURNS:
            logger.critical("requests wait and none can run, a defect: %s", self.scheduler.describe())
        return step, events

    @property
    def only_makes_grammars(self) -> bool:
        """There are requests, and all of them wait for their grammar: a step is for nothing until one is there."""
        return self.scheduler.num_making == self.scheduler.num_live > 0

    @property
    def puts_off(self) -> bool:
        """There is something to do that is better done while nobody waits."""
        return self.grammars is not None and not self.grammars.is_prepared

    def rest(self) -> None:
        """Nobody waits, and will not for a while."""
        if self.grammars is not None and not self.grammars.is_prepared:
            self.grammars.prepare()

    @property
    def is_stuck(self) -> bool:
        return self._num_idle_turns >= STUCK_TURNS

    def run(self, step: Step) -> list[EngineEvent]:
        """The second half: run and commit what was decided."""
        if not step.rows:
            return []
        try:
            return self._run_rows(step)
        except StepRaised as raised:
            self.num_step_faults += 1
            logger.error("step %d of %d requests raised", step.id, len(step.rows), exc_info=raised.__cause__)
            return self._find_culprit(step, raised)

    def _find_culprit(self, step: Step, raised: "StepRaised") -> list[EngineEvent]:
        """Run halves of a step that raised, at most ceil(log2 B) + 1 of them, until one request fails again alone; it ends.

        Rows that are not run again here are as they were before the step, and so are in the next one. If the last suspect
        does not fail alone, the fault was not its own and nobody ends.
        """
        events: list[EngineEvent] = []
        suspects, postponed = step.rows, list[Row]()
        has_failed_alone = False
        while suspects and not has_failed_alone:
            middle = (len(suspects) + 1) // 2
            half, rest = suspects[:middle], suspects[middle:]
            try:
                events += self._run_rows(self.scheduler.part(step, half, self._clock.now_ns()))
                suspects = rest
            except StepRaised as again:
                raised, suspects = again, half
                postponed += rest
                has_failed_alone = len(half) == 1
        self.scheduler.give_up(postponed)
        if has_failed_alone:
            cause = raised.__cause__
            error = InternalError(
                f"the step that computed this request failed, alone too: {type(cause).__name__}: {cause}"
            )
            logger.error("request %s ends: %s", suspects[0].sequence.id, error.message)
            failed = self.scheduler.fail(suspects, error)
            self._audit(failed)
            return events + failed
        logger.warning("the fault of step %d did not come again; nobody ends for it", step.id)
        return events

    def _run_rows(self, step: Step) -> list[EngineEvent]:
        """Compute and commit. Raises StepRaised, with nothing committed."""
        scheduled_ns = self._clock.now_ns()
        try:
            batch = pack(step, self._vocab_size)
            packed_ns = self._clock.now_ns()
            if self.grammars is not None:
                self.grammars.begin(step, batch)
            self.executor.launch(batch)
            result = self.executor.wait()
        except DeviceLost:
            raise  # no part of the step could be run again, so this engine has come to its end
        except Exception as error:
            raise StepRaised from error
        finally:
            if self.grammars is not None:
                self.grammars.end()
        done_ns = self._clock.now_ns()
        events = self.scheduler.commit(step, result, done_ns)
        self._audit(events)
        self._record(step, events, scheduled_ns, packed_ns, done_ns)
        return events

    def close(self) -> None:
        """Give back weights and KV cache; the engine is not used after that."""
        if self.grammars is not None:
            self.grammars.close()
        self.executor.free()

    def status(self) -> EngineStatus:
        pool = self.scheduler.pool
        return EngineStatus(
            state="ready",
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + self.scheduler.num_making,
            num_blocks_free=pool.num_free,
            num_blocks_cached=pool.num_cached,
            num_blocks_held=pool.num_held,
            last_step_age_s=(self._clock.now_ns() - self._step_end_ns) / 1e9,
            num_restarts=0,
            imbalance=self.imbalance,
            num_step_faults=self.num_step_faults,
            is_stuck=self.is_stuck,
            step_coefficients=self.step_times.coefficients,
        )

    def _audit(self, events: list[EngineEvent]) -> None:
        """The laws that cost nothing to check; a broken one is counted and shown, serving goes on."""
        self._num_ended += sum(map(is_terminal, events))
        if not self.scheduler.pool.is_balanced():
            self.imbalance += 1
            logger.error("blocks: %s", self.scheduler.pool.describe())
        if self._num_accepted != self._num_ended + self.scheduler.num_live:
            self.imbalance += 1
            logger.error(
                "requests: %d accepted, %d ended, %d live", self._num_accepted, self._num_ended, self.scheduler.num_live
            )

    def _record(self, step: Step, events: list[EngineEvent], scheduled_ns: int, packed_ns: int, done_ns: int) -> None:
        pool = self.scheduler.pool
        flops, num_bytes = self._cost.of(step)
        num_aborted, self._num_aborted = self._num_aborted, 0
        self._step_end_ns = self._clock.now_ns()
        self.step_times.observe(step.work, step.num_pairs, self._step_end_ns - step.begin_ns)
        if step.bound_ns and step.num_prefill_tokens:
            self.step_times.note_cut(step.predicted_ns, self._step_end_ns - step.begin_ns)
        self.log.add_step(
            StepRecord(
                step_id=step.id,
                begin_ns=step.begin_ns,
                scheduled_ns=scheduled_ns,
                packed_ns=packed_ns,
                done_ns=done_ns,
                end_ns=self._step_end_ns,
                num_rows=len(step.rows),
                num_prefill_tokens=step.num_prefill_tokens,
                num_decode_tokens=step.num_decode_tokens,
                num_cached_tokens=step.num_cached_tokens,
                num_recomputed_tokens=step.num_recomputed_tokens,
                num_logits=sum([row.num_logits for row in step.rows]),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_blocks_held=pool.num_held,
                num_blocks_cached=pool.num_cached,
                num_blocks_free=pool.num_free,
                num_preempted=step.num_preempted,
                num_finished=sum(map(is_terminal, events)),
                num_aborted=num_aborted,
                flops=flops,
                bytes=num_bytes,
                predicted_ns=step.predicted_ns,
                bound_ns=step.bound_ns,
                is_rerun=step.is_rerun,
                closed_by=step.closed_by,
                rows=b"".join(
                    [pack_row(row.sequence.request.number, row.start, row.count, row.is_sampled) for row in step.rows]
                ),
            )
        )


def check_bound(num_live: int, max_requests: int) -> None:
    if num_live >= max_requests:
        raise Overloaded(
            f"{max_requests} requests are under way, the engine's bound; try again later", retry_after_s=1.0
        )


def _info(
    plan: Plan,
    executor: Executor,
    limits: Limits,
    load_ms: float,
    gap_ms: float,
    score_work: float,
    roofs: Roofs | None,
) -> EngineInfo:
    num_slots = limits.num_blocks * limits.block_size
    kv_bytes_per_token = executor.kv_bytes_per_token(plan, limits.kv_dtype)
    return EngineInfo(
        kernel_set=executor.kernel_set,
        invariant=executor.invariant,
        num_threads=limits.num_threads,
        max_context=min(limits.max_context, num_slots),
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        max_rows=limits.max_rows,
        step_tokens=limits.max_tokens,
        token_gap_ms=gap_ms,
        score_work=score_work,
        weight_bytes=plan.weight_bytes,
        kv_bytes=kv_bytes_per_token * num_slots,
        workspace_bytes=executor.workspace_bytes(plan, limits),
        load_ms=load_ms,
        kv_bytes_per_token=kv_bytes_per_token,
        read_bytes_per_s=None if roofs is None else roofs.read_bytes_per_s,
        flops_per_s=None if roofs is None else roofs.flops_per_s,
    )
