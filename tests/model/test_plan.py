"""The plan: what the decoder writes, what verify() finds, and that shared buffers never hold two living values."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.formats.ggml import GgmlType
from jilju.model.decoder import build_plan
from jilju.model.spec import ModelSpec
from jilju.plan import (
    Attention,
    Buffer,
    KvSpec,
    Linear,
    Plan,
    PlanBuilder,
    RmsNorm,
    Rope,
    Sample,
    StepShape,
    TakeRows,
    Value,
    WeightSpec,
)
from jilju.plan.cost import PlanCost

from .tiny import GEMMA3, QWEN2, QWEN3, SCALED, SPEC

SMOLLM2 = ModelSpec(
    family="llama",
    name="SmolLM2-135M",
    num_layers=30,
    hidden_width=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_width=1536,
    vocab_size=49152,
    max_context=8192,
    rope_theta=100_000.0,
    rope_style="interleaved",
    rms_eps=1e-5,
    tied_head=True,
    attention_bias=False,
    attention_scale=64**-0.5,
)


def types_of(spec: ModelSpec, matrix: GgmlType = GgmlType.F32, table: GgmlType = GgmlType.F32) -> dict[str, GgmlType]:
    shapes = spec.tensor_shapes()
    return {
        name: GgmlType.F32 if len(shape) == 1 else table if "token_embd" in name else matrix
        for name, shape in shapes.items()
    }


def plan_of(spec: ModelSpec) -> Plan:
    return build_plan(spec, types_of(spec))


# ---- counts: the check values of the cost model


def test_counts_of_smollm2() -> None:
    plan = build_plan(SMOLLM2, types_of(SMOLLM2, GgmlType.Q4_1, GgmlType.Q8_0))
    linears = [op for op in plan.ops if isinstance(op, Linear)]
    body, head = linears[:-1], linears[-1]
    assert sum(w.num_inputs * w.num_outputs for op in body for w in op.parts) == 106_168_320
    assert sum(w.num_inputs * w.num_outputs for w in head.parts) == 28_311_552
    assert plan.weight_bytes == 96_576_768
    assert plan.kv.elements_per_token * 2 == 23_040

    decode, prefill = StepShape((0,), (1,), 1), StepShape((0,), (512,), 0)
    assert sum(op.flops(decode) for op in linears) == pytest.approx(0.269e9, rel=1e-3)
    assert sum(op.flops(prefill) for op in linears) / 512 == pytest.approx(0.212e9, rel=2e-3)
    # What a decode step reads of the weights: all of them, and one row of the table for the embedding.
    weights = sum(w.num_bytes for op in plan.ops if isinstance(op, Linear | RmsNorm) for w in op.weights)
    assert weights == plan.weight_bytes
    assert plan.bytes(decode, 2) > weights


def test_attention_counts_exact_causal_pairs() -> None:
    op = next(op for op in plan_of(SPEC).ops if isinstance(op, Attention))
    step = StepShape((0, 5), (3, 1), 2)
    pairs = sum(position + 1 for start, count in ((0, 3), (5, 1)) for position in range(start, start + count))
    assert op.flops(step) == 4 * 4 * 16 * pairs
    kv_width = 2 * 2 * 16 * 2
    assert op.bytes(step, 2) == kv_width * (3 + 6) + kv_width * 4 + 2 * 4 * 64 * 4


@given(starts=st.lists(st.integers(0, 12), max_size=4), count=st.integers(1, 9), window=st.integers(1, 12))
def test_a_window_counts_the_keys_that_are_seen(starts: list[int], count: int, window: int) -> None:
    step = StepShape(tuple(starts), (count,) * len(starts), 0)
    seen = [[range(max(0, p - window + 1), p + 1) for p in range(start, start + count)] for start in starts]
    assert step.num_attended(window) == sum(len(keys) for row in seen for keys in row)
    assert step.num_keys_read(window) == sum(len({key for keys in row for key in keys}) for row in seen)
    assert step.num_attended(30) == step.num_attended()
    assert step.num_keys_read(30) == step.num_keys_read()


def test_windows_and_additions_are_counted_by_their_ops() -> None:
    step, whole, plan = StepShape((9,), (1,), 1), StepShape((3,), (1,), 1), plan_of(SPEC)
    attention = next(op for op in plan.ops if isinstance(op, Attention))
    windowed = msgspec.structs.replace(attention, window=4)
    assert windowed.flops(step) == attention.flops(whole)
    assert windowed.bytes(step, 2) == attention.bytes(whole, 2)
    norm = next(op for op in plan.ops if isinstance(op, RmsNorm))
    added = msgspec.structs.replace(norm, add_to=norm.out)
    assert added.bytes(step, 2) - norm.bytes(step, 2) == 4 * norm.x.width
    assert added.flops(step) - norm.flops(step) == norm.x.width


@given(splits=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_chunks_cost_what_the_whole_costs(splits: list[int]) -> None:
    """FLOPs of a prompt do not depend on how it is cut."""
    plan, total = plan_of(SPEC), sum(splits)
    starts = [sum(splits[:i]) for i in range(len(splits))]
    parts = [plan.flops(StepShape((start,), (count,), 0)) for start, count in zip(starts, splits, strict=True)]
    assert sum(parts) == plan.flops(StepShape((0,), (total,), 0))


# ---- the decoder


@pytest.mark.parametrize("spec", [SPEC, QWEN2, QWEN3, GEMMA3, SMOLLM2], ids=lambda spec: spec.name + "-" + spec.family)
def test_a_plan_uses_every_tensor_with_its_shape(spec: ModelSpec) -> None:
    plan = plan_of(spec)
    shapes = {
        w.name: (w.num_inputs,) if w.num_outputs == 1 else (w.num_outputs, w.num_inputs) for w in plan.weights.values()
    }
    assert shapes == spec.tensor_shapes()
    plan.verify()
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_the_workspace_does_not_grow_with_layers() -> None:
    deep = msgspec.structs.replace(SPEC, num_layers=40)
    assert plan_of(deep).buffers == plan_of(SPEC).buffers
    buffers = plan_of(SPEC).buffers
    assert plan_of(SPEC).workspace_bytes(10, 3) == sum(4 * b.width * (10 if b.rows == "tokens" else 3) for b in buffers)


def test_the_residual_is_added_in_place() -> None:
    plan = plan_of(SPEC)
    added = [op for op in plan.ops if isinstance(op, Linear) and op.add_to is not None]
    assert len(added) == 2 * SPEC.num_layers
    assert {op.out for op in added} == {plan.ops[0].writes[0]}


def test_windows_and_bases_go_by_layer() -> None:
    spec = msgspec.structs.replace(GEMMA3, num_layers=13, global_every=6)
    plan = plan_of(spec)
    windows = [op.window for op in plan.ops if isinstance(op, Attention)]
    assert windows == [0 if layer in (5, 11) else 5 for layer in range(13)]
    thetas = [op.theta for op in plan.ops if isinstance(op, Rope)]
    assert thetas == [1e6 if layer in (5, 11) else 1e4 for layer in range(13) for _ in "qk"]


def test_scaled_frequencies_are_a_vector_of_every_rope() -> None:
    plan, plain = plan_of(SCALED), plan_of(SPEC)
    ropes = [op for op in plan.ops if isinstance(op, Rope)]
    factors = WeightSpec("rope_freqs.weight", GgmlType.F32, 1, 8)
    assert [op.factors for op in ropes] == [factors] * 2 * SPEC.num_layers
    assert plan.weights.keys() - plain.weights.keys() == {factors.name}
    step = StepShape((3, 0), (1, 5), 2)
    assert plan.flops(step) == plain.flops(step)
    assert plan.bytes(step, 2) - plain.bytes(step, 2) == len(ropes) * 8 * 4
    assert PlanCost(plan, 2).totals(step) == (plan.flops(step), plan.bytes(step, 2))


def test_factors_that_do_not_fit_the_heads_are_found() -> None:
    for outputs, inputs in ((1, 16), (1, 4), (2, 8)):
        b = PlanBuilder(KvSpec(1, 2, 16), 40)
        x = b.embed(WeightSpec("table", GgmlType.F32, 40, 64))
        b.rope(x, 16, 1e4, "halves", WeightSpec("factors", GgmlType.F32, outputs, inputs))
        with pytest.raises(ValueError, match=r"op 1 \(Rope\): factors .* for heads of 16, wanted a vector of 8"):
            b.build()


def test_norms_are_where_the_family_has_them() -> None:
    """q and k are normed head by head before rope; what a post norm gives is added to the residual, in place."""
    for spec, num_added in ((QWEN3, 0), (GEMMA3, 2)):
        ops = plan_of(spec).ops
        for index, op in enumerate(ops):
            if isinstance(op, Attention):
                norms = [norm for norm in ops[index - 4 : index] if isinstance(norm, RmsNorm)]
                ropes = [rope for rope in ops[index - 4 : index] if isinstance(rope, Rope)]
                assert [norm.out for norm in norms] == [rope.x for rope in ropes] == [op.q, op.k]
                assert [norm.weight.num_inputs for norm in norms] == [24, 24]
        added = [op for op in ops if isinstance(op, RmsNorm) and op.add_to is not None]
        assert [op.out for op in added] == [ops[0].writes[0]] * num_added * spec.num_layers


# ---- sharing buffers


def executed(ops: tuple[Any, ...], buffers: tuple[Buffer, ...]) -> list[tuple[tuple[float, ...], ...]]:
    """Run a plan on symbols: each op writes a number made of what it reads; what each op read, in order.

    Two plans of the same ops compute the same exactly if every op reads the same.
    """
    memory = [np.zeros(buffer.width) for buffer in buffers]
    seen = []
    for index, op in enumerate(ops):
        read = tuple(tuple(memory[v.buffer][v.offset : v.offset + v.width].tolist()) for v in op.reads)
        seen.append(read)
        for v in op.writes:
            mixed = hash((index, read)) % 1_000_003
            memory[v.buffer][v.offset : v.offset + v.width] = mixed + np.arange(v.width)
    return seen


class Unshared(PlanBuilder):
    """The plan as written: every result in a buffer of its own."""

    def build(self) -> Plan:
        plan = Plan(tuple(self._ops), tuple(self._buffers), self._kv, self._vocab_size)  # type: ignore[arg-type]
        plan.verify()
        return plan


@pytest.mark.parametrize("spec", [SPEC, QWEN2, QWEN3, GEMMA3], ids=lambda spec: spec.family)
def test_shared_buffers_compute_what_separate_ones_do(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = plan_of(spec)
    monkeypatch.setattr("jilju.model.decoder.PlanBuilder", Unshared)
    separate = plan_of(spec)
    assert len(shared.buffers) < len(separate.buffers)
    assert executed(shared.ops, shared.buffers) == executed(separate.ops, separate.buffers)


@st.composite
def programs(draw: st.DrawFn) -> Callable[[PlanBuilder], None]:
    """Random plans: norms, linears (some in place) and views of earlier results, in any order."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["norm", "norm add", "linear", "add", "glu"]), st.integers(0, 99), st.integers(0, 99)
            ),
            max_size=25,
        )
    )

    def write(b: PlanBuilder) -> None:
        values = [b.embed(WeightSpec("table", GgmlType.F32, 11, 4))]
        for number, (kind, first, second) in enumerate(steps):
            x, other = values[first % len(values)], values[second % len(values)]
            name = f"w{number}"
            if kind == "norm":
                values.append(b.rms_norm(x, WeightSpec(name, GgmlType.F32, 1, x.width), 1e-5))
            elif kind == "norm add" and x.buffer != other.buffer and x.width == other.width:
                b.rms_norm(x, WeightSpec(name, GgmlType.F32, 1, x.width), 1e-5, add_to=other)
            elif kind == "linear":
                values.append(b.linear(x, WeightSpec(name, GgmlType.F32, 4 + second % 2 * 4, x.width)))
            elif kind == "glu" and x.width % 2 == 0:
                values.append(b.glu(x))
            elif kind == "add" and x.buffer != other.buffer:
                b.linear(x, WeightSpec(name, GgmlType.F32, other.width, x.width), add_to=other)
        q = b.linear(values[-1], WeightSpec("qkv", GgmlType.F32, 12, values[-1].width))
        out = b.attention(*b.split(q, 4, 4, 4), 0, 1, 1.0)
        b.sample(b.linear(b.take_rows(out), WeightSpec("head", GgmlType.F32, 11, 4)))

    return write


