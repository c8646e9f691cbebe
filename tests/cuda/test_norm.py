"""Norms and embeddings: the reference's results, and a row's bits whatever is beside it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends import reference
from jilju.backends.cuda.kernels.embed import embed
from jilju.backends.cuda.kernels.norm import add_norm, rms_norm

EPS = 1e-5
HALVES = {
    "bf16": (torch.bfloat16, 2**-7),
    "f16": (torch.float16, 2**-11),
}  # the interpreter cuts bfloat16 off, rounds float16


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_near(got: "torch.Tensor", want: np.ndarray, half_ulp: float, sums: float = 0.0) -> None:
    """Within the rounding to half, and `sums` units of float32's rounding at the values' size."""
    difference = abs(got.float().cpu().numpy() - want)
    bound = abs(want) * (half_ulp + 2**-20) + sums * 2**-24 + 1e-7
    worst = np.unravel_index(np.argmax(difference - bound), want.shape)
    assert (difference <= bound).all(), f"at {worst}: {difference[worst]}, bound {bound[worst]}"


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("num_rows", "width", "group"), [(5, 576, 576), (3, 128, 64), (4, 16384, 16384), (1, 4096, 4096), (6, 90, 30)])  # fmt: skip
def test_rms_norm_is_the_references(device: str, half: str, num_rows: int, width: int, group: int) -> None:
    dtype, half_ulp = HALVES[half]
    x, weight = 3 * random(num_rows, width), random(group, seed=1)
    out = torch.empty(num_rows, width, dtype=dtype, device=device)
    x_there, weight_there = torch.from_numpy(x).to(device), torch.from_numpy(weight).to(device)
    rms_norm(x_there, weight_there, EPS, out)
    assert_near(out, reference.rms_norm(x, weight, EPS), half_ulp)
    halved = x_there.to(dtype)
    rms_norm(halved, weight_there, EPS, out)
    assert_near(out, reference.rms_norm(halved.float().cpu().numpy(), weight, EPS), half_ulp)


def test_rms_norm_takes_the_rows_it_is_given_and_rows_are_alone(device: str) -> None:
    x, weight = torch.from_numpy(random(9, 300)).to(device), torch.from_numpy(random(300, seed=1)).to(device)
    rows = torch.tensor([7, 0, 7, 8], dtype=torch.int32, device=device)
    out = torch.empty(4, 300, dtype=torch.bfloat16, device=device)
    rms_norm(x, weight, EPS, out, rows)
    every = torch.empty(9, 300, dtype=torch.bfloat16, device=device)
    rms_norm(x, weight, EPS, every)
    assert torch.equal(out, every[[7, 0, 7, 8]])
    one = torch.empty(1, 300, dtype=torch.bfloat16, device=device)
    rms_norm(x[8:], weight, EPS, one)
    assert torch.equal(one, every[8:])
    rms_norm(x[:0], weight, EPS, out[:0])


@pytest.mark.parametrize("num_parts", [1, 2, 7])
@pytest.mark.parametrize("options", ["", "bias", "post", "norm", "bias post norm"])
def test_add_norm_is_the_references(device: str, num_parts: int, options: str) -> None:
    num_tokens, width = 4, 600
    parts, residual = random(num_parts, num_tokens, width), random(num_tokens, width, seed=1)
    vectors = {name: random(width, seed=i + 2) if name in options else None for i, name in enumerate(("bias", "post", "norm"))}  # fmt: skip
    there = {name: None if v is None else torch.from_numpy(v).to(device) for name, v in vectors.items()}
    new = torch.from_numpy(residual.copy()).to(device)
    out = torch.empty(num_tokens, width, dtype=torch.bfloat16, device=device) if "norm" in options else None
    given = torch.from_numpy(parts).to(device)
    add_norm(given, new, out, bias=there["bias"], post_weight=there["post"], weight=there["norm"], eps=EPS)
    h = parts[0].copy()
    for part in parts[1:]:
        h += part
    if vectors["bias"] is not None:
        h += vectors["bias"]
    exact = vectors["post"] is None  # then there are additions alone, in this order
    if vectors["post"] is not None:
        h = reference.rms_norm(h, vectors["post"], EPS)
    want = residual + h
    assert_near(new, want, 0, 0 if exact else 16)
    if exact:
        np.testing.assert_array_equal(new.cpu().numpy(), want)
    if out is not None:
        assert_near(out, reference.rms_norm(want, vectors["norm"], EPS), HALVES["bf16"][1], 64)
    for token in range(num_tokens):
        alone = torch.from_numpy(residual[token : token + 1].copy()).to(device)
        out_alone = None if out is None else torch.empty_like(out[:1])
        add_norm(given[:, token : token + 1].contiguous(), alone, out_alone, bias=there["bias"], post_weight=there["post"], weight=there["norm"], eps=EPS)  # fmt: skip
        assert torch.equal(alone, new[token : token + 1])
        assert out is None or torch.equal(out_alone, out[token : token + 1])


def test_add_norm_takes_a_half_product(device: str) -> None:
    parts = torch.from_numpy(random(1, 3, 576)).to(device).half()
    residual = torch.from_numpy(random(3, 576, seed=1)).to(device)
    want = residual + parts[0].float()
    add_norm(parts, residual, None, eps=EPS)
    assert torch.equal(residual, want)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("scale", [1.0, 25.25])
def test_embed_takes_rows_of_the_table(device: str, half: str, scale: float) -> None:
    table = torch.from_numpy(random(50, 1100)).to(device).to(HALVES[half][0])
    ids = torch.tensor([3, 49, 0, 3], dtype=torch.int32, device=device)
    out = torch.empty(4, 1100, device=device)
    embed(table, ids, scale, out)
    np.testing.assert_array_equal(out.cpu().numpy(), reference.embed(table.float().cpu().numpy(), ids.cpu().numpy(), scale))  # fmt: skip


def test_embed_takes_an_fp8_table_with_a_scale_a_row(device: str) -> None:
    table = (100 * torch.from_numpy(random(50, 256))).to(torch.float8_e4m3fn).to(device)
    scales = torch.from_numpy(abs(random(50, seed=1))).to(device)
    ids = torch.tensor([3, 49, 0], dtype=torch.int32, device=device)
    out = torch.empty(3, 256, device=device)
    embed(table, ids, 2.5, out, scales)
    want = table.float()[ids.long()] * scales[ids.long(), None] * 2.5
    assert torch.equal(out, want)


def test_dependent_launches_change_no_bits(device: str) -> None:
    """A chain in which each kernel reads what the one before it wrote."""
    if device == "cpu":
        pytest.skip("no GPU: the interpreter launches nothing early")
    table = torch.from_numpy(random(50, 4096)).to(device).bfloat16()
    ids = torch.tensor([3, 49, 0], dtype=torch.int32, device=device)
    weight = torch.from_numpy(random(4096, seed=1)).to(device)
    results = []
    for pdl in (False, True):
        x = torch.empty(3, 4096, device=device)
        out = torch.empty(3, 4096, device=device, dtype=torch.bfloat16)
        embed(table, ids, 1.0, x, pdl=pdl)
        for _ in range(50):
            rms_norm(x, weight, EPS, out, pdl=pdl)
            add_norm(out[None], x, out, weight=weight, eps=EPS, pdl=pdl)
        results.append((x, out))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
