"""Quotas: what a key may use in any time, what a call that ends gives back, and what a refusal says."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.config import ApiKey
from jilju.engine.request import RequestTimes
from jilju.errors import RateLimitExceeded
from jilju.serve.door.quota import PERIOD_NS, Bucket, Quotas, tokens_to_charge
from jilju.serve.ledger import Call, Ledger

MINUTE_NS = PERIOD_NS["minute"]
RAN = RequestTimes(queued_ns=1, scheduled_ns=2)


class Caller:
    """Calls of one key, as a ledger sees them."""

    def __init__(self, key: ApiKey | None):
        self.key = key
        self.clock = VirtualClock(5)
        self.ledger, self.quotas = Ledger(self.clock), Quotas(self.clock)
        self.ledger.listen(self.quotas)
        self._ids: Iterator[int] = iter(range(10**6))

    def charge(self, num_tokens: int) -> Call:
        name = None if self.key is None else self.key.name
        call = Call(id=f"call-{next(self._ids)}", route="/", key_name=name, label=None, received_ns=0)
        self.quotas.charge(call, self.key, num_tokens)
        return self.ledger.accept(call)

    def end(self, call: Call, num_used: int) -> None:
        call.num_prompt_tokens = num_used
        call.times.append(RAN)
        self.ledger.end(call, "completed", 200)

    def wait_ns(self, num_tokens: int) -> int:
        with pytest.raises(RateLimitExceeded) as refused:
            self.charge(num_tokens)
        assert refused.value.retry_after_s is not None
        return round(refused.value.retry_after_s * 1e9)


@st.composite
def bucket_steps(draw: st.DrawFn) -> list[tuple[str, int, float]]:
    """("wait", ns, -), ("take", tokens, -) and ("end", which live call, share of its charge that it used)."""
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("wait"), st.integers(0, 2 * MINUTE_NS), st.just(0.0)),
                st.tuples(st.just("take"), st.integers(0, 100), st.just(0.0)),
                st.tuples(st.just("end"), st.integers(0, 9), st.floats(0, 1)),
            ),
            max_size=60,
        )
    )


@given(quota=st.integers(1, 100), steps=bucket_steps())
def test_in_no_time_is_more_used_than_the_quota_and_what_comes_in_meanwhile(
    quota: int, steps: list[tuple[str, int, float]]
) -> None:
    """By when calls were taken, and by when they ended; every window begins and ends with one of them."""
    bucket, now_ns = Bucket(quota, MINUTE_NS, 0), 0
    taken: list[tuple[int, int]] = []  # at, charged
    used: dict[int, tuple[int, int]] = {}  # index in taken -> ended at, used
    live: list[int] = []
    for what, number, share in steps:
        if what == "wait":
            now_ns += number
        elif what == "take":
            number = min(number, quota)
            if bucket.wait_ns(number, now_ns) == 0:
                bucket.take(number)
                live.append(len(taken))
                taken.append((now_ns, number))
        elif live:
            index = live.pop(number % len(live))
            used[index] = (now_ns, int(share * taken[index][1]))
            bucket.settle(taken[index][1], used[index][1], now_ns)
        assert bucket.level + bucket.held <= quota * MINUTE_NS
        assert bucket.level >= 0
    by_begin = [(at_ns, used[index][1] if index in used else charged) for index, (at_ns, charged) in enumerate(taken)]
    for moments in (by_begin, sorted(used.values())):
        for first, (begin_ns, _) in enumerate(moments):
            total = 0
            for end_ns, num_used in moments[first:]:
                total += num_used
                assert total * MINUTE_NS <= quota * (MINUTE_NS + end_ns - begin_ns)


@given(
    calls=st.lists(
        st.tuples(st.integers(0, 30 * 10**9), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=30
    )
)
def test_what_is_used_beyond_the_charge_is_a_debt(calls: list[tuple[int, int, int]]) -> None:
    """Whatever calls ask for and use: all that was used, less what came in, is what the bucket has less."""
    bucket, now_ns, total = Bucket(100, MINUTE_NS, 0), 0, 0
    for gap_ns, charged, num_used in calls:
        now_ns += gap_ns
        if bucket.wait_ns(charged, now_ns) == 0:
            bucket.take(charged)
            bucket.settle(charged, num_used, now_ns)
            total += num_used
        assert bucket.level + total * MINUTE_NS <= 100 * (MINUTE_NS + now_ns)
    debt_ns = bucket.wait_ns(1, now_ns)
    assert bucket.wait_ns(1, now_ns + debt_ns) == 0


@given(spent=st.integers(1, 1000), wanted=st.integers(1, 1000), quota=st.integers(1, 1000))
def test_the_wait_that_is_told_is_the_shortest_that_suffices(spent: int, wanted: int, quota: int) -> None:
    caller = Caller(ApiKey("k", "secret-1", tokens_per_minute=quota))
    caller.end(caller.charge(spent), spent)
    bucket = Bucket(quota, MINUTE_NS, 0)
    bucket.take(spent)
    bucket.settle(spent, spent, 0)
    wait_ns = bucket.wait_ns(wanted, 0)
    if wait_ns:
        assert caller.wait_ns(wanted) == wait_ns
        assert bucket.wait_ns(wanted, wait_ns - 1) > 0
        caller.clock.advance_ns(wait_ns)
    caller.charge(wanted)


def test_a_call_gives_back_what_it_did_not_use_and_one_that_never_ran_all_of_it() -> None:
    caller = Caller(ApiKey("k", "secret-1", tokens_per_minute=100))
    caller.end(caller.charge(100), 30)
    idle = caller.charge(70)
    idle.num_prompt_tokens = 70
    idle.times.append(RequestTimes(queued_ns=1))
    caller.ledger.end(idle, "deadline", 504, "deadline_exceeded")
    caller.charge(70)
    assert caller.wait_ns(1) == MINUTE_NS / 100


def test_a_call_that_was_cut_pays_for_its_prompt() -> None:
    caller = Caller(ApiKey("k", "secret-1", tokens_per_minute=100))
    cut = caller.charge(100)
    cut.num_prompt_tokens = 60
    caller.ledger.sequences_submitted(cut, 1)
    caller.ledger.sequence_ended(cut, None)
    caller.ledger.end(cut, "client_cancelled", 499)
    assert caller.wait_ns(41) and caller.charge(40)


def test_a_call_larger_than_the_quota_runs_when_it_is_full_and_leaves_a_debt() -> None:
    caller = Caller(ApiKey("k", "secret-1", tokens_per_minute=100))
    caller.end(caller.charge(250), 250)
    assert caller.wait_ns(1) == 151 * MINUTE_NS / 100
    assert caller.wait_ns(250) == caller.wait_ns(10**6) == 250 * MINUTE_NS / 100


def test_both_quotas_hold_and_a_refusal_charges_neither() -> None:
    caller = Caller(ApiKey("k", "secret-1", tokens_per_minute=50, tokens_per_day=60))
    caller.end(caller.charge(50), 50)
    caller.clock.advance_ns(MINUTE_NS)
    for _ in range(3):
        with pytest.raises(RateLimitExceeded, match=r"60 tokens a day, 10 are left, .* 50; wait .* max_tokens"):
            caller.charge(50)
    caller.charge(10)


def test_callers_without_a_quota_or_without_a_key_have_no_bound() -> None:
    for key in (None, ApiKey("k", "secret-1")):
        caller = Caller(key)
        caller.end(caller.charge(10**9), 10**9)
        caller.charge(10**9)


def test_keys_have_buckets_of_their_own_and_a_new_quota_counts_what_was_used() -> None:
    caller = Caller(ApiKey("a", "secret-1", tokens_per_minute=100))
    caller.charge(90)
    other = ApiKey("b", "secret-2", tokens_per_minute=100)
    caller.key = other
    caller.charge(90)
    caller.key = ApiKey("a", "secret-1", tokens_per_minute=120)
    live = caller.charge(30)
    assert caller.wait_ns(1)
    caller.quotas.keep([other])
    caller.charge(120)  # "a" was gone and came back
    caller.end(live, 0)  # charged to what is no more
    assert caller.wait_ns(1)


def test_what_a_call_may_use() -> None:
    assert tokens_to_charge(10, 5, 3) == 25
    assert tokens_to_charge(10, None, 2) == 10 + 2 * 256
    assert tokens_to_charge(10, 0, 1) == 10
