"""The sampling steps of plan/ops.py on the device: the reference's ids, from logits that both see exactly, whatever is beside a row."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends import reference
from jilju.backends.cuda import sampling_memory
from jilju.backends.cuda.sampling import Sampler
from jilju.plan import Batch, StepResult
from jilju.plan.batch import MAX_TOP, MAX_WANTED
from tests.model.batches import BatchRow, Logit, make_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* encountered in .*:RuntimeWarning"
)  # the interpreter's, of infinite numbers

CHUNKS = {
    1: 64,
    5: 64,
    300: 128,
    1003: 512,
    5000: 2048,
}  # by vocabulary: one chunk, a part of one, several, the last of them cut
MAX_LOGITS = 16
ROW = [BatchRow([0], 0, [0])]
RELATIVE = 1e-9  # masses are cut off at 2^-45 of the largest; that many times a vocabulary is less


def random_logits(vocab: int, num_rows: int, seed: int) -> np.ndarray:
    """Rows of several shapes: peaked, flat, full of ties, all equal, far apart, one above all, the ends of the range."""
    rng = np.random.default_rng(seed)
    logits = np.empty((num_rows, vocab), np.float32)
    for row in range(num_rows):
        x = rng.standard_normal(vocab)
        outlier = np.where(np.arange(vocab) == vocab // 3, 60, x)
        ends = np.where(x > 1, 1.6e38, np.where(x < -1, -1.6e38, x))
        zeros = np.where(x > 0, 0.0, -0.0)
        kinds = (4 * x, 0.01 * x, np.round(2 * x) / 2, np.full(vocab, 1.5), 40 * x, outlier, ends, x, zeros)
        logits[row] = kinds[row % len(kinds)]
    return logits


def mask_of(allowed: np.ndarray, vocab: int) -> np.ndarray:
    """With the bits beyond the vocabulary set: they mean nothing."""
    bits = np.arange(-(-vocab // 32) * 32) >= vocab
    bits[allowed] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def random_row(rng: np.random.Generator, vocab: int) -> Logit:
    def one_of(*values: float) -> float:
        return values[rng.integers(len(values))]

    def some_ids(most: int) -> list[int]:
        return np.unique(rng.integers(0, vocab, rng.integers(most + 1))).tolist()

    mask = None
    if rng.random() < 0.4:
        mask = mask_of(
            np.append(np.flatnonzero(rng.random(vocab) < one_of(0.01, 0.5, 1.0)), rng.integers(vocab)), vocab
        )
    lists = 40 if rng.random() < 0.5 else 0
    return Logit(
        token=0,
        target=int(one_of(-1, -1, -1, -1, -1, vocab - 1)),
        position=int(rng.integers(2**40)),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
        temperature=one_of(0.0, 1e-4, 2e-4, 0.2, 0.7, 1.0, 1.9),
        top_k=int(one_of(0, 0, 1, 2, 10, 100, vocab - 1, vocab, 50_000)),
        top_p=one_of(0.0, 0.1, 0.5, 0.9, 0.99, 0.9999999, 1.0, 1.0),
        min_p=one_of(0.0, 0.0, 1e-30, 0.001, 0.05, 1.0),
        num_top=int(rng.integers(MAX_TOP + 1)),
        repetition_penalty=one_of(0.5, 1.0, 1.2, 1e-39),
        presence_penalty=one_of(0.0, -2.0, 0.7),
        frequency_penalty=one_of(0.0, -0.3, 2.0),
        counts={i: i % 5 for i in some_ids(lists)},
        bias={i: float(one_of((i % 401 - 200) / 2, (i % 401 - 200) * 1e36)) for i in some_ids(lists)},
        banned_ids=some_ids(lists),
        wanted_ids=rng.integers(0, vocab, int(one_of(0, 0, 3, MAX_WANTED))).tolist(),
        mask=mask,
    )


def sampler(vocab: int, device: str) -> Sampler:
    return Sampler(vocab, MAX_LOGITS, device, CHUNKS.get(vocab, sampling_memory.CHUNK))


def run(sampler: Sampler, logits: np.ndarray, batch: Batch, device: str) -> StepResult:
    inputs = sampler.upload(batch)
    return sampler.begin_download(sampler.sample(torch.from_numpy(logits).to(device), inputs)).result()


def near(logits: np.ndarray, logit: Logit) -> set[int]:
    """The reference's choices when the numbers that decide are moved by a little more than masses are rounded."""
    u = reference.uniform(logit.seed, logit.position)
    moves = (1, 1 - RELATIVE, 1 + RELATIVE)
    top_p, min_p = float(np.float32(logit.top_p)), float(np.float32(logit.min_p))
    return {
        reference.choose(logits, min(u * a, 1 - 2**-53), logit.temperature, logit.top_k, top_p if top_p >= 1 else min(top_p * b, 1 - 1e-9), min_p * c)
        for a, b, c in itertools.product(moves, moves, moves)
    }  # fmt: skip


