"""linear bit for bit: native on every instruction set against packed.py, which does the same operations in numpy."""

import numpy as np
import pytest

from jilju.backends.native import _kernels
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes
from tests.native.packed import FAMILIES, float_linear, linear, native_linear, quantize_rows, unpacked
from tests.native.plans import FLOATS, random_blocks

TYPES = tuple(FAMILIES)
NUM_OUTPUTS = 19  # two strips and a piece of one
WIDTHS = (32, 96, 160, 256, 288, 576, 640, 896, 1536)
K_WIDTHS = (256, 768, 1536)


def available(isa: str) -> bool:
    try:
        _kernels.kernel_set(isa)
    except _kernels.Unsupported:
        return False
    return True


ISAS = tuple(isa for isa in ("generic", "avx2", "avx512") if available(isa))


def widths_of(type_: GgmlType) -> tuple[int, ...]:
    return WIDTHS if BLOCK_LAYOUTS[type_].block_elements == 32 else K_WIDTHS


def is_fused(isa: str) -> bool:
    return isa != "generic"


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """Of NaNs, that they are some."""
    differ = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        pytest.fail(f"{what}: {differ.sum()} of {differ.size} differ; at {at}: {got[at]!r}, want {want[at]!r}")


def random_rows(rng: np.random.Generator, num_rows: int, num_inputs: int) -> np.ndarray:
    """Rows of every size, some columns far beyond the others, as activations have them."""
    x = rng.standard_normal((num_rows, num_inputs)) * 10.0 ** rng.integers(-6, 7, (num_rows, 1))
    x[rng.random(x.shape) < 0.01] *= 50
    return x.astype(np.float32)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_any_number_of_rows_gives_the_exact_bits(isa: str, type_: GgmlType) -> None:
    """One to eight columns of a kernel, groups of eight and a rest, and row tiles of more than one."""
    rng = np.random.default_rng(type_)
    for num_inputs in widths_of(type_):
        data = random_blocks(rng, type_, NUM_OUTPUTS, num_inputs)
        x = random_rows(rng, 43, num_inputs)
        want = linear(unpacked(type_, data, NUM_OUTPUTS, num_inputs), x, fused=is_fused(isa))
        for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 43):
            got = native_linear(isa, type_, data, x[:num_rows])
            assert_same_bits(got, want[:num_rows], f"{num_rows} rows of {num_inputs}")
        assert_same_bits(native_linear(isa, type_, data, x, num_threads=3), want, f"three threads, {num_inputs}")


@pytest.mark.parametrize("type_", FLOATS, ids=lambda t: t.name)
def test_float_formats_give_the_exact_bits(isa: str, type_: GgmlType) -> None:
    """K within one block of the kernel, and 1541 in several; both with a tail."""
    rng = np.random.default_rng(type_)
    for num_inputs in (77, 1541):
        data = random_blocks(rng, type_, NUM_OUTPUTS, num_inputs)
        x = random_rows(rng, 17, num_inputs)
        want = float_linear(data.reshape(-1), type_, x, fused=is_fused(isa))
        for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 17):
            assert_same_bits(native_linear(isa, type_, data, x[:num_rows]), want[:num_rows], f"{num_rows} rows")


@pytest.mark.parametrize("type_", list(GgmlType), ids=lambda t: t.name)
def test_avx2_and_avx512_give_the_same_bits(type_: GgmlType) -> None:
    if not {"avx2", "avx512"} <= set(ISAS):
        pytest.skip(f"this CPU has {', '.join(ISAS)}")
    rng = np.random.default_rng(5)
    data, x = random_blocks(rng, type_, 300, 768), random_rows(rng, 70, 768)
    one, other = (native_linear(isa, type_, data, x, num_threads=2) for isa in ("avx2", "avx512"))
    assert_same_bits(one, other, "avx2 and avx512")


# --- extremes ---------------------------------------------------------------------------------------------------------


