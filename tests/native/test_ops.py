"""Each op and whole small models, native against reference, within the bounds that rounding allows."""

import numpy as np
import pytest

from jilju.errors import ConfigError
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType
from jilju.formats.quants import dequantize
from jilju.plan import Activation, KvSpec, PlanBuilder
from tests.model.batches import BatchRow, Logit, make_batch, run
from tests.native.packed import float_linear, linear, unpacked
from tests.native.plans import EXECUTORS, FLOATS, Shape, Weights, decoder, loaded

EPSILON = 2.0**-24  # of one float32 rounding
HALF_EPSILON = 2.0**-11  # of one float16 rounding: the cache's


def logprobs_of(executor, rows, logits, vocab: int) -> np.ndarray:
    """All logprobs of each logit row, by id: float32 [num_logits, vocab <= 20]"""
    result = run(executor, make_batch(rows, [logit._replace(num_top=vocab) for logit in logits]))
    assert result.finite.all()
    out = np.empty((len(logits), vocab), np.float32)
    np.put_along_axis(out, result.top_ids[:, :vocab], result.top_logprobs[:, :vocab], axis=1)
    return out


def assert_within(got: np.ndarray, want: np.ndarray, bound: np.ndarray) -> None:
    worst = np.unravel_index(np.argmax(abs(got - want) - bound), got.shape)
    assert (abs(got - want) <= bound).all(), f"at {worst}: {got[worst]}, reference {want[worst]}, bound {bound[worst]}"


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 7, 31, 32, 33, 150])
@pytest.mark.parametrize("type_", list(GgmlType), ids=lambda t: t.name)
def test_linear_of_two_formats_and_biases(type_: GgmlType, num_tokens: int) -> None:
    """logits = table[token] @ head.T + bias; K is odd for floats, two blocks for K formats; parts end in half a strip. The logits
    are known in every bit (packed.py), the bound is what a logprob's own sum may lose."""
    num_inputs = 77 if type_ in FLOATS else max(96, 2 * BLOCK_LAYOUTS[type_].block_elements)
    vocab = 19
    w = Weights(seed=num_tokens)
    table = w.matrix(vocab, num_inputs)
    parts = (w.matrix(12, num_inputs, type_), w.matrix(7, num_inputs, GgmlType.F32))
    biases = (w.vector(12), w.vector(7))
    b = PlanBuilder(KvSpec(0, 1, 8), vocab)
    b.sample(b.linear(b.take_rows(b.embed(table)), *parts, biases=biases))
    plan = b.build()

    tokens = [(5 * t + 3) % vocab for t in range(num_tokens)]
    rows, logits = [BatchRow(tokens, 0, range(10))], [Logit(t) for t in range(num_tokens)]
    executor = loaded(plan, w.tensors)
    fused = executor.kernel_set != "native-generic"
    got = logprobs_of(executor, rows, logits, vocab)
    x = dequantize(w.tensors[table.name].data, GgmlType.F32, num_inputs).reshape(vocab, -1)[tokens]
    products = []
    for part in parts:
        data = w.tensors[part.name].data
        if part.type in FLOATS:
            products.append(float_linear(data, part.type, x, fused=fused))
        else:
            products.append(linear(unpacked(part.type, data, part.num_outputs, num_inputs), x, fused=fused))
    bias = np.concatenate([dequantize(w.tensors[p.name].data, p.type, p.num_inputs).reshape(-1) for p in biases])
    exact = (np.concatenate(products, axis=1) + bias).astype(np.float64)
    largest = exact.max(axis=1, keepdims=True)
    want = exact - largest - np.log(np.exp(exact - largest).sum(axis=1, keepdims=True))
    assert_within(got, want, (vocab + 8) * EPSILON * (1 + abs(want)) + 2 * EPSILON * abs(largest))