def assert_like_reference(got: StepResult, logits: np.ndarray, batch: Batch, rows: list[Logit]) -> None:
    with np.errstate(over="ignore"):  # logprobs beyond float32's range
        want = reference.sample(logits, batch)
    np.testing.assert_array_equal(got.finite, want.finite)
    good = want.finite
    for i in np.flatnonzero(good & (got.token_ids != want.token_ids)):
        choices = near(reference.changed(logits[i], batch, int(i)), rows[i])
        assert got.token_ids[i] in choices and len(choices) > 1, (
            f"row {i}: {rows[i]}, {got.token_ids[i]} for {want.token_ids[i]}"
        )
        want.logprobs[i] = reference.log_softmax(logits[i])[got.token_ids[i]]
    np.testing.assert_array_equal(got.top_ids[good], want.top_ids[good])
    np.testing.assert_allclose(got.logprobs[good], want.logprobs[good], rtol=2**-21, atol=2**-19)
    np.testing.assert_allclose(got.top_logprobs[good], want.top_logprobs[good], rtol=2**-21, atol=2**-19)
    good = np.repeat(good, np.diff(batch.wanted_starts))
    np.testing.assert_allclose(got.wanted_logprobs[good], want.wanted_logprobs[good], rtol=2**-21, atol=2**-19)


