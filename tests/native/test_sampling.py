"""The sampling steps of plan/ops.py: the reference's ids, from logits that both see exactly, whatever the threads and the batch."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends import reference
from jilju.plan import Batch, Executor, StepResult
from jilju.plan.batch import MAX_TOP, MAX_WANTED
from tests.model.batches import BatchRow, Logit, make_batch, run
from tests.native.plans import loaded, rows_of_logits, table_of_logits

NUM_ROWS = 18
VOCABS = (  # one logit; less than a vector, than a group of 256, than a strip of 4096, than a tile of strips; no multiple of 8 or 32
    1, 5, 203, 1003, 4096, 17011,
)  # fmt: skip


def random_logits(vocab: int) -> np.ndarray:
    """Rows of several shapes: peaked, flat, full of ties, all equal, far apart, one above all, the ends of the range, and two
    in which the first 16 ids of every 256 say nothing of the others."""
    rng = np.random.default_rng(0)
    logits = np.empty((NUM_ROWS, vocab), np.float32)
    for row in range(NUM_ROWS):
        x = rng.standard_normal(vocab)
        outlier = np.where(np.arange(vocab) == vocab // 3, 60, x)
        ends = np.where(x > 1, 1.6e38, np.where(x < -1, -1.6e38, x))
        first = np.arange(vocab) % 256 < 16
        kinds = (
            4 * x, 0.01 * x, np.round(2 * x) / 2, np.full(vocab, 1.5), 40 * x, outlier, ends, np.where(first, x - 20, 2 * x),
            np.where(first, x + 3, x),
        )  # fmt: skip
        logits[row] = kinds[row % len(kinds)]
    return logits


LOGITS = {vocab: random_logits(vocab) for vocab in VOCABS}


@pytest.fixture(scope="module")
def executors() -> dict[int, tuple[Executor, Executor]]:
    """Per vocabulary: on three threads and on one."""
    plans = {vocab: rows_of_logits(logits) for vocab, logits in LOGITS.items()}
    return {v: (loaded(*plan, num_threads=3), loaded(*plan, num_threads=1)) for v, plan in plans.items()}


def mask_of(allowed: list[int], vocab: int) -> np.ndarray:
    """With the bits beyond the vocabulary set: they mean nothing."""
    bits = np.arange(-(-vocab // 32) * 32) >= vocab
    bits[allowed] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


@st.composite
def logit_rows(draw: st.DrawFn, vocab: int) -> Logit:
    ids = st.integers(0, vocab - 1)
    mask = None
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.001, 0.1, 0.5, 1.0]))
        allowed = np.random.default_rng(draw(st.integers(0, 99))).random(vocab) < share
        mask = mask_of([*np.flatnonzero(allowed).tolist(), draw(ids)], vocab)
    change = draw(st.booleans())
    lists = st.integers(0, 30) if change else st.just(0)
    return Logit(
        token=0,
        target=draw(st.sampled_from([-1, -1, -1, -1, vocab - 1])),
        position=draw(st.integers(0, 2**40)),
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.sampled_from([0.0, 1e-5, 2e-4, 0.2, 0.7, 1.0, 1.9])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 10, 100, vocab - 1, vocab, 50_000])),
        top_p=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 0.9999999, 1.0, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-30, 0.001, 0.05, 0.5, 1.0])),
        num_top=draw(st.integers(0, MAX_TOP)),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 1.2, 1e-39])),
        presence_penalty=draw(st.sampled_from([0.0, -2.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.3, 2.0])),
        counts={i % vocab: i % 5 for i in draw(st.lists(ids, max_size=draw(lists)))},
        bias={i: (i % 401 - 200) / 2 for i in draw(st.lists(ids, max_size=draw(lists)))},
        banned_ids=sorted(set(draw(st.lists(ids, max_size=draw(lists))))),
        wanted_ids=draw(st.lists(ids, max_size=draw(st.sampled_from([0, 0, 3, MAX_WANTED])))),
        mask=mask,
    )


def near(logits: np.ndarray, logit: Logit) -> set[int]:
    """The reference's choices when the numbers that decide are moved by a little more than float32 rounds."""
    u = reference.uniform(logit.seed, logit.position)
    moves = (1, 1 - 1e-5, 1 + 1e-5)
    return {
        reference.choose(logits, min(u * a, 1 - 2**-53), logit.temperature, logit.top_k, min(np.float32(logit.top_p) * b, 1 if logit.top_p == 1 else 1 - 1e-9), np.float32(logit.min_p) * c)
        for a, b, c in itertools.product(moves, moves, moves)
    }  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(VOCABS))
