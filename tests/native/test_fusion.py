"""Fusing ops changes nothing: not a bit where it is allowed, and where it is not, later readers find what they read."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends.native import NativeExecutor
from jilju.formats.ggml import GgmlType
from jilju.plan import Activation, KvSpec, Plan, PlanBuilder, Value, WeightSpec
from tests.model.batches import BatchRow, Logit, make_batch, run
from tests.native.plans import LIMITS, Shape, Weights, decoder, loaded

WIDTH, VOCAB = 64, 20
TYPES = (GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0)


# What may stand between two ops, or in the second: alone each forbids to fuse them, but for "".
AFTER_NORM = ("", "no norm", "norms of heads", "norm is read again", "a part is float32")
AFTER_LINEAR = (
    "",
    "no gate",
    "gate is read again",
    "a part is float32",
    "biases",
    "one part",
    "three parts",
    "uneven parts",
)


@dataclass(frozen=True)
class Block:
    """x += down(gate(norm(x))), or with a plain linear for the gate."""

    after_norm: str
    after_linear: str
    types: tuple[GgmlType, ...]  # of the gate's parts, and of down
    width: int  # of the gate's output
    activation: Activation

    def parts(self) -> list[tuple[int, GgmlType]]:
        """Outputs and format of each part of the gate's linear."""
        n = self.width
        shares = {"one part": [2 * n], "three parts": [n, n - 8, 8], "uneven parts": [n - 8, n + 8]}
        float_part = "a part is float32" in (self.after_norm, self.after_linear)
        types = (self.types[0], GgmlType.F32, self.types[2]) if float_part else self.types
        return list(zip(shares.get(self.after_linear, [n, n]), types, strict=False))


