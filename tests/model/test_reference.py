"""Every op of the reference backend against its formula in plain loops of float64, and the laws that must hold."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends import reference
from jilju.backends.reference import ReferenceExecutor
from jilju.formats.ggml import GgmlType
from jilju.formats.gguf import GgufFile
from jilju.formats.quants import dequantize
from jilju.model.decoder import build_plan
from jilju.model.spec import spec_from_gguf
from jilju.model.weights import load_weights
from jilju.plan import Limits
from jilju.plan.batch import MAX_TOP

from .batches import BatchRow, Logit, chunks_of, logits_of, make_batch, run
from .tiny import SPEC, write

EPSILON = 2.0**-24  # of float32, half a unit in the last place
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(got: np.ndarray, want: np.ndarray, bound: np.ndarray | float) -> None:
    assert got.dtype == np.float32
    assert got.shape == want.shape
    excess = abs(got - want) - bound
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"at {worst}: {got[worst]}, wanted {want[worst]}, off by {abs(got - want)[worst]}"


# ---- the ops by themselves


def test_embed_takes_rows_and_scales() -> None:
    table = normal(0, 7, 4)
    assert_close(reference.embed(table, np.array([3, 3, 6]), 2.0), np.stack([table[3], table[3], table[6]]) * 2, 0.0)


@given(seed=SEEDS, num_groups=st.integers(1, 3), width=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_rms_norm(seed: int, num_groups: int, width: int) -> None:
    x, weight, eps = normal(seed, 3, num_groups * width), normal(seed + 1, width), 1e-5
    want = np.empty(x.shape)
    for row in range(3):
        for group in range(num_groups):
            part = x[row, group * width : (group + 1) * width].astype(float)
            size = math.sqrt(sum(value * value for value in part) / width + eps)
            want[row, group * width : (group + 1) * width] = part / size * weight
    assert_close(reference.rms_norm(x, weight, eps), want, (width + 6) * EPSILON * abs(want))


@given(seed=SEEDS, num_inputs=st.integers(1, 80), with_bias=st.booleans())
@settings(max_examples=40, deadline=None)
def test_linear_stays_within_the_rounding_bound(seed: int, num_inputs: int, with_bias: bool) -> None:
    x, parts = normal(seed, 4, num_inputs), [normal(seed + 1, 5, num_inputs), normal(seed + 2, 2, num_inputs)]
    biases = [normal(seed + 3, 5), normal(seed + 4, 2)] if with_bias else []
    weight = np.concatenate(parts).astype(float)
    want, size = x.astype(float) @ weight.T, abs(x) @ abs(weight).T
    if with_bias:
        want, size = want + np.concatenate(biases), size + abs(np.concatenate(biases))
    assert_close(reference.linear(x, parts, biases), want, (num_inputs + 1) * EPSILON * size)


@pytest.mark.parametrize("factors", [None, (1.0, 2.5, 8.0)])
@pytest.mark.parametrize("style", ["halves", "interleaved"])
def test_rope_is_a_rotation_of_each_pair(style: str, factors: tuple[float, ...] | None) -> None:
    head_dim, theta, positions = 6, 10_000.0, [0, 1, 50, 8000]
    x = normal(0, len(positions), 2 * head_dim)
    want = np.empty(x.shape)
    for t, position in enumerate(positions):
        for head in range(2):
            for i in range(head_dim // 2):
                first, second = (i, i + head_dim // 2) if style == "halves" else (2 * i, 2 * i + 1)
                a, b = (complex(x[t, head * head_dim + j]) for j in (first, second))
                angle = position / theta ** (2 * i / head_dim) / (1.0 if factors is None else factors[i])
                want[t, head * head_dim + first] = (a * math.cos(angle) - b * math.sin(angle)).real
                want[t, head * head_dim + second] = (a * math.sin(angle) + b * math.cos(angle)).real
    given = None if factors is None else np.float32(factors)
    got = reference.rope(x, np.array(positions), head_dim, theta, style, given)
    assert_close(got, want, 8 * EPSILON * abs(x).max())


@given(seed=SEEDS, shift=st.integers(0, 1000), style=st.sampled_from(["halves", "interleaved"]))
@settings(max_examples=30, deadline=None)
def test_rope_sees_only_distances(seed: int, shift: int, style: str) -> None:
    """The product of a rotated query and key depends on how far apart they are, not on where."""
    q, k = normal(seed, 1, 8), normal(seed + 1, 1, 8)

    def product(q_position: int, k_position: int) -> float:
        a = reference.rope(q, np.array([q_position]), 8, 100.0, style)
        b = reference.rope(k, np.array([k_position]), 8, 100.0, style)
        return float((a.astype(float) * b).sum())

    bound = 40 * EPSILON * float((abs(q) @ abs(k).T).item() + np.linalg.norm(q) * np.linalg.norm(k))
    assert abs(product(7, 3) - product(7 + shift, 3 + shift)) <= bound


@given(
    seed=SEEDS,
    start=st.integers(0, 9),
    count=st.integers(1, 6),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_attention_is_causal_grouped_and_windowed(
    seed: int, start: int, count: int, num_kv_heads: int, group: int, window: int
) -> None:
    head_dim, scale, num_keys = 4, 0.7, start + count
    q = normal(seed, count, num_kv_heads * group, head_dim)
    k, v = normal(seed + 1, num_keys, num_kv_heads, head_dim), normal(seed + 2, num_keys, num_kv_heads, head_dim)
    want = np.zeros(q.shape)
    for i in range(count):
        for head in range(num_kv_heads * group):
            kv_head = head // group
            seen = [j for j in range(num_keys) if j <= start + i and (window == 0 or j > start + i - window)]
            scores = [scale * float(q[i, head].astype(float) @ k[j, kv_head]) for j in seen]
            weights = [math.exp(score - max(scores)) for score in scores]
            for j, weight in zip(seen, weights, strict=True):
                want[i, head] += weight / sum(weights) * v[j, kv_head].astype(float)
    steepest = scale * head_dim * abs(q).max() * abs(k).max()  # a score's rounding error goes through exp
    bound = 4 * (num_keys + head_dim + steepest) * EPSILON * (1 + steepest) * abs(v).max()
    assert_close(reference.attention(q, k, v, start, scale, window), want, bound)


def test_glu_gates_with_silu_even_far_out() -> None:
    gate, up = np.array([[-200.0, -90, -1, 0, 1, 200]], np.float32), np.array([[1.0, 2, 3, 4, 5, 6]], np.float32)
    want = [[g / (1 + math.exp(-g)) * u for g, u in zip(gate[0].tolist(), up[0].tolist(), strict=True)]]
    assert_close(
        reference.glu(np.concatenate([gate, up], axis=1)), np.array(want), 4 * EPSILON * abs(np.array(want)) + 1e-36
    )


def test_glu_gates_with_gelu_even_far_out() -> None:
    gate = np.array([[-1e20, -200.0, -9, -3, -1, 0, 1, 3, 200, 1e20]], np.float32)
    up = np.arange(1, 11, dtype=np.float32)[None]
    slopes = [math.sqrt(2 / math.pi) * (g + 0.044715 * g**3) for g in gate[0].tolist()]
    want = np.array([[g / 2 * (1 + math.tanh(s)) for g, s in zip(gate[0].tolist(), slopes, strict=True)]])
    # exp(-2s) multiplies the rounding of its argument by 2s; float64's 1 + tanh is 0 or a few 1e-16 far out
    bound = (8 + 4 * np.minimum(abs(np.array(slopes)), 20)) * EPSILON * abs(want * up) + 1e-14
    assert_close(reference.glu(np.concatenate([gate, up], axis=1), "gelu_tanh"), want * up, bound)


# ---- sampling


def test_philox_known_answers() -> None:
    """The published answers of Philox4x32-10."""
    assert [f"{word:08x}" for word in reference.philox(0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = reference.philox(2**64 - 1, 2**128 - 1)
    assert [f"{word:08x}" for word in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    key, counter = 0x299F31D0_A4093822, 0x03707344_13198A2E_85A308D3_243F6A88
    assert [f"{word:08x}" for word in reference.philox(key, counter)] == [
        "d16cfe09",
        "94fdcceb",
        "5001e420",
        "24126ea1",
    ]


def test_noise_is_uniform_and_its_own_for_each_seed_and_position() -> None:
    draws = np.array([reference.uniform(seed, position) for seed in range(40) for position in range(100)])
    assert len(set(draws.tolist())) == draws.size
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 10, (0, 1))[0]
    assert (abs(counts - 400) < 5 * math.sqrt(400 * 0.9)).all(), counts
    w0, w1, _, _ = reference.philox(5, 9)
    assert reference.uniform(5, 9) == ((w0 * 2**21 + w1 // 2**11) % 2**53) / 2**53


def test_log_softmax() -> None:
    logits = normal(0, 50) * 20
    got = reference.log_softmax(logits)
    assert np.exp(got).sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(got - got[0], logits.astype(float) - logits[0], rtol=0, atol=1e-12)


def changed(logits: list[float], **fields: Any) -> list[float]:
    raw = np.array(logits, np.float32)
    got = reference.changed(raw, make_batch([BatchRow([0], 0, [0])], [Logit(0, **fields)]), 0)
    assert raw.tolist() == logits, "the raw logits are needed for the logprobs"
    return got.tolist()


def test_what_changes_a_logit_and_in_which_order() -> None:
    inf = math.inf
    raw = [2.0, -2.0, 1.0, 0.0]
    counts = {0: 0, 1: 3, 3: 1}  # 0 is in the prompt alone
    assert changed(raw, counts=counts, repetition_penalty=2.0) == [1.0, -4.0, 1.0, 0.0]
    assert changed(raw, counts=counts, presence_penalty=0.5) == [2.0, -2.5, 1.0, -0.5]
    assert changed(raw, counts=counts, frequency_penalty=-0.5) == [2.0, -0.5, 1.0, 0.5]
    penalties = {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 1.0}
    assert changed(raw, counts={1: 2}, bias={1: 4.0}, **penalties)[1] == (-2.0 + 4.0) / 2 - 2 * 0.25 - 1.0
    assert changed(raw, bias={1: 100.0}, banned_ids=[1, 2]) == [2.0, -inf, -inf, 0.0]
    mask = np.array([0b1010 | 1 << 20], np.uint32)  # a bit beyond the vocabulary means nothing
    assert changed(raw, bias={0: 100.0}, banned_ids=[3], mask=mask) == [-inf, -2.0, -inf, -inf]
    assert changed([2.0], counts={0: 0}, repetition_penalty=1e-39)[0] == float(np.finfo(np.float32).max)


def test_a_row_with_nothing_left_to_sample_is_said_so() -> None:
    nothing = np.zeros(1, np.uint32)
    logits = [
        Logit(0, mask=nothing),
        Logit(0, banned_ids=range(4)),
        Logit(0, banned_ids=range(3)),
        Logit(0, mask=nothing, target=2),
    ]
    batch = make_batch([BatchRow([0], 0, [0])], logits)
    result = reference.sample(np.zeros((4, 4), np.float32), batch)
    assert result.finite.tolist() == [False, False, True, True]
    assert result.token_ids[2:].tolist() == [3, 2]


def survivors(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The filters in plain words: id -> probability."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    mass = {i: math.exp((float(logits[i]) - float(logits[ranked[0]])) / temperature) for i in ranked}
    if top_p < 1:
        total, so_far, kept = sum(mass.values()), 0.0, []
        for i in ranked:
            kept.append(i)
            so_far += mass[i]
            if so_far >= float(np.float32(top_p)) * total:
                break
        ranked = kept
    ranked = [i for i in ranked if mass[i] >= float(np.float32(min_p)) * mass[ranked[0]]]
    total = sum(mass[i] for i in ranked)
    return {i: mass[i] / total for i in sorted(ranked)}


@given(
    seed=SEEDS,
    u=st.floats(0, 1, exclude_max=True),
    temperature=st.floats(0.125, 2, width=32),
    top_k=st.integers(0, 12),
    top_p=st.floats(2.0**-7, 1, width=32),
    min_p=st.floats(0, 1, width=32),
)
@settings(max_examples=300, deadline=None)
def test_choose_follows_the_filters(
    seed: int, u: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.round(normal(seed, 10) * 4) / 2  # coarse, so that there are ties
    kept = survivors(logits, temperature, top_k, top_p, min_p)
    cumulative, want = 0.0, None
    for i, probability in kept.items():
        cumulative += probability
        if cumulative > u:
            want = i
            break
        if abs(cumulative - u) < 1e-12:
            return  # on the very edge: the order of summation decides
    got = reference.choose(logits, u, temperature, top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    assert got == (want if want is not None else max(kept))


def test_choose_draws_each_id_as_often_as_it_is_probable() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    num_draws = 4000
    ids = [reference.choose(logits, reference.uniform(1, position), 1.0, 0, 1.0, 0.0) for position in range(num_draws)]
    for i, probability in enumerate((0.5, 0.25, 0.125, 0.125)):
        spread = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(ids.count(i) - num_draws * probability) < 5 * spread


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.array([0.0, 3, 3, 3, 1], np.float32)
    assert reference.choose(logits, 0.999, 0.0, 0, 1.0, 0.0) == 1
    assert {reference.choose(logits, u, 1.0, 2, 1.0, 0.0) for u in (0.0, 0.49, 0.51, 0.999)} == {1, 2}
    assert reference.choose(logits, 0.999, 1.0, 0, 0.3, 0.0) == 1


def test_sample_reports_the_models_own_distribution() -> None:
    """Penalties, bans and temperature change the choice; the logprobs are of the raw logits."""
    logits = np.tile(np.array([1.0, 4.0, 3.0, 2.0], np.float32), (3, 1))
    batch = make_batch(
        [BatchRow([0], 0, [0])],
        [
            Logit(0, banned_ids=[1], num_top=3),
            Logit(0, repetition_penalty=4.0, counts={1: 1, 2: 0}),
            Logit(0, target=3, banned_ids=[3], num_top=MAX_TOP),
        ],
    )
    result = reference.sample(logits, batch)
    want = [math.log(math.exp(x) / sum(math.exp(y) for y in (1, 4, 3, 2))) for x in (1, 4, 3, 2)]
    assert result.token_ids.tolist() == [2, 3, 3]
    assert result.logprobs.tolist() == pytest.approx([want[2], want[3], want[3]], abs=1e-6)
    assert result.top_ids[:, :5].tolist() == [[1, 2, 3, -1, -1], [-1] * 5, [1, 2, 3, 0, -1]]
    assert result.top_logprobs[0, :3].tolist() == pytest.approx([want[1], want[2], want[3]], abs=1e-6)
    assert result.finite.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_said_so_and_leaves_others_alone(bad: float) -> None:
    logits = normal(0, 3, 9)
    logits[1, 4] = bad
    batch = make_batch([BatchRow([0], 0, [0])], [Logit(0, num_top=2)] * 3)
    result = reference.sample(logits, batch)
    assert result.finite.tolist() == [True, False, True]
    assert result.token_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(axis=1).tolist()


# ---- the executor


LIMITS = Limits(num_blocks=24, block_size=4, max_rows=4, max_tokens=32, max_context=64, num_threads=1)


@pytest.fixture
def executor(tmp_path: Path) -> ReferenceExecutor:
    file = GgufFile.open(write(tmp_path / "m.gguf"))
    plan = build_plan(spec_from_gguf(file), {name: tensor.type for name, tensor in file.tensors.items()})
    executor = ReferenceExecutor()
    executor.load(plan, load_weights(file, plan), LIMITS)
    return executor


IDS = np.random.default_rng(4).integers(0, SPEC.vocab_size, 24).tolist()


def naive_logits(path: Path, ids: list[int]) -> np.ndarray:
    """The model of `tiny.SPEC` once more, in one piece and float64: no plan, no cache, no batch."""
    with GgufFile.open(path) as file:
        w = {
            name: dequantize(file.tensor_data(name), tensor.type, tensor.shape[-1]).reshape(tensor.shape).astype(float)
            for name, tensor in file.tensors.items()
        }
    num_heads, num_kv_heads, d = SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + SPEC.rms_eps) * weight

    def rotate(x: np.ndarray) -> np.ndarray:
        """[tokens, heads, d]: neighbouring columns as complex numbers, turned"""
        angles = np.arange(len(x))[:, None] * SPEC.rope_theta ** (-np.arange(0, d, 2) / d)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None, :]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    x = w["token_embd.weight"][ids]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(SPEC.num_layers):
        p = f"blk.{layer}."
        h = norm(x, w[p + "attn_norm.weight"])
        q, k, v = (
            (h @ w[f"{p}attn_{part}.weight"].T).reshape(len(ids), heads, d)
            for part, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
        )
        q, k = rotate(q), rotate(k)
        heads = []
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = np.exp(q[:, head] @ k[:, kv_head].T / math.sqrt(d) + mask)
            heads.append(scores / scores.sum(axis=-1, keepdims=True) @ v[:, kv_head])
        x = x + np.concatenate(heads, axis=1) @ w[p + "attn_output.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate, up = h @ w[p + "ffn_gate.weight"].T, h @ w[p + "ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


@pytest.mark.parametrize("type_", [GgmlType.F32, GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_1])
def test_a_whole_model_against_its_formula(type_: GgmlType, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", type_of=lambda name: GgmlType.F32 if "norm" in name else type_)
    with GgufFile.open(path) as file:
        plan = build_plan(spec_from_gguf(file), {name: tensor.type for name, tensor in file.tensors.items()})
        executor = ReferenceExecutor()
        executor.load(plan, load_weights(file, plan), LIMITS)
    want = naive_logits(path, IDS)
    got = logits_of(executor, IDS, [(0, len(IDS))], range(6))
    assert (abs(got - want).max(axis=1) <= 1e-5 * abs(want).max(axis=1)).all()


@given(sizes=st.lists(st.integers(1, 8), min_size=24, max_size=24), blocks=st.permutations(range(24)))
@settings(max_examples=15, deadline=None)
def test_chunks_and_blocks_change_nothing(
    sizes: list[int], blocks: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "chunks.gguf"
    file = GgufFile.open(path if path.exists() else write(path))
    plan = build_plan(spec_from_gguf(file), {name: tensor.type for name, tensor in file.tensors.items()})
    executor = ReferenceExecutor()
    executor.load(plan, load_weights(file, plan), LIMITS)
    whole = logits_of(executor, IDS, [(0, len(IDS))], range(6))
    parts = logits_of(executor, IDS, chunks_of(len(IDS), sizes), blocks[:6])
    assert (abs(parts - whole).max(axis=1) <= 1e-5 * abs(whole).max(axis=1)).all()


def test_rows_of_a_batch_do_not_see_each_other(executor: ReferenceExecutor) -> None:
    """A chunk, a decode and a fresh prompt in one step, against each alone."""
    a, b, c = IDS[:12], IDS[5:14], IDS[8:13]
    alone = [logits_of(executor, ids, [(0, len(ids))], range(3))[-1] for ids in (a, b, c)]
    for ids, blocks, num_before in ((a, [7, 1, 5], 6), (b, [2, 9, 23], 8)):
        run(executor, make_batch([BatchRow(ids[:num_before], 0, blocks)]))
    rows = [BatchRow(a[6:], 6, [7, 1, 5]), BatchRow(b[8:], 8, [2, 9, 23]), BatchRow(c, 0, [0, 11])]
    run(executor, make_batch(rows, [Logit(5), Logit(6), Logit(11)]))
    assert executor.last_logits is not None
    for got, want in zip(executor.last_logits, alone, strict=True):
        assert abs(got - want).max() <= 1e-5 * abs(want).max()


def test_a_shared_block_serves_two_sequences(executor: ReferenceExecutor) -> None:
    """What prefix caching relies on: K and V of a full block are the same whoever wrote them."""
    run(executor, make_batch([BatchRow(IDS[:8], 0, [3, 4])]))
    rows = [BatchRow(IDS[8:10], 8, [3, 4, 5]), BatchRow(IDS[10:12], 8, [3, 4, 6])]
    run(executor, make_batch(rows, [Logit(1), Logit(3)]))
    shared = executor.last_logits
    assert shared is not None
    for got, ids in zip(shared, (IDS[:10], IDS[:8] + IDS[10:12]), strict=True):
        want = logits_of(executor, ids, [(0, 10)], [20, 21, 22])[-1]
        assert abs(got - want).max() <= 1e-5 * abs(want).max()


def test_targets_score_and_sampling_repeats(executor: ReferenceExecutor) -> None:
    scored = run(executor, make_batch([BatchRow(IDS[:6], 0, [0, 1])], [Logit(i, target=IDS[i + 1]) for i in range(6)]))
    assert scored.token_ids.tolist() == IDS[1:7]
    assert executor.last_logits is not None
    want = [reference.log_softmax(row)[target] for row, target in zip(executor.last_logits, IDS[1:7], strict=True)]
    assert scored.logprobs.tolist() == pytest.approx(want, abs=1e-6)
    logit = Logit(0, temperature=1.0, seed=2**63 + 5, position=2**33)
    twice = [run(executor, make_batch([BatchRow(IDS[:1], 0, [0])], [logit])).token_ids.tolist() for _ in range(2)]
    assert twice[0] == twice[1]


def test_a_step_without_logit_rows(executor: ReferenceExecutor) -> None:
    result = run(executor, make_batch([BatchRow(IDS[:5], 0, [0, 1])]))
    assert len(result.token_ids) == len(result.finite) == 0
    assert result.top_ids.shape == (0, MAX_TOP)


def test_breaking_the_limits_is_our_own_fault(executor: ReferenceExecutor) -> None:
    with pytest.raises(AssertionError, match="33 tokens, limit 32"):
        executor.launch(make_batch([BatchRow([0] * 33, 0, range(9))]))
    with pytest.raises(AssertionError, match="block 24 of 24"):
        executor.launch(make_batch([BatchRow([0], 0, [24])]))
    with pytest.raises(AssertionError, match="no block for position 4"):
        executor.launch(make_batch([BatchRow([0] * 5, 0, [1]), BatchRow([0], 0, [2, 3])]))
    with pytest.raises(AssertionError, match="wait without a launch"):
        executor.wait()
    executor.launch(make_batch([BatchRow([0], 0, [0])]))
    with pytest.raises(AssertionError, match="launch before"):
        executor.launch(make_batch([BatchRow([0], 0, [0])]))