def extreme_blocks(type_: GgmlType, num_inputs: int) -> np.ndarray:
    """Rows whose quants are all smallest or all largest, and alternate; whose integer scales are at either end."""
    layout, family = BLOCK_LAYOUTS[type_], FAMILIES[type_]
    rows = []
    for quants in (0x00, 0xFF, 0x0F, 0x80, 0x7F, 0x81):
        for integer_scales in (0xFF, 0x80, 0x7F) if family.head else (0,):
            for scale in (1.0, -1.0):
                block = np.full(layout.block_bytes, quants, np.uint8)
                if type_ is GgmlType.Q6_K:
                    block[192:208] = integer_scales
                elif family.head:
                    block[4:16] = integer_scales
                at = slice(208, 210) if type_ is GgmlType.Q6_K else slice(0, 2)
                block[at] = np.array([scale], "<f2").view(np.uint8)
                if family.offsets:
                    block[2:4] = np.array([scale], "<f2").view(np.uint8)
                rows.append(np.tile(block, num_inputs // layout.block_elements))
    return np.stack(rows)


def extreme_rows(num_inputs: int) -> np.ndarray:
    """All +-127 when quantized: of one sign, alternating by one, two, four and 16 columns, and at random."""
    column = np.arange(num_inputs)
    signs = [np.ones(num_inputs), -np.ones(num_inputs)]
    signs += [np.where(column // run % 2, -1, 1) for run in (1, 2, 4, 16, 32)]
    signs += [np.random.default_rng(3).choice([-1, 1], num_inputs)]
    return np.stack(signs).astype(np.float32)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_nothing_saturates_or_wraps_at_the_extremes(isa: str, type_: GgmlType) -> None:
    """All quants at an end, all activations +-127, integer scales at their ends: still the exact sums, by any number of columns."""
    for num_inputs in (32, 160, 576) if BLOCK_LAYOUTS[type_].block_elements == 32 else (256, 512):
        data = extreme_blocks(type_, num_inputs)
        x = extreme_rows(num_inputs)
        want = linear(unpacked(type_, data, len(data), num_inputs), x, fused=is_fused(isa))
        assert np.isfinite(want).all()
        for num_rows in range(1, len(x) + 1):
            got = native_linear(isa, type_, data, x[:num_rows])
            assert_same_bits(got, want[:num_rows], f"{num_rows} rows of {num_inputs}")


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_the_extremes_are_extreme(type_: GgmlType) -> None:
    """Guards the test above: quants, scales and activations do reach the ends of what a file and a row can hold."""
    bits, zero = FAMILIES[type_].num_bits, FAMILIES[type_].zero
    q = unpacked(type_, extreme_blocks(type_, 256), len(extreme_blocks(type_, 256)), 256).q
    if type_ is GgmlType.Q8_0:
        assert {-128, -127, 127} <= set(q.flat)
    elif type_ is GgmlType.Q6_K:
        assert (q.min(), q.max()) == (127 * -zero, 128 * zero)
    else:
        assert (q.min(), q.max()) == (-zero, 2**bits - 1 - zero)
    xq, _, _ = quantize_rows(extreme_rows(256))
    assert (abs(xq) == 127).all()


# --- activations that are no ordinary numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_", list(GgmlType), ids=lambda t: t.name)
def test_a_number_that_is_not_finite_reaches_its_whole_row_and_no_other(isa: str, type_: GgmlType, bad: float) -> None:
    rng = np.random.default_rng(8)
    num_inputs = 768
    data, x = random_blocks(rng, type_, NUM_OUTPUTS, num_inputs), random_rows(rng, 11, num_inputs)
    healthy = native_linear(isa, type_, data, x)
    for row, column in ((0, 0), (4, 31), (7, 300), (8, 767), (10, 512)):
        sick = x.copy()
        sick[row, column] = bad
        got = native_linear(isa, type_, data, sick)
        assert not np.isfinite(got[row]).any(), f"row {row}, column {column}"
        others = np.arange(len(x)) != row
        assert_same_bits(got[others], healthy[others], "the other rows")


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_zeros_and_the_smallest_and_largest_numbers_give_the_exact_bits(isa: str, type_: GgmlType) -> None:
    rng = np.random.default_rng(9)
    num_inputs = 768
    data = random_blocks(rng, type_, NUM_OUTPUTS, num_inputs)
    one = rng.standard_normal(num_inputs).astype(np.float32)
    largest = np.finfo(np.float32).max
    ends = (1e-45, 1e-38, 1e-31, 1e-30, 1.1e-30, 1e-20, 1e30, largest)
    rows = [
        np.zeros(num_inputs),
        -np.zeros(num_inputs),
        *(one / abs(one).max() * end for end in ends),
        np.full(num_inputs, largest),
    ]
    gap = one.copy()
    gap[: num_inputs // 2] = 0  # blocks of zeros beside others
    halves = np.where(np.arange(num_inputs) % 2, 0.5, 127) * 1.0  # products that end in .5: to even
    x = np.stack([*rows, gap, halves, (np.arange(num_inputs) % 255 - 127) + 0.5]).astype(np.float32)
    want = linear(unpacked(type_, data, NUM_OUTPUTS, num_inputs), x, fused=is_fused(isa))
    assert not want[:2].any()
    got = native_linear(isa, type_, data, x)
    assert_same_bits(got, want, "extreme rows")


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_a_sum_beyond_float32_is_infinite_in_its_own_row(isa: str, type_: GgmlType) -> None:
    """Outputs that overflow must not come out as large finite numbers, nor touch the row beside them."""
    data = extreme_blocks(type_, 768)
    x = np.stack([np.full(768, np.finfo(np.float32).max), np.ones(768)]).astype(np.float32)
    want = linear(unpacked(type_, data, len(data), 768), x, fused=is_fused(isa))
    assert np.isinf(want[0]).any()
    assert np.isfinite(want[1]).all()
    assert_same_bits(native_linear(isa, type_, data, x), want, "overflow")


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_weights_that_are_not_finite_spoil_their_own_output(isa: str, type_: GgmlType) -> None:
    """Random bytes as weights: whatever they are, each output is its own row's, and NaN where that row has a NaN scale."""
    rng = np.random.default_rng(10)
    data = rng.integers(0, 256, (64, row_bytes(type_, 768)), np.uint8)
    x = random_rows(rng, 3, 768)
    weight = unpacked(type_, data, 64, 768)
    want = linear(weight, x, fused=is_fused(isa))
    got = native_linear(isa, type_, data, x)
    assert_same_bits(got, want, "random bytes")
    spoilt = ~np.isfinite(weight.d).all(axis=1)
    assert spoilt.any(), "no scale of 64 rows is NaN or infinite"
    assert not np.isfinite(got[:, spoilt]).any()
