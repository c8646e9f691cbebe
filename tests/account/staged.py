"""A stage: the real engine on a virtual clock, with the marks that a server would have made around it."""

from dataclasses import dataclass, field

import msgspec

from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.step_model import StepModel
from jilju.account.time_ledger import TimeLedger, make_time_ledger
from jilju.backends.roofline import RooflineExecutor, tiny_plan
from jilju.clock import VirtualClock
from jilju.engine.events import EventLog
from jilju.engine.loop import Engine
from jilju.engine.request import EngineEvent, Request, RequestTimes, SamplingParams, TokenEvent, is_terminal
from jilju.plan import Limits, Plan
from jilju.plan.cost import TWO_CORE_CPU

SERVER_NS = 1000  # of each of the server's own intervals


@dataclass
class Life:
    """One request on the stage."""

    request: Request
    received_ns: int
    submitted_ns: int
    times: RequestTimes | None = None
    token_ids: list[int] = field(default_factory=list)
    ended_ns: int = 0
    num_resumes: int = 0


class Stage:
    def __init__(self, limits: Limits, plan: Plan | None = None, **options):
        self.clock, self.plan, self.log = VirtualClock(1), plan or tiny_plan(64), EventLog()
        self.limits, self.options = limits, options
        self.executor = RooflineExecutor(
            self.clock, self.plan, TWO_CORE_CPU, limits, noise=lambda number: 1 + number % 7 / 10
        )
        self.model = StepModel(self.plan, self.executor.kv_bytes_per_token(self.plan))
        self.lives: dict[str, Life] = {}
        self.start()

    def start(self) -> None:
        """A new engine, which writes on in the same log."""
        self.executor.load(self.plan, {}, self.limits)
        self.engine = Engine(self.plan, self.executor, self.limits, self.clock, log=self.log, **self.options)

    def die(self, pause_ns: int) -> None:
        """The engine is gone, and another takes over what had not ended, as the supervisor hands it on."""
        self.clock.advance_ns(pause_ns)
        self.start()
        for life in self.lives.values():
            if not life.ended_ns:
                life.num_resumes += 1
                self.engine.submit(msgspec.structs.replace(life.request, output_ids=list(life.token_ids)))

    def submit(self, request_id: str, num_prompt: int, max_tokens: int, first_id: int = 0, **changes) -> Life:
        params = SamplingParams(seed=7, max_tokens=max_tokens, temperature=1.0, ignore_eos=True)
        ids = [(first_id + i * 7) % self.plan.vocab_size for i in range(num_prompt)]
        request = Request(id=request_id, prompt_ids=ids, params=params, number=len(self.lives) + 1, **changes)
        received_ns = self.clock.now_ns()
        self.clock.advance_ns(6 * SERVER_NS)
        life = self.lives[request_id] = Life(request, received_ns, self.clock.now_ns())
        self.clock.advance_ns(SERVER_NS)
        self.engine.submit(request)
        return life

    def step(self) -> list[EngineEvent]:
        events = self.engine.step()
        self.clock.advance_ns(SERVER_NS)  # the way to the server
        for event in events:
            life = self.lives[event.request_id]
            if isinstance(event, TokenEvent):
                life.token_ids.append(event.token_id)
            life.times = getattr(event, "times", None) or life.times
            if is_terminal(event):
                life.ended_ns = self.clock.now_ns()
        return events

    def run(self) -> None:
        for _ in range(20_000):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def record(self, life: Life) -> CallRecord:
        at, end = life.received_ns, life.ended_ns
        times, is_whole = life.times, len(life.token_ids) == life.request.params.max_tokens
        sequence = SequenceRecord(
            number=life.request.number, index=0, prompt_index=0, num_prompt_tokens=len(life.request.prompt_ids),
            num_cached_tokens=times.num_cached_tokens if times else 0, num_output_tokens=len(life.token_ids),
            queued_ns=life.submitted_ns + SERVER_NS, ended_ns=end, num_preemptions=times.num_preemptions if times else 0,
            num_resumes=life.num_resumes, finish_reason="length" if is_whole else None, miss=times.miss if times else None,
        )  # fmt: skip
        return CallRecord(
            id=life.request.id, run_id="chatcmpl-" + life.request.id, route="/v1/chat/completions", key_name=None,
            received_ns=at, body_ns=at + SERVER_NS, parsed_ns=at + 2 * SERVER_NS, render_ns=SERVER_NS, tokenize_ns=SERVER_NS,
            grammar_ns=0, submitted_ns=life.submitted_ns, first_sent_ns=0, last_event_ns=end,
            encoded_ns=end + SERVER_NS if end else 0, ended_ns=end + 2 * SERVER_NS if end else 0, waits=[], is_streamed=False,
            state="completed" if end else None, status=200, code=None, sequences=[sequence],
        )  # fmt: skip

    def ledger(self, life: Life) -> TimeLedger:
        record = self.record(life)
        return make_time_ledger(
            record, record.sequences[0], self.log, self.model, block_size=self.limits.block_size,
            now_ns=self.clock.now_ns(),
        )  # fmt: skip