@pytest.mark.parametrize("has_factors", [False, True])
@pytest.mark.parametrize("style", ["halves", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads"),
    [(16, 6, 2), (64, 3, 1), (20, 2, 2), (80, 8, 1), (128, 4, 2), (256, 2, 1), (32, 16, 1)],
)
def test_a_decoder_stays_near_the_reference(
    style: str, head_dim: int, num_heads: int, num_kv_heads: int, has_factors: bool
) -> None:
    """Whole models with a prompt beyond a split of 256 keys. Keys and values are rounded to float16, once a layer: each
    moves a logit by at most a few roundings of its size, which is what the tolerance counts."""
    shape = Shape(
        head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, style=style, has_factors=has_factors
    )
    plan, weights = decoder(shape, seed=head_dim)
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, shape.vocab, 300).tolist()
    rows, logits = [BatchRow(tokens, 0, range(5, 24))], [Logit(t) for t in (0, 1, 17, 31, 32, 255, 256, 299)]
    got, want = (
        logprobs_of(loaded(plan, weights, name), rows, logits, shape.vocab) for name in ("native", "reference")
    )
    spread = want.max(axis=1, keepdims=True) - want.min(axis=1, keepdims=True)
    assert_within(got, want, 4 * shape.num_layers * HALF_EPSILON * np.broadcast_to(1 + spread, got.shape))


@pytest.mark.parametrize("shape", [Shape(), Shape(head_dim=64, num_heads=7, num_kv_heads=1), Shape(window=40)], ids=str)
def test_int8_keys_and_values_stay_near_the_reference(shape: Shape) -> None:
    """Both round alike, but for numbers that lie between two steps: those go either way, by 1/254 of a head's largest."""
    plan, weights = decoder(shape, seed=2)
    tokens = np.random.default_rng(7).integers(0, shape.vocab, 300).tolist()
    rows, logits = [BatchRow(tokens, 0, range(5, 24))], [Logit(t) for t in (0, 1, 17, 31, 32, 255, 256, 299)]
    got, want, plain = (
        logprobs_of(loaded(plan, weights, name, kv_dtype=kv_dtype), rows, logits, shape.vocab)
        for name, kv_dtype in (("native", "int8"), ("reference", "int8"), ("native", "f16"))
    )
    spread = want.max(axis=1, keepdims=True) - want.min(axis=1, keepdims=True)
    assert_within(got, want, shape.num_layers / 254 * np.broadcast_to(1 + spread, got.shape))
    assert abs(got - plain).max() > 3 * abs(got - want).max(), "the rounding to int8 does not show"


def test_int8_rounds_as_the_reference_does() -> None:
    """A first token attends to itself alone: its logits are its V, rounded. Steps, halves, zeros, the smallest, the largest."""
    heads = [
        [127, -126.5, 0.5, 1.5, -2.5, 3, 0, 63.49, -63.51, 1],
        [0.0] * 10,
        [1e-44, -1e-45] * 5,
        [3e-37, -1e-38, 2e-37, 1e-40, 0] * 2,
        [1e30, -9e29, 1e20, 5e28, -3.4e27, 1, 2, 3, 4, 5],
        [1.0, float("nan"), 1, 1, 1, 1, 1, 1, 1, 1],
        [1.0, 2, 3, float("inf"), 1, 1, 1, 1, 1, 1],
    ]
    w = Weights(0)
    b = PlanBuilder(KvSpec(1, 1, 10), 10)
    ones = np.ones((10, 20))
    table = np.concatenate([ones, np.array(heads + [[1.0] * 10] * 3)], axis=1)
    q, k, v = b.split(b.embed(w.values(table)), 10, 10, 10)
    b.sample(b.take_rows(b.attention(q, k, v, 0, 1, 1.0)))
    plan = b.build()
    rows, logits = [BatchRow([t], 0, [t]) for t in range(7)], [Logit(t, num_top=10) for t in range(7)]
    got, want = (
        run(loaded(plan, w.tensors, name, kv_dtype="int8"), make_batch(rows, logits))
        for name in ("native", "reference")
    )
    assert got.finite.tolist() == want.finite.tolist() == [True] * 5 + [False] * 2
    np.testing.assert_array_equal(got.top_ids[:5], want.top_ids[:5])
    np.testing.assert_allclose(got.top_logprobs[:5], want.top_logprobs[:5], rtol=4 * EPSILON, atol=16 * EPSILON)


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_long_contexts_are_as_exact_as_short_ones(kv_dtype: str) -> None:
    """8,192 tokens: the last 64 positions lie as near to the reference as those before position 512."""
    shape = Shape(num_layers=1, hidden=32, num_heads=3, num_kv_heads=1, ffn=32, theta=1e6)
    plan, weights = decoder(shape, seed=4)
    tokens = np.random.default_rng(5).integers(0, shape.vocab, 8192).tolist()
    tables: dict[str, list[np.ndarray]] = {}
    for name in EXECUTORS:
        executor = loaded(plan, weights, name, num_blocks=512, max_context=8192, kv_dtype=kv_dtype)
        for start in range(0, 8192, 512):
            rows = [BatchRow(tokens[start : start + 512], start, range(512))]
            if start in (0, 7680):
                logits = [Logit(t) for t in range(448, 512)]
                tables.setdefault(name, []).append(logprobs_of(executor, rows, logits, shape.vocab))
            else:
                run(executor, make_batch(rows))
        executor.free()
    step = HALF_EPSILON if kv_dtype == "f16" else 1 / 254
    for got, want in zip(tables["native"], tables["reference"], strict=True):
        spread = want.max(axis=1, keepdims=True) - want.min(axis=1, keepdims=True)
        assert_within(got, want, 4 * step * np.broadcast_to(1 + spread, got.shape))