@pytest.mark.parametrize(
    ("vocab", "seed"), [(1, 0), (5, 0), (300, 0), (300, 1), (300, 2), (1003, 0), (1003, 1), (5000, 0)]
)
def test_rows_of_every_kind_equal_the_reference(device: str, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(vocab, MAX_LOGITS, seed)
    rows = [random_row(rng, vocab) for _ in range(MAX_LOGITS)]
    batch = make_batch(ROW, rows)
    assert_like_reference(run(sampler(vocab, device), logits, batch, device), logits, batch, rows)


@pytest.mark.parametrize("kind", range(9))
def test_filters_end_where_the_reference_says(device: str, kind: int) -> None:
    """One row of logits, many filters, no changes: the bins from the raw logits."""
    vocab = 1003
    cases = [(1.0, 0, 0.3), (1.0, 0, 0.98), (1.9, 7, 1.0), (0.3, 400, 1.0), (0.7, 400, 0.9), (1.0, 30, 0.5)]
    logits = np.repeat(random_logits(vocab, 9, 5)[kind : kind + 1], len(cases), axis=0)
    rows = [Logit(0, temperature=t, top_k=k, top_p=p, seed=i, position=kind) for i, (t, k, p) in enumerate(cases)]
    batch = make_batch(ROW, rows)
    assert_like_reference(run(sampler(vocab, device), logits, batch, device), logits, batch, rows)


@pytest.mark.parametrize("capacity", [16, 128])
def test_filters_end_there_however_little_a_list_holds(device: str, capacity: int) -> None:
    """All that is kept is in a list, or only where a filter ends, or nothing. With min-p, which a list knows by a key."""
    vocab, num_kinds = 1003, 9
    one = Sampler(vocab, num_kinds, device, 512, capacity)
    for t, k, p, m in [(1.0, 0, 0.6, 0.0), (1.0, 300, 1.0, 0.5), (0.7, 200, 0.8, 0.01), (1.5, 600, 0.5, 0.0)]:
        logits = random_logits(vocab, num_kinds, 11)
        rows = [Logit(0, temperature=t, top_k=k, top_p=p, min_p=m, seed=i, position=i) for i in range(num_kinds)]
        batch = make_batch(ROW, rows)
        assert_like_reference(run(one, logits, batch, device), logits, batch, rows)


def test_top_p_that_ends_elsewhere_than_bins_let_expect(device: str) -> None:
    """Logits at one side of their bins above, at the other below: far more or less mass than in their middle."""
    vocab, num_rows = 1003, 12
    bins = np.random.default_rng(0).integers(0, 24, vocab)
    logits, rows = np.empty((num_rows, vocab), np.float32), []
    for i in range(num_rows):
        top_p = 0.7 + i / 50
        width = (12.5 - math.log(1 - top_p)) / sampling_memory.NUM_BINS
        inner = 0.99 if i % 2 else 0.01
        logits[i] = -width * (bins + np.where(bins < 12, inner, 1 - inner))
        logits[i, 7], logits[i, 11] = 0, -30
        rows.append(Logit(0, temperature=1.0, top_p=top_p, seed=i))
    batch = make_batch(ROW, rows)
    one = Sampler(vocab, num_rows, device, 512, 64)
    assert_like_reference(run(one, logits, batch, device), logits, batch, rows)


def test_a_row_alone_has_the_bits_that_it_has_among_others(device: str) -> None:
    vocab, rng = 300, np.random.default_rng(7)
    logits = random_logits(vocab, MAX_LOGITS, 7)
    plain = [
        Logit(0),
        Logit(0, num_top=3),
        Logit(0, temperature=1.0, seed=3),
        Logit(0, temperature=1.0, top_p=0.9, seed=4),
    ]
    rows = [random_row(rng, vocab) for _ in range(MAX_LOGITS - len(plain))] + plain
    one = sampler(vocab, device)
    together = run(one, logits, make_batch(ROW, rows), device)
    starts = np.cumsum([0, *(len(row.wanted_ids) for row in rows)])
    for i, row in enumerate(rows):
        alone = run(one, logits[i : i + 1], make_batch(ROW, [row]), device)
        for field in fields(StepResult):
            part = slice(starts[i], starts[i + 1]) if field.name == "wanted_logprobs" else slice(i, i + 1)
            assert getattr(alone, field.name).tobytes() == getattr(together, field.name)[part].tobytes(), (
                f"row {i}: {field.name}"
            )


def test_a_bin_with_more_ids_than_a_list_holds(device: str) -> None:
    """Ties over most of the vocabulary, in which both filters end."""
    vocab = sampling_memory.LIST_CAPACITY + 1500
    logits = np.zeros((2, vocab), np.float32)
    logits[:, ::9] = -3
    logits[:, 5000] = 0.5
    rows = [Logit(0, temperature=1.0, top_k=7000, top_p=0.7, seed=3), Logit(0, temperature=0.5, top_k=2, seed=4)]
    batch = make_batch(ROW, rows)
    assert_like_reference(run(sampler(vocab, device), logits, batch, device), logits, batch, rows)


@pytest.mark.parametrize("vocab", [5, 300])
def test_ties_go_to_the_lowest_id_and_targets_are_scored(device: str, vocab: int) -> None:
    last, rest = vocab - 1, list(range(vocab - 1))
    rows = [
        Logit(0),
        Logit(0, banned_ids=rest),
        Logit(0, banned_ids=rest, temperature=1.0, top_p=0.5),
        Logit(0, banned_ids=rest, temperature=1.0),
        Logit(0, bias={last: 1.0}),
        Logit(0, temperature=1.0, top_k=1, seed=5),
        Logit(0, temperature=1.0, top_p=0.0, seed=6),
        Logit(0, target=last, num_top=2, temperature=1.0),
    ]
    result = run(sampler(vocab, device), np.full((8, vocab), 1.5, np.float32), make_batch(ROW, rows), device)
    assert result.token_ids.tolist() == [0, last, last, last, last, 0, 0, last]
    np.testing.assert_allclose(result.logprobs, -math.log(vocab), rtol=1e-6)
    assert result.top_ids[-1, :3].tolist() == [0, 1, -1]


def test_each_change_moves_what_it_says(device: str) -> None:
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
        (Logit(0, counts={7: 1}, bias={7: 3.4e38}, repetition_penalty=1e-39), 7),  # infinite on the way, and then again
        (Logit(0, bias={5: 1.0}, banned_ids=[5]), 0),
        (Logit(0, bias={5: 1.0, 202: 1.0}, mask=mask_of(np.array([33, 202]), 300)), 202),
    ]  # fmt: skip
    rows = [row for row, _ in cases]
    logits = np.full((len(rows), 300), 1.5, np.float32)
    result = run(sampler(300, device), logits, make_batch(ROW, rows), device)
    assert result.token_ids.tolist() == [token_id for _, token_id in cases]
    np.testing.assert_allclose(result.logprobs, -math.log(300), rtol=1e-6, err_msg="of the raw logits")


