"""The bill: every ns is somebody's once, in every log that there may be; and each step is split by what drives its ops."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.account.bill import LINES, Bill, Paid, Sums, make_cost, make_energy, split
from jilju.account.energy import DeclaredPower
from jilju.account.step_model import BASE_NS, ETA_B, ETA_C, ROW_NS, TOKEN_NS, StepModel
from jilju.clock import VirtualClock
from jilju.engine.events import EventLog, pack_row
from jilju.engine.loop import Engine
from jilju.engine.request import is_terminal
from jilju.plan import StepShape
from jilju.plan.cost import Machine, PlanCost, Roofs
from tests.account.staged import SERVER_NS, Stage
from tests.backends.test_roofline_cost import LLAMA_8B, PLANS, SMOLLM2_135M
from tests.engine.fakes import RAISE_TOKEN, FakeExecutor, make_limits, request
from tests.engine.fakes import tiny_plan as fake_plan
from tests.serve.stub import step_record

Row = tuple[int, int, int, int]


def a_step(step_id: int, begin_ns: int, end_ns: int, *rows: Row, num_logits: int | None = None):
    sampled = sum(row[3] for row in rows)
    return step_record(
        step_id=step_id, begin_ns=begin_ns, end_ns=end_ns, num_rows=len(rows), rows=b"".join(pack_row(*row) for row in rows),
        num_logits=sampled if num_logits is None else num_logits,
    )  # fmt: skip


def make_bill(begin_ns: int = 0, meter=None, plan=None, **options) -> Bill:
    kv_bytes = 0 if plan is None else 2 * plan.kv.elements_per_token
    return Bill(begin_ns, lambda: StepModel(plan, kv_bytes), meter, **{"is_ready": True} | options)


def ns_of(sums: Sums) -> dict[str, int]:
    return {line: paid.machine_ns for line, paid in sums.lines.items() if paid.machine_ns} | {
        f"key {key}": paid.machine_ns for key, paid in sums.by_key.items() if paid.machine_ns
    }


def check_sums(sums: Sums) -> None:
    assert sum(ns_of(sums).values()) == sums.uptime_ns
    assert all(ns >= 0 for ns in ns_of(sums).values())
    assert set(sums.lines) == set(LINES)


# ---- shares of a step ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**12), st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=64))
def test_shares_are_whole_and_exact(ns, weights):
    shares = split(ns, weights)
    assert sum(shares) == ns
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - ns * weight / sum(weights)) < 1 + 1e-3


step_rows = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from([1, 1, 1, 2, 17, 512]), st.integers(0, 1)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(step_rows, st.sampled_from([None, Roofs(1e9, 1e15), Roofs(1e15, 1e9)]))
def test_the_parts_of_rows_are_the_modelled_step(rows, roofs):
    shape = StepShape(*zip(*[row[:2] for row in rows], strict=True), sum(row[2] for row in rows))
    used = roofs or Roofs(20e9, 200e9)
    machine = Machine(used.flops_per_s, used.read_bytes_per_s, ETA_C, ETA_B, BASE_NS, ROW_NS)
    for plan in PLANS:
        model = StepModel(plan, 2 * plan.kv.elements_per_token, roofs)
        parts = model.rows_ns(rows, shape.num_logits)
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(PlanCost(plan, 2).step_ns(shape, machine), rel=1e-9, abs=1)


def parts_of(*rows: tuple[int, int, int], num_logits: int | None = None, plan=LLAMA_8B, roofs=None) -> list[float]:
    model = StepModel(plan, 2 * plan.kv.elements_per_token, roofs)
    return model.rows_ns(rows, sum(row[2] for row in rows) if num_logits is None else num_logits)


class TestWhatDrivesAnOp:
    def test_equal_rows_pay_equal_parts(self):
        assert len(set(parts_of((100, 1, 1), (100, 1, 1), (100, 1, 1)))) == 1

    def test_a_long_context_pays_for_its_keys(self):
        """All else being equal, the difference is attention alone: bytes, where they bound it."""
        near, far = parts_of((100, 1, 1), (4100, 1, 1))
        kv_bytes = 4000 * LLAMA_8B.kv.elements_per_token * 2
        assert far - near == pytest.approx(kv_bytes * 1e9 / (ETA_B * 20e9))

    def test_a_long_prompt_pays_for_its_pairs(self):
        """FLOPs, where they bound it."""
        early, late = parts_of((0, 512, 0), (4000, 512, 0), num_logits=0, roofs=Roofs(1e15, 1e12))
        flops = 4 * 32 * 32 * 128 * 512 * 4000
        assert late - early == pytest.approx(flops * 1e9 / (ETA_C * 1e12))

    def test_tokens_pay_for_the_weights_and_samples_for_the_head(self):
        one, many = parts_of((0, 1, 0), (0, 3, 0), num_logits=0, plan=SMOLLM2_135M)
        model = StepModel(SMOLLM2_135M, 0)
        assert many - one > model.ns([]) and many / one > 1.5
        quiet, sampled = parts_of((50, 1, 0), (50, 1, 1))
        head_bytes = 4096 * 128256 * 2
        assert sampled - quiet > head_bytes * 1e9 / (ETA_B * 20e9)

    def test_scored_prompts_pay_for_their_logits(self):
        """Of two prompts that have their logits scored, the longer pays more; who decodes beside them pays for its own."""
        short, long, decoding = parts_of((0, 10, 0), (0, 30, 0), (7, 1, 1), num_logits=41)
        assert long > 2 * short > 10 * decoding

    def test_without_a_plan_tokens_count(self):
        assert StepModel(None).rows_ns([(0, 3, 0), (9, 1, 1)], 1) == [
            BASE_NS / 2 + 3 * TOKEN_NS,
            BASE_NS / 2 + TOKEN_NS,
        ]


# ---- whose a ns is -------------------------------------------------------------------------------------------------------


def test_a_day_in_its_lines():
    """load, idle, host, a step of two keys, idle again."""
    bill = make_bill(1000, is_ready=False)
    check_sums(bill.sums(1500))
    bill.on_engine(True, 2000)  # 1000 of load
    bill.on_enter(1, "ann", 2300)  # 300 idle
    bill.on_enter(2, "bob", 2310)
    bill.on_step(a_step(1, 2350, 2450, (1, 0, 9, 1), (2, 0, 9, 1)))  # 50 between, 50 each
    bill.on_leave(1, 2460)
    bill.on_leave(2, 2465)  # 15 after it
    sums = bill.sums(2600)
    assert ns_of(sums) == {"load": 1000, "idle": 300 + 135, "host": 65, "key ann": 50, "key bob": 50}
    assert bill.close([1]) == Paid(50, None) and bill.close([2]) == Paid(50, None)
    assert ns_of(bill.sums(2600)) == ns_of(sums)
    assert bill.close([1, 2, 99]) == Paid(0, None)


def test_the_time_of_a_step_under_way_is_the_hosts_until_it_is_known():
    bill = make_bill()
    bill.on_enter(1, "", 100)
    assert ns_of(bill.sums(500)) == {"idle": 100, "host": 400}
    assert ns_of(bill.sums(500, is_settled=True)) == {"idle": 100}
    bill.on_step(a_step(1, 120, 600, (1, 0, 9, 1)))
    assert ns_of(bill.sums(600)) == {"idle": 100, "host": 20, "key ": 480}


def test_a_step_that_raised_is_nobodys():
    """It has a number and no record: the time before the next record is that of the failure."""
    faults = [0]
    bill = make_bill(num_faults=lambda: faults[0])
    bill.on_enter(1, "ann", 0)
    bill.on_step(a_step(1, 0, 10, (1, 0, 4, 1)))
    faults[0] = 1
    bill.on_step(a_step(3, 70, 80, (1, 4, 1, 1)))
    assert ns_of(bill.sums(80)) == {"failed": 60, "key ann": 20}
    faults[0] = 2
    bill.on_leave(1, 100)  # it failed alone, and nothing came after it
    assert ns_of(bill.sums(150)) == {"failed": 80, "idle": 50, "key ann": 20}


def test_a_step_that_died_with_its_engine_is_nobodys():
    bill = make_bill()
    bill.on_enter(1, "ann", 0)
    bill.on_step(a_step(1, 0, 10, (1, 0, 4, 1)))
    bill.on_engine(False, 40)
    bill.on_engine(True, 90)
    bill.on_step(a_step(1, 92, 102, (1, 0, 5, 1)))  # 4 of 5 tokens anew
    assert ns_of(bill.sums(102)) == {"failed": 30, "load": 50, "host": 2, "recompute": 8, "key ann": 12}


def test_what_is_computed_again_after_a_preemption_is_the_operators():
    bill = make_bill()
    for number in (1, 2):
        bill.on_enter(number, "ann", 0)
    bill.on_step(a_step(1, 0, 100, (1, 0, 8, 1), (2, 0, 8, 1)))
    bill.on_step(a_step(2, 100, 200, (1, 8, 1, 1), (2, 4, 4, 0)))  # 2 found 4 of its tokens in the cache
    bill.on_step(a_step(3, 200, 300, (1, 9, 1, 1), (2, 8, 1, 1)))
    parts = StepModel(None).rows_ns([(8, 1, 1), (4, 4, 0)], 1)
    _, again = split(100, parts)
    assert ns_of(bill.sums(300)) == {"recompute": again, "key ann": 300 - again}


def test_rows_of_who_was_given_up_are_nobodys():
    bill = make_bill()
    bill.on_enter(1, "ann", 0)
    bill.on_leave(1, 10)
    bill.close([1])
    bill.on_step(a_step(1, 5, 60, (1, 0, 8, 1)))
    assert ns_of(bill.sums(60)) == {"host": 10, "failed": 50}


def test_who_leaves_a_step_pays_for_it():
    bill = make_bill()
    bill.on_enter(1, "ann", 0)
    assert not bill.is_final([1]) and bill.paid([1]) == Paid(0, None)
    bill.on_step(a_step(1, 0, 100, (1, 0, 8, 1)))  # its client went meanwhile
    bill.on_leave(1, 100)
    assert bill.is_final([1]) and bill.close([1]) == Paid(100, None)


# ---- random logs ---------------------------------------------------------------------------------------------------------


@dataclass
class Counter:
    """An energy counter that the test turns on."""

    uj: int = 0
    source: str = "a counter"
    watts: float | None = None
    num_read: int = 0

    def read_uj(self) -> int:
        self.num_read += 1
        return self.uj


@dataclass
class Life:
    number: int
    key: str
    computed: int = 0
    is_inside: bool = True
    is_closed: bool = False


@dataclass
class RandomLog:
    """A bill, and what may happen to it. What it must sum to is kept beside it."""

    bill: Bill
    counter: Counter
    draw: object
    now_ns: int = 0
    step_id: int = 0
    lives: list[Life] = field(default_factory=list)
    closed: dict[str, int] = field(default_factory=dict)
    num_faults: int = 0
    settled: dict[str, int] = field(default_factory=dict)

    def turn(self) -> None:
        kind = self.draw(
            st.sampled_from(["step"] * 6 + ["enter"] * 3 + ["leave", "leave", "close", "restart", "fault", "wait"])
        )
        self.pass_time(self.draw(st.sampled_from([0, 3, 1000, 700_000_000])))
        getattr(self, kind)()
        self.check()

    def pass_time(self, ns: int) -> None:
        self.now_ns += ns
        self.counter.uj += ns // 20

    def wait(self) -> None:
        self.pass_time(2_000_000_000)

    def enter(self) -> None:
        self.lives.append(Life(len(self.lives) + 1, self.draw(st.sampled_from(["ann", "bob", ""]))))
        self.bill.on_enter(self.lives[-1].number, self.lives[-1].key, self.now_ns)

    def inside(self) -> list[Life]:
        return [life for life in self.lives if life.is_inside]

    def leave(self) -> None:
        if inside := self.inside():
            life = self.draw(st.sampled_from(inside))
            life.is_inside = False
            self.bill.on_leave(life.number, self.now_ns)

    def close(self) -> None:
        ready = [life for life in self.lives if not life.is_inside and not life.is_closed]
        if ready:
            life = self.draw(st.sampled_from(ready))
            life.is_closed = True
            assert self.bill.is_final([life.number])
            self.closed[life.key] = self.closed.get(life.key, 0) + self.bill.close([life.number]).machine_ns

    def restart(self) -> None:
        self.bill.on_engine(False, self.now_ns)
        self.pass_time(self.draw(st.sampled_from([5, 3_000_000_000])))
        self.bill.on_engine(True, self.now_ns)
        self.step_id = 0

    def fault(self) -> None:
        self.step_id += 1
        self.num_faults += 1
        self.pass_time(900)

    def step(self) -> None:
        rows: list[Row] = []
        for life in (
            self.draw(st.lists(st.sampled_from(self.inside()), unique_by=id, max_size=9)) if self.inside() else []
        ):
            start = self.draw(st.integers(0, life.computed))  # preempted, perhaps with a part of it in the cache
            count = self.draw(st.sampled_from([1, 1, 16, 300]))
            life.computed = max(life.computed, start + count)
            rows.append((life.number, start, count, self.draw(st.integers(0, 1))))
        begin_ns = self.now_ns
        self.pass_time(self.draw(st.integers(1, 10**9)))
        self.step_id += 1
        if rows:
            self.bill.on_step(a_step(self.step_id, begin_ns, self.now_ns, *rows))

    def check(self) -> None:
        settled = ns_of(self.bill.sums(self.now_ns, is_settled=True))
        sums = self.bill.sums(self.now_ns)
        check_sums(sums)
        assert sums.uptime_ns == self.now_ns
        assert all(settled.get(name, 0) >= ns for name, ns in self.settled.items()), "a settled sum got smaller"
        self.settled = settled
        for key, ns in self.closed.items():
            open_ns = self.bill.paid([life.number for life in self.lives if life.key == key]).machine_ns
            assert sums.by_key[key].machine_ns == ns + open_ns
        assert self.counter.num_read <= 1 + self.now_ns // 10**9


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([None, SMOLLM2_135M]))
def test_requests_and_lines_are_the_uptime_in_every_log(data, plan):
    counter = Counter()
    log = RandomLog(make_bill(0, counter, plan, num_faults=lambda: log.num_faults), counter, data.draw)
    for _ in range(data.draw(st.integers(1, 40))):
        log.turn()
    # Energy: what is told is what was read, but for what those who left between two readings were charged ahead.
    log.wait()
    sums = log.bill.sums(log.now_ns)
    if not log.inside():
        told = sums.requests.joules + sum(paid.joules for paid in sums.lines.values())
        assert told == pytest.approx(counter.uj / 1e6 - log.bill._energy._left, rel=1e-6)
        assert log.bill._energy._left <= 1e-9, "nothing that was used is nobody's"


# ---- the real engine ------------------------------------------------------------------------------------------------------


class BilledStage(Stage):
    """A stage whose log is told of what is between steps, as a client tells it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.bill = Bill(self.clock.now_ns(), lambda: self.model, is_ready=True)
        self.log.listen(self.bill.on_step)
        self.log.watch(self.bill)
        self.num_recomputed = 0
        self.log.listen(self._count)

    def _count(self, record) -> None:
        self.num_recomputed += record.num_recomputed_tokens
        check_sums(self.bill.sums(self.clock.now_ns()))

    def submit(self, *args, **changes):
        life = super().submit(*args, **changes)
        self.log.enter(life.request.number, life.request.tenant, self.clock.now_ns())
        return life

    def step(self):
        events = super().step()
        for event in events:
            if is_terminal(event):
                self.log.leave(self.lives[event.request_id].request.number, self.clock.now_ns())
        return events

    def die(self, pause_ns: int) -> None:
        self.log.engine(False, self.clock.now_ns())
        super().die(pause_ns)
        self.log.engine(True, self.clock.now_ns())


