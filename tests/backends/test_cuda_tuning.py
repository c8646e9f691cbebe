"""Configurations: valid for any matrix and step, of one reduction in invariant mode. Needs no torch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.backends.cuda.tuning import (
    LinearConfig,
    Measured,
    TunedLinear,
    Tuning,
    load_tuning,
    max_parts_values,
    num_parts,
)

SHARED_BYTES = 227 << 10  # of a block on an H100 or H200
POWERS = {16, 32, 64, 128, 256, 512, 1024, 2048, 4096}
widths = st.integers(1, 9000).map(lambda n: 16 * n)


def is_sound(config: LinearConfig, dtype: str, k: int, t: int, glu: bool) -> bool:
    if config.kind == "matmul":
        return True
    weight_bytes = 1 if dtype == "fp8" else 2
    if config.kind == "gemv":
        is_aligned = config.block_k >= 32 * 16 // weight_bytes * config.num_warps
        return t <= 4 and config.block_n >= 2 and config.num_splits == 1 and is_aligned and config.num_stages >= 1
    stage_bytes = config.block_k * (config.block_n * (1 + glu) * weight_bytes + config.block_t * 2)
    return (
        config.block_n in POWERS
        and {config.block_k, config.block_t} <= POWERS
        and config.block_n >= 64
        and config.num_warps in (4, 8)  # whole warpgroups of 64 rows
        and config.num_stages >= 2
        and config.num_stages * stage_bytes <= SHARED_BYTES
        and config.num_splits <= max(1, k // config.block_k)
    )


@given(
    st.sampled_from(["NVIDIA H200", "NVIDIA H100 80GB HBM3", "another"]),
    st.sampled_from(["invariant", "fast"]),
    st.sampled_from(["bf16", "f16", "fp8"]),
    widths,
    widths,
    st.integers(1, 9000),
    st.booleans(),
)
def test_the_rule_of_thumb_holds_for_all_shapes(gpu_name, mode, dtype, n, k, t, glu):
    config = load_tuning(gpu_name).linear(mode, dtype, n, k, t, glu)
    assert is_sound(config, dtype, k, t, glu), config
    assert mode == "fast" or config.kind == "tiles"


@given(
    st.sampled_from(["bf16", "f16", "fp8"]), widths, widths, st.lists(st.integers(1, 9000), min_size=2), st.booleans()
)
def test_invariant_mode_has_one_reduction_for_a_matrix(dtype, n, k, steps, glu):
    configs = [load_tuning("NVIDIA H200").linear("invariant", dtype, n, k, t, glu) for t in steps]
    assert len({(config.kind, config.block_k, config.num_splits) for config in configs}) == 1


@pytest.mark.parametrize("gpu_name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_a_shipped_table_is_sound(gpu_name):
    tuning = load_tuning(gpu_name)
    if not tuning.linears:
        pytest.skip(f"{gpu_name} has no table")
    for entry in tuning.linears:
        tokens = [measured.num_tokens for measured in entry.best]
        assert tokens == sorted(set(tokens)) and tokens
        for measured in entry.best:
            assert is_sound(measured.config, entry.dtype, entry.num_columns, measured.num_tokens, entry.glu), measured
        if entry.mode == "invariant":
            steps = {*tokens, *range(1, 9000, 37)}
            shape = entry.dtype, entry.num_rows, entry.num_columns
            configs = [tuning.linear("invariant", *shape, t, entry.glu) for t in steps]
            assert {config.kind for config in configs} == {"tiles"}
            assert len({(config.block_k, config.num_splits) for config in configs}) == 1, entry


def small_table(*tokens: int) -> Tuning:
    best = tuple(Measured(t, 1.0, LinearConfig("tiles", 64, 32, max(16, t), 2, 4, 3)) for t in tokens)
    return Tuning("a", (TunedLinear("invariant", "bf16", 256, 512, False, best),))


def test_the_next_measured_step_above_counts():
    tuning = small_table(1, 32, 128)
    assert [tuning.linear("invariant", "bf16", 256, 512, t, False).block_t for t in (1, 2, 32, 33, 5000)] == [
        16,
        32,
        32,
        128,
        128,
    ]


def test_beyond_a_table_of_short_steps_the_rule_keeps_its_reduction():
    config = small_table(1, 32).linear("invariant", "bf16", 256, 512, 4000, False)
    assert (config.block_k, config.num_splits, config.block_t) == (32, 2, 128)


def test_a_table_is_of_its_matrix_alone():
    tuning = small_table(1)
    assert tuning.linear("invariant", "f16", 256, 512, 1, False).block_k == 32  # as fast as bf16
    for shape in (("fp8", 256, 512), ("bf16", 512, 512), ("bf16", 256, 256)):
        assert tuning.linear("invariant", *shape, 1, False) == Tuning("b").linear("invariant", *shape, 1, False)


def test_parts_are_made_while_tiles_are_few_and_the_workspace_holds_the_most():
    tuning = Tuning("any")
    small = tuning.linear("invariant", "bf16", 4096, 4096, 1, False)
    large = tuning.linear("invariant", "bf16", 4096, 4096, 4096, False)
    assert num_parts(small, 1, 4096) == small.num_splits == large.num_splits > 1
    assert num_parts(large, 4096, 4096) == 1
    most = max_parts_values(tuning, "invariant", "bf16", 4096, 4096, 200)
    sizes = []
    for t in range(1, 201):
        config = tuning.linear("invariant", "bf16", 4096, 4096, t, False)
        sizes.append(num_parts(config, t, 4096) * t * 4096)
    assert most == max(sizes) and sizes.index(most) < 199
