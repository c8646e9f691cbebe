"""Packed weights mean what the file's bytes mean, bit for bit. The decoder is packed.py, the values are those of the `gguf`
package."""

import gguf
import numpy as np
import pytest

from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes
from jilju.formats.quants import dequantize
from tests.native.packed import FAMILIES, STRIP_ROWS, pack, packed_bytes_of, unpack, unpacked
from tests.native.plans import random_blocks

WIDTHS = (32, 96, 160, 576, 640, 896, 1536, 4864)
K_WIDTHS = (256, 512, 768, 1280, 2048)
SCALES_AT = {
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
}


@pytest.fixture(params=tuple(FAMILIES), ids=lambda t: t.name)
def type_(request: pytest.FixtureRequest) -> GgmlType:
    assert isinstance(request.param, GgmlType)
    return request.param


def widths_of(type_: GgmlType) -> tuple[int, ...]:
    return WIDTHS if BLOCK_LAYOUTS[type_].block_elements == 32 else K_WIDTHS


def file_values(type_: GgmlType, data: np.ndarray, num_inputs: int) -> np.ndarray:
    """float32 [rows, K], by the gguf package and by ours"""
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(type_))).astype(np.float32)
    np.testing.assert_array_equal(dequantize(data.reshape(-1), type_, num_inputs), want)
    return want


def test_a_packed_weight_has_the_size_that_its_layout_needs(type_: GgmlType) -> None:
    for num_inputs in widths_of(type_):
        for num_outputs in (1, 8, 13, 16):
            want = -(-num_outputs // STRIP_ROWS) * FAMILIES[type_].strip_bytes(num_inputs)
            assert packed_bytes_of(type_, num_outputs, num_inputs) == want


def test_packed_values_are_the_files(type_: GgmlType) -> None:
    """Every bit of the quants in use, scales of either sign; whole strips, and some that are filled up."""
    rng = np.random.default_rng(type_)
    for num_inputs in widths_of(type_):
        for num_outputs in (1, 7, 8, 13):
            data = random_blocks(rng, type_, num_outputs, num_inputs)
            got = unpacked(type_, data, num_outputs, num_inputs).values()
            np.testing.assert_array_equal(got, file_values(type_, data, num_inputs))


def test_any_bytes_keep_their_values(type_: GgmlType) -> None:
    """Scales of all sizes side by side, subnormal ones among them; what is not finite in the file is not finite packed."""
    rng = np.random.default_rng(type_)
    num_inputs, num_outputs = 512, 400
    data = rng.integers(0, 256, (num_outputs, row_bytes(type_, num_inputs)), np.uint8)
    want = file_values(type_, data, num_inputs)
    with np.errstate(all="ignore"):
        got = unpacked(type_, data, num_outputs, num_inputs).values()
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[finite], want[finite])
    assert not np.isfinite(got[~finite]).any()
    assert not finite.all(), "no scale was NaN or infinite"
    sizes = abs(want[finite & (want != 0)])
    assert sizes.min() < 1e-4
    assert sizes.max() > 1e4


@pytest.mark.parametrize("quants", [0x00, 0x08, 0x80, 0x88, 0xFF], ids=hex)
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-24, -1.0, 65504.0], ids=str)
def test_blocks_of_equal_bytes_keep_their_values(type_: GgmlType, quants: int, scale: float) -> None:
    """Smallest and largest quants (-128 in Q8_0), scales of zero, subnormal, negative and largest."""
    layout = BLOCK_LAYOUTS[type_]
    data = np.full((3, 512 // layout.block_elements * layout.block_bytes), quants, np.uint8)
    for at in SCALES_AT.get(type_, (0,)):
        data.reshape(-1, layout.block_bytes)[:, at : at + 2] = np.array([scale], "<f2").view(np.uint8)
    np.testing.assert_array_equal(unpacked(type_, data, 3, 512).values(), file_values(type_, data, 512))


def test_the_last_strip_is_filled_up_with_rows_of_zeros(type_: GgmlType) -> None:
    data = random_blocks(np.random.default_rng(1), type_, 13, 512)
    rest = unpack(type_, pack(type_, data, 13, 512), 16, 512)
    assert not rest.d[13:].any()
    assert not rest.values()[13:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_spoils_its_row_alone(type_: GgmlType, bad: float) -> None:
    data = random_blocks(np.random.default_rng(2), type_, 8, 512)
    sound = unpacked(type_, data, 8, 512).values()
    num_blocks = 512 // BLOCK_LAYOUTS[type_].block_elements
    for at in SCALES_AT.get(type_, (0,)):
        sick = data.copy()
        sick[3].reshape(num_blocks, -1)[num_blocks // 2, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
        with np.errstate(invalid="ignore"):
            got = unpacked(type_, sick, 8, 512).values()
        assert not np.isfinite(got[3]).all()
        np.testing.assert_array_equal(np.delete(got, 3, axis=0), np.delete(sound, 3, axis=0))
