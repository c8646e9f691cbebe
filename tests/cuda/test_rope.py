"""The step between the QKV product and attention against the reference backend, and what it writes to the cache."""

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends import reference
from jilju.backends.cuda.kernels.kv import kv_layer
from jilju.backends.cuda.kernels.rope import rope_and_write

BLOCK_SIZE = 16
THETA = 10_000.0
EPS = 1e-5
POSITIONS = [0, 5, 77, 31, 99]
SLOTS = [3, 17, -1, 60, 32]


class Step:
    """A product in some parts, and what is done to it."""

    def __init__(
        self,
        device: str,
        heads: int = 6,
        kv_heads: int = 3,
        dim: int = 32,
        num_parts: int = 3,
        *,
        style: str = "halves",
        bias: bool = False,
        q_norm: bool = False,
        k_norm: bool = False,
        fp8: bool = False,
        parts_type: Any = torch.float32,
        half: Any = torch.float16,
    ) -> None:
        g = torch.Generator().manual_seed(1)
        self.heads, self.kv_heads, self.dim, self.style, self.fp8, self.half = heads, kv_heads, dim, style, fp8, half
        width = (heads + 2 * kv_heads) * dim
        self.parts = torch.randn(num_parts, len(POSITIONS), width, generator=g).to(parts_type)
        self.bias = torch.randn(width, generator=g) if bias else None
        self.q_norm = torch.rand(dim, generator=g) + 0.5 if q_norm else None
        self.k_norm = torch.rand(dim, generator=g) + 0.5 if k_norm else None
        self.device = device

    def run(self) -> tuple[Any, Any, Any]:
        """q [T, H, d], the cache and its scales; slots that nothing was written to hold NaN."""
        angles = torch.arange(100)[:, None] / THETA ** (
            torch.arange(self.dim // 2, dtype=torch.float64) / (self.dim // 2)
        )
        cache = torch.full((2, 2, 4, self.kv_heads, BLOCK_SIZE, self.dim), math.nan)
        scales = torch.full(cache.shape[:-1], math.nan).to(self.device) if self.fp8 else None
        cache = cache.to(torch.float8_e4m3fn if self.fp8 else self.half).to(self.device)
        q = torch.full((len(POSITIONS), self.heads, self.dim), math.nan, dtype=self.half, device=self.device)

        def there(x: Any) -> Any:
            return None if x is None else x.to(self.device)

        rope_and_write(
            there(self.parts),
            there(self.bias),
            there(self.q_norm),
            there(self.k_norm),
            EPS,
            self.style,
            there(angles.cos().float()),
            there(angles.sin().float()),
            there(torch.tensor(POSITIONS, dtype=torch.int32)),
            there(torch.tensor(SLOTS, dtype=torch.int32)),
            q,
            kv_layer(cache, scales, 1),
        )
        return q.cpu(), cache.cpu(), None if scales is None else scales.cpu()

    def want(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v [T, heads, d] in float32."""
        x = self.parts.float().numpy().sum(axis=0)
        if self.bias is not None:
            x = x + self.bias.numpy()
        q, k, v = np.split(x, [self.heads * self.dim, (self.heads + self.kv_heads) * self.dim], axis=1)
        if self.q_norm is not None:
            q = reference.rms_norm(q, self.q_norm.numpy(), EPS)
        if self.k_norm is not None:
            k = reference.rms_norm(k, self.k_norm.numpy(), EPS)
        q, k = (reference.rope(y, np.array(POSITIONS), self.dim, THETA, self.style) for y in (q, k))
        q, k, v = (y.reshape(len(POSITIONS), -1, self.dim) for y in (q, k, v))
        return q, k, v


def written(cache: Any, plane: int) -> Any:
    """[T, KH, d] (or [T, KH] of the scales) of the tokens that have a slot."""
    return torch.stack([cache[1, plane, slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] for slot in SLOTS if slot >= 0])


def assert_near(got: Any, want: np.ndarray, eps: float, sizes: float) -> None:
    """Float32 in between: some 16 roundings of what is at most `sizes`; then one to a type of this eps."""
    error = abs(got.float().numpy() - want)
    bound = eps / 2 * abs(want) + 16 * 2.0**-24 * sizes + 2.0**-25
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"at {worst}: off by {error[worst]:.3g}, bound {bound[worst]:.3g}"


CASES = {
    "halves": {},
    "interleaved": {"style": "interleaved"},
    "bias": {"bias": True, "heads": 7, "kv_heads": 1, "dim": 24},
    "head norms": {"q_norm": True, "k_norm": True, "dim": 20},
    "k norm alone": {"k_norm": True, "style": "interleaved", "dim": 24, "num_parts": 1},
    "half parts": {"parts_type": torch.float16, "num_parts": 1, "bias": True},
    "many heads": {"heads": 32, "kv_heads": 8, "dim": 128, "num_parts": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_q_k_and_v_are_the_references(device: str, case: dict[str, Any]) -> None:
    step = Step(device, **case)
    got_q, cache, _ = step.run()
    q, k, v = step.want()
    has_slot = np.array(SLOTS) >= 0
    eps = torch.finfo(step.half).eps
    assert_near(got_q, q, eps, abs(q).max())
    assert_near(written(cache, 0), k[has_slot], eps, abs(k).max())
    assert_near(written(cache, 1), v[has_slot], eps, abs(v).max())


@pytest.mark.parametrize("fp8", [False, True])
def test_no_other_slot_is_written(device: str, fp8: bool) -> None:
    step = Step(device, fp8=fp8)
    _, cache, scales = step.run()
    for tensor in (cache.float(), *([scales[..., None]] if fp8 else [])):
        written_to = ~tensor[1].isnan()  # [2, blocks, KH, block_size, d]
        slots = written_to.permute(1, 3, 0, 2, 4).reshape(-1, written_to[:, 0, :, 0].numel())
        want = torch.tensor([slot in SLOTS for slot in range(len(slots))])
        assert torch.equal(slots, want[:, None].expand_as(slots))
        assert tensor[0].isnan().all(), "the other layer"


@pytest.mark.parametrize("style, dim", [("halves", 32), ("interleaved", 24)])
def test_float8_keeps_each_head_within_half_a_step(device: str, style: str, dim: int) -> None:
    step = Step(device, style=style, dim=dim, fp8=True)
    _, cache, scales = step.run()
    has_slot = np.array(SLOTS) >= 0
    for plane, want in zip((0, 1), step.want()[1:], strict=True):
        want = want[has_slot]
        stored, scale = written(cache, plane).float().numpy(), written(scales, plane).numpy()
        top = abs(want).max(axis=-1)
        assert (abs(scale - top / 448) <= 16 * 2.0**-24 * top / 448).all()
        size = np.maximum(abs(want), 2.0**-6 * scale[..., None])  # below the smallest normal number steps are equal
        bound = size * 2.0**-4 + 16 * 2.0**-24 * top[..., None]
        assert (abs(stored * scale[..., None] - want) <= bound).all()
        assert (abs(stored).max(axis=-1) == 448).all()


def test_float8_is_rounded_as_torch_rounds(device: str) -> None:
    step = Step(device, fp8=True, num_parts=1)
    values = step.parts[0, :, -step.kv_heads * step.dim :].reshape(len(POSITIONS), step.kv_heads, step.dim)
    values[:, 0] *= 10.0 ** torch.linspace(0, -6, step.dim)  # down through e4m3's smallest numbers
    values[:, 1] = 0
    _, cache, scales = step.run()
    values = values[torch.tensor(SLOTS) >= 0]
    scale = values.abs().amax(-1) / 448
    want = torch.where(scale[..., None] == 0, 0, values / scale[..., None]).to(torch.float8_e4m3fn)
    assert torch.equal(written(scales, 1), scale)
    assert torch.equal(written(cache.float(), 1), want.float())


def test_a_tokens_bits_do_not_depend_on_how_many_there_are(device: str) -> None:
    step = Step(device, q_norm=True, k_norm=True)
    together, cache, _ = step.run()
    step.parts = step.parts[:, :1].expand(-1, len(POSITIONS), -1).contiguous()
    alone, alone_cache, _ = step.run()
    assert torch.equal(together[0], alone[0])
    assert torch.equal(written(cache, 0)[0], written(alone_cache, 0)[0])