@pytest.mark.parametrize("type_", [t for t in GgmlType if BLOCK_LAYOUTS[t].block_elements <= 32], ids=lambda t: t.name)
def test_a_decoder_of_each_format_stays_near_the_reference(type_: GgmlType) -> None:
    """Rows meet quantized weights as signed bytes: each linear moves a logit by some 1/254 of its size, with random signs. No
    less can be asked of a whole model: where a product falls next to a step between bytes, the last bit decides. Single
    linears are known exactly (test_linear.py)."""
    shape = Shape(type=type_, bias=False)
    plan, weights = decoder(shape, seed=3)
    rows = [BatchRow([1, 2, 3, 4, 5, 6, 7], 0, [3]), BatchRow([9], 0, [4]), BatchRow(list(range(20)), 0, [5, 6])]
    logits = [Logit(t) for t in (0, 6, 7, 8, 27)]
    got, want = (
        logprobs_of(loaded(plan, weights, name), rows, logits, shape.vocab) for name in ("native", "reference")
    )
    spread = want.max(axis=1, keepdims=True) - want.min(axis=1, keepdims=True)
    epsilon = HALF_EPSILON if type_ in FLOATS else 1 / 127
    assert_within(got, want, 4 * shape.num_layers * epsilon * np.broadcast_to(1 + spread, got.shape))