blocks = st.builds(
    Block,
    after_norm=st.sampled_from(AFTER_NORM),
    after_linear=st.sampled_from(AFTER_LINEAR),
    types=st.tuples(*[st.sampled_from(TYPES)] * 4),
    width=st.sampled_from([32, 40, 96]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)


class Writer:
    """Writes a plan of blocks; notes the values between ops that may be fused."""

    def __init__(self, seed: int) -> None:
        self.weights = Weights(seed)
        self.builder = PlanBuilder(KvSpec(0, 1, 8), VOCAB)
        self.between: list[Value] = []

    def linear(self, x: Value, *parts: WeightSpec, biases: bool = False, add_to: Value | None = None) -> Value:
        vectors = tuple(self.weights.vector(part.num_outputs) for part in parts) if biases else ()
        return self.builder.linear(x, *parts, biases=vectors, add_to=add_to)

    def matrix(self, num_outputs: int, num_inputs: int, type_: GgmlType) -> WeightSpec:
        return self.weights.matrix(num_outputs, num_inputs, GgmlType.F32 if num_inputs % 32 else type_)

    def block(self, x: Value, block: Block) -> None:
        h = x
        if block.after_norm != "no norm":
            norm = self.weights.vector(16 if block.after_norm == "norms of heads" else WIDTH)
            h = self.builder.rms_norm(x, norm, 1e-5)
            self.between.append(h)
        parts = [self.matrix(n, WIDTH, type_) for n, type_ in block.parts()]
        g = y = self.linear(h, *parts, biases=block.after_linear == "biases")
        if block.after_linear != "no gate":
            y = self.builder.glu(g, block.activation)
            self.between.append(g)
        self.linear(y, self.matrix(WIDTH, y.width, block.types[-1]), add_to=x)
        if block.after_norm == "norm is read again":
            self.linear(h, self.matrix(WIDTH, WIDTH, block.types[0]), add_to=x)
        if block.after_linear == "gate is read again":
            self.linear(g, self.matrix(WIDTH, g.width, block.types[1]), add_to=x)

    def read_all_between(self) -> None:
        """Into nothing: it only keeps their writers from being fused."""
        for value in self.between:
            self.builder.rms_norm(value, self.weights.values(np.ones((1, value.width))), 1.0)
        self.between.clear()


def plan_of(on_tokens: list[Block], on_logits: list[Block], seed: int, *, fusable: bool) -> tuple[Plan, Weights]:
    writer = Writer(seed)
    x = writer.builder.embed(writer.weights.matrix(VOCAB, WIDTH))
    for part in (on_tokens, on_logits):
        for block in part:
            writer.block(x, block)
        if not fusable:
            writer.read_all_between()
        x = writer.builder.take_rows(x) if part is on_tokens else x
    x = writer.builder.rms_norm(x, writer.weights.vector(WIDTH), 1e-5)
    if not fusable:
        writer.between.append(x)
        writer.read_all_between()
    writer.builder.sample(writer.linear(x, writer.weights.matrix(VOCAB, WIDTH, GgmlType.Q8_0)))
    return writer.builder.build(), writer.weights


def logprobs_of(plan: Plan, weights: Weights, backend: str) -> np.ndarray:
    """Of 11 tokens: float32 [11, VOCAB], by id"""
    executor = loaded(plan, weights.tensors, backend)
    rows = [BatchRow(range(3, 14), 0, [0])]
    result = run(executor, make_batch(rows, [Logit(t, num_top=VOCAB) for t in range(11)]))
    executor.free()
    assert result.finite.all()
    out = np.empty((11, VOCAB), np.float32)
    np.put_along_axis(out, result.top_ids[:, :VOCAB], result.top_logprobs[:, :VOCAB], axis=1)
    return out


def assert_fusing_changes_nothing(on_tokens: list[Block], on_logits: list[Block], seed: int) -> None:
    """Readers at the end forbid every fusion, and must not change a bit; and either is near the reference: a value that was
    read after its writer had been fused away would be far off."""
    fused = logprobs_of(*plan_of(on_tokens, on_logits, seed, fusable=True), "native")
    plain = logprobs_of(*plan_of(on_tokens, on_logits, seed, fusable=False), "native")
    np.testing.assert_array_equal(fused, plain)
    want = logprobs_of(*plan_of(on_tokens, on_logits, seed, fusable=True), "reference")
    spread = want.max(axis=1) - want.min(axis=1)
    error = abs(fused - want).max(axis=1) / (1 + spread)
    assert error.max() < 0.1, f"{error.max()}"  # rows are rounded to 127 steps in up to 13 linears


@pytest.mark.parametrize("on_logits", [False, True], ids=["tokens", "logits"])
@pytest.mark.parametrize(
    ("after_norm", "after_linear"),
    [*((norm, "") for norm in AFTER_NORM), *(("", linear) for linear in AFTER_LINEAR[1:])],
)
def test_what_forbids_fusing_is_heeded(after_norm: str, after_linear: str, on_logits: bool) -> None:
    for width in (32, 40):
        block = Block(after_norm, after_linear, TYPES[:4], width, "silu")
        assert_fusing_changes_nothing([] if on_logits else [block], [block] if on_logits else [], seed=width)


@settings(max_examples=30, deadline=None)
@given(on_tokens=st.lists(blocks, max_size=2), on_logits=st.lists(blocks, max_size=2), seed=st.integers(0, 99))
def test_a_plan_computes_the_same_whether_its_ops_can_be_fused_or_not(
    on_tokens: list[Block], on_logits: list[Block], seed: int
) -> None:
    assert_fusing_changes_nothing(on_tokens, on_logits, seed)


def profile_of(shape: Shape) -> dict[str, int]:
    plan, weights = decoder(shape)
    executor = NativeExecutor(profile=True)
    executor.load(plan, weights, LIMITS)
    run(executor, make_batch([BatchRow(range(9), 0, [0])], [Logit(8)]))
    return executor.profile().ns


@pytest.mark.parametrize("bias", [False, True])
def test_norms_and_gates_of_packed_weights_are_fused(bias: bool) -> None:
    """A decoder's steps then spend nothing in these ops."""
    ns = profile_of(Shape(type=GgmlType.Q8_0, bias=bias))
    assert ns["rms_norm"] == ns["glu"] == 0
    assert ns["linear"] > 0
    ns = profile_of(Shape(type=GgmlType.F32, bias=bias))
    assert ns["rms_norm"] > 0
    assert ns["glu"] > 0
