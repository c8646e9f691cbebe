"""The same bits for a row whatever its neighbours, its chunks, its cache and the number of threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType
from jilju.plan import Embed, Executor, Plan, StepResult, WeightTensor
from tests.model.batches import BatchRow, Logit, chunks_of, make_batch, run
from tests.native.plans import Shape, decoder, loaded

PROMPT = (
    np.random.default_rng(1).integers(0, 20, 530).tolist()
)  # beyond two splits of 256 keys and two tiles of 256 tokens
OTHERS = np.random.default_rng(2).integers(0, 20, 400).tolist()
PLAIN = Shape(type=GgmlType.Q4_1, has_factors=True)
WINDOWED = Shape(type=GgmlType.Q4_1, bias=False, post_norms=True, activation="gelu_tanh", window=130)  # as Gemma's


def executor_of(shape: Shape, num_threads: int = 2, **changes: int) -> Executor:
    return loaded(*decoder(shape), num_threads=num_threads, **changes)


@pytest.fixture(scope="module", params=[PLAIN, WINDOWED], ids=["plain", "windowed"])
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


@pytest.fixture(scope="module")
def executor(shape: Shape) -> Executor:
    return executor_of(shape)


def sampled(token: int, position: int) -> Logit:
    return Logit(
        token, position=position, seed=position + 7, temperature=0.8, top_k=15, top_p=0.95, min_p=0.01, num_top=20
    )


def bits(result: StepResult, rows: slice = slice(None)) -> bytes:
    fields = (result.token_ids, result.logprobs, result.top_ids, result.top_logprobs, result.finite)
    return b"".join(field[rows].tobytes() for field in fields)


def alone(executor: Executor, num_tokens: int, blocks: range) -> bytes:
    """The prompt in one piece: the draw after its last token."""
    batch = make_batch([BatchRow(PROMPT[:num_tokens], 0, blocks)], [sampled(num_tokens - 1, num_tokens)])
    return bits(run(executor, batch))


BLOCKS, OTHER_BLOCKS = range(40, 80), range(40)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 530),
    sizes=st.lists(st.integers(1, 300), max_size=8),
    neighbours=st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=6),
    row_index=st.integers(0, 6),
)
def test_a_chunked_prompt_among_neighbours_draws_what_it_draws_alone(
    executor: Executor, num_tokens: int, sizes: list[int], neighbours: list[tuple[int, bool]], row_index: int
) -> None:
    want = alone(executor, num_tokens, BLOCKS)
    for start, count in chunks_of(num_tokens, sizes):
        rows = [BatchRow(OTHERS[:n], 0, OTHER_BLOCKS[3 * i : 3 * i + 3]) for i, (n, _) in enumerate(neighbours)]
        if sum(len(row.token_ids) for row in rows) + count > 600:
            rows = rows[:1]
        if sum(len(row.token_ids) for row in rows) + count > 600:
            rows = []
        at = min(row_index, len(rows))
        rows.insert(at, BatchRow(PROMPT[start : start + count], start, BLOCKS))
        ends = np.cumsum([len(row.token_ids) for row in rows]) - 1
        logits = [sampled(int(end), start + count) for end in ends]
        result = run(executor, make_batch(rows, logits))
    assert bits(result, slice(at, at + 1)) == want


@pytest.mark.parametrize("num_threads", [1, 3, 4])
def test_threads_change_nothing(executor: Executor, shape: Shape, num_threads: int) -> None:
    other = executor_of(shape, num_threads)
    rows = [BatchRow(PROMPT[:n], 0, BLOCKS[first : first + 20]) for n, first in ((300, 0), (1, 20), (33, 24))]
    batch = make_batch(rows, [sampled(299, 300), sampled(300, 1), sampled(333, 33)])
    assert bits(run(other, batch)) == bits(run(executor, batch))
    for position in range(300, 304):  # decode: keys split over threads, or not
        batch = make_batch([BatchRow([position % 20], position, BLOCKS[:20])], [sampled(0, position + 1)])
        assert bits(run(other, batch)) == bits(run(executor, batch))
    other.free()


def test_decode_gives_the_bits_of_prefill(executor: Executor) -> None:
    """One token at a time against all at once: a cached prefix is nothing but a chunk."""
    for position in range(290):
        decoded = run(
            executor,
            make_batch([BatchRow(PROMPT[position : position + 1], position, BLOCKS)], [sampled(0, position + 1)]),
        )
        if position in (0, 15, 16, 31, 32, 100, 255, 256, 289):
            assert bits(decoded) == alone(executor, position + 1, OTHER_BLOCKS), f"position {position}"


@pytest.mark.parametrize("block_size", [32, 48, 256])
def test_the_block_size_changes_nothing(executor: Executor, shape: Shape, block_size: int) -> None:
    other = executor_of(shape, block_size=block_size)
    table = range(5, 5 + -(-530 // block_size))
    batch = make_batch([BatchRow(PROMPT, 0, table)], [sampled(529, 530)])
    assert bits(run(other, batch)) == alone(executor, 530, BLOCKS)


def test_scored_logits_do_not_depend_on_their_number(executor: Executor) -> None:
    """More logit rows than the 32 that run together."""
    scores = [Logit(t, target=PROMPT[t + 1], num_top=3) for t in range(299)]
    together = run(executor, make_batch([BatchRow(PROMPT[:300], 0, BLOCKS)], scores))
    for t in (0, 31, 32, 255, 256, 298):
        single = run(executor, make_batch([BatchRow(PROMPT[:300], 0, BLOCKS)], [scores[t]]))
        assert bits(single) == bits(together, slice(t, t + 1)), f"token {t}"


def test_a_row_of_nans_is_flagged_and_hurts_nobody() -> None:
    """Token 0 embeds to NaN. Its neighbours, and a later owner of its blocks, see the bits they see without it."""
    plan, weights = decoder(Shape())
    broken = dict(weights)
    table = plan.ops[0].table
    poisoned = weights[table.name].data.copy()
    poisoned[: 4 * table.num_inputs] = np.full(table.num_inputs, np.nan, np.float32).view(np.uint8)
    broken[table.name] = type(weights[table.name])(table.name, table.type, weights[table.name].shape, poisoned)
    clean, sick = loaded(plan, weights), loaded(plan, broken)
    healthy = [t % 19 + 1 for t in range(50)]

    rows = [BatchRow(healthy, 0, range(4)), BatchRow([0] * 40, 0, range(4, 8)), BatchRow(healthy[:20], 0, range(8, 12))]
    result = run(sick, make_batch(rows, [sampled(49, 50), sampled(89, 40), sampled(109, 20)]))
    assert result.finite.tolist() == [True, False, True]
    rows[1] = BatchRow(healthy[:40], 0, range(4, 8))
    want = run(clean, make_batch(rows, [sampled(49, 50), sampled(89, 40), sampled(109, 20)]))
    assert bits(result, slice(0, 1)) == bits(want, slice(0, 1))
    assert bits(result, slice(2, 3)) == bits(want, slice(2, 3))

    heir = make_batch([BatchRow(healthy[:10], 0, range(4, 8))], [sampled(9, 10)])  # 10 keys where 40 NaNs were
    assert bits(run(sick, heir)) == bits(run(clean, heir))


def test_nans_in_a_rows_own_future_leave_its_past_alone() -> None:
    """Token 0 embeds to NaN. What comes before it, in the same chunk, is as finite as in a chunk of its own."""
    for num_heads in (
        2,
        6,
        14,
    ):  # groups of 1, 3 and 7 query heads: rows of several queries share a register tile or not
        plan, weights = decoder(Shape(num_heads=num_heads))
        table = plan.ops[0].table
        poisoned = weights[table.name].data.copy()
        poisoned[: 4 * table.num_inputs] = np.full(table.num_inputs, np.nan, np.float32).view(np.uint8)
        tensor = type(weights[table.name])(table.name, table.type, weights[table.name].shape, poisoned)
        sick = loaded(plan, {**weights, table.name: tensor})
        tokens = [t % 19 + 1 for t in range(70)] + [0]
        scores = [Logit(t, target=tokens[t + 1], num_top=3) for t in range(69)]
        want = run(sick, make_batch([BatchRow(tokens[:70], 0, range(5))], scores))
        got = run(sick, make_batch([BatchRow(tokens, 0, range(5))], scores))
        assert want.finite.all()
        assert bits(got) == bits(want), f"{num_heads} heads: finite {got.finite.tolist()}"


SICK = 0  # the token that embeds to NaN


def with_a_sick_token(shape: Shape) -> tuple[Plan, dict[str, WeightTensor]]:
    plan, weights = decoder(shape)
    embed = plan.ops[0]
    assert isinstance(embed, Embed)
    sound = weights[embed.table.name]
    poisoned = sound.data.copy()
    poisoned[: 4 * shape.hidden] = np.full(shape.hidden, np.nan, np.float32).view(np.uint8)
    return plan, {**weights, sound.name: WeightTensor(sound.name, sound.type, sound.shape, poisoned)}


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(head_dim=32, num_heads=16, num_kv_heads=1),
        Shape(head_dim=64, num_heads=9, num_kv_heads=3),
        Shape(head_dim=64, num_heads=14, num_kv_heads=2, style="interleaved"),
        Shape(head_dim=80, num_heads=4, num_kv_heads=4),
        Shape(head_dim=128, num_heads=8, num_kv_heads=2),
        Shape(head_dim=256, num_heads=4, num_kv_heads=1, window=40),
        Shape(head_dim=26, num_heads=5, num_kv_heads=1, style="interleaved"),
        Shape(num_heads=6, num_kv_heads=2, window=1),
        Shape(num_heads=2, num_kv_heads=2, window=33),
        Shape(num_heads=20, num_kv_heads=2, window=130),
        Shape(num_heads=4, num_kv_heads=2, window=300),
    ],
    ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-{s.head_dim}-{s.window}-{s.style}",
)
def test_every_shape_of_heads_gives_the_same_bits(shape: Shape, kv_dtype: str) -> None:
    """In one piece, in chunks and a token at a time, on one thread and several, in blocks that were full of NaN."""
    plan, weights = with_a_sick_token(shape)
    prompt = [t % 19 + 1 for t in np.random.default_rng(3).integers(0, 400, 560).tolist()]
    wanted = (1, 31, 32, 33, 255, 256, 257, 290, 300, 513, 560)
    want: dict[int, bytes] = {}
    for num_threads in (1, 3):
        executor = loaded(plan, weights, num_threads=num_threads, kv_dtype=kv_dtype)
        for sizes in ((560,), (1, 30, 1, 1, 1, 221, 1, 1, 1, 33, 10, 213, 47), (255, 1, 1, 1, 300, 1, 1)):
            sick = run(executor, make_batch([BatchRow([SICK] * 600, 0, BLOCKS)], [sampled(599, 600)]))
            assert not sick.finite[0]
            for start, count in chunks_of(560, sizes):
                ends = [n for n in wanted if start < n <= start + count]
                batch = make_batch(
                    [BatchRow(prompt[start : start + count], start, BLOCKS)], [sampled(n - start - 1, n) for n in ends]
                )
                result = run(executor, batch)
                assert result.finite.all()
                for i, n in enumerate(ends):
                    assert bits(result, slice(i, i + 1)) == want.setdefault(n, bits(result, slice(i, i + 1))), (
                        n,
                        sizes,
                        num_threads,
                    )
        executor.free()
    assert set(want) == set(wanted)


K_WIDTHS = {"hidden": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "ffn": 256}
BY_FORMAT = [Shape(type=t, **(K_WIDTHS if BLOCK_LAYOUTS[t].block_elements == 256 else {})) for t in GgmlType]
MIXED = Shape(mixed=(GgmlType.Q5_0, GgmlType.F16, GgmlType.Q8_0, GgmlType.Q6_K, GgmlType.Q4_K), bias=False, **K_WIDTHS)


@pytest.mark.parametrize("shape", [*BY_FORMAT, MIXED], ids=[*(shape.type.name for shape in BY_FORMAT), "mixed"])
def test_every_number_format_gives_the_same_bits(shape: Shape) -> None:
    """In one piece and in chunks that begin anywhere in the kernels' groups of eight rows, on one thread and several, behind
    neighbours that move a row to another place of its group."""
    plan, weights = decoder(shape)
    wanted = (1, 2, 8, 9, 17, 40, 59, 70)
    want: dict[int, bytes] = {}
    for num_threads in (1, 3):
        executor = loaded(plan, weights, num_threads=num_threads)
        for sizes, num_before in (((70,), 0), ((1, 1, 6, 1, 8, 23, 19), 0), ((70,), 5), ((3, 6, 31, 30), 11)):
            for start, count in chunks_of(70, sizes):
                before = [BatchRow(OTHERS[:num_before], 0, OTHER_BLOCKS)] if num_before else []
                row = BatchRow(PROMPT[start : start + count], start, BLOCKS)
                ends = [n for n in wanted if start < n <= start + count]
                logits = [sampled(num_before + n - start - 1, n) for n in ends]
                result = run(executor, make_batch([*before, row], logits))
                assert result.finite.all()
                for i, n in enumerate(ends):
                    got = bits(result, slice(i, i + 1))
                    assert got == want.setdefault(n, got), (n, sizes, num_before, num_threads)
        executor.free()
    assert set(want) == set(wanted)


def test_a_penalty_after_other_ops_touches_every_id_once() -> None:
    """Penalising all ids alike keeps their order, whatever attention left in the scratch that sampling uses next."""
    executor = loaded(*decoder(Shape(head_dim=64, hidden=128)), num_threads=1)
    for length in range(40, 60):
        prompt, last = BatchRow(PROMPT[:length], 0, BLOCKS), length - 1
        plain = run(executor, make_batch([prompt], [Logit(last, num_top=20)]))
        penalised = run(
            executor, make_batch([prompt], [Logit(last, repetition_penalty=1e-3, counts=dict.fromkeys(range(20), 0))])
        )
        assert penalised.token_ids[0] == plain.top_ids[0, 0], f"{length} tokens"
