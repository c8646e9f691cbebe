"""Linears against float64, and the law of invariant mode: a row's bits do not depend on the step around it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.glu import glu
from jilju.backends.cuda.kernels.linear import FP8, LinearConfig, Quantized, linear, linear_glu, quantize
from jilju.backends.cuda.kernels.linear_tiles import widened
from jilju.backends.cuda.tuning import load_tuning, num_parts

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
SLOPE = 1.13  # the steepest that silu and gelu_tanh rise


def matrix(num_rows, num_columns, dtype, half, device, *, whole_numbers=False):
    """(weight, scale or None, its values in float64); whole numbers are so small that any order of summation is exact."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_columns)
    if whole_numbers:
        values = torch.randint(-2, 3, (num_rows, num_columns), generator=generator).float()
    else:
        values = torch.randn(num_rows, num_columns, generator=generator)
    if dtype != "fp8":
        weight = values.to(half)
        return weight.to(device), None, weight.double()
    scale = torch.full((num_rows,), 0.5) if whole_numbers else values.abs().amax(1) / 448
    weight = (values / scale[:, None]).to(FP8)
    return weight.to(device), scale.to(device), weight.double() * scale.double()[:, None]


def tokens(num_tokens, num_columns, half, *, whole_numbers=False):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_columns)
    if whole_numbers:
        return torch.randint(-2, 3, (num_tokens, num_columns), generator=generator).to(half)
    return torch.randn(num_tokens, num_columns, generator=generator).to(half)


def sum_bound(x, values):
    """Of a product summed in float32: each addition and each scale rounds once, tensor cores by cutting off (2^-23)."""
    return (x.shape[1] + 4) * 2.0**-23 * (x.double().abs() @ values.abs().T)


HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative


def rounding(dtype, device):
    """Relative, of a store. A GPU rounds; the interpreter cuts off."""
    return HALF_ULP[dtype] * (1 if device == "cuda" else 2)


def assert_within(got, want, bound):
    error = (got.double().cpu() - want).abs() - bound
    worst = divmod(int(error.argmax()), want.shape[1])
    assert (error <= 0).all(), (
        f"at {worst}: {got[worst].item()}, float64 {want[worst].item()}, bound {bound[worst].item()}"
    )


CODES = torch.arange(256, dtype=torch.uint8)
FINITE = (CODES & 0x7F) != 0x7F


def test_the_bits_of_e4m3_move_to_where_bfloat16_has_them():
    """The arithmetic of `widened`, here on one number at a time."""
    moved = (CODES.numpy().view(np.int8).astype(np.int16) << 4) & np.int16(-0x7810)  # 0x87f0
    values = (moved.astype(np.uint16).astype(np.uint32) << 16).view(np.float32) * np.float32(2.0**120)
    want = CODES.view(FP8).float().numpy()
    assert np.array_equal(values[FINITE], want[FINITE]) and np.array_equal(np.signbit(values), CODES.numpy() >= 128)
    assert (abs(values[~FINITE]) == 480).all()


@triton.jit
def widened_kernel(weights, out):
    places = tl.arange(0, 512)
    tl.store(out + places, widened(tl.load(weights + places), out.dtype.element_ty))


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_all_of_e4m3_is_widened_exactly(half, device):
    codes = torch.cat([CODES, CODES.roll(1)])  # each first and second of a pair
    out = torch.empty(512, dtype=half, device=device)
    widened_kernel[(1,)](codes.view(FP8).to(device), out)
    finite = torch.cat([FINITE, FINITE.roll(1)])
    got, want = out.cpu()[finite], codes.view(FP8).to(half)[finite]
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))  # the sign of zero too


def parts_of(x, weight, scale, config, num, device):
    out = torch.full((num, x.shape[0], weight.shape[0]), float("nan"), device=device)
    linear(x.to(device), weight, scale, out, config)
    return out


def in_order(parts):
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