def test_draws_equal_the_reference(
    executors: dict[int, tuple[Executor, Executor]], data: st.DataObject, vocab: int
) -> None:
    num_rows = min(vocab, NUM_ROWS)
    cases = data.draw(st.lists(st.tuples(st.integers(0, num_rows - 1), logit_rows(vocab)), min_size=1, max_size=12))
    rows = [BatchRow([token for token, _ in cases], 0, range(3))]
    batch = make_batch(rows, [logit._replace(token=i) for i, (_, logit) in enumerate(cases)])
    got, alone = (run(executor, batch) for executor in executors[vocab])
    for field in ("token_ids", "logprobs", "top_ids", "top_logprobs", "wanted_logprobs", "finite"):
        assert getattr(got, field).tobytes() == getattr(alone, field).tobytes(), f"threads change {field}"
    assert_like_reference(got, batch, cases, vocab)


@pytest.mark.parametrize("kind", range(9))
@pytest.mark.parametrize("changes", [{}, {"bias": {7: 1.5, 16000: -3.0}}], ids=["raw", "changed"])
def test_the_prefix_of_top_p_is_found_however_wide_it_is(
    executors: dict[int, tuple[Executor, Executor]], kind: int, changes: dict[str, dict[int, float]]
) -> None:
    """One row of logits, many draws: in all parts of the vocabulary, above the band in which the prefix ends and in it."""
    vocab = 17011
    settings = itertools.product((0.7, 1.0, 1.9), (0.3, 0.9, 0.98, 1.0), range(4))
    cases = [
        (kind, Logit(0, temperature=t, top_p=p, seed=seed, position=round(t * 10 + p * 1000), **changes))
        for t, p, seed in settings
    ]
    batch = make_batch([BatchRow([kind], 0, range(3))], [logit for _, logit in cases])
    assert_like_reference(run(executors[vocab][0], batch), batch, cases, vocab)


def assert_like_reference(got: StepResult, batch: Batch, cases: list[tuple[int, Logit]], vocab: int) -> None:
    """`cases` are of logit rows: the row of LOGITS[vocab], and how it is sampled."""
    logits = LOGITS[vocab][[token for token, _ in cases]]
    want = reference.sample(logits, batch)
    np.testing.assert_array_equal(got.finite, want.finite)
    good = want.finite
    for i in np.flatnonzero(good & (got.token_ids != want.token_ids)):
        choices = near(reference.changed(logits[i], batch, int(i)), cases[i][1])
        assert got.token_ids[i] in choices and len(choices) > 1, f"row {i}: logits {cases[i]}, want {want.token_ids[i]}"
        want.logprobs[i] = reference.log_softmax(logits[i])[got.token_ids[i]]
    np.testing.assert_array_equal(got.top_ids[good], want.top_ids[good])
    np.testing.assert_allclose(got.logprobs[good], want.logprobs[good], rtol=2**-21, atol=2**-19)
    np.testing.assert_allclose(got.top_logprobs[good], want.top_logprobs[good], rtol=2**-21, atol=2**-19)
    good = np.repeat(good, np.diff(batch.wanted_starts))
    np.testing.assert_allclose(got.wanted_logprobs[good], want.wanted_logprobs[good], rtol=2**-21, atol=2**-19)


def test_the_draws_follow_the_distribution(executors: dict[int, tuple[Executor, Executor]]) -> None:
    """3000 seeds at temperature 1 on the peaked row 0: each frequent id within five standard deviations."""
    n, vocab = 3000, 1003
    counts = np.zeros(vocab)
    for first in range(0, n, 500):
        logits = [Logit(0, seed=seed, position=3, temperature=1.0) for seed in range(first, first + 500)]
        np.add.at(counts, run(executors[vocab][0], make_batch([BatchRow([0], 0, [0])], logits)).token_ids, 1)
    p = np.exp(LOGITS[vocab][0].astype(np.float64))
    p /= p.sum()
    likely = p > 0.005
    assert likely.sum() > 5
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)))[likely].all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_ties_go_to_the_lowest_id_and_targets_are_scored(
    executors: dict[int, tuple[Executor, Executor]], vocab: int
) -> None:
    flat, last = 3 % min(vocab, NUM_ROWS), vocab - 1
    rest = list(range(vocab - 1))
    logits = [
        Logit(0),
        Logit(0, banned_ids=rest),
        Logit(0, banned_ids=rest, temperature=1.0, top_p=0.5),
        Logit(0, banned_ids=rest, temperature=1.0),
        Logit(0, bias={last: 1.0}),
        Logit(0, temperature=1.0, top_k=1, seed=5),
        Logit(0, temperature=1.0, top_p=0.0, seed=6),
        Logit(0, target=last, num_top=2, temperature=1.0),
    ]
    result = run(executors[vocab][0], make_batch([BatchRow([flat], 0, [0])], logits))
    assert result.token_ids.tolist() == [0, last, last, last, last, 0, 0, last]
    if vocab > 3:
        np.testing.assert_allclose(result.logprobs, -math.log(vocab), rtol=1e-5)
        assert result.top_ids[-1, :3].tolist() == [0, 1, -1]


