"""Attention over the paged cache against the reference backend, and the laws of its bits."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends import reference
from jilju.backends.cuda.attention_configs import AttentionConfig, Mode, attention_config
from jilju.backends.cuda.kernels.attention import Partials, attention
from jilju.backends.cuda.kernels.kv import copy_slots, kv_layer

BLOCK_SIZE = 16
SMALL = AttentionConfig(block_m=16, block_n=16, split_keys=32, num_warps=4, num_stages=2)
UNSPLIT = AttentionConfig(block_m=16, block_n=32, split_keys=0, num_warps=4, num_stages=2)


def half_of(device: str) -> Any:
    """The interpreter multiplies no bfloat16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


@dataclasses.dataclass
class Case:
    """A batch of rows with a shuffled cache that holds NaN wherever no row has a key."""

    q: Any  # [T, H, d]
    cache: Any
    scales: Any
    tables: Any
    starts: list[int]
    counts: list[int]
    scale: float
    window: int
    keys: list[np.ndarray]  # per row [start + count, KH, d], as the cache gives them back
    values: list[np.ndarray]

    @property
    def group(self) -> int:
        return int(self.q.shape[1] // self.cache.shape[3])


def fp8_rounded(x: Any) -> tuple[Any, Any]:
    scale = x.abs().amax(-1) / 448
    return (x / scale[..., None]).to(torch.float8_e4m3fn), scale


def make(
    device: str,
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    window: int = 0,
    fp8: bool = False,
    dtype: Any = None,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    dtype = dtype or half_of(device)
    widths = [-(-(start + count) // BLOCK_SIZE) for start, count in rows]
    num_blocks = sum(widths) + 3
    order = torch.randperm(num_blocks, generator=g).tolist()
    tables = torch.full((len(rows), max(widths)), -1, dtype=torch.int32)
    cache = torch.full((2, 2, num_blocks, kv_heads, BLOCK_SIZE, dim), math.nan)
    scales = torch.full(cache.shape[:-1], math.nan)
    keys, values = [], []
    for row, ((start, count), width) in enumerate(zip(rows, widths, strict=True)):
        blocks = torch.tensor([order.pop() for _ in range(width)])
        tables[row, :width] = blocks
        at = torch.arange(start + count)
        for plane, kept in ((0, keys), (1, values)):
            x = torch.randn(start + count, kv_heads, dim, generator=g)
            if fp8:
                stored, scale = fp8_rounded(x)
                scales[1, plane][blocks[at // BLOCK_SIZE], :, at % BLOCK_SIZE] = scale
                cache[1, plane][blocks[at // BLOCK_SIZE], :, at % BLOCK_SIZE] = stored.float()
                kept.append((stored.float() * scale[..., None]).numpy())
            else:
                cache[1, plane][blocks[at // BLOCK_SIZE], :, at % BLOCK_SIZE] = x
                kept.append(x.to(dtype).float().numpy())
    q = torch.randn(sum(count for _, count in rows), heads, dim, generator=g).to(dtype)
    stored_type = torch.float8_e4m3fn if fp8 else dtype
    return Case(
        q.to(device),
        cache.to(stored_type).to(device),
        scales.to(device) if fp8 else None,
        tables.to(device),
        [start for start, _ in rows],
        [count for _, count in rows],
        1.3 * dim**-0.5,
        window,
        keys,
        values,
    )


def partials_of(case: Case, num_splits: int) -> Partials:
    num_tokens, num_heads, dim = case.q.shape
    shape, device = (num_tokens, num_heads, num_splits), case.q.device
    acc, stats = (torch.full((*shape, n), math.nan, device=device) for n in (dim, 2))
    return Partials(acc, stats, torch.zeros((num_tokens + 2) * num_heads, dtype=torch.int32, device=device))


def run(case: Case, config: AttentionConfig, num_splits: int = 1, partials: Partials | None = None) -> Any:
    """With partials of its own if none are given; however that may be, their counters are zero in the end."""
    device = case.q.device
    step = config.tokens_per_tile(case.group)
    tiles = [(row, token) for row, count in enumerate(case.counts) for token in range(0, count, step)]
    tiles = [*tiles[1:], (-1, 0), tiles[0], (-1, 0)]  # in any order, some for nothing
    first_tokens = np.concatenate([[0], np.cumsum(case.counts)[:-1]])

    def ints(x: Any) -> Any:
        return torch.tensor(np.asarray(x), dtype=torch.int32, device=device)

    if num_splits > 1 and partials is None:
        partials = partials_of(case, num_splits)
    out = torch.full_like(case.q, math.nan)
    attention(
        case.q,
        kv_layer(case.cache, case.scales, 1),
        case.tables,
        ints(case.starts),
        ints(first_tokens),
        ints(case.counts),
        ints([row for row, _ in tiles]),
        ints([token for _, token in tiles]),
        out,
        config,
        scale=case.scale,
        window=case.window,
        num_splits=num_splits,
        partials=partials,
    )
    assert partials is None or not partials.counters.any()
    return out


def most_splits(case: Case, config: AttentionConfig) -> int:
    tokens = config.tokens_per_tile(case.group)
    return max(
        config.num_splits(start + count, min(tokens, count), case.window)
        for start, count in zip(case.starts, case.counts, strict=True)
    )


def check(case: Case, got: Any) -> None:
    """The kernel rounds probabilities to half (each product by eps / 2 of |v|), and its result; exp2 and float32 sums add less.

    |error| <= eps * (sum_k p_k |v_k|) + eps * |out| / 2, plus float32's part: the scores' errors d * 2^-24 * |q||k| * scale.
    """
    eps = torch.finfo(case.q.dtype).eps
    got = got.float().cpu().numpy()
    assert np.isfinite(got).all(), "every token is written"
    first = 0
    for row, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        q = case.q[first : first + count].float().cpu().numpy()
        k, v = case.keys[row], case.values[row]
        want = reference.attention(q, k, v, start, case.scale, case.window)
        size = reference.attention(q, k, abs(v), start, case.scale, case.window)
        score_error = q.shape[-1] * 2.0**-22 * case.scale * np.abs(q).max() * np.abs(k).max() * q.shape[-1] ** 0.5
        bound = (eps + 2 * score_error) * size + eps * abs(want) / 2 + 2.0**-20
        error = abs(got[first : first + count] - want)
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        assert (error <= bound).all(), f"row {row} at {worst}: off by {error[worst]:.3g}, bound {bound[worst]:.3g}"
        first += count


MIXED = [(37, 1), (0, 9), (16, 20), (0, 1), (70, 3)]  # (start, count): decode, prefill, a later chunk


@pytest.mark.parametrize("config", [SMALL, UNSPLIT], ids=["splits", "unsplit"])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 1, 32), (3, 1, 20), (7, 1, 24), (2, 2, 64)])
def test_a_mixed_batch_is_the_references(
    device: str, config: AttentionConfig, heads: int, kv_heads: int, dim: int
) -> None:
    case = make(device, MIXED, heads, kv_heads, dim)
    check(case, run(case, config))


@pytest.mark.parametrize("window", [1, 8, 33])
@pytest.mark.parametrize("config", [SMALL, UNSPLIT], ids=["splits", "unsplit"])
def test_a_window_hides_older_keys(device: str, config: AttentionConfig, window: int) -> None:
    case = make(device, MIXED, 4, 2, 32, window=window)
    check(case, run(case, config))


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dim", [32, 24])
def test_a_float8_cache(device: str, dim: int, window: int) -> None:
    case = make(device, MIXED, 4, 2, dim, fp8=True, window=window)
    check(case, run(case, SMALL))


def test_small_values_of_a_float8_cache_keep_their_bits_in_float16(device: str) -> None:
    case = make(device, MIXED, 4, 2, 32, fp8=True, dtype=torch.float16)
    case.scales[:, 1] *= 2.0**-9
    case.values = [v * np.float32(2.0**-9) for v in case.values]
    got = run(case, SMALL).float() * 2.0**9
    case.values = [v * np.float32(2.0**9) for v in case.values]
    check(case, got)


@pytest.mark.parametrize("window, fp8", [(0, False), (40, False), (0, True)])
def test_splits_merged_apart_have_the_bits_of_those_merged_inline(device: str, window: int, fp8: bool) -> None:
    case = make(device, [(37, 1), (0, 6), (70, 3), (130, 5)], 4, 1, 32, window=window, fp8=fp8)
    inline = run(case, SMALL)
    check(case, inline)
    most = most_splits(case, SMALL)
    assert most > 1
    for num_splits in (most, 8):
        assert torch.equal(inline, run(case, SMALL, num_splits)), f"{num_splits} splits"


MANY_SPLITS = [(0, 1), (31, 1), (32, 1), (300, 1), (290, 7), (530, 2), (0, 5), (95, 3)]  # from 1 to 17 for a tile


@pytest.mark.parametrize("window, fp8, heads", [(0, False, 4), (70, False, 3), (0, True, 4)])
def test_the_last_program_of_a_tile_merges_its_splits_launch_after_launch(
    device: str, window: int, fp8: bool, heads: int
) -> None:
    case = make(device, MANY_SPLITS, 2 * heads, 2, 32, window=window, fp8=fp8)
    inline = run(case, SMALL)
    check(case, inline)
    most = most_splits(case, SMALL)
    assert most > (2 if window else 16), "more than a merge takes at once"
    partials = partials_of(case, 32)
    for _ in range(3):
        assert torch.equal(inline, run(case, SMALL, 32, partials))
        partials.acc.fill_(math.nan)
        partials.stats.fill_(math.nan)


@pytest.mark.parametrize("window, fp8", [(0, False), (0, True), (300, False)])
def test_programs_that_run_at_once_lose_no_split(device: str, window: int, fp8: bool) -> None:
    """Decode, as it is split in production: every launch has the bits of the first, and those of a walk inline."""
    if device != "cuda":
        pytest.skip("the interpreter runs one program after another")
    rows = [(1023 - 37 * (row % 27), 1) for row in range(256)]
    case = make(device, rows, 8, 2, 128, window=window, fp8=fp8)
    config = AttentionConfig(block_m=16, block_n=64, split_keys=64, num_warps=4, num_stages=3)
    inline = run(case, config)
    check(case, inline)
    partials = partials_of(case, 16)
    for repetition in range(50):
        got = run(case, config, 16, partials)
        assert torch.equal(inline, got), f"repetition {repetition}: {int((got != inline).sum())} values differ"


def one_by_one(case: Case, config: AttentionConfig, num_splits: int) -> Any:
    """Each token as a row of its own: what decode would have computed."""
    tables = torch.repeat_interleave(
        case.tables, torch.tensor(case.counts, device=case.tables.device), dim=0
    ).contiguous()
    starts = [start + i for start, count in zip(case.starts, case.counts, strict=True) for i in range(count)]
    return run(dataclasses.replace(case, tables=tables, starts=starts, counts=[1] * len(starts)), config, num_splits)


@pytest.mark.parametrize("window, fp8", [(0, False), (40, False), (0, True)])
def test_decode_has_the_bits_of_prefill(device: str, window: int, fp8: bool) -> None:
    case = make(device, [(57, 10)], 4, 1, 32, window=window, fp8=fp8)
    together = run(case, SMALL)
    assert torch.equal(together, one_by_one(case, SMALL, 1))
    assert torch.equal(together, one_by_one(case, SMALL, 4))


@pytest.mark.parametrize("head_dim, group", [(128, 4), (64, 7), (256, 4)])
def test_the_invariant_config_gives_a_token_the_same_bits_however_it_comes(
    device: str, head_dim: int, group: int
) -> None:
    kv_dtype = "half"
    config = attention_config("invariant", head_dim, group, 1, True, kv_dtype)
    for num_rows in (1, 64, 256):
        assert attention_config("invariant", head_dim, group, num_rows, False, kv_dtype) == config
    case = make(device, [(0, 2), (config.split_keys - 3, 8)], group, 1, head_dim)
    together = run(case, config)
    check(case, together)
    assert torch.equal(together, one_by_one(case, config, 2))


def test_a_rows_bits_are_its_own(device: str) -> None:
    case = make(device, MIXED, 4, 2, 32)
    together = run(case, SMALL)
    first = 0
    for row, count in enumerate(case.counts):
        alone = dataclasses.replace(
            case,
            q=case.q[first : first + count].contiguous(),
            tables=case.tables[row : row + 1],
            starts=[case.starts[row]],
            counts=[count],
        )
        assert torch.equal(run(alone, SMALL), together[first : first + count]), f"row {row}"
        first += count


@pytest.mark.parametrize("mode", ["invariant", "fast"])
@pytest.mark.parametrize("group", [1, 3, 7, 16, 48, 71])
def test_every_config_holds_a_token_and_splits_at_tiles(mode: Mode, group: int) -> None:
    for head_dim in (20, 64, 128, 256):
        for num_rows, is_prefill in ((1, False), (64, False), (1, True)):
            config = attention_config(mode, head_dim, group, num_rows, is_prefill, "half")
            assert config.tokens_per_tile(group) >= 1
            assert config.split_keys % config.block_n == 0


@pytest.mark.parametrize(
    "num_keys, num_tokens, window", [(1, 1, 0), (64, 1, 0), (65, 4, 0), (200, 1, 33), (200, 4, 30)]
)
def test_num_splits_covers_every_tile(num_keys: int, num_tokens: int, window: int) -> None:
    """The last token has num_keys keys; any tile of so many tokens that ends at or before it fits."""
    size = SMALL.split_keys
    most = 0
    for end in range(num_tokens, num_keys + 1):
        low = max(end - num_tokens - window + 1, 0) if window else 0
        most = max(most, -(-end // size) - low // size)
    assert SMALL.num_splits(num_keys, num_tokens, window) == most


@pytest.mark.parametrize("fp8", [False, True])
def test_copy_slots_copies_all_layers_and_nothing_for_minus_one(device: str, fp8: bool) -> None:
    g = torch.Generator().manual_seed(3)
    cache = torch.randn(3, 2, 4, 3, BLOCK_SIZE, 20, generator=g).to(torch.float8_e4m3fn if fp8 else torch.float16)
    scales = torch.randn(cache.shape[:-1], generator=g) if fp8 else None
    sources, targets = [0, 17, -1, 40, 63], [5, 33, 20, -1, 1]
    want, want_scales = cache.float(), None if scales is None else scales.clone()
    for source, target in zip(sources, targets, strict=True):
        if source >= 0 and target >= 0:
            a, b = divmod(source, BLOCK_SIZE), divmod(target, BLOCK_SIZE)
            want[:, :, b[0], :, b[1]] = want[:, :, a[0], :, a[1]].clone()
            if want_scales is not None:
                want_scales[:, :, b[0], :, b[1]] = want_scales[:, :, a[0], :, a[1]].clone()
    cache, scales = cache.to(device), None if scales is None else scales.to(device)
    copy_slots(
        cache,
        scales,
        torch.tensor(sources, dtype=torch.int32, device=device),
        torch.tensor(targets, dtype=torch.int32, device=device),
    )
    assert torch.equal(cache.float().cpu(), want)
    if scales is not None:
        assert torch.equal(scales.cpu(), want_scales)