GEMV = LinearConfig("gemv", block_n=8, block_k=512, num_warps=1, num_stages=1)
TILES = LinearConfig("tiles", block_n=64, block_k=64, block_t=16, num_splits=3, num_warps=4, num_stages=3)
TMA = LinearConfig("tiles", 64, 64, 16, num_splits=3, num_warps=4, num_stages=3, tma=True)
SHAPES = [(1, 40, 96), (2, 64, 1024), (3, 70, 1100), (4, 72, 512)]  # T, N, K: multiples of the blocks and not


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("dtype", ["half", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", [GEMV, TILES], ids=lambda config: config.kind)
def test_a_linear_stays_within_the_rounding_bound(config, shape, dtype, half, device):
    num_tokens, num_rows, num_columns = shape
    weight, scale, values = matrix(num_rows, num_columns, dtype, half, device)
    x = tokens(num_tokens, num_columns, half)
    got = parts_of(x, weight, scale, config, 1, device)[0]
    assert_within(got, x.double() @ values.T, sum_bound(x, values))


@pytest.mark.parametrize("shape", [(33, 130, 200), (70, 64, 256)], ids=str)
@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_tiles_of_many_tokens(shape, dtype, device):
    num_tokens, num_rows, num_columns = shape
    weight, scale, values = matrix(num_rows, num_columns, dtype, torch.bfloat16, device)
    x = tokens(num_tokens, num_columns, torch.bfloat16)
    config = LinearConfig("tiles", block_n=128, block_k=64, block_t=32, num_splits=2, num_warps=8, num_stages=3)
    got = parts_of(x, weight, scale, config, 1, device)[0]
    assert_within(got, x.double() @ values.T, sum_bound(x, values))


@pytest.mark.parametrize("dtype", ["half", "fp8"])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 5])
def test_splits_inline_have_the_bits_of_the_parts_summed(num_splits, dtype, device):
    """5 splits of 7 blocks are 2, 2, 2, 1 and none."""
    weight, scale, _ = matrix(130, 7 * 64 - 10, dtype, torch.bfloat16, device)
    x = tokens(20, 7 * 64 - 10, torch.bfloat16)
    config = LinearConfig("tiles", 64, 64, 16, num_splits, num_warps=4, num_stages=3)
    parts = parts_of(x, weight, scale, config, num_splits, device)
    assert torch.equal(in_order(parts), parts_of(x, weight, scale, config, 1, device)[0])


