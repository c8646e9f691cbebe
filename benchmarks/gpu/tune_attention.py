"""Attention on a GPU: which tiles are fastest, in both modes, by rows and cache type; one run within a budget of seconds.

Owns the method: kernels are compiled beforehand by a pool of processes, then each launch is timed inside a CUDA graph that
goes over the layers of a cache larger than the L2. Before that the results are checked against torch's attention in float32,
and the invariant mode's bits, decode against prefill, on this device. Shape of Llama-3.1-8B.
Usage: tune_attention.py [--budget-s 60] [--json OUT]
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from jilju.backends.cuda.attention_configs import AttentionConfig, attention_config
from jilju.backends.cuda.kernels.attention import Partials, attention
from jilju.backends.cuda.kernels.kv import kv_layer
from jilju.backends.cuda.kernels.rope import rope_and_write

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 32, 8, 128, 16
GROUP = HEADS // KV_HEADS
SCALE = DIM**-0.5
CONTEXT = 1024
FRESH_BYTES = 256 << 20  # of cache that a graph goes over: more than the L2 holds
REPEATS = 5
WORKERS = 12

C = AttentionConfig
DECODE_FAST = (  # the best guess first
    C(16, 64, 256, 4, 3),
    C(16, 64, 128, 4, 3),
    C(16, 64, 512, 4, 3),
    C(16, 64, 0, 4, 3),
    C(16, 32, 256, 2, 4),
    C(16, 64, 256, 2, 3),
    C(16, 128, 256, 4, 2),
    C(16, 64, 512, 4, 4),
    C(16, 32, 512, 2, 5),
    C(16, 128, 512, 4, 3),
    C(16, 32, 0, 2, 4),
    C(16, 32, 128, 2, 4),
    C(16, 128, 0, 8, 3),
)
DECODE_FLOAT8 = (  # of 64 rows most are idle, but then K and V are converted in bulk, through shared memory
    C(16, 128, 256, 4, 3),
    C(16, 128, 512, 4, 3),
    C(16, 128, 128, 4, 3),
    C(16, 128, 0, 4, 3),
    C(64, 128, 256, 4, 2),
    C(16, 64, 256, 4, 3),
    C(64, 128, 512, 4, 2),
    C(64, 64, 256, 4, 3),
    C(16, 128, 512, 4, 4),
    C(16, 64, 128, 4, 3),
    C(16, 128, 512, 8, 3),
    C(16, 64, 512, 2, 4),
)
INVARIANT = (  # one of them for decode and prefill
    C(64, 64, 256, 4, 3),
    C(64, 64, 256, 4, 2),
    C(64, 128, 256, 4, 2),
    C(64, 64, 512, 4, 3),
    C(64, 32, 256, 4, 3),
    C(64, 64, 128, 4, 3),
    C(32, 64, 256, 4, 3),
)
PREFILL_FAST = (
    C(128, 64, 0, 8, 3),
    C(128, 64, 0, 8, 2),
    C(128, 128, 0, 8, 2),
    C(64, 64, 0, 4, 3),
    C(128, 32, 0, 8, 3),
    C(64, 128, 0, 4, 2),
    C(128, 64, 0, 4, 2),
)


class Shape(NamedTuple):
    """A step: num_rows rows of count tokens from start on."""

    num_rows: int
    start: int
    count: int
    fp8: bool

    @property
    def name(self) -> str:
        what = f"decode rows={self.num_rows} at {self.start + 1}" if self.count == 1 else f"prefill {self.count}"
        return f"{what} {'float8' if self.fp8 else 'half'}"


class Step:
    """The tensors of a shape: a cache of several layers, shuffled blocks, and a launch per layer."""

    def __init__(self, shape: Shape, device: str, half: torch.dtype, fresh_bytes: int) -> None:
        self.shape, self.device = shape, device
        num_keys = shape.start + shape.count
        width = -(-num_keys // BLOCK_SIZE)
        num_blocks = shape.num_rows * width
        layer_bytes = 2 * num_blocks * BLOCK_SIZE * KV_HEADS * DIM * (1 if shape.fp8 else half.itemsize)
        self.num_layers = max(1, min(64, -(-fresh_bytes // layer_bytes)))
        g = torch.Generator(device).manual_seed(1)
        size = (self.num_layers, 2, num_blocks, KV_HEADS, BLOCK_SIZE, DIM)
        # one layer, copied: random numbers for all of them take longer than what is measured
        cache = torch.randn((1, *size[1:]), generator=g, device=device, dtype=torch.float32).to(half)
        self.scales = None
        if shape.fp8:
            scale = cache.abs().amax(-1).float() / 448
            cache = (cache.float() / scale[..., None]).to(torch.float8_e4m3fn)
            self.scales = scale.expand(size[:-1]).contiguous()
        bits = cache.view(torch.uint8) if shape.fp8 else cache
        self.cache = bits.expand(size).contiguous().view(cache.dtype)
        self.q = torch.randn((shape.num_rows * shape.count, HEADS, DIM), generator=g, device=device).to(half)
        self.out = torch.zeros_like(self.q)
        self.tables = self.ints(torch.randperm(num_blocks, generator=g, device=device).reshape(shape.num_rows, width))
        self.starts = self.ints([shape.start] * shape.num_rows)
        self.counts = self.ints([shape.count] * shape.num_rows)
        self.first_tokens = self.ints(range(0, shape.num_rows * shape.count, shape.count))
        self.partials: dict[int, Partials] = {}

    def ints(self, x: Any) -> torch.Tensor:
        x = x if isinstance(x, torch.Tensor) else torch.tensor(list(x))
        return x.to(torch.int32).to(self.device)

    def launcher(self, config: AttentionConfig, split: bool, pdl: bool = False) -> Callable[[int], None]:
        """launch(layer), with each split by a program of its own if `split`."""
        shape = self.shape
        tokens = range(0, shape.count, config.tokens_per_tile(GROUP))
        tile_rows = self.ints([row for row in range(shape.num_rows) for _ in tokens])
        tile_tokens = self.ints([token for _ in range(shape.num_rows) for token in tokens])
        num_splits = config.num_splits(shape.start + shape.count) if split else 1
        partials = None
        if num_splits > 1:
            if num_splits not in self.partials:
                size = (len(self.q), HEADS, num_splits)
                self.partials[num_splits] = Partials(
                    torch.empty((*size, DIM), device=self.device),
                    torch.empty((*size, 2), device=self.device),
                    torch.zeros(len(self.q) * KV_HEADS, dtype=torch.int32, device=self.device),
                )
            partials = self.partials[num_splits]

        def launch(layer: int) -> None:
            attention(
                self.q,
                kv_layer(self.cache, self.scales, layer),
                self.tables,
                self.starts,
                self.first_tokens,
                self.counts,
                tile_rows,
                tile_tokens,
                self.out,
                config,
                scale=SCALE,
                window=0,
                num_splits=num_splits,
                partials=partials,
                pdl=pdl,
            )

        return launch

    @property
    def kv_bytes(self) -> int:
        element = self.cache.element_size() + (4 / DIM if self.shape.fp8 else 0)
        return int(2 * self.shape.num_rows * (self.shape.start + self.shape.count) * KV_HEADS * DIM * element)

    @property
    def flops(self) -> int:
        shape = self.shape
        attended = sum(range(shape.start + 1, shape.start + shape.count + 1)) * shape.num_rows
        return 4 * HEADS * DIM * attended

    def want(self, row: int) -> torch.Tensor:
        """torch's attention of a row in float32: [count, H, d]"""
        shape = self.shape
        positions = torch.arange(shape.start + shape.count, device=self.device)
        blocks = self.tables[row].long()[positions // BLOCK_SIZE]
        k, v = (self.cache[0, plane].float()[blocks, :, positions % BLOCK_SIZE].transpose(0, 1) for plane in (0, 1))
        if self.scales is not None:
            scales = (self.scales[0, plane][blocks, :, positions % BLOCK_SIZE].transpose(0, 1) for plane in (0, 1))
            k, v = (x * scale[..., None] for x, scale in zip((k, v), scales, strict=True))
        k, v = (x.repeat_interleave(GROUP, dim=0) for x in (k, v))
        q = self.q[row * shape.count : (row + 1) * shape.count].float().transpose(0, 1)
        seen = positions[None, :] <= positions[-shape.count :, None]
        result = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=SCALE)
        return result[0].transpose(0, 1)


