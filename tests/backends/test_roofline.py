"""The roofline executor by itself: the hash chain through blocks, sampling from it, and the time that a step takes."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends.roofline import AloneRequest, RooflineExecutor, alone, chain, tiny_plan
from jilju.backends.roofline.sampling import sample
from jilju.backends.roofline.slots import Slots
from jilju.clock import VirtualClock
from jilju.plan import Batch
from jilju.plan.batch import MAX_TOP
from jilju.plan.cost import TWO_CORE_CPU, PlanCost

from .roofline import VOCAB, make_batch, make_executor, make_limits

BLOCK_SIZES = [1, 2, 3, 16, 32]
WORDS = st.integers(0, chain.MASK)


def words_of(tokens: list[int]) -> list[int]:
    """The chain as its definition says it: each word from all before it."""
    words: list[int] = []
    for position, token in enumerate(tokens):
        before = sum(pow(chain.RATIO, j, 2**64) * word for j, word in enumerate(words))
        words.append(chain.mixed((before + token * chain.TOKEN + position * chain.POSITION + chain.START) % 2**64))
    return words


# ---- the chain through blocks ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BLOCK_SIZES), st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(0, 2**32))
def test_words_are_the_same_whatever_the_chunks_the_batch_and_the_blocks(block_size, lengths, seed):
    rng = random.Random(seed)
    sequences = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    num_blocks = [-(-length // block_size) for length in lengths]
    spare = rng.randrange(4)
    ids = rng.sample(range(sum(num_blocks) + spare), sum(num_blocks))
    tables = [[ids.pop() for _ in range(n)] for n in num_blocks]
    slots = Slots(make_limits(sum(num_blocks) + spare, block_size, max_tokens=512, max_context=rng.choice([90, 131])))
    done = [0] * len(lengths)
    got: list[list[int]] = [[] for _ in lengths]
    while open_rows := [i for i, length in enumerate(lengths) if done[i] < length]:
        chosen = rng.sample(open_rows, rng.randint(1, len(open_rows)))
        most = rng.choice([1, 1, 4, 40])
        counts = [min(rng.randint(1, most), lengths[i] - done[i]) for i in chosen]
        num_ahead = rng.choice([0, 0, 1])  # blocks that a row has beyond those it needs
        batch = make_batch(
            [
                (
                    sequences[i][done[i] : done[i] + n],
                    done[i],
                    tables[i][: -(-(done[i] + n) // block_size) + num_ahead],
                )
                for i, n in zip(chosen, counts, strict=True)
            ]
        )
        words = slots.append(batch).tolist()
        for i, n in zip(chosen, counts, strict=True):
            got[i] += words[:n]
            del words[:n]
            done[i] += n
        assert not words
    assert got == [words_of(tokens) for tokens in sequences]


@st.composite
def sequences_in_blocks(draw):
    """Slots with `tokens`, of which the last is not computed yet, in the blocks of a table; one block is left over."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=70))
    num_blocks = -(-len(tokens) // block_size)
    table = draw(st.permutations(range(num_blocks + 1)))
    slots = Slots(make_limits(num_blocks + 1, block_size, max_tokens=128))
    slots.append(make_batch([(tokens[:-1], 0, table[:num_blocks])]))
    return slots, block_size, tokens, table[:num_blocks], table[num_blocks]


def next_word(slots: Slots, tokens: list[int], table: list[int]) -> int:
    return int(slots.append(make_batch([(tokens[-1:], len(tokens) - 1, table)]))[0])


@settings(max_examples=200, deadline=None)
@given(sequences_in_blocks(), st.data())
def test_a_change_of_any_slot_that_is_read_changes_the_next_word(scene, data):
    slots, block_size, tokens, table, _ = scene
    position = data.draw(st.integers(0, len(tokens) - 2))
    place = table[position // block_size], position % block_size
    slots.overwrite(*place, slots.word(*place) ^ data.draw(st.integers(1, chain.MASK)))
    assert next_word(slots, tokens, table) != words_of(tokens)[-1]


@settings(max_examples=100, deadline=None)
@given(sequences_in_blocks(), st.data())
def test_what_lies_at_the_start_or_after_it_is_not_read(scene, data):
    slots, block_size, tokens, table, left_over = scene
    for offset in range((len(tokens) - 1) % block_size, block_size):
        slots.overwrite(table[-1], offset, data.draw(WORDS))
    slots.poison([left_over])
    assert next_word(slots, tokens, table) == words_of(tokens)[-1]


@settings(max_examples=200, deadline=None)
@given(sequences_in_blocks(), st.data())
def test_a_wrong_entry_of_a_table_changes_the_next_word(scene, data):
    slots, block_size, tokens, table, left_over = scene
    num_read = -(-(len(tokens) - 1) // block_size)
    column = data.draw(st.integers(0, num_read - 1))
    wrong = list(table)
    wrong[column] = data.draw(st.sampled_from([left_over, *table[:column]]))  # poisoned, or another part of its own
    assert next_word(slots, tokens, wrong) != words_of(tokens)[-1]


@settings(max_examples=100, deadline=None)
@given(sequences_in_blocks(), st.data())
def test_entries_of_a_table_in_the_wrong_order_change_the_next_word(scene, data):
    slots, block_size, tokens, table, _ = scene
    num_full = (len(tokens) - 1) // block_size
    if num_full < 2:
        return
    a, b = data.draw(st.lists(st.integers(0, num_full - 1), min_size=2, max_size=2, unique=True))
    wrong = list(table)
    wrong[a], wrong[b] = wrong[b], wrong[a]
    assert next_word(slots, tokens, wrong) != words_of(tokens)[-1]


@pytest.mark.parametrize("tokens", [[5], [5, 6]])
def test_tokens_written_where_others_lie_are_read_by_them(tokens):
    """The sums of blocks follow a write into a full block, as when a block is given to two."""
    slots = Slots(make_limits(8, 4))
    slots.append(make_batch([(list(range(9)), 0, [0, 1, 2])]))
    slots.append(make_batch([(tokens, 1, [0])]))
    assert int(slots.append(make_batch([([9], 9, [0, 1, 2])]))[0]) != words_of(list(range(10)))[-1]


def test_a_skipped_chunk_changes_the_next_word():
    slots = Slots(make_limits(8, 4))
    tokens = list(range(12))
    slots.append(make_batch([(tokens[:4], 0, [0])]))
    words = slots.append(make_batch([(tokens[6:], 6, [0, 1, 2])]))
    assert not set(words.tolist()) & set(words_of(tokens))


def test_a_row_reads_what_lay_there_before_the_step():
    """Another row's write of the same step is no ground to stand on."""
    tokens = list(range(9))
    slots = Slots(make_limits(8, 4))
    words = slots.append(make_batch([(tokens[:8], 0, [0, 1]), (tokens[8:], 8, [0, 1, 2])]))
    assert words.tolist()[:8] == words_of(tokens)[:8]
    assert int(words[8]) != words_of(tokens)[8]


def test_poison_takes_what_lay_there():
    slots = Slots(make_limits(8, 4))
    words = slots.append(make_batch([(list(range(9)), 0, [0, 1, 2])]))
    assert slots.word(1, 0) == int(words[4])
    slots.poison([1])
    assert slots.word(1, 0) != int(words[4])
    assert int(slots.append(make_batch([([9], 9, [0, 1, 2])]))[0]) != words_of(list(range(10)))[-1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([([1], 4, [0, -1])], "lacks a block that it writes"),
        ([([1], 4, [-1, 0])], "lacks a block that it reads"),
        ([([1, 2], 3, [0, -1])], "lacks a block that it writes"),
        ([([1], 4, [0])], "1 blocks do not cover 5 tokens"),
        ([([1], 0, [8])], "there are 8 blocks"),
        ([([1], 0, [3]), ([2], 0, [3])], "two tokens of a step write one slot"),
        ([([1] * 8, 0, [3, 3])], "two tokens of a step write one slot"),
        ([([1], 24, [0, 1, 2, 3, 4, 5, 6])], "ends at 25; the context is 24"),
    ],
)
def test_a_batch_that_no_engine_should_make_is_found(rows, message):
    slots = Slots(make_limits(8, 4, max_context=24))
    with pytest.raises(AssertionError, match=message):
        slots.append(make_batch(rows))


@pytest.mark.parametrize("counts", [[1, 2], [2, 0], [1, 0]])
def test_rows_that_do_not_count_the_tokens_are_found(counts):
    batch = make_batch([([1], 0, [0]), ([2], 0, [1])])
    with pytest.raises(AssertionError, match="the batch has 2"):
        Slots(make_limits()).append(dataclasses.replace(batch, counts=np.array(counts, np.int32)))


def test_an_executor_holds_an_engine_to_its_limits():
    executor = make_executor(make_limits(8, 4, max_rows=2, max_tokens=3))
    with pytest.raises(AssertionError, match="3 rows; allowed: 1 to 2"):
        executor.launch(make_batch([([1], 0, [i]) for i in range(3)]))
    with pytest.raises(AssertionError, match="4 tokens in 1 rows; allowed: one a row to 3"):
        executor.launch(make_batch([([1] * 4, 0, [0])]))
    with pytest.raises(AssertionError, match="wait before launch"):
        executor.wait()
    executor.launch(make_batch([([1] * 3, 0, [0])]))
    with pytest.raises(AssertionError, match="launch before wait"):
        executor.launch(make_batch([([1] * 3, 0, [0])]))
    with pytest.raises(AssertionError, match="takes no weights"):
        executor.load(tiny_plan(VOCAB), {"embed": None}, make_limits())


# ---- sampling -------------------------------------------------------------------------------------------------------

SMALL_IDS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(-2, 2, width=32)


@given(WORDS, WORDS, SMALL_IDS, st.integers(0, 2**40), st.integers(0, 1000), st.tuples(FLOATS, FLOATS, FLOATS))
def test_the_formulas_are_the_same_for_columns(word, seed, token_id, position, count, penalties):
    ids, words = np.array([token_id], np.int32), np.array([word], np.uint64)
    columns = [np.array([p], np.float32) for p in penalties]
    assert chain.mixed_words(words.copy()).tolist() == [chain.mixed(word)]
    slot = chain.mixed_words(chain.token_keys(ids) + chain.position_keys(6)[5:] + words)
    assert slot.tolist() == [chain.slot_value(word, 5, token_id)]
    for temperature, noise in ((1.0, chain.noise_of(seed, position)), (0.0, 0)):
        got = chain.noise_words(
            np.array([seed], np.uint64), np.array([position]), np.array([temperature], np.float32)
        ).tolist()
        assert got == [noise]
        x = words + np.array([noise], np.uint64)
        assert chain.draw_words(x).tolist() == [chain.draw_of(word, noise, 0)]
    assert chain.logprob_words(words, ids).tolist() == [chain.logprob_of(word, token_id)]
    keys = chain.penalty_keys(*columns)
    assert keys.tolist() == [chain.penalty_key(penalties)]
    terms = chain.penalty_terms(keys, ids, np.array([count], np.int32))
    assert terms.tolist() == [chain.penalty_term(chain.penalty_key(penalties), token_id, count)]
    assert chain.bias_terms(ids, columns[0]).tolist() == [chain.bias_sum({token_id: penalties[0]})]


NUM = 16
BIG_VOCAB = 1_000_003  # so that two different draws hardly give one id


def logit_rows(**columns: object) -> Batch:
    return make_batch([([i], 0, [i]) for i in range(NUM)], **{"positions": range(NUM)} | columns)


def sampled(vocab_size: int = BIG_VOCAB, **columns: object) -> list[int]:
    words = np.random.default_rng(1).integers(0, 2**64, NUM, np.uint64)
    result = sample(words, logit_rows(**columns), vocab_size)
    assert result.finite.all()
    return result.token_ids.tolist()


PENALISED = {"penalty_starts": range(NUM + 1), "penalty_ids": [3] * NUM, "penalty_counts": [2] * NUM}
BIASED = {"bias_starts": range(NUM + 1), "bias_ids": [3] * NUM, "biases": [0.5] * NUM}


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({}, {"seeds": [8] * NUM}),
        ({}, {"positions": range(1, NUM + 1)}),
        ({}, {"temperatures": [0.0] * NUM}),
        ({}, PENALISED),
        (PENALISED, {"penalty_ids": [4] * NUM}),
        (PENALISED, {"penalty_counts": [3] * NUM}),
        (PENALISED, {"repetition_penalties": [1.1] * NUM}),
        (PENALISED, {"presence_penalties": [0.1] * NUM}),
        (PENALISED, {"frequency_penalties": [0.1] * NUM}),
        ({}, BIASED),
        (BIASED, {"bias_ids": [4] * NUM}),
        (BIASED, {"biases": [0.25] * NUM}),
    ],
)
def test_whatever_may_change_a_token_changes_it(before, changes):
    pairs = zip(sampled(**before), sampled(**before | changes), strict=True)
    assert all(a != b for a, b in pairs)