def test_long_lists_are_changed_whole(device: str) -> None:
    vocab, rng = 5000, np.random.default_rng(3)
    logits = random_logits(vocab, 2, 3)
    ids = rng.permutation(vocab)
    counts = {int(i): int(i) % 7 for i in ids[:4000]}
    rows = [
        Logit(
            0,
            num_top=5,
            counts=counts,
            repetition_penalty=1.3,
            frequency_penalty=0.1,
            banned_ids=ids[3000:4500].tolist(),
        ),
        Logit(
            0,
            temperature=1.0,
            seed=1,
            bias={int(i): float(i % 11) for i in ids[:1024]},
            counts=counts,
            presence_penalty=1.0,
        ),
    ]
    batch = make_batch(ROW, rows)
    assert_like_reference(run(sampler(vocab, device), logits, batch, device), logits, batch, rows)


def test_a_row_with_nothing_left_is_flagged_and_leaves_others_alone(device: str) -> None:
    nothing = mask_of(np.array([], int), 300)
    rows = [
        Logit(0, temperature=1.0, mask=nothing, num_top=1, top_k=5),
        Logit(0, temperature=1.0, top_p=0.9),
        Logit(0, banned_ids=range(300)),
        Logit(0, target=7, mask=nothing),
    ]
    logits = random_logits(300, 4, 0)
    result = run(sampler(300, device), logits, make_batch(ROW, rows), device)
    assert result.finite.tolist() == [False, True, False, True]
    assert result.token_ids[[0, 2, 3]].tolist() == [0, 0, 7]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [Logit(0), Logit(0, temperature=1.0, top_p=0.9), Logit(0, target=3), Logit(0, bias={3: 1.0})], ids=["greedy", "drawn", "scored", "changed"])  # fmt: skip
def test_a_single_bad_logit_is_flagged(device: str, value: float, row: Logit) -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[[0, 1, 3], [0, 131, 299]] = value
    result = run(sampler(300, device), logits, make_batch(ROW, [row] * 4), device)
    assert result.finite.tolist() == [False, False, True, False]
    assert result.token_ids[~result.finite].tolist() == [0, 0, 0]


def test_masks_may_come_after_the_rest(device: str) -> None:
    vocab = 300
    logits = random_logits(vocab, 3, 1)
    rows = [Logit(0, mask=mask_of(np.array([3, 77]), vocab)), Logit(0), Logit(0, mask=mask_of(np.array([299]), vocab))]
    whole = make_batch(ROW, rows)
    late = replace(whole, masks=np.zeros_like(whole.masks), masks_ready=np.zeros(1, np.int32))
    one = sampler(vocab, device)
    inputs = one.upload(late)
    late.masks[:] = whole.masks
    late.masks_ready[0] = 1
    one.upload_masks(inputs, late)
    got = one.begin_download(one.sample(torch.from_numpy(logits).to(device), inputs)).result()
    assert_like_reference(got, logits, whole, rows)