def graph_us(launch: Callable[[int], None], num_layers: int) -> float:
    """Microseconds a launch, the best of a few replays of a graph over all layers."""
    launch(0)
    torch.cuda.synchronize()
    rounds = max(1, 16 // num_layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for layer in range(num_layers):
                launch(layer)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * num_layers))
    return min(times)


def compiled(config: AttentionConfig, split: bool, decode: bool, fp8: bool, half: str) -> None:
    """In a worker: the same kernel on a small step, which leaves it in Triton's cache."""
    keys = max(config.split_keys, 16)
    shape = Shape(1, keys, 1, fp8) if decode else Shape(1, keys, 2, fp8)
    Step(shape, "cuda", getattr(torch, half), 0).launcher(config, split)(0)
    torch.cuda.synchronize()


class Tuner:
    """Runs cases until the time is up, prints a line each, and keeps what it found."""

    def __init__(self, budget_s: float, out: Path | None, device: str, half: str, workers: int) -> None:
        self.deadline = time.monotonic() + budget_s
        self.out, self.device, self.half = out, device, half
        self.found: list[dict[str, Any]] = []
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers else None
        self.futures: dict[tuple[AttentionConfig, bool, bool, bool], Future[None]] = {}

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def step(self, shape: Shape, fresh_bytes: int = FRESH_BYTES) -> Step:
        return Step(shape, self.device, getattr(torch, self.half), fresh_bytes)

    def compile(self, config: AttentionConfig, split: bool, decode: bool, fp8: bool) -> None:
        key = (config, split, decode, fp8)
        if self.pool is not None and key not in self.futures:
            self.futures[key] = self.pool.submit(compiled, *key, self.half)

    def wait(self, config: AttentionConfig, split: bool, decode: bool, fp8: bool) -> None:
        """A worker's failure is left to the launch, which compiles for itself and then says more."""
        future = self.futures.get((config, split, decode, fp8))
        if future is not None:
            future.exception(timeout=max(0.1, self.left_s))

    def say(self, kind: str, line: str, **record: Any) -> None:
        print(f"{kind:9} {line}", flush=True)
        self.found.append({"kind": kind, "line": line, **record})
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, default=msgspec.to_builtins, indent=1))

    def attempt(self, name: str, case: Callable[[], None], reserve_s: float = 1) -> None:
        if self.left_s < reserve_s:
            self.say("skipped", name)
            return
        try:
            case()
        except Exception as error:
            self.say("failed", f"{name}: {type(error).__name__} {str(error)[:300]}")

    def check(self, shape: Shape, config: AttentionConfig, split: bool) -> None:
        step = self.step(shape, 0)
        self.wait(config, split, shape.count == 1, shape.fp8)
        step.launcher(config, split)(0)
        got = step.out[-shape.count :].float()
        want = step.want(shape.num_rows - 1)
        error = (got - want).abs().max().item()
        bound = 4 * torch.finfo(step.q.dtype).eps * want.abs().max().item()
        verdict = "right" if error <= bound else "WRONG"
        self.say("check", f"{shape.name} {short(config, split)}: {verdict}, error {error:.2e}, allowed {bound:.2e}")

    def bits(self, config: AttentionConfig, fp8: bool, others: tuple[AttentionConfig, ...]) -> None:
        """Prefill against decode of each of its tokens, inline and split; then which other prefill tiles give the same."""
        count, start = min(150, CONTEXT // 8), CONTEXT - CONTEXT // 4
        prefill = self.step(Shape(1, start, count, fp8), 0)
        decode = self.step(Shape(count, CONTEXT - 1, 1, fp8), 0)
        decode.cache, decode.scales, decode.q = prefill.cache, prefill.scales, prefill.q
        decode.tables = prefill.tables.expand(count, -1).contiguous()
        decode.starts = decode.ints(range(start, start + count))
        results = {}
        for name, step, split, tile in (
            ("prefill", prefill, False, config),
            ("prefill split", prefill, True, config),
            ("decode", decode, False, config),
            ("decode split", decode, True, config),
            *((f"prefill {short(other, False)}", prefill, False, other) for other in others),
        ):
            self.wait(tile, split, step is decode, fp8)
            step.out.fill_(float("nan"))
            step.launcher(tile, split)(0)
            results[name] = step.out.clone()
        want = results.pop("decode split")
        verdicts = {name: bool(torch.equal(x, want)) for name, x in results.items()}
        text = ", ".join(f"{name} {'==' if same else '!='} it" for name, same in verdicts.items())
        self.say("bits", f"{'float8' if fp8 else 'half'} {short(config, True)} decode: {text}", verdicts=verdicts)

    def time(self, mode: str, shape: Shape, configs: tuple[tuple[AttentionConfig, bool], ...]) -> None:
        step = self.step(shape)
        times = []
        for config, split in configs:
            if self.left_s < 0.5:
                break
            try:
                self.wait(config, split, shape.count == 1, shape.fp8)
                us = graph_us(step.launcher(config, split), step.num_layers)
                times.append({"config": config, "split": split, "us": round(us, 2)})
            except Exception as error:
                self.say("failed", f"{mode} {shape.name} {short(config, split)}: {str(error)[:200]}")
        times.sort(key=lambda x: x["us"])
        text = ", ".join(f"{short(x['config'], x['split'])} {x['us']}" for x in times[:4])
        us = times[0]["us"]
        rate = f"{step.kv_bytes / us / 1e3:.0f} GB/s" if shape.count == 1 else f"{step.flops / us / 1e6:.0f} TFLOP/s"
        shown = f"{mode} {shape.name}: {us} us {rate} | {text} | worst {times[-1]['us']}"
        self.say("time", shown, mode=mode, shape=shape._asdict(), times=times)

    def pdl(self, shape: Shape, config: AttentionConfig) -> None:
        step = self.step(shape)
        us = {on: graph_us(step.launcher(config, True, on), step.num_layers) for on in (False, True)}
        self.say(
            "pdl", f"{shape.name} {short(config, True)}: {us[False]:.2f} us, with launches ahead {us[True]:.2f} us"
        )

    def rope(self, num_tokens: int, num_parts: int) -> None:
        step = self.step(Shape(1, num_tokens - 1, 1, False))
        parts = torch.randn((num_parts, num_tokens, (HEADS + 2 * KV_HEADS) * DIM), device=self.device)
        q = torch.empty((num_tokens, HEADS, DIM), device=self.device, dtype=step.q.dtype)
        cos = torch.randn((num_tokens, DIM // 2), device=self.device)
        positions = step.ints(range(num_tokens))

        def launch(layer: int) -> None:
            at = kv_layer(step.cache, None, layer)
            rope_and_write(parts, None, None, None, 0.0, "halves", cos, cos, positions, positions, q, at)

        us = graph_us(launch, step.num_layers)
        num_bytes = parts.numel() * 4 + parts[0].numel() * 2
        self.say("rope", f"{num_tokens} tokens, {num_parts} parts: {us:.2f} us {num_bytes / us / 1e3:.0f} GB/s")


def short(config: AttentionConfig, split: bool) -> str:
    c = config
    return f"{c.block_m}x{c.block_n}/{c.split_keys}{'s' if split else 'i'}w{c.num_warps}st{c.num_stages}"


def decode_choices(configs: tuple[AttentionConfig, ...], num_rows: int) -> tuple[tuple[AttentionConfig, bool], ...]:
    """(config, each split by its own program): few rows need splits, many can do without."""
    by_size = sorted(configs, key=lambda c: c.split_keys == 0) if num_rows <= 8 else configs
    split = [(c, True) for c in by_size if c.split_keys]
    inline = [(c, False) for c in by_size if c.split_keys == 0 or c.block_m > 16]
    return tuple(split + (inline if num_rows > 8 else []))


def cases(tuner: Tuner, context: int, prefills: tuple[int, int]) -> Iterator[tuple[str, str, Shape, Any]]:
    """(name, mode, shape, choices), the most valuable first."""

    def decode(num_rows: int, fp8: bool, mode: str) -> tuple[str, Shape, Any]:
        configs = INVARIANT if mode == "invariant" else DECODE_FLOAT8 if fp8 else DECODE_FAST
        return mode, Shape(num_rows, context - 1, 1, fp8), decode_choices(configs, num_rows)

    def prefill(count: int, fp8: bool, mode: str) -> tuple[str, Shape, Any]:
        extra = (C(128, 64, 256, 8, 3),)
        configs = PREFILL_FAST if mode == "fast" else (*INVARIANT, *extra)
        return mode, Shape(1, 0, count, fp8), tuple((c, False) for c in configs)

    order = (
        *(decode(rows, False, "fast") for rows in (1, 64, 256)),
        prefill(prefills[0], False, "fast"),
        prefill(prefills[0], False, "invariant"),
        *(decode(rows, False, "invariant") for rows in (1, 64, 256)),
        *(decode(rows, True, "fast") for rows in (1, 64, 256)),
        prefill(prefills[1], False, "fast"),
        prefill(prefills[1], False, "invariant"),
        *(decode(rows, True, "invariant") for rows in (1, 64, 256)),
        *(decode(rows, False, mode) for rows in (32, 128, 8) for mode in ("fast", "invariant")),
        prefill(prefills[0], True, "fast"),
        prefill(prefills[0], True, "invariant"),
        *(decode(rows, True, "fast") for rows in (32, 128, 8)),
    )
    for mode, shape, choices in order:
        yield f"{mode} {shape.name}", mode, shape, choices


def run(tuner: Tuner, context: int, prefills: tuple[int, int]) -> None:
    invariant = {
        fp8: attention_config("invariant", DIM, GROUP, 1, False, "float8" if fp8 else "half") for fp8 in (False, True)
    }
    others = tuple(
        c for c in (C(128, 64, 256, 8, 3), C(64, 64, 256, 4, 2), C(64, 64, 256, 4, 3)) if c != invariant[False]
    )
    checks = [
        (Shape(3, context - 1, 1, fp8), config, split)
        for fp8 in (False, True)
        for config, split in ((DECODE_FAST[0], True), (DECODE_FAST[3], False), (invariant[fp8], True))
    ] + [
        (Shape(2, 100, 200, fp8), config, False)
        for fp8 in (False, True)
        for config in (PREFILL_FAST[0], invariant[fp8])
    ]
    plan = list(cases(tuner, context, prefills))
    for shape, config, split in checks:
        tuner.compile(config, split, shape.count == 1, shape.fp8)
    for fp8, config in invariant.items():
        for split, decode in ((False, False), (True, False), (False, True), (True, True)):
            tuner.compile(config, split, decode, fp8)
        for other in others:
            tuner.compile(other, False, False, fp8)
    for _, _, shape, choices in plan:
        for config, split in choices:
            tuner.compile(config, split, shape.count == 1, shape.fp8)

    for shape, config, split in checks:
        tuner.attempt(f"check {shape.name}", lambda s=shape, c=config, p=split: tuner.check(s, c, p))
    for fp8, config in invariant.items():
        tuner.attempt("bits", lambda f=fp8, c=config: tuner.bits(c, f, others))
    for name, mode, shape, choices in plan[:8]:
        tuner.attempt(name, lambda m=mode, s=shape, c=choices: tuner.time(m, s, c))
    tuner.attempt("rope", lambda: [tuner.rope(t, p) for t, p in ((1, 4), (64, 4), (256, 4), (2048, 1))] and None)
    tuner.attempt("pdl", lambda: tuner.pdl(Shape(1, context - 1, 1, False), DECODE_FAST[0]))
    for name, mode, shape, choices in plan[8:]:
        tuner.attempt(name, lambda m=mode, s=shape, c=choices: tuner.time(m, s, c))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-s", type=float, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin = time.monotonic()
    tuner = Tuner(args.budget_s, args.json, "cuda", "bfloat16", min(WORKERS, os.cpu_count() or 1))
    print(torch.cuda.get_device_name(), flush=True)
    run(tuner, CONTEXT, (2048, 8192))
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    if tuner.pool is not None:
        tuner.pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