def test_each_change_moves_what_it_says(executors: dict[int, tuple[Executor, Executor]]) -> None:
    """On equal logits of 1.5: greedy takes the lowest id that is not worse than others, or the one that is better."""
    counts = {0: 0, 1: 1, 2: 2}  # 0 is in the prompt alone
    cases = [
        (Logit(0, counts=counts, repetition_penalty=1.5), 3),
        (Logit(0, counts=counts, repetition_penalty=0.5), 0),
        (Logit(0, counts=counts, presence_penalty=0.5), 0),
        (Logit(0, counts=counts, presence_penalty=-0.5), 1),
        (Logit(0, counts=counts, frequency_penalty=0.5), 0),
        (Logit(0, counts=counts, frequency_penalty=-0.5), 2),
        (Logit(0, counts={7: 1}, bias={7: -2.0, 9: 0.25}, repetition_penalty=0.1), 9),  # -0.5 * 0.1 is still below 1.5
        (Logit(0, counts={7: 1}, bias={7: 0.5}, repetition_penalty=2.0, frequency_penalty=-0.25, presence_penalty=-0.25), 0),
        (Logit(0, counts={7: 1}, bias={7: 0.5}, repetition_penalty=2.0, frequency_penalty=-0.25, presence_penalty=-0.375), 7),
        (Logit(0, bias={5: 1.0}, banned_ids=[5]), 0),
        (Logit(0, bias={5: 1.0, 202: 1.0}, mask=mask_of([33, 202], 203)), 202),
    ]  # fmt: skip
    batch = make_batch([BatchRow([3], 0, [0])], [logit for logit, _ in cases])
    for executor in (*executors[203], loaded(*rows_of_logits(LOGITS[203]), backend="reference")):
        result = run(executor, batch)
        assert result.token_ids.tolist() == [token_id for _, token_id in cases]
        np.testing.assert_allclose(result.logprobs, -math.log(203), rtol=1e-6, err_msg="of the raw logits")


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_wanted_ids_are_reported_in_their_order_of_the_raw_logits(backend: str) -> None:
    """Whatever changes the row's own logits, of sampled and scored rows alike; rows that want none are skipped."""
    executor = loaded(*rows_of_logits(LOGITS[1003]), backend=backend)
    changes = {"bias": {7: 3.0}, "counts": {9: 2}, "repetition_penalty": 1.5, "banned_ids": [1002]}
    logits = [
        Logit(0, wanted_ids=[1002, 7, 7, 0], **changes),
        Logit(0, num_top=3),
        Logit(0, target=5, wanted_ids=[5, 9]),
    ]
    result = run(executor, make_batch([BatchRow([0], 0, [0])], logits))
    want = reference.log_softmax(LOGITS[1003][0])[[1002, 7, 7, 0, 5, 9]]
    np.testing.assert_allclose(result.wanted_logprobs, want, rtol=2**-21, atol=2**-19)
    assert result.wanted_logprobs[4] == result.logprobs[2]


@pytest.mark.parametrize("wanted", [[1003], [-1], [0] * (MAX_WANTED + 1)], ids=["beyond", "negative", "too many"])
def test_wrong_wanted_ids_are_refused(executors: dict[int, tuple[Executor, Executor]], wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted id"):
        run(executors[1003][0], make_batch([BatchRow([0], 0, [0])], [Logit(0, wanted_ids=wanted)]))


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_row_with_nothing_left_is_flagged_and_leaves_others_alone(
    executors: dict[int, tuple[Executor, Executor]], vocab: int
) -> None:
    nothing = mask_of([], vocab)
    logits = [
        Logit(0, temperature=1.0, mask=nothing, num_top=1),
        Logit(0, temperature=1.0, top_p=0.9),
        Logit(0, banned_ids=range(vocab)),
        Logit(0, target=0, mask=nothing),
    ]
    result = run(executors[vocab][0], make_batch([BatchRow([0], 0, [0])], logits))
    assert result.finite.tolist() == [False, True, False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 255, 256, 1001, 1002])
def test_a_single_bad_logit_is_flagged(value: float, where: int) -> None:
    logits = np.zeros((1003, 1003), np.float32)
    logits[0, where] = value
    executor = loaded(*table_of_logits(logits))
    rows = [BatchRow([0, 1], 0, [0])]
    result = run(executor, make_batch(rows, [Logit(0, temperature=1.0), Logit(1, temperature=1.0)]))
    assert result.finite.tolist() == [False, True]
