"""Step times: the model learns what steps take, and its answers hold in both directions."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.engine.step_times import StepTimes, num_pairs

TRUE = (3e6, 4e5, 300.0)  # ns: a small model on two cores


def measured(rng: random.Random, num_tokens: int, pairs: int, noise: float) -> int:
    base, token, pair = TRUE
    return int((base + token * num_tokens + pair * pairs) * rng.uniform(1 - noise, 1 + noise))


@pytest.mark.parametrize("prior", [(1e6, 1e6, 0.0), (1e8, 1e3, 0.0), (3e6, 4e5, 0.0)])
def test_it_learns_from_mixed_steps(prior):
    rng, times = random.Random(1), StepTimes(prior)
    for _ in range(400):
        rows, start, chunk = rng.randrange(1, 17), rng.randrange(0, 2000), rng.choice([0, 0, 64, 200])
        pairs = rows * rng.randrange(20, 1000) + num_pairs(start, chunk)
        times.observe(rows + chunk, pairs, measured(rng, rows + chunk, pairs, 0.05))
    for tokens, pairs in ((1, 100), (16, 16 * 500), (256, num_pairs(0, 256)), (256, num_pairs(4000, 256))):
        true = measured(rng, tokens, pairs, 0.0)
        assert abs(times.predict_ns(tokens, pairs) - true) < 0.15 * true


def test_what_prefill_takes_is_not_forgotten_over_many_decode_steps():
    rng, times = random.Random(2), StepTimes()
    for _ in range(50):
        for tokens in (1, 64, 128):
            times.observe(tokens, num_pairs(0, tokens), measured(rng, tokens, num_pairs(0, tokens), 0.05))
    for i in range(20_000):
        times.observe(4, 4 * (100 + i % 500), measured(rng, 4, 4 * (100 + i % 500), 0.05))
    true = measured(rng, 128, num_pairs(0, 128), 0.0)
    assert abs(times.predict_ns(128, num_pairs(0, 128)) - true) < 0.4 * true


@pytest.mark.parametrize("times_as_long", [0.5, 2.0])
def test_a_neighbour_that_comes_or_goes_is_noticed_within_some_steps(times_as_long):
    rng, times = random.Random(4), StepTimes()

    def observe(num_steps: int, pace: float) -> None:
        for _ in range(num_steps):
            chunk, start = rng.choice([0, 32, 128]), rng.randrange(0, 4000)
            pairs = 8 * 300 + num_pairs(start, chunk)
            times.observe(8 + chunk, pairs, int(pace * measured(rng, 8 + chunk, pairs, 0.05)))

    shapes = ((8, 2400), (136, 2400 + num_pairs(0, 128)), (40, 2400 + num_pairs(4000, 32)))
    observe(400, 1.0)
    for pace in (times_as_long, 1.0):
        observe(24, pace)
        for tokens, pairs in shapes:
            true = pace * measured(rng, tokens, pairs, 0.0)
            assert abs(times.predict_ns(tokens, pairs) - true) < 0.25 * true


def test_one_disturbed_step_does_not_upset_it():
    rng, times = random.Random(3), StepTimes()
    for _ in range(200):
        times.observe(8, 800, measured(rng, 8, 800, 0.02))
    before = times.predict_ns(8, 800)
    times.observe(8, 800, 10**10)
    assert times.predict_ns(8, 800) < 2 * before


@given(
    st.tuples(st.floats(0, 1e8), st.floats(0, 1e7), st.floats(0, 1e4)),
    st.integers(0, 100_000), st.integers(1, 8192), st.integers(-10, 10**9), st.sampled_from([1.0, 1.4, 2.7]),
)  # fmt: skip
def test_a_chunk_within_a_time_is_the_longest_that_takes_no_more(prior, start, most, left_ns, weight):
    times = StepTimes(prior)
    count = times.chunk_within(left_ns, start, most, weight)
    assert 0 <= count <= most
    assert times.chunk_ns(start, count, weight) <= max(left_ns, 0) * (1 + 1e-9)
    if count < most and left_ns > 0:
        assert times.chunk_ns(start, count + 1, weight) > left_ns * (1 - 1e-9)


@given(st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 10**8), st.integers(0, 10**11)), max_size=60))
def test_coefficients_are_never_negative_or_unbounded(steps):
    times = StepTimes()
    for tokens, pairs, took_ns in steps:
        times.observe(tokens, pairs, took_ns)
        assert all(0 <= c < 1e15 for c in times.coefficients)


def test_long_steps_in_a_row_are_believed():
    rng, times = random.Random(4), StepTimes(TRUE, is_measured=True)
    for _ in range(60):
        times.observe(8, 800, 50 * measured(rng, 8, 800, 0.05))
    true = 50 * measured(rng, 8, 800, 0.0)
    assert 0.5 * true < times.predict_ns(8, 800) < 2 * true


@pytest.mark.parametrize("seed", range(30))
def test_decode_after_much_prefill_is_learnt(seed):
    """With noise, the fitted time of a kind of step that was not seen for long may be below nothing."""
    rng, times = random.Random(seed), StepTimes((1e6, 1e6, 0.0))
    for _ in range(300):
        start = rng.randrange(2000)
        times.observe(256, num_pairs(start, 256), measured(rng, 256, num_pairs(start, 256), 0.3))
    for _ in range(200):
        times.observe(1, 500, measured(rng, 1, 500, 0.2))
    true = measured(rng, 1, 500, 0.0)
    assert 0.5 * true < times.predict_ns(1, 500) < 2 * true


def test_a_disturbed_first_step_after_a_warm_up_is_no_disaster():
    rng, times = random.Random(5), StepTimes((3e6, 4e5, 300.0), is_measured=True)
    times.observe(8, 800, 20 * 10**9)
    for _ in range(10):
        times.observe(8, 800, measured(rng, 8, 800, 0.05))
    assert times.predict_ns(8, 800) < 3 * measured(rng, 8, 800, 0.0)