def test_norms_of_single_heads_and_half_precision_vectors() -> None:
    """rms_norm whose weight is narrower than the row norms each head by itself."""
    w = Weights(seed=5)
    table, weight = w.matrix(20, 20), w.vector(10, GgmlType.F16)
    b = PlanBuilder(KvSpec(0, 1, 8), 20)
    b.sample(b.rms_norm(b.take_rows(b.embed(table)), weight, 1e-3))
    plan = b.build()
    rows, logits = [BatchRow(range(20), 0, [0, 1])], [Logit(t) for t in range(20)]
    got, want = (logprobs_of(loaded(plan, w.tensors, name), rows, logits, 20) for name in ("native", "reference"))
    assert_within(got, want, 20 * EPSILON * (1 + abs(want)) * 4)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_near_zero_and_far_out(activation: Activation) -> None:
    """The logits of token t are the gates after the activation, turned by t: two vectors and a tail, in every order."""
    gates = [-1e20, -1e4, -90, -88, -87, -44, -20, -9, -5, -2, -1, -1e-3, 0, 1e-30, 1e-3, 1, 2, 3, 4]
    n = len(gates)
    w = Weights(0)
    table = np.array([np.roll(gates, t).tolist() + [1.0] * n for t in range(n)])
    b = PlanBuilder(KvSpec(0, 1, 8), n)
    b.sample(b.glu(b.take_rows(b.embed(w.values(table))), activation))
    plan = b.build()
    rows, logits = [BatchRow(range(n), 0, [0, 1])], [Logit(t) for t in range(n)]
    got, want = (logprobs_of(loaded(plan, w.tensors, name), rows, logits, n) for name in ("native", "reference"))
    assert_within(got, want, 20 * EPSILON * (4 + abs(want)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_that_are_not_finite_are_said_so(activation: Activation, bad: float) -> None:
    w = Weights(0)
    table = np.ones((11, 22), np.float32)
    table[3, 9] = bad
    b = PlanBuilder(KvSpec(0, 1, 8), 11)
    b.sample(b.glu(b.take_rows(b.embed(w.values(table))), activation))
    executor = loaded(b.build(), w.tensors)
    result = run(executor, make_batch([BatchRow(range(11), 0, [0])], [Logit(t) for t in range(11)]))
    assert result.finite.tolist() == [t != 3 for t in range(11)]


def test_a_norm_is_added_to_the_residual() -> None:
    """logits = x + rms_norm(x @ m.T); 19 columns end in a tail."""
    w = Weights(seed=6)
    table, matrix, weight = w.matrix(19, 19), w.matrix(19, 19), w.vector(19)
    b = PlanBuilder(KvSpec(0, 1, 8), 19)
    x = b.take_rows(b.embed(table))
    b.sample(b.rms_norm(b.linear(x, matrix), weight, 1e-3, add_to=x))
    plan = b.build()
    rows, logits = [BatchRow(range(19), 0, [0, 1])], [Logit(t) for t in range(19)]
    got, want = (logprobs_of(loaded(plan, w.tensors, name), rows, logits, 19) for name in ("native", "reference"))
    assert_within(got, want, 60 * EPSILON * (4 + abs(want)))


def test_a_decoder_with_post_norms_and_gelu_stays_near_the_reference() -> None:
    shape = Shape(post_norms=True, activation="gelu_tanh", bias=False)
    plan, weights = decoder(shape, seed=8)
    tokens = np.random.default_rng(7).integers(0, shape.vocab, 60).tolist()
    rows, logits = [BatchRow(tokens, 0, range(5, 9))], [Logit(t) for t in range(0, 60, 3)]
    got, want = (
        logprobs_of(loaded(plan, weights, name), rows, logits, shape.vocab) for name in ("native", "reference")
    )
    spread = want.max(axis=1, keepdims=True) - want.min(axis=1, keepdims=True)
    assert_within(got, want, 4 * shape.num_layers * HALF_EPSILON * np.broadcast_to(1 + spread, got.shape))


@pytest.mark.parametrize("window", [1, 5, 32, 100, 256, 270])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (2, 2), (7, 1)])
def test_a_window_hides_what_lies_before_it(window: int, num_heads: int, num_kv_heads: int) -> None:
    """A prompt beyond a split of 256 keys: tiles and splits wholly before the window, its edge inside one, and none."""
    shape = Shape(window=window, num_heads=num_heads, num_kv_heads=num_kv_heads)
    plan, weights = decoder(shape, seed=window)
    tokens = np.random.default_rng(7).integers(0, shape.vocab, 320).tolist()
    rows, logits = [BatchRow(tokens, 0, range(5, 25))], [Logit(t) for t in (0, 4, 5, 33, 101, 255, 257, 300, 319)]
    got, want = (
        logprobs_of(loaded(plan, weights, name), rows, logits, shape.vocab) for name in ("native", "reference")
    )
    spread = want.max(axis=1, keepdims=True) - want.min(axis=1, keepdims=True)
    assert_within(got, want, 4 * shape.num_layers * HALF_EPSILON * np.broadcast_to(1 + spread, got.shape))


def test_generic_and_avx2_agree_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(type=GgmlType.Q5_1)
    plan, weights = decoder(shape, seed=11)
    rows, logits = [BatchRow([t % 20 for t in range(280)], 0, range(18))], [Logit(t) for t in (0, 100, 279)]
    got = {}
    for isa in ("generic", ""):
        monkeypatch.setenv("JILJU_ISA", isa)
        executor = loaded(plan, weights)
        got[executor.kernel_set] = logprobs_of(executor, rows, logits, shape.vocab)
    assert "native-generic" in got
    if len(got) == 1:
        pytest.skip("this CPU has no other instruction set than generic")
    one, other = got.values()
    spread = one.max(axis=1, keepdims=True) - one.min(axis=1, keepdims=True)
    assert_within(other, one, 4 * shape.num_layers * HALF_EPSILON * np.broadcast_to(1 + spread, one.shape))


def test_avx2_and_avx512_run_a_model_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(mixed=(GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.F16, GgmlType.Q8_0), bias=False)
    plan, weights = decoder(shape, seed=12)
    rows, logits = [BatchRow([t % 20 for t in range(280)], 0, range(18))], [Logit(t) for t in range(0, 280, 9)]
    got = []
    for isa in ("avx2", "avx512"):
        monkeypatch.setenv("JILJU_ISA", isa)
        try:
            got.append(logprobs_of(loaded(plan, weights), rows, logits, shape.vocab))
        except ConfigError as error:
            pytest.skip(str(error))
    np.testing.assert_array_equal(*got)