def test_seed_and_position_do_not_enter_a_greedy_row():
    greedy = {"temperatures": [0.0] * NUM}
    assert sampled(**greedy) == sampled(**greedy, seeds=range(NUM))
    assert sampled(**greedy) == sampled(**greedy, positions=range(1, NUM + 1))


def test_the_lists_of_a_row_are_its_own_and_their_order_does_not_matter():
    """Row 3 has two penalised ids, the others have none."""
    starts = [0] * 4 + [2] * (NUM - 3)
    plain = sampled()
    got = sampled(penalty_starts=starts, penalty_ids=[3, 9], penalty_counts=[2, 1])
    assert [i for i in range(NUM) if got[i] != plain[i]] == [3]
    assert got == sampled(penalty_starts=starts, penalty_ids=[9, 3], penalty_counts=[1, 2])
    got = sampled(bias_starts=starts, bias_ids=[3, 9], biases=[1.0, -1.0])
    assert [i for i in range(NUM) if got[i] != plain[i]] == [3]


def mask_of(ids: list[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def test_masks_and_bans_leave_what_they_leave():
    vocab_size, banned = 40, [0, 7, 8, 39]
    bans = {"banned_starts": [4 * i for i in range(NUM + 1)], "banned_ids": banned * NUM}
    free = sampled(vocab_size)
    seen, seen_masked = set(), set()
    for seed in range(40):
        seen |= set(sampled(vocab_size, seeds=[seed] * NUM, **bans))
        masked = sampled(
            vocab_size, seeds=[seed] * NUM, **bans,
            mask_rows=[0] * 8 + [-1, 1] * 4, masks=[mask_of([3, 7, 12], vocab_size), mask_of([5], vocab_size)],
        )  # fmt: skip
        assert masked[9::2] == [5] * 4
        seen_masked |= set(masked[:8])
    assert seen == set(range(vocab_size)) - set(banned)
    assert seen_masked == {3, 12}
    assert sampled(vocab_size, banned_starts=[0] * NUM + [1], banned_ids=[free[-1] ^ 1])[:-1] == free[:-1]


def test_a_row_without_an_id_left_is_not_finite():
    words = np.arange(NUM, dtype=np.uint64)
    starts = [0] * 4 + [2] * (NUM - 3)
    result = sample(words, logit_rows(banned_starts=starts, banned_ids=[0, 1]), 2)
    assert np.flatnonzero(~result.finite).tolist() == [3]
    targets = [-1] * 3 + [1] + [-1] * (NUM - 4)  # a token that is there already is scored as it is
    result = sample(words, logit_rows(banned_starts=starts, banned_ids=[0, 1], targets=targets), 2)
    assert result.finite.all() and result.token_ids[3] == 1


def test_targets_are_scored_and_alternatives_are_in_order():
    words = np.random.default_rng(2).integers(0, 2**64, NUM, np.uint64)
    targets = [5, -1] * (NUM // 2)
    result = sample(words, logit_rows(targets=targets, num_top=[0, 3] * (NUM // 2)), 12)
    assert result.token_ids[::2].tolist() == [5] * (NUM // 2)
    assert result.logprobs.dtype == np.float32 and (result.logprobs < 0).all()
    for i, word in enumerate(words.tolist()):
        assert result.logprobs[i] == chain.logprob_of(word, int(result.token_ids[i]))
        best = sorted(range(12), key=lambda t: (-chain.logprob_of(word, t), t))[: 3 * (i % 2)]
        assert result.top_ids[i].tolist() == best + [-1] * (MAX_TOP - len(best))
        assert result.top_logprobs[i, : len(best)].tolist() == [chain.logprob_of(word, t) for t in best]


def test_logit_rows_that_do_not_ascend_are_found():
    with pytest.raises(AssertionError, match="logit rows ascend"):
        sample(np.arange(2, dtype=np.uint64), make_batch([([1, 2], 0, [0])], logit_tokens=[1, 0]), 4)


def test_a_step_without_logit_rows_has_an_empty_result():
    executor = make_executor(make_limits())
    executor.launch(make_batch([([1, 2], 0, [0])], logit_tokens=[]))
    result = executor.wait()
    assert len(result.token_ids) == len(result.finite) == 0 and result.top_ids.shape == (0, MAX_TOP)


@pytest.mark.parametrize("vocab_size", [2, 7, 64])
def test_every_token_is_as_likely_as_any_other(vocab_size):
    """Over seeds, and over the length of one answer; within five standard deviations."""
    num = 2000
    by_seed = Counter(
        alone(AloneRequest(prompt_ids=[1], vocab_size=vocab_size, seed=seed, max_tokens=1)).tokens[0]
        for seed in range(num)
    )
    by_place = Counter(alone(AloneRequest(prompt_ids=[1], vocab_size=vocab_size, seed=3, max_tokens=num)).tokens)
    expected, deviation = num / vocab_size, (num / vocab_size * (1 - 1 / vocab_size)) ** 0.5
    for counts in (by_seed, by_place):
        assert all(abs(counts[token] - expected) < 5 * deviation for token in range(vocab_size)), counts


# ---- time -----------------------------------------------------------------------------------------------------------


def test_a_step_takes_the_modelled_time_times_the_noise():
    clock, plan, limits = VirtualClock(1), tiny_plan(VOCAB), make_limits()
    executor = RooflineExecutor(clock, plan, TWO_CORE_CPU, limits, noise=lambda number: (1.0, 1.5)[number])
    cost = PlanCost(plan, 2)
    batches = [make_batch([([1] * 5, 0, [0, 1])]), make_batch([([1], 5, [0, 1]), ([2], 0, [2])])]
    expected = [cost.step_ns(batches[0].shape, TWO_CORE_CPU), round(1.5 * cost.step_ns(batches[1].shape, TWO_CORE_CPU))]
    for batch, step_ns in zip(batches, expected, strict=True):
        begin_ns = clock.now_ns()
        executor.launch(batch)
        assert clock.now_ns() == begin_ns
        executor.wait()
        assert clock.now_ns() == begin_ns + step_ns


def test_int8_keys_and_values_cost_less_to_read():
    plan = tiny_plan(VOCAB)
    limits = make_limits()
    executor = RooflineExecutor(VirtualClock(), plan, TWO_CORE_CPU, dataclasses.replace(limits, kv_dtype="int8"))
    assert executor.kv_bytes_per_token(plan) == 2 * 2 * 2 * 4  # K and V, two layers, a head of 4, 2 bytes
    assert executor.kv_bytes_per_token(plan, "int8") == 2 * 2 * (4 + 4)  # and a float32 scale
