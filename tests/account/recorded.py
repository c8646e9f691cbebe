"""Recordings of a stage: what a server would hand to folds, at any moment of a script."""

from dataclasses import dataclass, field

import msgspec
from hypothesis import strategies as st

from jilju.account.frame import Counts
from jilju.account.recording import BlockCounts, Now, Outages, Recording, Refusal, Restarts, first_moment
from jilju.account.records import CallRecord
from jilju.engine.loop import Engine
from tests.account.staged import SERVER_NS, Life, Stage
from tests.backends.roofline import make_limits

KEYS = ("blue", "red")
UNIX_NS = 1_700_000_000 * 10**9  # wall clock at 0


@dataclass
class Recorder:
    """Plays a script on a stage, as a server beside it would see it."""

    stage: Stage
    started_ns: int = 0
    is_away: bool = False  # the engine died, and the next is not ready
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started_ns = self.stage.clock.now_ns()
        self.restarts = Restarts(self.stage.log)
        self.outages = Outages(self.stage.log, self.started_ns, is_ready=True)

    def play(self, kind: str, a: int, b: int, c: int) -> None:
        stage = self.stage
        if kind == "submit":
            stage.submit(f"r{len(stage.lives)}", a, b, first_id=c)
        elif kind in ("step", "steps"):
            for _ in range(1 if kind == "step" else a):
                self._step()
        elif kind == "wait":
            stage.clock.advance_ns(a * 1_500_000_000)
        elif kind == "die":
            stage.log.engine(False, stage.clock.now_ns())
            stage.die(a * 1_000_000)
            self.is_away = True
        elif kind == "refuse":
            self.refusals.append(Refusal(stage.clock.now_ns(), 429, "rate_limit_exceeded"))
        elif kind == "abort" and stage.lives:
            stage.engine.abort(f"r{a % len(stage.lives)}")
        stage.clock.advance_ns(3 * SERVER_NS)  # what has ended is written out, and a frame begins behind it

    def _step(self) -> None:
        if self.is_away:
            self.stage.log.engine(True, self.stage.clock.now_ns())
            self.is_away = False
        self.stage.step()

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.stage.engine.has_work():
                break
            self._step()
        self.stage.clock.advance_ns(3 * SERVER_NS)

    def record(self, life: Life) -> CallRecord:
        record, times, number = self.stage.record(life), life.times, life.request.number
        is_whole = life.ended_ns and len(life.token_ids) == life.request.params.max_tokens
        state = None if not life.ended_ns else "completed" if is_whole else "client_cancelled"
        first_ns = times.first_token_ns + SERVER_NS if times is not None and times.first_token_ns else 0
        sequence = msgspec.structs.replace(
            record.sequences[0], queued_ns=0 if times is None else record.submitted_ns + SERVER_NS
        )
        return msgspec.structs.replace(
            record, state=state, first_sent_ns=first_ns, key_name=KEYS[number % 2], sequences=[sequence],
            status=499 if state == "client_cancelled" else 200,
        )  # fmt: skip

    def recording(self, *, is_live: bool = True) -> Recording:
        stage, now_ns = self.stage, self.stage.clock.now_ns()
        records = [self.record(life) for life in stage.lives.values()]
        ended = sorted((call for call in records if call.ended_ns), key=lambda call: call.ended_ns)
        live = [call for call in records if not call.ended_ns]
        return Recording(
            model="staged", version="1", log=stage.log, calls=ended, live=lambda: live, refusals=list(self.refusals),
            restarts=list(self.restarts.found), outages=list(self.outages.found), info=stage.engine.info, step_model=stage.model, counts=self._counts(records),
            started_ns=self.started_ns, first_ns=first_moment(stage.log, self.started_ns, 0), now_ns=now_ns,
            unix_ns=UNIX_NS + now_ns, now=self._now(stage.engine) if is_live else None,
        )  # fmt: skip

    def _counts(self, records: list[CallRecord]) -> Counts:
        states = [call.state for call in records]
        return Counts(
            accepted=len(records), live=states.count(None), completed=states.count("completed"),
            cancelled=states.count("client_cancelled"), deadline=0, shed=0, failed=0, refused=len(self.refusals),
            restarts=len(self.restarts.found),
        )  # fmt: skip

    def _now(self, engine: Engine) -> Now:
        step = self.stage.log.steps[-1] if len(self.stage.log.steps) else None
        if step is None:
            blocks = BlockCounts(0, 0, engine.info.num_blocks)
        else:
            blocks = BlockCounts(step.num_blocks_held, step.num_blocks_cached, step.num_blocks_free)
        return Now(
            state="restarting" if self.is_away else "ready", imbalance=engine.imbalance, blocks=blocks,
            predicted_starts={}, memory=list,
        )  # fmt: skip


@st.composite
def scripts(draw) -> list[tuple]:
    kinds = ["submit", "submit", "step", "steps", "steps", "die", "abort", "wait", "refuse"]
    return [
        (kind, draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(0, 3)))
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=25))
    ]


@st.composite
def recorders(draw) -> Recorder:
    """Small pools preempt, small steps stall."""
    max_rows, max_tokens, spare = draw(st.integers(1, 5)), draw(st.integers(1, 24)), draw(st.sampled_from([0, 1, 20]))
    return Recorder(Stage(make_limits(14 + spare, 4, max_rows, max_tokens)))
