"""Weights on their way to the device: piece by piece as in one, no piece larger than it may be, none that is not a number."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends.cuda import weights
from jilju.backends.cuda.lowering import lower
from jilju.errors import StartupError
from tests.cuda.models import LLAMA, QWEN
from tests.native.plans import decoder

SMALL_BYTES = 2048  # of a piece: a few rows of these matrices
SHAPES = {"as they are": LLAMA, "quantized": QWEN}


class Watched(weights.FileSource):
    """Notes how large the pieces are."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sizes = list[int]()

    def _host(self, data, spec, width):
        chunk = super()._host(data, spec, width)
        self.sizes.append(chunk.nbytes)
        return chunk


def loaded(shape, device, dtype):
    plan, given = decoder(shape)
    source = Watched(given, torch.device(device), plan.weight_bytes, lambda *_: None)
    return list(weights._tensors(weights.load(lower(plan), source, dtype, torch.device(device)))), source.sizes


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", SHAPES)
def test_in_small_pieces_as_in_one(name, dtype, device, monkeypatch):
    whole, _ = loaded(SHAPES[name], device, dtype)
    monkeypatch.setattr(weights, "CHUNK_BYTES", SMALL_BYTES)
    parts, sizes = loaded(SHAPES[name], device, dtype)
    assert len(sizes) > 2 * len(parts) and max(sizes) <= SMALL_BYTES
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_wherever_it_is(bad, device, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", SMALL_BYTES)
    plan, given = decoder(LLAMA)
    name = lower(plan).head.name
    data = given[name].data.copy()
    data.view(np.uint16)[-1] = np.float32(bad).view(np.uint32) >> 16
    given[name] = replace(given[name], data=data)
    source = weights.FileSource(given, torch.device(device), plan.weight_bytes, lambda *_: None)
    with pytest.raises(StartupError, match=name):
        weights.load(lower(plan), source, "bf16", torch.device(device))


def test_fp8_is_the_nearest_of_its_grid(device):
    """e4m3 has three bits behind the first: half a step is 2^-4 of a number, and 2^-10 of the smallest that is normal."""
    values = torch.randn(40, 70, dtype=torch.bfloat16, device=device) * torch.logspace(-3, 3, 40, device=device)[
        :, None
    ].to(torch.bfloat16)
    values[7] = 0
    quantized, scale = weights.to_fp8(values)
    exact, back = values.double(), quantized.double() * scale.double()[:, None]
    assert (
        (back - exact)
        .abs()
        .le(torch.maximum(exact.abs() * 2.0**-4, scale.double()[:, None] * 2.0**-10) * (1 + 1e-6))
        .all()
    )
    assert quantized[7].double().abs().max() == 0 and scale[7] == 0
    largest = quantized.double().abs().amax(dim=1)
    assert (largest[scale > 0] == 448).all()
