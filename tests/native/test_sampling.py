"""The sampling steps of plan/ops.py: the same ids as the reference, from logits that both see exactly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.plan import Executor
from jilju.plan.batch import MAX_TOP
from tests.model.batches import BatchRow, Logit, make_batch, run
from tests.native.plans import loaded, table_of_logits

VOCAB = 1003  # no multiple of 8 or 64


def random_logits() -> np.ndarray:
    """Rows of several shapes: peaked, flat, full of ties, all equal, far apart."""
    rng = np.random.default_rng(0)
    logits = np.empty((VOCAB, VOCAB), np.float32)
    for row, kind in enumerate(np.resize(np.arange(5), VOCAB)):
        x = rng.standard_normal(VOCAB)
        logits[row] = (4 * x, 0.01 * x, np.round(2 * x) / 2, np.full(VOCAB, 1.5), 40 * x)[kind]
    return logits


LOGITS = random_logits()


@pytest.fixture(scope="module")
def executors() -> tuple[Executor, Executor]:
    plan, weights = table_of_logits(LOGITS)
    return loaded(plan, weights, "native"), loaded(plan, weights, "reference")


ids = st.lists(st.integers(0, VOCAB - 1), max_size=30)
logit_rows = st.builds(
    Logit,
    token=st.just(0),
    target=st.just(-1),
    position=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 1e-5, 0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 10, 100, 1002, 1003, 5000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.2]),
    penalty_ids=ids,
    banned_ids=ids,
    num_top=st.integers(0, MAX_TOP),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, VOCAB - 1), logit_rows), min_size=1, max_size=40))
def test_draws_equal_the_reference(executors: tuple[Executor, Executor], cases: list[tuple[int, Logit]]) -> None:
    rows = [BatchRow([token for token, _ in cases], 0, range(3))]
    batch = make_batch(rows, [logit._replace(token=i) for i, (_, logit) in enumerate(cases)])
    got, want = (run(executor, batch) for executor in executors)
    assert got.finite.all()
    for i, (token, logit) in enumerate(cases):
        assert got.token_ids[i] == want.token_ids[i], f"row {i}: logits {token}, {logit}"
    np.testing.assert_array_equal(got.top_ids, want.top_ids)
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=2**-21, atol=2**-18)
    np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, rtol=2**-21, atol=2**-18)


def test_the_draws_follow_the_distribution(executors: tuple[Executor, Executor]) -> None:
    """3000 seeds at temperature 1 on the peaked row 0: each frequent id within five standard deviations."""
    n = 3000
    counts = np.zeros(VOCAB)
    for first in range(0, n, 500):
        logits = [Logit(0, seed=seed, position=3, temperature=1.0) for seed in range(first, first + 500)]
        np.add.at(counts, run(executors[0], make_batch([BatchRow([0], 0, [0])], logits)).token_ids, 1)
    p = np.exp(LOGITS[0].astype(np.float64))
    p /= p.sum()
    likely = p > 0.005
    assert likely.sum() > 5
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)))[likely].all()


def test_greedy_takes_the_lowest_of_equal_ids_and_targets_are_scored(executors: tuple[Executor, Executor]) -> None:
    flat = 3  # a row of equal logits
    logits = [Logit(0), Logit(0, banned_ids=[0, 1]), Logit(0, target=17, num_top=2, temperature=1.0)]
    result = run(executors[0], make_batch([BatchRow([flat], 0, [0])], logits))
    assert result.token_ids.tolist() == [0, 2, 17]
    np.testing.assert_allclose(result.logprobs, -math.log(VOCAB), rtol=1e-5)
    assert result.top_ids[2, :3].tolist() == [0, 1, -1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1001, 1002])
def test_a_single_bad_logit_is_flagged(value: float, where: int) -> None:
    logits = np.zeros((VOCAB, VOCAB), np.float32)
    logits[0, where] = value
    executor = loaded(*table_of_logits(logits))
    rows = [BatchRow([0, 1], 0, [0])]
    result = run(executor, make_batch(rows, [Logit(0, temperature=1.0), Logit(1, temperature=1.0)]))
    assert result.finite.tolist() == [False, True]
