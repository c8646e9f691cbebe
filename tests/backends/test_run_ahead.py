"""Running ahead: which batch is expected after a step, what of the real one it has foreseen, and parts of batches."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends.cuda.run_ahead import (
    LISTS,
    SAMPLED_BY,
    expect,
    logit_of_rows,
    logits_between,
    match,
    part_of,
    written_slots,
)
from jilju.backends.reference import sample
from jilju.plan import Batch
from tests.model.batches import BatchRow, Logit, make_batch

BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_CONTEXT = 40
VOCAB = 50


@st.composite
def batches(draw: st.DrawFn, plain: bool = False, sampled: bool = False) -> Batch:
    """Rows on blocks of their own; `plain`: without lists and masks; `sampled`: every row samples its last token alone."""
    free = draw(st.permutations(range(NUM_BLOCKS)))
    rows, logits, first = [], [], 0
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 20))
        count = draw(st.sampled_from([1, 1, 1, 2, 5]))
        num_blocks = -(-(start + count) // BLOCK_SIZE)
        rows.append(
            BatchRow(
                draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count)), start, free[:num_blocks]
            )
        )
        free = free[num_blocks:]
        places = [count - 1] if sampled else sorted(draw(st.sets(st.integers(0, count - 1))))
        for place in places:
            ids = st.lists(st.integers(0, VOCAB - 1), max_size=0 if plain else 3, unique=True)
            logits.append(
                Logit(
                    first + place,
                    target=-1 if sampled or place == count - 1 else draw(st.integers(0, VOCAB - 1)),
                    position=start + place + 1,
                    seed=draw(st.integers(0, 2**40)),
                    temperature=draw(st.sampled_from([0.0, 0.8])),
                    top_k=draw(st.sampled_from([0, 3])),
                    num_top=draw(st.integers(0, 3)),
                    counts=dict.fromkeys(draw(ids), 1),
                    repetition_penalty=1.0 if plain else 1.3,
                    bias=dict.fromkeys(draw(ids), 2.5),
                    banned_ids=draw(ids),
                    wanted_ids=draw(ids),
                )
            )
        first += count
    return make_batch(rows, logits)


@settings(deadline=None, max_examples=200)
@given(batches(), st.data())
def test_a_part_samples_what_the_whole_samples(batch: Batch, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.permutations(range(batch.num_rows)))[: data.draw(st.integers(1, batch.num_rows))])
    part, logits = part_of(batch, rows)
    assert part.starts.tolist() == batch.starts[rows].tolist()
    values = np.random.default_rng(0).normal(size=(batch.num_logits, VOCAB)).astype(np.float32)
    whole, own = sample(values, batch), sample(values[logits], part)
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "finite"):
        assert (getattr(own, name) == getattr(whole, name)[logits]).all(), name
    wanted = [x for i in logits for x in whole.wanted_logprobs[batch.wanted_starts[i] : batch.wanted_starts[i + 1]]]
    assert own.wanted_logprobs.tolist() == wanted
    for field in fields(Batch):
        assert getattr(part, field.name).dtype == getattr(batch, field.name).dtype, field.name


@settings(deadline=None, max_examples=100)
@given(batches(), st.integers(1, 4))
def test_logit_rows_in_turns_sample_what_all_sample_at_once(batch: Batch, at_once: int) -> None:
    values = np.random.default_rng(0).normal(size=(batch.num_logits, VOCAB)).astype(np.float32)
    whole = sample(values, batch)
    wanted = list[float]()
    for first in range(0, batch.num_logits, at_once):
        end = min(first + at_once, batch.num_logits)
        part = logits_between(batch, first, end)
        assert part.logit_tokens.tolist() == batch.logit_tokens[first:end].tolist()
        assert part.num_rows == batch.num_rows and part.num_tokens == batch.num_tokens
        own = sample(values[first:end], part)
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "finite"):
            assert (getattr(own, name) == getattr(whole, name)[first:end]).all(), name
        wanted += own.wanted_logprobs.tolist()
    assert wanted == whole.wanted_logprobs.tolist()


def advanced(batch: Batch, token_ids: np.ndarray, free: list[int]) -> Batch:
    """The next step of an engine in which all goes on: made from the step before, row by row."""
    logits = logit_of_rows(batch)
    rows, wanted = [], []
    for r in range(batch.num_rows):
        start = int(batch.starts[r] + batch.counts[r])
        blocks = [b for b in batch.block_tables[r].tolist() if b >= 0]
        if len(blocks) * BLOCK_SIZE <= start:
            blocks.append(free.pop())
        i = logits[r]
        rows.append(BatchRow([int(token_ids[i])], start, blocks))
        columns = {name: getattr(batch, name)[i].item() for name in SAMPLED_BY}
        singular = {"positions": "position", "seeds": "seed", "temperatures": "temperature", "top_ks": "top_k", "top_ps": "top_p", "min_ps": "min_p", "repetition_penalties": "repetition_penalty", "presence_penalties": "presence_penalty", "frequency_penalties": "frequency_penalty"}  # fmt: skip
        named = {singular.get(name, name): value for name, value in columns.items()}
        named["position"] += 1
        wanted.append(Logit(r, **named))
    return make_batch(rows, wanted)


@settings(deadline=None, max_examples=200)
@given(batches(plain=True, sampled=True), st.data())
def test_the_expected_batch_is_the_next_one(batch: Batch, data: st.DataObject) -> None:
    found = expect(batch, BLOCK_SIZE, MAX_CONTEXT, spare_block=NUM_BLOCKS)
    assert found is not None
    expected, sources = found
    token_ids = np.arange(batch.num_logits, dtype=np.int32) % VOCAB
    free = sorted(set(range(NUM_BLOCKS)) - set(batch.block_tables.reshape(-1).tolist()))
    following = advanced(batch, token_ids, free)
    assert (sources == logit_of_rows(batch)).all()
    for name in ("starts", "counts", "logit_tokens", "targets", "mask_rows", *SAMPLED_BY):
        assert (getattr(expected, name) == getattr(following, name)).all(), name
    assert match(expected, token_ids[sources], following, BLOCK_SIZE).tolist() == list(range(batch.num_rows))
    # a place that the engine had not given is a spare block of the row's own; all others are where they will be
    wrote, belongs = written_slots(expected, BLOCK_SIZE), written_slots(following, BLOCK_SIZE)
    for row in range(batch.num_rows):
        spare = (NUM_BLOCKS + row) * BLOCK_SIZE
        assert wrote[row] == (spare if following.starts[row] % BLOCK_SIZE == 0 else belongs[row])


@settings(deadline=None, max_examples=200)
@given(batches(plain=True, sampled=True), st.data())
def test_rows_are_found_in_any_order_and_beside_others(batch: Batch, data: st.DataObject) -> None:
    found = expect(batch, BLOCK_SIZE, MAX_CONTEXT, spare_block=NUM_BLOCKS)
    assert found is not None
    expected, sources = found
    token_ids = np.arange(batch.num_logits, dtype=np.int32)
    free = sorted(set(range(NUM_BLOCKS)) - set(batch.block_tables.reshape(-1).tolist()))
    following = advanced(batch, token_ids, free)
    order = np.array(data.draw(st.permutations(range(batch.num_rows)))[: data.draw(st.integers(1, batch.num_rows))])
    part, _ = part_of(following, order)
    assert match(expected, token_ids[sources], part, BLOCK_SIZE).tolist() == order.tolist()


CHANGES = {
    "another token": lambda b: replace(b, token_ids=b.token_ids + 1),
    "another seed": lambda b: replace(b, seeds=b.seeds + np.uint64(1)),
    "another temperature": lambda b: replace(b, temperatures=b.temperatures + np.float32(0.1)),
    "another position": lambda b: replace(b, positions=b.positions + 1),
    "more alternatives": lambda b: replace(b, num_top=b.num_top + 1),
    "a target": lambda b: replace(b, targets=b.targets + 3),
    "a mask": lambda b: replace(b, mask_rows=b.mask_rows + 1),
    "other blocks": lambda b: replace(b, block_tables=b.block_tables[:, ::-1].copy()),
    "a ban": lambda b: replace(b, banned_ids=np.array([1], np.int32), banned_starts=np.array([0, 1], np.int32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_differs_is_not_taken(change: str) -> None:
    batch = make_batch([BatchRow([7], 9, [3, 5, 8])], [Logit(0, position=10, seed=4, temperature=0.5)])
    found = expect(batch, BLOCK_SIZE, MAX_CONTEXT, spare_block=NUM_BLOCKS)
    assert found is not None
    following = advanced(batch, np.array([6], np.int32), [])
    assert match(found[0], np.array([6]), following, BLOCK_SIZE).tolist() == [0]
    assert match(found[0], np.array([6]), CHANGES[change](following), BLOCK_SIZE).tolist() == [-1]


def test_what_cannot_be_told_is_not_expected() -> None:
    def given(row: BatchRow, *logits: Logit) -> object:
        return expect(make_batch([row], logits), BLOCK_SIZE, MAX_CONTEXT, spare_block=NUM_BLOCKS)

    row = BatchRow([1, 2], 0, [0])
    assert given(row, Logit(1)) is not None
    assert given(row) is None, "a prompt under way"
    assert given(row, Logit(1, target=3)) is None, "a score"
    assert given(row, Logit(1, counts={3: 1})) is None, "penalties change with each token"
    assert given(row, Logit(1, mask=np.ones(2, np.uint32))) is None, "a grammar"
    assert given(BatchRow([1], MAX_CONTEXT - 1, list(range(10))), Logit(0)) is None, "a full context"


def test_every_field_of_a_logit_row_is_compared() -> None:
    """A field that is added to batches must be thought of here."""
    lists = {name for starts, names in LISTS for name in (starts, *names)}
    others = {
        "token_ids",
        "starts",
        "counts",
        "block_tables",
        "logit_tokens",
        "targets",
        "mask_rows",
        "masks",
        "masks_ready",
    }
    assert {field.name for field in fields(Batch)} == lists | set(SAMPLED_BY) | others
