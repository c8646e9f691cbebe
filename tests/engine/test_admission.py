"""Admission: each bound, the predicted wait against hand-made cases, laws of the prediction, and that sums equal a recount."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jilju.engine.admission import CORRECTION_MAX, CORRECTION_MIN, FIRST_MEAN_OUTPUT, Admission
from jilju.errors import Overloaded

MS = 10**6
S = 10**9
SCORE_WORK = 0.5  # what scoring a token of a prompt adds to it, in tokens


def make(*, rows=4, pool=100_000, coefficients=(4 * MS, MS, 0.0), **limits) -> Admission:
    """A step of one row takes 5 ms, of four rows 8 ms; a token of a prompt 1 ms."""
    admission = Admission(**limits)
    admission.update(coefficients, rows, pool, SCORE_WORK)
    return admission


def admit(
    admission: Admission, request_id: str, prompt=10, output=100, *, at=0, running=False, scored=0, **rank
) -> None:
    admission.admitted(request_id, at, num_prompt_tokens=prompt, max_tokens=output, num_scored_tokens=scored, **rank)
    if running:
        admission.token(request_id)


def check(admission: Admission, now_ns=0, *, prompt=10, output=100, **rest) -> int:
    return admission.check(now_ns, num_prompt_tokens=prompt, max_tokens=output, **rest)


def refusal(admission: Admission, now_ns=0, **rest) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        check(admission, now_ns, **rest)
    return caught.value


# ---- the bounds ------------------------------------------------------------------------------------------------------


def test_so_many_requests_wait_and_no_more():
    admission = make(max_requests=3)
    for name in "ab":
        admit(admission, name)
    check(admission)
    error = refusal(admission, num_sequences=2)
    assert (error.reason, error.status, error.code) == ("queue_requests", 429, "overloaded")
    assert "2 requests wait and 3 are the most" in error.message
    admission.token("a")
    check(admission, num_sequences=2)
    assert (admission.num_waiting, admission.num_running) == (1, 1)


def test_so_many_tokens_of_prompts_wait_and_no_more():
    admission = make(pool=100, max_pools=4.0)
    for index in range(4):
        admit(admission, str(index), prompt=90)
    check(admission, prompt=40)
    error = refusal(admission, prompt=41)
    assert error.reason == "queue_tokens" and "360" in error.message and "400" in error.message
    admission.ended("0", 0, None)
    check(admission, prompt=100)
    assert admission.num_waiting_tokens == 270


def test_a_prompt_longer_than_the_pool_is_left_to_who_counts_its_tokens():
    admission = make(pool=100, coefficients=(0.0, 0.0, 0.0))
    for index in range(4):
        admit(admission, str(index), prompt=95)
    assert refusal(admission, prompt=100).reason == "queue_tokens"
    assert check(admission, prompt=101) == 0
    assert refusal(admission, prompt=101, num_sequences=2).reason == "queue_tokens"


def test_a_tenant_gets_its_share_of_a_queue_that_another_filled():
    admission = make(max_requests=10, coefficients=(0.0, 0.0, 0.0))
    for index in range(10):
        admit(admission, f"a{index}", tenant="a")
    assert refusal(admission, tenant="a").reason == "queue_requests"
    for index in range(5):
        check(admission, tenant="b")
        admit(admission, f"b{index}", tenant="b")
    assert refusal(admission, tenant="b").reason == "queue_requests"
    for index, name in enumerate("cdefghijklmn"):
        if admission.num_waiting < 20:
            check(admission, tenant=name)
            admit(admission, name + str(index), tenant=name)
    assert admission.num_waiting == 20
    assert refusal(admission, tenant="z").reason == "queue_requests", "twice the bound is the end for everybody"


@pytest.mark.parametrize("deadline", ["deadline_ns", "queue_deadline_ns"])
def test_who_would_wait_beyond_its_deadline_is_refused(deadline):
    admission = make()
    for index in range(8):
        admit(admission, str(index), running=index < 4)
    wait_ns = check(admission, 5 * S)
    assert check(admission, 5 * S, **{deadline: 5 * S + wait_ns}) == wait_ns > 0
    error = refusal(admission, 5 * S, **{deadline: 5 * S + wait_ns - 1})
    assert (error.reason, error.predicted_wait_ns) == ("predicted_wait", wait_ns)
    assert error.retry_after_s == wait_ns / S
    assert refusal(admission, 5 * S, deadline_ns=5 * S + wait_ns, queue_deadline_ns=6 * S).reason == "predicted_wait"


def test_where_nothing_is_ahead_no_deadline_is_too_near():
    assert check(make(), 5 * S, deadline_ns=1, queue_deadline_ns=1) == 0


# ---- the prediction --------------------------------------------------------------------------------------------------


def test_with_rows_to_spare_only_the_prompts_ahead_count():
    admission = make()
    assert check(admission) == 0
    admit(admission, "a", prompt=30, running=True)
    assert check(admission) == 0
    admit(admission, "b", prompt=30)
    admit(admission, "c", prompt=20)
    assert check(admission) == 50 * MS


def test_with_all_rows_taken_the_first_one_that_leaves_is_waited_for():
    admission = make()
    for name in "abcd":
        admit(admission, name, running=True)
    # A token costs 8 ms / 4; of 4 x 99 tokens a quarter of twice the work is left until the first row is free.
    assert check(admission) == pytest.approx(2 * 4 * 99 / 4 * 2 * MS)
    admit(admission, "e", prompt=30, output=50)
    assert check(admission) == pytest.approx(2 * 4 * 99 / 4 * 2 * MS + 30 * MS + 50 * 2 * MS)
    for _ in range(49):
        admission.token("a")
    assert check(admission) == pytest.approx((2 * (3 * 99 + 50) / 4 * 2 + 30 + 100) * MS)


def test_a_pool_that_holds_fewer_than_there_are_rows_bounds_them():
    admission = make(rows=100, pool=120)
    admit(admission, "a", prompt=10, output=100, running=True)  # 60 tokens half-way: two fit
    assert check(admission) == 0
    admit(admission, "b", prompt=10, output=100, running=True)
    assert check(admission) == pytest.approx(2 * (99 + 99) / 2 * (4 / 2 + 1) * MS)


def test_pairs_of_queries_and_keys_count_as_the_step_times_say():
    admission = make(coefficients=(4 * MS, MS, 100.0))
    admit(admission, "a", prompt=1000)
    assert check(admission) == 1000 * MS + 100 * 1000 * 1001 // 2


def test_prompts_that_are_scored_cost_what_the_engine_says():
    admission = make()
    admit(admission, "a", prompt=200, scored=200)
    assert check(admission) == (200 + 200 * SCORE_WORK) * MS
    assert check(admission, prompt=60, num_sequences=3, num_scored_tokens=60) == (300 + 2 * (20 + 20 * SCORE_WORK)) * MS
    admission.token("a")
    assert check(admission) == 0, "it runs"


def test_the_last_of_several_sequences_waits_for_the_others():
    admission = make(rows=2)
    assert check(admission, prompt=20, num_sequences=2) == 10 * MS
    alone = check(admission, prompt=30, output=10, num_sequences=3)
    for name in "ab":
        admit(admission, name, prompt=10, output=10)
    assert check(admission, prompt=10, output=10) == alone == pytest.approx((20 + 20 * (4 / 2 + 1)) * MS)


def test_who_has_a_higher_number_is_not_ahead():
    admission = make()
    for name in "abcd":
        admit(admission, name, running=True, priority=5)
    running = check(admission, priority=0)
    assert running > 0, "who runs keeps its row"
    admit(admission, "e", priority=1)
    assert check(admission, priority=0) == running < check(admission, priority=1) == check(admission, priority=100)


def test_another_tenant_is_ahead_by_no_more_than_ones_own():
    admission = make(rows=1)
    admit(admission, "r", running=True, tenant="a")
    for index in range(100):
        admit(admission, f"a{index}", tenant="a")
    first = check(admission, tenant="b")
    assert first == pytest.approx(2 * 99 * 5 * MS), "the first row that is free"
    admit(admission, "b0", tenant="b")
    work = 10 * MS + 100 * 5 * MS
    assert check(admission, tenant="b") == pytest.approx(first + 2 * work)
    assert check(admission, tenant="a") == pytest.approx(first + 101 * work)
    assert check(admission, tenant="b", priority=1) == pytest.approx(first + 101 * work), "a priority comes first"


def test_output_to_come_is_learnt_from_answers():
    admission = make()
    assert admission.mean_output == FIRST_MEAN_OUTPUT
    for name in "abcd":
        admit(admission, name, output=None, running=True)
    before = check(admission)
    for index in range(200):
        admit(admission, f"x{index}", output=None, running=True)
        admission.ended(f"x{index}", 0, 20)
    assert admission.mean_output == pytest.approx(20, rel=0.05)
    assert check(admission) < before / 10, "also of those that were live before"
    mean = admission.mean_output
    admit(admission, "y")
    admission.ended("y", 0, None)
    admission.ended("nobody", 0, 1000)
    assert admission.mean_output == mean


def test_more_tokens_than_expected_leave_one_to_come():
    admission = make(rows=1)
    admit(admission, "a", output=1000, running=True)
    for _ in range(500):
        admission.token("a")
    assert check(admission) == pytest.approx(2 * 1 * 5 * MS)


def test_a_request_without_output_is_a_prompt_alone():
    admission = make(rows=1)
    admit(admission, "a", prompt=7, output=0)
    assert check(admission) == 7 * MS


# ---- what is learnt of waits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "learnt"), [(2.0, 2.0), (0.5, 0.5), (1.0, 1.0), (50.0, CORRECTION_MAX), (0.0, CORRECTION_MIN)])  # fmt: skip
def test_the_correction_converges_to_actual_over_predicted(factor, learnt):
    admission = make()
    admit(admission, "ahead", prompt=200)
    raw = 200 * MS
    for index in range(300):
        admit(admission, "x", at=index * S)
        error = admission.started("x", index * S + int(factor * raw))
        admission.ended("x", index * S, None)
    assert admission.correction == pytest.approx(learnt, rel=0.01)
    assert check(admission) == pytest.approx(raw * learnt, rel=0.01)
    assert error == pytest.approx(raw * (learnt - factor), rel=0.01, abs=raw * 0.02)


def test_the_error_is_told_once_and_short_waits_teach_nothing():
    admission = make()
    admit(admission, "ahead", prompt=15)
    admit(admission, "x", at=S)
    assert admission.started("x", S + 20 * MS) == -5 * MS
    assert admission.started("x", S + 90 * MS) is None
    admission.token("x")
    admit(admission, "y", at=2 * S, prompt=1)
    assert admission.started("y", S) == 15 * MS, "a moment before it came is no wait below none"
    assert admission.correction == 1.0


def test_one_that_is_dropped_waiting_was_promised_too_much():
    admission = make()
    admit(admission, "ahead", prompt=200)
    admit(admission, "x")
    admission.ended("x", 199 * MS, None)
    assert admission.correction == 1.0, "it left before its time, which says nothing"
    for _ in range(100):
        admit(admission, "x")
        admission.ended("x", 300 * MS, None)
    assert check(admission) > 300 * MS, "it rises until the promise would have held"
    correction = admission.correction
    admit(admission, "y", running=True)
    admission.ended("y", S, None)
    assert admission.correction == correction, "one that ran is another matter"


def test_nothing_is_learnt_from_what_the_mean_output_was_wrong_by():
    admission = make(rows=1)
    admit(admission, "ahead", output=None, running=True)
    admit(admission, "old", output=None)
    admit(admission, "new", output=None)
    for index in range(30):
        admit(admission, f"x{index}", output=None)
        admission.ended(f"x{index}", 0, 20)
    admission.started("old", 0)
    assert admission.correction == 1.0
    admit(admission, "new", output=None)
    admission.started("new", 0)
    assert admission.correction < 1.0


def test_better_numbers_take_the_place_of_the_first():
    admission = make()
    admit(admission, "a", prompt=500, output=None)
    admit(admission, "a", prompt=7, output=3, priority=2)
    assert (admission.num_waiting, admission.num_waiting_tokens) == (1, 7)
    assert check(admission, priority=1) == 0 and check(admission, priority=2) == 7 * MS
    admission.token("a")
    with pytest.raises(AssertionError, match="runs already"):
        admit(admission, "a")
    with pytest.raises(AssertionError, match="not live"):
        admission.token("b")


# ---- laws ------------------------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(1, 3000),
            "output": st.none() | st.integers(0, 2000),
            "scored": st.sampled_from([0, 0, 500]),
            "priority": st.integers(-2, 2),
            "tenant": st.sampled_from("ab"),
            "running": st.booleans(),
        }
    ),
    max_size=20,
)
COEFFICIENTS = st.tuples(st.floats(0, 1e8), st.floats(0, 1e7), st.floats(0, 1e3))


@settings(max_examples=200, deadline=None)
@given(REQUESTS, REQUESTS.filter(bool), COEFFICIENTS, st.integers(1, 8), st.integers(-2, 2))
def test_more_load_is_never_less_wait(requests, more, coefficients, rows, priority):
    """Of one tenant, where rows bound and keys cost nothing: otherwise the mean sequence counts, which a short one lowers."""
    base, per_token, _ = coefficients
    admission = make(rows=rows, pool=10**9, coefficients=(base, per_token, 0.0))
    for index, r in enumerate(requests):
        admit(admission, f"r{index}", **r | {"tenant": "a"})
    wait_ns = admission.predicted_wait_ns(priority, "a")
    for index, r in enumerate(more):
        admit(admission, f"m{index}", **r | {"tenant": "a"})
        before_ns, wait_ns = wait_ns, admission.predicted_wait_ns(priority, "a")
        assert wait_ns >= before_ns - 1, "rounding apart"
    admission.update((2 * base, 2 * per_token, 0.0), rows, 10**9, SCORE_WORK)
    assert admission.predicted_wait_ns(priority, "a") == pytest.approx(2 * wait_ns, abs=2, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(REQUESTS, COEFFICIENTS, st.integers(1, 8), st.integers(100, 10**6), st.sampled_from("ab"))
def test_a_lower_number_and_a_larger_engine_never_wait_longer(requests, coefficients, rows, pool, tenant):
    requests = [r | {"tenant": "a"} for r in requests]
    admission = make(rows=rows, pool=pool, coefficients=coefficients)
    for index, r in enumerate(requests):
        admit(admission, f"r{index}", **r)
    waits = [admission.predicted_wait_ns(priority, "a") for priority in range(-3, 4)]
    assert waits == sorted(waits)
    assert admission.predicted_wait_ns(0, "b") <= admission.predicted_wait_ns(0, "a")
    admission.update(coefficients, 2 * rows, 2 * pool, SCORE_WORK)
    assert admission.predicted_wait_ns(3, "a") <= waits[-1] + 1


class Recount(RuleBasedStateMachine):
    """Whatever is told in whatever order, the sums are those of the live requests, and nothing is left at the end."""

    @initialize(rows=st.integers(1, 4), pool=st.integers(100, 2000))
    def begin(self, rows, pool):
        self.admission = make(rows=rows, pool=pool)
        self.now = 0
        self.waiting: set[str] = set()
        self.running: set[str] = set()

    @rule(name=st.sampled_from("abcdefgh"), prompt=st.integers(1, 300), output=st.none() | st.integers(0, 600), scored=st.integers(0, 9), priority=st.integers(-1, 1), tenant=st.sampled_from(["", "t"]))  # fmt: skip
    def admit(self, name, prompt, output, scored, priority, tenant):
        if name not in self.running:
            admit(self.admission, name, prompt, output, at=self.now, scored=scored, priority=priority, tenant=tenant)
            self.waiting.add(name)

    @rule(data=st.data(), wait=st.integers(0, 10 * S), is_started=st.booleans())
    @precondition(lambda self: self.waiting | self.running)
    def go_on(self, data, wait, is_started):
        name = data.draw(st.sampled_from(sorted(self.waiting | self.running)))
        self.now += wait
        self.admission.started(name, self.now) if is_started else self.admission.token(name)
        self.waiting.discard(name)
        self.running.add(name)

    @rule(data=st.data(), output=st.none() | st.integers(0, 5000))
    @precondition(lambda self: self.waiting | self.running)
    def end(self, data, output):
        name = data.draw(st.sampled_from(sorted(self.waiting | self.running)))
        self.admission.ended(name, self.now, output)
        self.waiting.discard(name)
        self.running.discard(name)

    @invariant()
    def sums_are_those_of_the_live(self):
        if not hasattr(self, "admission"):
            return
        a = self.admission
        assert (a.num_waiting, a.num_running) == (len(self.waiting), len(self.running))
        sums = a._groups, a._waiting, a._running
        mean, counted = a.mean_output, a._counted_mean
        a.mean_output = counted
        a._recount()
        a.mean_output = mean
        assert sums == (a._groups, a._waiting, a._running)
        assert CORRECTION_MIN <= a.correction <= CORRECTION_MAX
        if not self.waiting and not self.running:
            assert not a._groups and not a._live and a.predicted_wait_ns() == 0


TestRecount = Recount.TestCase
TestRecount.settings = settings(max_examples=100, deadline=None, stateful_step_count=40)


def test_a_check_looks_at_groups_not_at_requests():
    """A thousand live requests of one priority and tenant are one look."""
    admission = make(rows=32, max_requests=2000)
    for index in range(1024):
        admit(admission, str(index), running=index < 32)
    looks = 0
    groups = dict(admission._groups)

    class Counting(dict):
        def items(self):
            nonlocal looks
            looks += len(self)
            return super().items()

    admission._groups = Counting(groups)
    check(admission)
    assert looks == 1