@pytest.mark.parametrize("num_blocks", [12, 64])
def test_an_engine_that_preempts_and_dies_is_billed_to_the_ns(num_blocks):
    stage = BilledStage(make_limits(num_blocks, 4, max_rows=4, max_tokens=16))
    for index in range(6):
        stage.submit(f"r{index}", 11, 14, index, tenant="ann" if index % 2 else "bob")
        stage.step()
    stage.die(10**6)
    stage.run()
    sums = stage.bill.sums(stage.clock.now_ns())
    check_sums(sums)
    assert stage.num_recomputed > 0 and sums.lines["recompute"].machine_ns > 0
    assert not stage.log.num_failures, "sums were right after each step"
    assert sums.lines["load"].machine_ns == 10**6
    assert all(sums.by_key[key].machine_ns > 0 for key in ("ann", "bob"))
    assert sums.lines["failed"].machine_ns == SERVER_NS  # from its last step to its death


def test_all_attempts_that_raised_are_the_operators():
    """Steps take 1000 ns here and nothing else takes any, so the line is a thousand an attempt without a record."""
    clock, limits, log = VirtualClock(0), make_limits(), EventLog()
    executor = FakeExecutor(limits, before_step=lambda: clock.advance_ns(1000))
    engine = Engine(fake_plan(), executor, limits, clock, log=log)
    bill = make_bill(num_faults=lambda: engine.num_step_faults)
    log.listen(bill.on_step)
    log.watch(bill)
    for number, prompt in enumerate(([1, 2, 3], [4, 5, RAISE_TOKEN], [6, 7, 8]), 1):
        asked = request(str(number), prompt, 5)
        engine.submit(
            type(asked)(**{name: getattr(asked, name) for name in asked.__struct_fields__} | {"number": number})
        )
        log.enter(number, "", clock.now_ns())
    num_attempts = 0
    while engine.has_work():
        before_ns = clock.now_ns()
        events = engine.step()
        num_attempts += (clock.now_ns() - before_ns) // 1000
        for event in events:
            if is_terminal(event):
                log.leave(int(event.request_id), clock.now_ns())
    sums = bill.sums(clock.now_ns())
    check_sums(sums)
    assert sums.lines["failed"].machine_ns == 1000 * (num_attempts - log.num_steps) > 0
    assert sums.requests.machine_ns == 1000 * log.num_steps


