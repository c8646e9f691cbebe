"""The cost model: grouped and kept, it says what the plain sum over the plan's ops says."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends.roofline import llama_plan, tiny_plan
from jilju.formats.ggml import GgmlType
from jilju.plan import KvSpec, Plan, PlanBuilder, StepShape, WeightSpec
from jilju.plan.cost import H100_SXM, MAX_TALLIES, TWO_CORE_CPU, Machine, PlanCost

SMOLLM2_135M = llama_plan(30, 576, 9, 3, 1536, 49152, body=GgmlType.Q4_1, head=GgmlType.Q8_0)
LLAMA_8B = llama_plan(32, 4096, 32, 8, 14336, 128256, body=GgmlType.BF16, head=GgmlType.BF16, is_tied=False)


def windowed_plan() -> Plan:
    """Two layers of attention in a window of 5 keys and one without."""
    b = PlanBuilder(KvSpec(3, 1, 4), 32)
    table = WeightSpec("embed", GgmlType.F32, 32, 8)
    x = b.embed(table)
    for layer, window in enumerate((5, 0, 5)):
        q, k, v = b.split(b.linear(x, WeightSpec(f"{layer}.qkv", GgmlType.F32, 16, 8)), 8, 4, 4)
        h = b.attention(q, k, v, layer, 2, 0.5, window)
        x = b.linear(h, WeightSpec(f"{layer}.o", GgmlType.F32, 8, 8), add_to=x)
    b.sample(b.linear(b.take_rows(x), table))
    return b.build()


PLANS = [tiny_plan(7), windowed_plan(), SMOLLM2_135M, LLAMA_8B]
MACHINES = [TWO_CORE_CPU, H100_SXM, Machine(1e9, 1e12, 0.5, 0.9, 0.0, 0.0), Machine(1e15, 1e9, 0.5, 0.9, 1e3, 7e3)]


@st.composite
def shapes(draw):
    rows = draw(
        st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 1, 1, 2, 17, 512])), min_size=1, max_size=40)
    )
    starts, counts = zip(*rows, strict=True)
    if draw(st.booleans()):
        counts = (1,) * len(counts)
    return StepShape(starts, counts, draw(st.integers(0, sum(counts))))


@settings(max_examples=60, deadline=None)
@given(st.lists(shapes(), min_size=1, max_size=4))
def test_a_cost_is_that_of_the_plain_sum_over_ops(steps):
    for plan in PLANS:
        cost = PlanCost(plan, 2)
        fewer = [dataclasses.replace(shape, num_logits=0) for shape in steps]
        for shape in steps + fewer + steps:  # some of it is known then
            assert cost.totals(shape) == (plan.flops(shape), plan.bytes(shape, 2))
            for m in MACHINES:
                times = [
                    max(
                        1e9 * op.flops(shape) / (m.eta_c * m.flops_per_s),
                        1e9 * op.bytes(shape, 2) / (m.eta_b * m.bytes_per_s),
                    )
                    for op in plan.ops
                ]
                expected = sum(times) + m.base_ns + m.row_ns * len(shape.starts)
                # A kind is multiplied where the plain sum adds: some hundred roundings of 2^-53, and one to whole ns.
                assert cost.step_ns(shape, m) == pytest.approx(expected, rel=1e-12, abs=0.51)


def test_costs_that_are_kept_have_a_bound():
    plan = tiny_plan(7)
    cost = PlanCost(plan, 2)
    shapes = [StepShape((3,), (count,), 1) for count in range(1, MAX_TALLIES + 20)]
    for shape in shapes:
        cost.totals(shape)
    assert len(cost._tallies) <= MAX_TALLIES
    for shape in (shapes[0], shapes[-1]):
        assert cost.totals(shape) == (plan.flops(shape), plan.bytes(shape, 2))


def test_the_plans_of_known_models_have_their_sizes():
    assert SMOLLM2_135M.kv.elements_per_token * 2 == 23_040
    norms = 4 * 576 * 61  # float32
    assert SMOLLM2_135M.weight_bytes - norms == 106_168_320 * 5 // 8 + 49152 * 576 * 34 // 32
    assert LLAMA_8B.kv.elements_per_token * 2 == 131_072
    decode = StepShape((0,), (1,), 1)
    assert LLAMA_8B.bytes(decode, 2) == pytest.approx(15.01e9, rel=2e-3)
    assert SMOLLM2_135M.flops(decode) == pytest.approx(0.269e9, rel=0.01)


def test_decode_is_bound_by_memory_and_prefill_by_compute():
    cost = PlanCost(LLAMA_8B, 2)
    decode, prefill = StepShape((0,), (1,), 1), StepShape((0,), (4096,), 1)
    twice_the_bandwidth = Machine(989e12, 6.7e12, 0.8, 0.8, 0.0, 0.0)
    machine = Machine(989e12, 3.35e12, 0.8, 0.8, 0.0, 0.0)
    assert cost.step_ns(decode, machine) > 15e9 / (0.8 * 3.35e12) * 1e9
    assert cost.step_ns(decode, twice_the_bandwidth) == pytest.approx(cost.step_ns(decode, machine) / 2, rel=1e-3)
    assert cost.step_ns(prefill, twice_the_bandwidth) > 0.8 * cost.step_ns(prefill, machine)
