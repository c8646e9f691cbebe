"""glu() against float64."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends.cuda.kernels.glu import glu

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_parts", "num_tokens", "width"), [(1, 1, 64), (3, 5, 1100), (2, 2, 1024)])
def test_glu_sums_the_parts_and_gates(num_parts, num_tokens, width, half, activation, device):
    parts = torch.randn(num_parts, num_tokens, 2 * width, generator=torch.Generator().manual_seed(width))
    out = torch.full((num_tokens, width), float("nan"), dtype=half, device=device)
    glu(parts.to(device), out, activation)

    gate, up = parts.double().sum(0).chunk(2, dim=1)
    gate_bound, up_bound = (num_parts * 2.0**-23 * parts.double().abs().sum(0)).chunk(2, dim=1)
    want = ACTIVATIONS[activation](gate) * up
    rounding = (
        2.0**-7 if half == torch.bfloat16 else 2.0**-10
    )  # of the interpreter, which cuts off; a GPU's is half of it
    bound = 1.13 * gate_bound * up.abs() + gate.abs() * up_bound + (rounding + 2.0**-18) * want.abs() + 2.0**-24
    error = (out.cpu().double() - want).abs() - bound
    worst = divmod(int(error.argmax()), width)
    assert (error <= 0).all(), (
        f"at {worst}: {out[worst].item()}, float64 {want[worst].item()}, bound {bound[worst].item()}"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_of_half_parts_and_far_out_gates(activation, device):
    """What matmul leaves. The activation is zero far below and the gate itself far above."""
    gates = torch.tensor([[-100.0, -30.0, 0.0, 30.0, 100.0]])
    parts = torch.cat([gates, torch.full((1, 5), 2.0)], dim=1).to(torch.bfloat16)[None]
    out = torch.empty(1, 5, dtype=torch.bfloat16, device=device)
    glu(parts.to(device), out, activation)
    torch.testing.assert_close(out.cpu().float(), 2 * gates.clamp(min=0), rtol=2.0**-7, atol=1e-10)