# ---- as it is shown -------------------------------------------------------------------------------------------------------


def a_day() -> Bill:
    bill = make_bill(0, DeclaredPower(30.0))
    bill.on_enter(1, "ann", 1_000_000_000)
    bill.on_step(a_step(1, 1_000_000_000, 3_000_000_000, (1, 0, 8, 1)))
    bill.on_leave(1, 3_000_000_000)
    return bill


def test_a_price_makes_it_money():
    cost = make_cost(a_day().sums(4 * 10**9), 3.6, 1000)
    assert (cost.currency, cost.price_per_hour, cost.is_default) == ("USD", 3.6, False)
    assert (
        cost.total == pytest.approx(4e-3) and cost.requests == pytest.approx(2e-3) and cost.idle == pytest.approx(2e-3)
    )
    assert cost.requests + cost.idle + cost.load + cost.failed + cost.recompute + cost.host == pytest.approx(cost.total)
    assert cost.by_key == {"ann": pytest.approx(2e-3)}
    assert cost.per_million_output_tokens == pytest.approx(2.0)
    assert cost.machine_s.total == 4.0 and cost.machine_s.by_key == {"ann": 2.0}
    assert Paid(10**9, None).cost(3.6) == pytest.approx(1e-3)


def test_without_a_price_it_is_time():
    cost = make_cost(a_day().sums(4 * 10**9), None, 0)
    assert cost.is_default and cost.total == cost.requests == cost.price_per_hour == 0 and cost.by_key == {"ann": 0}
    assert cost.machine_s.requests == 2.0 and cost.machine_s.idle == 2.0
    assert cost.per_million_output_tokens is None and Paid(10**9, None).cost(None) is None


