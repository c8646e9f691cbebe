"""Number formats: bytes mean what the `gguf` package says, bit for bit, and packing loses no more than it must."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes
from jilju.formats.quants import CHUNK_ELEMENTS, dequantize, first_block_not_finite, quantize

PACKED = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0,
)  # fmt: skip


def oracle(type_: GgmlType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(type_))


@pytest.mark.parametrize("type_", GgmlType)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 5), num_blocks=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_any_bytes_unpack_bit_for_bit(type_: GgmlType, seed: int, num_rows: int, num_blocks: int) -> None:
    layout = BLOCK_LAYOUTS[type_]
    raw = np.random.default_rng(seed).integers(0, 256, (num_rows, num_blocks * layout.block_bytes), np.uint8)
    with np.errstate(all="ignore"):  # random scales may be NaN or infinite, and must come out as such
        want = gguf.quants.dequantize(raw, oracle(type_)).astype(np.float32)
    got = dequantize(raw.reshape(-1), type_, num_blocks * layout.block_elements)
    assert got.dtype == np.float32
    assert got.shape == (num_rows, num_blocks * layout.block_elements)
    assert np.array_equal(got.view(np.uint32), np.ascontiguousarray(want).view(np.uint32))


@pytest.mark.parametrize("type_", GgmlType)
def test_block_layouts_are_those_of_the_gguf_package(type_: GgmlType) -> None:
    assert tuple(BLOCK_LAYOUTS[type_]) == gguf.GGML_QUANT_SIZES[oracle(type_)]


def test_more_rows_than_one_chunk() -> None:
    """The loop over chunks joins without a seam."""
    columns, rows = 256, CHUNK_ELEMENTS // 256 * 2 + 3
    raw = np.random.default_rng(0).integers(0, 100, rows * row_bytes(GgmlType.Q6_K, columns), np.uint8)
    whole = dequantize(raw, GgmlType.Q6_K, columns)
    per_row = row_bytes(GgmlType.Q6_K, columns)
    for row in (0, rows // 2 - 1, rows // 2, rows - 1):
        part = dequantize(raw[row * per_row : (row + 1) * per_row], GgmlType.Q6_K, columns)
        assert np.array_equal(whole[row], part[0], equal_nan=True)


def test_bytes_that_are_no_whole_rows_are_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="no multiple of a row"):
        dequantize(np.zeros(19, np.uint8), GgmlType.Q4_0, 32)
    with pytest.raises(AssertionError, match="no multiple of Q4_0's block"):
        dequantize(np.zeros(18, np.uint8), GgmlType.Q4_0, 33)
    with pytest.raises(AssertionError, match="no packing into Q6_K"):
        quantize(np.zeros((1, 256), np.float32), GgmlType.Q6_K)


def sample(seed: int) -> np.ndarray:
    """Rows of many sizes, and the special ones: zeros, one value, one outlier, ties."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((12, 64)) * 10.0 ** rng.integers(-4, 4, (12, 1))).astype(np.float32)
    x[0], x[1], x[2, 5], x[3] = 0, -1.5, 300, np.arange(64) / 2
    return x


@pytest.mark.parametrize("type_", PACKED)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_packing_is_that_of_the_gguf_package(type_: GgmlType, seed: int) -> None:
    x = sample(seed)
    want = np.ascontiguousarray(gguf.quants.quantize(x, oracle(type_))).view(np.uint8).reshape(-1)
    assert np.array_equal(quantize(x, type_), want)


# Steps between neighbouring levels over the spread of a block; half a step is lost by rounding, as much again at the end
# that has one level less (formats without m), and the scale's own rounding to float16 moves a level by 2^-11 of itself.
LEVELS = {GgmlType.Q4_0: 8, GgmlType.Q4_1: 15, GgmlType.Q5_0: 16, GgmlType.Q5_1: 31, GgmlType.Q8_0: 127}


@pytest.mark.parametrize("type_", LEVELS)
def test_a_round_trip_loses_at_most_a_step(type_: GgmlType) -> None:
    x = np.random.default_rng(5).standard_normal((40, 128)).astype(np.float32)
    back = dequantize(quantize(x, type_), type_, 128)
    blocks = x.reshape(-1, 32)
    with_minimum = type_ in (GgmlType.Q4_1, GgmlType.Q5_1)
    spread = np.ptp(blocks, axis=1) if with_minimum else abs(blocks).max(axis=1)
    half_steps = 1 if with_minimum or type_ is GgmlType.Q8_0 else 2
    bound = half_steps * spread / LEVELS[type_] / 2 + 2**-10 * abs(blocks).max(axis=1)
    error = abs(back - x).reshape(-1, 32).max(axis=1)
    worst = int(np.argmax(error - bound))
    assert (error <= bound).all(), f"block {worst}: lost {error[worst]}, bound {bound[worst]}"


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    x = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, np.nan, np.inf, -np.inf, 3.4e38]], np.float32)
    back = dequantize(quantize(x, GgmlType.BF16), GgmlType.BF16, 7)[0]
    assert back[:3].tolist() == [1.0, 1.0, 1 + 2**-6]
    assert np.isnan(back[3])
    assert back[4:].tolist() == [np.inf, -np.inf, np.inf]


@pytest.mark.parametrize("type_", GgmlType)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_number_that_is_not_finite_is_found(type_: GgmlType, seed: int) -> None:
    """Found exactly where unpacking meets one; random bytes have a bad scale in about one block of 32 or none at all."""
    layout = BLOCK_LAYOUTS[type_]
    raw = np.random.default_rng(seed).integers(0, 256, 8 * layout.block_bytes, np.uint8)
    bad = ~np.isfinite(dequantize(raw, type_, layout.block_elements)).all(axis=1)
    assert first_block_not_finite(raw, type_) == (int(bad.argmax()) if bad.any() else None)
    raw[: 4 * layout.block_bytes] = 0  # zero scales are finite
    bad[:4] = False
    assert first_block_not_finite(raw, type_) == (int(bad.argmax()) if bad.any() else None)
