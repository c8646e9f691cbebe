"""Every number format unpacks to the very values of formats/quants.py on every instruction set; exp; Philox."""

import numpy as np
import pytest

from jilju.backends.native import _kernels
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType
from jilju.formats.quants import dequantize
from tests.native.plans import FLOATS, random_blocks

ISAS = ("generic", "avx2", "avx512", "neon")


def available(isa: str) -> bool:
    try:
        _kernels.kernel_set(isa)
    except _kernels.Unsupported:
        return False
    return True


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not available(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize("type_", list(GgmlType), ids=lambda t: t.name)
def test_unpacked_values_equal_the_definition(isa: str, type_: GgmlType) -> None:
    rng = np.random.default_rng(type_)
    columns = 13 if type_ in FLOATS else 3 * BLOCK_LAYOUTS[type_].block_elements
    data = random_blocks(rng, type_, 50, columns)
    out = np.full((50, columns), np.nan, np.float32)
    _kernels.unpack(isa, type_, data.reshape(-1), out)
    want = dequantize(data.reshape(-1), type_, columns).reshape(50, columns)
    np.testing.assert_array_equal(out, want)  # a zero may have either sign, all else is equal in every bit


def test_all_half_precision_numbers_unpack_exactly(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))].reshape(-1, 1)  # 63488 = 8 * 7936
    out = np.empty((len(bits) // 8, 8), np.float32)
    _kernels.unpack(isa, GgmlType.F16, bits.view(np.uint8).reshape(-1), out)
    np.testing.assert_array_equal(
        out.reshape(-1).view(np.uint32), bits.reshape(-1).view(np.float16).astype(np.float32).view(np.uint32)
    )


def test_exp_is_within_two_units_and_exact_at_its_ends(isa: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-87.3, 88.3, 100_000), rng.uniform(-1, 1, 50_001)]).astype(np.float32)
    out = np.empty_like(x)
    _kernels.exp(isa, x, out)
    want = np.exp(x.astype(np.float64))
    error = np.abs(out - want) / np.spacing(want.astype(np.float32))
    worst = np.argmax(error)
    assert error[worst] <= 2, f"exp({x[worst]}) = {out[worst]}, want {want[worst]}"

    ends = np.array([-np.inf, -1e30, -88.0, 0.0, np.nan], np.float32)
    got = np.empty_like(ends)
    _kernels.exp(isa, ends, got)
    np.testing.assert_array_equal(got, np.array([0, 0, 0, 1, np.nan], np.float32))


def test_philox_gives_the_known_answers() -> None:
    """The three known-answer vectors of Random123 for philox4x32-10."""
    ones, pi = 0xFFFFFFFF, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert _kernels.philox4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _kernels.philox4x32_10([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert _kernels.philox4x32_10(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