def test_masks_of_scored_rows_are_not_looked_at(device: str) -> None:
    vocab, logits = 300, random_logits(300, 2, 1)
    rows = [Logit(0, target=5, mask=mask_of(np.array([3]), vocab)), Logit(0, bias={4: 90.0})]
    batch = make_batch(ROW, rows)
    one = sampler(vocab, device)
    inputs = one.upload(replace(batch, masks_ready=np.zeros(1, np.int32)))
    got = one.begin_download(one.sample(torch.from_numpy(logits).to(device), inputs)).result()
    assert_like_reference(got, logits, batch, rows)


def test_logits_are_left_as_they_are_and_may_lie_apart(device: str) -> None:
    vocab = 300
    wide = torch.from_numpy(random_logits(400, 4, 2)).to(device)
    before = wide.clone()
    rows = [Logit(0, temperature=1.0, seed=i, bias={3: 5.0}, num_top=4) for i in range(4)]
    batch = make_batch(ROW, rows)
    one = sampler(vocab, device)
    got = one.begin_download(one.sample(wide[:, :vocab], one.upload(batch))).result()
    assert torch.equal(wide, before)
    assert_like_reference(got, np.ascontiguousarray(before[:, :vocab].cpu().numpy()), batch, rows)


def test_results_that_are_taken_late_are_their_own(device: str) -> None:
    """Several under way, their ids on the device until then; a batch without logit rows among them."""
    vocab, one = 300, sampler(300, device)
    logits = random_logits(vocab, 12, 4)
    downloads = []
    order = (0, 5, 5, 12, 3, 4, 7, 1)  # more than there are buffers at first
    for first in order:
        rows = [Logit(0, num_top=2 if first else 0) for _ in logits[first:]]
        batch = make_batch(ROW, rows)
        downloads.append(one.begin_download(one.sample(torch.from_numpy(logits[first:]).to(device), one.upload(batch))))
    best = logits.argmax(axis=1)
    for first, download in zip(order, downloads, strict=True):
        assert download.token_ids.cpu().tolist() == best[first:].tolist()
        result = download.result()
        assert result.token_ids.tolist() == best[first:].tolist()
        assert result.top_ids.shape == result.top_logprobs.shape == (12 - first, MAX_TOP)
        assert (result.top_ids[:, 0] == (best[first:] if first else -1)).all()


def test_batches_that_were_prepared_wait_for_their_turn(device: str) -> None:
    """Uploads in one order, used in another, some never; then their memory again, for longer lists than before."""
    vocab, one = 300, sampler(300, device)
    logits = np.zeros((3, vocab), np.float32)
    for size in (2, 150):
        batches = [make_batch(ROW, [Logit(0, bias={i + j: 1.0, **dict.fromkeys(range(200, 200 + size // 2), -1.0)}) for j in range(3)]) for i in range(7)]  # fmt: skip
        inputs = [one.upload(batch) for batch in batches]
        for i in (4, 0, 6, 2, 3):
            got = one.begin_download(one.sample(torch.from_numpy(logits).to(device), inputs[i])).result()
            assert got.token_ids.tolist() == [i, i + 1, i + 2]


def test_a_sampler_that_is_warm_samples_as_before(device: str) -> None:
    one, logits = sampler(300, device), random_logits(300, 2, 6)
    one.warm_up()
    batch = make_batch(ROW, [Logit(0), Logit(0, temperature=1.0, seed=8)])
    assert_like_reference(run(one, logits, batch, device), logits, batch, [Logit(0), Logit(0, temperature=1.0, seed=8)])


def test_what_is_allocated_is_what_was_told(device: str) -> None:
    one = Sampler(1003, 5, device)
    held = sum(space.numel() * space.element_size() for space in one._spaces.values())
    assert held == Sampler.workspace_bytes(1003, 5) == sampling_memory.workspace_bytes(1003, 5)