@pytest.mark.parametrize("dtype", ["half", "fp8"])
@pytest.mark.parametrize(
    "shape", [(20, 130, 7 * 64 - 16), (3, 70, 1100)], ids=str
)  # the second's fp8 rows are not of 16 bytes
def test_the_copy_engine_brings_the_same_tiles(shape, dtype, device):
    num_tokens, num_rows, num_columns = shape
    weight, scale, _ = matrix(num_rows, num_columns, dtype, torch.bfloat16, device)
    x = tokens(num_tokens, num_columns, torch.bfloat16)
    for num in (1, 3):
        by_pointers = parts_of(x, weight, scale, TILES, num, device)
        assert torch.equal(parts_of(x, weight, scale, TMA, num, device), by_pointers)
    by_pointers, by_engine = (torch.empty(num_tokens, num_rows // 2, dtype=x.dtype, device=device) for _ in range(2))
    linear_glu(x.to(device), weight, scale, by_pointers, TILES, "silu")
    linear_glu(x.to(device), weight, scale, by_engine, TMA, "silu")
    assert torch.equal(by_engine, by_pointers)


@pytest.mark.parametrize("dtype", ["half", "fp8"])
@pytest.mark.parametrize("glued", [False, True], ids=["linear", "glu"])
def test_a_row_has_the_same_bits_in_every_step(dtype, glued, device):
    """The configurations of invariant mode, whatever T. In the interpreter the products are numpy's, whose order of
    summation follows the shape: there the values are such that only a wrong or a missing product could change the bits."""
    on_gpu = device == "cuda"
    num_rows, num_columns, longest = (4096, 2048, 300) if on_gpu else (192, 512, 130)
    weight, scale, _ = matrix(num_rows, num_columns, dtype, torch.bfloat16, device, whole_numbers=not on_gpu)
    x = tokens(longest, num_columns, torch.bfloat16, whole_numbers=not on_gpu)
    tuning = load_tuning("NVIDIA H200")

    def run(rows):
        config = tuning.linear(
            "invariant", "fp8" if dtype == "fp8" else "bf16", num_rows, num_columns, len(rows), glued
        )
        if not glued:
            return in_order(parts_of(rows, weight, scale, config, num_parts(config, len(rows), num_rows), device))
        out = torch.empty(len(rows), num_rows // 2, dtype=rows.dtype, device=device)
        linear_glu(rows.to(device), weight, scale, out, config, "silu")
        return out

    want = run(x)
    for first, count in ((0, 1), (7, 1), (1, 2), (3, 16), (5, 17), (60, 64), (2, 65), (0, 128), (longest - 1, 1)):
        assert torch.equal(run(x[first : first + count]), want[first : first + count]), f"{count} tokens from {first}"
    neighbours = x.clone()
    neighbours[1:] = -3.0
    assert torch.equal(run(neighbours)[0], want[0])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", ["half", "fp8"])
@pytest.mark.parametrize("config", [GEMV, TILES], ids=lambda config: config.kind)
@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_a_glu_behind_its_linear(config, dtype, activation, half, device):
    weight, scale, values = matrix(2 * 70, 224, dtype, half, device)
    values *= 0.25  # into the curved part of the activation
    weight, scale = (weight, scale * 0.25) if scale is not None else (weight * 0.25, None)
    x = tokens(3, 224, half)
    out = torch.empty(3, 70, dtype=half, device=device)
    linear_glu(x.to(device), weight, scale, out, config, activation)

    gate, up = (x.double() @ values.T).chunk(2, dim=1)
    gate_bound, up_bound = sum_bound(x, values).chunk(2, dim=1)
    activated = (
        torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    )
    bound = SLOPE * gate_bound * (up.abs() + up_bound) + activated.abs() * up_bound
    bound += (rounding(half, device) + 2.0**-18) * (activated * up).abs() + 2.0**-24
    assert_within(out, activated * up, bound)


@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_a_fused_glu_has_the_bits_of_a_linear_and_a_glu(dtype, device):
    weight, scale, _ = matrix(2 * 70, 200, dtype, torch.bfloat16, device)
    x = tokens(20, 200, torch.bfloat16).to(device)
    parts = parts_of(x, weight, scale, TILES, TILES.num_splits, device)
    fused, apart = (torch.empty(20, 70, dtype=torch.bfloat16, device=device) for _ in range(2))
    linear_glu(x, weight, scale, fused, TILES, "silu")
    glu(parts, apart, "silu")
    assert torch.equal(fused, apart)


def test_matmul_of_half(device):
    weight, _, values = matrix(96, 128, "half", torch.bfloat16, device)
    x = tokens(40, 128, torch.bfloat16)
    out = torch.empty(1, 40, 96, dtype=torch.bfloat16, device=device)
    linear(x.to(device), weight, None, out, LinearConfig("matmul"))
    want = x.double() @ values.T
    assert_within(out[0], want, sum_bound(x, values) + rounding(torch.bfloat16, device) * want.abs())


def exact_tokens(num_tokens, num_columns):
    """Values that e4m3 holds, each token's times its own power of two, with the largest among them: quantized exactly."""
    values = tokens(num_tokens, num_columns, torch.bfloat16).to(FP8).float()
    values[:, 3] = 448
    return (values * 2.0 ** (torch.arange(num_tokens)[:, None] - 9)).to(torch.bfloat16)


def test_matmul_of_fp8_quantizes_each_token(device):
    weight, scale, values = matrix(96, 128, "fp8", torch.bfloat16, device)
    x = exact_tokens(40, 128)
    quantized = Quantized(torch.empty(64 * 128, dtype=FP8, device=device), torch.empty(64, device=device))
    out = torch.empty(1, 40, 96, dtype=torch.bfloat16, device=device)
    linear(x.to(device), weight, scale, out, LinearConfig("matmul"), quantized=quantized)
    want = x.double() @ values.T
    # Tensor cores add 32 fp8 products at once, cut 13 bits behind the point of the largest
    largest = (x.double()[:, None].cpu() * values.cpu()[None]).abs().amax(2).to(want.device)
    bound = 128 * 2.0**-13 * largest + rounding(torch.bfloat16, device) * want.abs()
    assert_within(out[0], want, bound)


def test_quantize_takes_what_e4m3_holds_and_zeros_as_they_are(device):
    x = exact_tokens(5, 300)
    x[2] = 0
    values, scales = torch.empty(5, 300, dtype=FP8, device=device), torch.empty(5, 1, device=device)
    quantize(x.to(device), values, scales)
    assert torch.equal(scales[2].cpu(), torch.ones(1))
    assert torch.equal(values.cpu().float() * scales.cpu(), x.float())


def test_quantize_rounds(device):
    if device != "cuda":
        pytest.skip("the interpreter's cast to e4m3 loses carries")
    x = tokens(5, 300, torch.bfloat16)
    values, scales = torch.empty(5, 300, dtype=FP8, device=device), torch.empty(5, 1, device=device)
    quantize(x.to(device), values, scales)
    largest = x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.cpu().double(), largest / 448, rtol=2.0**-22, atol=0)
    bound = x.double().abs() * (2.0**-4 + 2.0**-20) + largest / 448 * 2.0**-10  # below 2^-6, multiples of 2^-9
    assert_within(values.cpu().double() * scales.cpu().double(), x.double(), bound)


def test_a_zero_token_and_extreme_values(device):
    weight, scale, _ = matrix(64, 64, "fp8", torch.bfloat16, device)
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[1] = 2.0**100
    got = parts_of(x, weight, scale, TILES, 1, device)[0]
    assert (got[0] == 0).all() and got[1].isfinite().all()


@pytest.mark.parametrize(
    ("num_tokens", "num", "config"),
    [(5, 1, GEMV), (2, 2, GEMV), (2, 2, TILES)],
    ids=["too many tokens", "gemv has no parts", "other than its splits"],
)
def test_what_a_kernel_cannot_do_is_refused(num_tokens, num, config, device):
    weight, scale, _ = matrix(40, 96, "half", torch.bfloat16, device)
    with pytest.raises(AssertionError, match=r"tokens|parts"):
        parts_of(tokens(num_tokens, 96, torch.bfloat16), weight, scale, config, num, device)