def test_declared_power_is_energy_by_time():
    bill = a_day()
    assert bill.paid([1]).joules == pytest.approx(60.0)
    energy = make_energy(bill.sums(4 * 10**9), 600)
    assert energy is not None and energy.source == "declared watts"
    assert (energy.joules, energy.requests_joules, energy.idle_joules) == pytest.approx((120.0, 60.0, 60.0))
    assert energy.joules_per_output_token == pytest.approx(0.1)
    assert bill.close([1]) == Paid(2 * 10**9, 60.0)
    assert bill.sums(4 * 10**9).by_key["ann"].joules == pytest.approx(60.0)
    assert make_energy(make_bill().sums(10), 0) is None


def test_counted_energy_goes_where_the_time_went():
    """1 s idle at 10 W, then a step of 1 s at 40 W that two share."""
    counter = Counter()
    bill = make_bill(0, counter)
    counter.uj = 10_000_000
    bill.on_enter(1, "ann", 10**9)
    bill.on_enter(2, "bob", 10**9)
    counter.uj = 50_000_000
    bill.on_step(a_step(1, 10**9, 2 * 10**9, (1, 0, 8, 1), (2, 0, 8, 1)))
    sums = bill.sums(2 * 10**9)
    assert sums.lines["idle"].joules == pytest.approx(10)
    assert {key: paid.joules for key, paid in sums.by_key.items()} == {
        "ann": pytest.approx(20),
        "bob": pytest.approx(20),
    }
    bill.on_step(a_step(2, 2 * 10**9, 2_500_000_000, (1, 8, 1, 1)))
    bill.on_leave(1, 2_500_000_000)
    assert bill.close([1]).joules == pytest.approx(40)  # the half second by the power of the last one
    counter.uj = 70_000_000  # it was less: what it was charged ahead is not charged again
    bill.on_leave(2, 3 * 10**9)
    assert bill.sums(3 * 10**9).by_key["ann"].joules == pytest.approx(40)
    assert sum(p.joules for p in bill.sums(3 * 10**9).lines.values()) == pytest.approx(10)