@given(write=programs())
@settings(max_examples=150, deadline=None)
def test_sharing_never_aliases_living_values(write: Callable[[PlanBuilder], None]) -> None:
    plans = []
    for builder in (PlanBuilder, Unshared):
        b = builder(KvSpec(1, 1, 4), 11)
        write(b)
        plans.append(b.build())
    shared, separate = plans
    assert executed(shared.ops, shared.buffers) == executed(separate.ops, separate.buffers)


# ---- verify()


def changed(plan: Plan, kind: type, **fields: Any) -> Plan:
    """The plan with its first op of a kind changed."""
    index = next(i for i, op in enumerate(plan.ops) if isinstance(op, kind))
    op = msgspec.structs.replace(plan.ops[index], **fields)
    return msgspec.structs.replace(plan, ops=(*plan.ops[:index], op, *plan.ops[index + 1 :]))


def without(plan: Plan, kind: type) -> Plan:
    index = next(i for i, op in enumerate(plan.ops) if isinstance(op, kind))
    return msgspec.structs.replace(plan, ops=plan.ops[:index] + plan.ops[index + 1 :])


PLAN = plan_of(SPEC)
NORM = next(op for op in PLAN.ops if isinstance(op, RmsNorm))
LINEAR = next(op for op in PLAN.ops if isinstance(op, Linear))
ATTENTION = next(op for op in PLAN.ops if isinstance(op, Attention))
BIAS = WeightSpec("bias", GgmlType.F32, 1, 7)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            changed(PLAN, RmsNorm, x=msgspec.structs.replace(NORM.x, buffer=99)),
            r"op 1 \(RmsNorm\): buffer 99 does not exist",
        ),
        (changed(PLAN, RmsNorm, x=msgspec.structs.replace(NORM.x, width=65)), r"op 1 \(RmsNorm\): columns \[0, 65\)"),
        (changed(PLAN, RmsNorm, x=msgspec.structs.replace(NORM.x, offset=-1)), r"op 1 \(RmsNorm\): columns \[-1, 63\)"),
        (
            changed(PLAN, RmsNorm, x=msgspec.structs.replace(NORM.x, rows="logits")),
            "value of logits rows in a buffer of tokens",
        ),
        (changed(PLAN, RmsNorm, x=NORM.out), "before they are written"),
        (
            changed(PLAN, RmsNorm, weight=msgspec.structs.replace(NORM.weight, num_inputs=63)),
            "weight of 63 for width 64",
        ),
        (changed(PLAN, Linear, parts=LINEAR.parts[:2]), r"op 2 \(Linear\): outputs \[64, 32\] into width 128"),
        (changed(PLAN, Linear, biases=(BIAS,)), r"biases \[7\] do not match"),
        (changed(PLAN, Linear, add_to=NORM.out), "add_to must be the value that is written"),
        (changed(PLAN, RmsNorm, add_to=NORM.x), "add_to must be the value that is written"),
        (changed(PLAN, RmsNorm, add_to=NORM.out), r"op 1 \(RmsNorm\): reads columns .* before they are written"),
        (changed(PLAN, Attention, window=-1), r"\(Attention\): a window of -1 keys"),
        (changed(PLAN, Attention, num_heads=3), "3 query heads over 2 KV heads"),
        (changed(PLAN, Attention, head_dim=8), "KV heads differ from the cache's"),
        (changed(PLAN, Attention, q=ATTENTION.k), "widths"),
        (changed(PLAN, Attention, layer=1), "layer 1 has two attention ops"),
        (changed(PLAN, TakeRows, x=ATTENTION.k), r"\(TakeRows\): width 32 into 64"),
        (without(PLAN, Attention), r"attention layers are \[1\]"),
        (without(PLAN, Sample), "the last op must be sample"),
        (
            msgspec.structs.replace(PLAN, kv=KvSpec(3, 2, 16)),
            r"attention layers are \[0, 1\], the KV cache has layers 0..2",
        ),
        (msgspec.structs.replace(PLAN, vocab_size=41), "40 rows for a vocabulary of 41"),
        (Plan((), (), KvSpec(0, 1, 2), 1), "the last op must be sample"),
    ],
)
def test_a_bad_plan_is_refused_by_name(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.verify()


def test_half_written_values_may_not_be_read() -> None:
    b = PlanBuilder(KvSpec(1, 1, 4), 11)
    x = b.embed(WeightSpec("table", GgmlType.F32, 11, 4))
    wide = Value(b._new("tokens", 8).buffer, 0, 8, "tokens")
    b.linear(x, WeightSpec("w", GgmlType.F32, 4, 4), add_to=msgspec.structs.replace(wide, width=4))
    with pytest.raises(ValueError, match="before they are written"):
        b.build()


def test_one_name_with_two_shapes() -> None:
    b = PlanBuilder(KvSpec(1, 1, 4), 11)
    x = b.embed(WeightSpec("w", GgmlType.F32, 11, 4))
    b.linear(x, WeightSpec("w", GgmlType.F32, 12, 4))
    with pytest.raises(ValueError, match="weight w is used with two shapes"):
        b.build()


def test_step_shape_counts_pairs_and_keys() -> None:
    step = StepShape((0, 7, 3), (4, 1, 2), 3)
    assert (step.num_tokens, step.num_attended(), step.num_keys_read()) == (7, 10 + 8 + 9, 4 + 8 + 5)
