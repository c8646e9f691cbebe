"""Chooses the linears' configurations on this GPU, by measurement, within a budget: python -m benchmarks.gpu.tune_linear --json OUT

Prints one line a case and writes the table that jilju.backends.cuda.tuning ships (OUT), and all that was measured beside it
(OUT.all.json). With --only fp8-few: the shipped table, with fp8 tiles for up to 128 tokens measured anew; half a minute will
do. Candidates are compiled by processes without the GPU while it works; each is checked against a float32 product
before it is timed, as a CUDA graph over weights that rotate through more memory than the L2 cache holds, and tiles against
their own first bits behind it. A case that fails is told and left out; the most valuable come first.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton
import triton.language as tl
from benchmarks.gpu.compile_only import CompileOnly

from jilju.backends.cuda.kernels.glu import glu
from jilju.backends.cuda.kernels.linear import FP8, Quantized, linear, linear_glu
from jilju.backends.cuda.tuning import Dtype, LinearConfig, Measured, Mode, TunedLinear, Tuning, load_tuning, num_parts

ROTATED_BYTES = 500 << 20  # of weights, many times the 60 MB of an H200's L2 cache
WEIGHTS = {
    1: 4.0,
    64: 2.0,
    128: 2.0,
    256: 2.0,
    2048: 2.0,
}  # what a number of tokens counts where one choice serves all; else 1
FEW_TOKENS = (64, 1, 128, 4, 32, 8)  # of --only fp8-few, after 16: the most valuable first
LEADING = 2  # reductions that are tried there beyond 16 tokens
CHAINED = (("bf16", 1), ("bf16", 64), ("fp8", 1))
HALF = torch.bfloat16
DEVICE = "cuda"
MODES: tuple[Mode, ...] = ("fast", "invariant")


class Matrix(msgspec.Struct, frozen=True):
    name: str
    num_rows: int
    num_columns: int
    glu: bool = False


LLAMA_8B = (
    Matrix("gate_up", 28672, 4096, glu=True),
    Matrix("down", 4096, 14336),
    Matrix("qkv", 6144, 4096),
    Matrix("o", 4096, 4096),
    Matrix("head", 128256, 4096),
)


class Case(msgspec.Struct, frozen=True):
    dtype: Dtype
    matrix: Matrix
    num_tokens: int


class Timed(msgspec.Struct, frozen=True):
    case: Case
    config: LinearConfig
    us: float


def cases() -> Iterator[Case]:
    """The most valuable first."""
    for dtype, some in (
        ("bf16", (1, 64, 256, 2048)),
        ("fp8", (1, 64, 256)),
        ("bf16", (32, 128, 8, 16)),
        ("fp8", (32, 128, 2048, 8, 16)),
        ("bf16", (4, 2)),
        ("fp8", (4, 2)),
    ):
        for num_tokens in some:
            for matrix in LLAMA_8B:
                if num_tokens <= 256 or matrix.name != "head":  # of a prompt, one row each is wanted
                    yield Case(dtype, matrix, num_tokens)  # type: ignore[arg-type]


# --- candidates ---


def gemv_candidates(case: Case) -> list[LinearConfig]:
    """A warp takes at least 32 times 16 bytes of a row, or its threads' values would not lie beside their weights."""
    unit = 512 if case.dtype == "fp8" else 256
    tiles = (
        (8, 4, 1),
        (4, 4, 1),
        (8, 8, 1),
        (16, 4, 1),
        (8, 2, 1),
        (4, 8, 1),
        (8, 4, 3),
        (4, 4, 4),
    )  # block_n, num_warps, stages
    return [LinearConfig("gemv", n, unit * warps, num_warps=warps, num_stages=stages) for n, warps, stages in tiles]


def reductions(case: Case) -> list[tuple[int, int]]:
    """block_k and num_splits, such that 60 to 400 programs of 64 rows run in a step of few tokens."""
    blocks = case.matrix.num_rows // 2 // 64 if case.matrix.glu else case.matrix.num_rows // 64
    splits = [1] if case.matrix.glu or blocks > 400 else [s for s in (1, 2, 4) if 60 <= blocks * s <= 400]
    return [(block_k, s) for s in splits for block_k in (64, 128)]


def tiles_candidates(case: Case) -> list[LinearConfig]:
    if case.dtype == "fp8":
        return fp8_candidates(case)
    t, is_glu = case.num_tokens, case.matrix.glu
    block_t = max(16, t)
    if t <= 64:
        shapes = [(64, block_t, 4, 100), (64, block_t, 4, 70), (64, block_t, 8, 100), (128, block_t, 8, 200)]
    elif t == 128:
        shapes = [(64, 128, 4, 100), (64, 128, 8, 100), (64, 128, 8, 200), (128, 128, 8, 200), (64, 64, 4, 100)]
    else:
        shapes = [
            (128, 128, 8, 200),
            (128, 256, 8, 200),
            (64, 256, 8, 200),
            (64, 128, 4, 100),
            (64, 128, 8, 200),
            (256, 128, 8, 200),
        ]
    found = []
    for index, (block_n, block_t, num_warps, kib) in enumerate(shapes):
        for block_k, num_splits in reductions(case):
            accumulators = block_n * block_t * (1 + is_glu) * (1 + (num_splits > 1)) // (32 * num_warps)
            stage = block_k * 2 * (block_n * (1 + is_glu) + block_t)
            num_stages = min(6, (kib << 10) // stage)
            is_wide = num_splits > 1 and block_k == 128  # more is live at once: 128 would spill
            if accumulators <= (96 if is_wide else 128) and num_stages >= 2:
                engines = (True, False) if index < 2 else (True,)
                tile = block_n, block_k, block_t, num_splits, num_warps, num_stages
                found += [LinearConfig("tiles", *tile, tma=tma) for tma in engines]
    return list(dict.fromkeys(found))


def fp8_candidates(case: Case) -> list[LinearConfig]:
    """Each weight is converted by one warp: 64 rows for each four of them, or two would do the same. Few tokens: two to four
    programs an SM. Blocks of many rows read the tokens less often, which for many of them is most of the reading."""
    t, is_glu = case.num_tokens, case.matrix.glu
    if t <= 16:
        shapes = [(64, 16, 4, 75), (128, 16, 8, 110)] + (
            [(64, 16, 4, 110)] if is_glu else [(64, 16, 4, 55), (128, 16, 4, 75)]
        )
    elif t <= 64:
        shapes = [(128, t, 8, 110), (64, t, 4, 110 if is_glu else 75)]
        shapes += [(128, t, 8, 200)] if is_glu else [(256, 64, 8, 200)] if t > 32 else []
    else:
        shapes = [(128, 128, 8, 200), (128, 64, 8, 200), (64, 128, 4, 110)] + ([] if is_glu else [(256, 64, 8, 200)])
    found = []
    for block_n, block_t, num_warps, kib in shapes:
        for block_k, num_splits in fp8_reductions(case):
            num_stages = min(6, (kib << 10) // (block_k * (block_n * (1 + is_glu) + 2 * block_t)))
            accumulators = block_n * block_t * (1 + is_glu) // (32 * num_warps)
            registers = (
                accumulators + block_n * block_k // (32 * num_warps) // 2
            )  # of a thread, with the converted weights
            if num_stages >= 2 and registers <= 160:
                tile = block_n, block_k, block_t, num_splits, num_warps, num_stages
                # Pointers take registers too, and would spill
                found += [LinearConfig("tiles", *tile, tma=tma) for tma in (True, False) if tma or registers < 128]
    return list(dict.fromkeys(found))


def fp8_reductions(case: Case) -> list[tuple[int, int]]:
    blocks = case.matrix.num_rows // 64
    splits = (1,) if case.matrix.glu or blocks > 400 else (2, 4)
    return [(block_k, num_splits) for num_splits in splits for block_k in (128, 256)]


def candidates(case: Case) -> list[LinearConfig]:
    few = gemv_candidates(case) if case.num_tokens <= 4 else []
    return [LinearConfig("matmul"), *few, *tiles_candidates(case)]


# --- compiling, in processes that never see the GPU ---


def compile_case(case: Case, config: LinearConfig, pdl: bool = False) -> None:
    dtype = FP8 if case.dtype == "fp8" else HALF
    weight = torch.empty(case.matrix.num_rows, case.matrix.num_columns, dtype=dtype)
    scale = torch.empty(case.matrix.num_rows) if dtype == FP8 else None
    x = torch.empty(case.num_tokens, case.matrix.num_columns, dtype=HALF)
    launch(case, config, x, weight, scale, output(case, config, "cpu"), None, pdl)


def start_compiler() -> None:
    torch.set_num_threads(1)
    CompileOnly().activate()


# --- running ---


def output(case: Case, config: LinearConfig, device: str) -> torch.Tensor:
    """What the kernel leaves: [T, F] of a glu, else [S, T, N]."""
    rows, matmul = case.matrix.num_rows, config.kind == "matmul"
    if case.matrix.glu and not matmul:
        return torch.empty(case.num_tokens, rows // 2, dtype=HALF, device=device)
    parts = num_parts(config, case.num_tokens, rows)
    return torch.empty(parts, case.num_tokens, rows, dtype=HALF if matmul else torch.float32, device=device)


def workspace_of(case: Case) -> tuple[Quantized, torch.Tensor]:
    """For matmul: of fp8 the quantized tokens, and what glu() makes of the product."""
    values = torch.empty(case.num_tokens * case.matrix.num_columns, dtype=FP8, device=DEVICE)
    gated = torch.empty(case.num_tokens, case.matrix.num_rows // 2, dtype=HALF, device=DEVICE)
    return Quantized(values, torch.empty(case.num_tokens, device=DEVICE)), gated


def launch(case, config, x, weight, scale, out, workspace, pdl=False) -> None:
    """Of a glu by matmul the product and the glu are two kernels."""
    if case.matrix.glu and config.kind != "matmul":
        linear_glu(x, weight, scale, out, config, "silu", pdl=pdl)
        return
    linear(x, weight, scale, out, config, quantized=workspace and workspace[0], pdl=pdl)
    if case.matrix.glu:
        glu(out, workspace[1], "silu", pdl=pdl)


class Weights:
    """Copies of one matrix, and the float32 product that all configurations are checked against."""

    def __init__(self, dtype: Dtype, matrix: Matrix, max_tokens: int):
        shape = matrix.num_rows, matrix.num_columns
        num_bytes = math.prod(shape) * (1 if dtype == "fp8" else 2)
        first = torch.randn(shape, dtype=torch.float32, device=DEVICE).mul_(matrix.num_columns**-0.5)
        self.scale = None
        if dtype == "fp8":
            self.scale = first.abs().amax(1) / 448
            first = first.div_(self.scale[:, None]).to(FP8)
        else:
            first = first.to(HALF)
        self.copies = [first] + [first.clone() for _ in range(min(8, ROTATED_BYTES // num_bytes))]
        self.x = torch.randn(max_tokens, matrix.num_columns, device=DEVICE).to(HALF)
        whole = first.float() if self.scale is None else first.float() * self.scale[:, None]
        self.product = self.x.float() @ whole.T
        self.num_bytes = num_bytes


class Timer:
    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def us(self, launches: list[Callable[[], None]], expected_us: float) -> float:
        """The mean of a launch in a graph of about 1.5 ms, the best of three replays."""
        rounds = max(1, math.ceil(1500 / max(expected_us, 5.0) / len(launches)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            launches[0]()
            self.stream.synchronize()
            graph.capture_begin()
            for _ in range(rounds):
                for run in launches:
                    run()
            graph.capture_end()
            graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            self.stream.synchronize()
        best = min(a.elapsed_time(b) for a, b in itertools.pairwise(events))
        return best * 1000 / rounds / len(launches)


def check(case: Case, config: LinearConfig, out: torch.Tensor, workspace: Any, product: torch.Tensor) -> None:
    """Outputs are of magnitude 1. fp8 activations have three bits behind the point, halves seven."""
    want = product[: case.num_tokens]
    if case.matrix.glu:
        gate, up = want.chunk(2, dim=1)
        want = torch.nn.functional.silu(gate) * up
        got = workspace[1] if config.kind == "matmul" else out
    else:
        got = out.float().sum(0)
    by_matmul = config.kind == "matmul"
    tolerance = 0.25 if by_matmul and case.dtype == "fp8" else 0.02 if by_matmul or case.matrix.glu else 1e-3
    error = ((got.float() - want).abs() / (1 + want.abs())).max().item()
    if not error <= tolerance:
        raise ArithmeticError(f"off by {error:.3g}, allowed {tolerance}")


def check_steady(runs: list[Callable[[], None]], out: torch.Tensor, first: torch.Tensor) -> None:
    """The copies of the weights are the same, so the bits must be."""
    wrong = (out != first).any()
    for run in runs * 2:
        run()
        wrong |= (out != first).any()
    if wrong.item():
        raise ArithmeticError("other bits in another launch")


@triton.jit
def read_kernel(x, out, num_rounds, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_rounds):
        block = (i * tl.num_programs(0) + program).to(tl.int64)
        total += tl.load(x + block * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out + program, tl.sum(total, axis=0))


def read_gb_per_s(timer: Timer) -> float:
    """What a kernel that only adds up 4 GiB reaches: the roof for all that follows."""
    x = torch.randn(1 << 30, dtype=torch.float32, device=DEVICE)
    out = torch.empty(1 << 16, device=DEVICE)
    best = 0.0
    for block, programs in ((4096, 132 * 8), (8192, 132 * 4), (4096, 1 << 14), (8192, 1 << 14)):
        rounds = x.numel() // (block * programs)
        us = timer.us([lambda: read_kernel[(programs,)](x, out, rounds, BLOCK=block, num_warps=8)], 1000)  # noqa: B023
        best = max(best, rounds * block * programs * 4 / us / 1e3)
    return best


# --- choosing ---


def cost(timed: Timed) -> float:
    """Its time, and that of whoever reads what it leaves."""
    out = output(timed.case, timed.config, "meta")
    return timed.us + out.numel() * out.element_size() / 3e6


def of_fast_mode(timings: list[Timed]) -> dict[int, Timed]:
    by_tokens: dict[int, list[Timed]] = defaultdict(list)
    for timed in timings:
        by_tokens[timed.case.num_tokens].append(timed)
    return {t: min(some, key=cost) for t, some in by_tokens.items()}


def of_invariant_mode(timings: list[Timed]) -> dict[int, Timed]:
    """One block_k and num_splits for every number of tokens: those that lose least in all, a failure counted as three times the best."""
    tiles = [timed for timed in timings if timed.config.kind == "tiles"]
    by_reduction: dict[tuple[int, int], list[Timed]] = defaultdict(list)
    for timed in tiles:
        by_reduction[timed.config.block_k, timed.config.num_splits].append(timed)
    best = of_fast_mode(tiles)

    def loss(reduction: tuple[int, int]) -> float:
        own = of_fast_mode(by_reduction[reduction])
        return sum(WEIGHTS.get(t, 1.0) * (cost(own[t]) / cost(best[t]) if t in own else 3.0) for t in best)

    return of_fast_mode(by_reduction[min(by_reduction, key=loss)]) if by_reduction else {}


def unbeaten(best: tuple[Measured, ...]) -> tuple[Measured, ...]:
    """Without those that one of more tokens beats: it holds fewer tokens too."""
    found: list[Measured] = []
    for measured in reversed(best):
        if not found or measured.us <= min(later.us for later in found):
            found.append(measured)
    return tuple(reversed(found))


def pruned(tuning: Tuning) -> Tuning:
    linears = (msgspec.structs.replace(linear, best=unbeaten(linear.best)) for linear in tuning.linears)
    return msgspec.structs.replace(tuning, linears=tuple(linears))


def table(gpu_name: str, timings: list[Timed], read: float) -> Tuning:
    by_matrix: dict[tuple[Dtype, Matrix], list[Timed]] = defaultdict(list)
    for timed in timings:
        by_matrix[timed.case.dtype, timed.case.matrix].append(timed)
    linears = []
    for (dtype, matrix), some in by_matrix.items():
        for mode, choose in zip(MODES, (of_fast_mode, of_invariant_mode), strict=True):
            best = tuple(Measured(t, round(v.us, 2), v.config) for t, v in sorted(choose(some).items()))
            if best:
                linears.append(TunedLinear(mode, dtype, matrix.num_rows, matrix.num_columns, matrix.glu, best))
    return pruned(Tuning(gpu_name, tuple(linears), round(read, 1)))


def merged(shipped: Tuning, timings: list[Timed]) -> Tuning:
    """The shipped table with newly measured tiles: of the same matrix, mode and dtype, what it has of gemv and matmul goes on to
    compete; its tiles stay where there are more tokens than now and, in invariant mode, the same reduction."""
    new = {
        (e.mode, e.dtype, e.num_rows, e.num_columns, e.glu): e
        for e in table(shipped.gpu_name, timings, shipped.read_gb_per_s).linears
    }
    linears = []
    for old in shipped.linears:
        entry = new.pop((old.mode, old.dtype, old.num_rows, old.num_columns, old.glu), None)
        linears.append(old if entry is None else joined(old, entry))
    return Tuning(shipped.gpu_name, (*linears, *new.values()), shipped.read_gb_per_s)


def joined(old: TunedLinear, new: TunedLinear) -> TunedLinear:
    matrix = next(m for m in LLAMA_8B if (m.num_rows, m.num_columns, m.glu) == (new.num_rows, new.num_columns, new.glu))
    last = new.best[-1]

    def stays(measured: Measured) -> bool:
        if measured.config.kind != "tiles":
            return True
        same = measured.config.block_k == last.config.block_k and measured.config.num_splits == last.config.num_splits
        return measured.num_tokens > last.num_tokens and (same or new.mode == "fast")

    def whole_cost(measured: Measured) -> float:
        return cost(Timed(Case(new.dtype, matrix, measured.num_tokens), measured.config, measured.us))

    best: dict[int, Measured] = {}
    for measured in sorted([*filter(stays, old.best), *new.best], key=whole_cost):
        best.setdefault(measured.num_tokens, measured)
    return msgspec.structs.replace(new, best=tuple(best[t] for t in sorted(best)))


def shown(config: LinearConfig) -> str:
    if config.kind == "matmul":
        return "matmul"
    split = f"t{config.block_t} s{config.num_splits} " if config.kind == "tiles" else ""
    engine = " tma" if config.tma else ""
    return f"{config.kind} n{config.block_n} k{config.block_k} {split}w{config.num_warps} st{config.num_stages}{engine}"


class Run:
    def __init__(self, path: Path, budget_s: float, max_tokens: int = 2048):
        self.path, self.end, self.max_tokens = path, time.monotonic() + budget_s, max_tokens
        self.timings: list[Timed] = []
        self.read = 0.0
        self.compiling: dict[Any, Future[None]] = {}
        self.weights: dict[tuple[Dtype, Matrix], Weights] = {}

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def submit(self, pool: ProcessPoolExecutor, case: Case, config: LinearConfig, pdl: bool = False) -> None:
        """Once a kernel: the number of rows is no part of it, nor is that of columns if the blocks divide it."""
        if config.kind != "matmul":
            key = self.key(case, config, pdl)
            if key not in self.compiling:
                self.compiling[key] = pool.submit(compile_case, case, config, pdl)

    @staticmethod
    def key(case: Case, config: LinearConfig, pdl: bool) -> tuple[object, ...]:
        parts = num_parts(config, case.num_tokens, case.matrix.num_rows)
        tokens = case.num_tokens if config.kind == "gemv" else 0
        is_even = case.matrix.num_columns % config.block_k == 0
        return case.dtype, case.matrix.glu, config, tokens, parts if not case.matrix.glu else 0, is_even, pdl

    def measure(self, timer: Timer, case: Case, configs: list[LinearConfig]) -> None:
        key = case.dtype, case.matrix
        if key not in self.weights:
            max_tokens = min(self.max_tokens, 256 if case.matrix.name == "head" else 2048)
            self.weights[key] = Weights(case.dtype, case.matrix, max_tokens)
        weights = self.weights[key]
        x = weights.x[: case.num_tokens]
        flops = 2 * case.num_tokens * case.matrix.num_rows * case.matrix.num_columns
        expected_us = weights.num_bytes / 4e6 + flops / 6e8
        failures: list[str] = []
        for config in configs:
            if self.left_s < 1.5:
                failures.append("budget")
                break
            try:
                if config.kind != "matmul":
                    self.compiling[self.key(case, config, False)].result(timeout=max(0.1, self.left_s - 1.5))
                out = output(case, config, DEVICE)
                workspace = workspace_of(case)
                launch(case, config, x, weights.copies[0], weights.scale, out, workspace)
                check(case, config, out, workspace, weights.product)
                runs = [
                    lambda w=w, c=config, o=out, s=workspace: launch(case, c, x, w, weights.scale, o, s)
                    for w in weights.copies
                ]
                first = out.clone()
                us = timer.us(runs, expected_us)
                if config.kind == "tiles":
                    check_steady(runs, out, first)
                self.timings.append(Timed(case, config, us))
            except Exception as error:
                failures.append(f"{shown(config)}: {type(error).__name__} {str(error)[:90]}")
        self.report(case, weights.num_bytes, flops, failures)

    def report(self, case: Case, num_bytes: int, flops: int, failures: list[str]) -> None:
        own = sorted((timed for timed in self.timings if timed.case == case), key=cost)
        line = f"{case.dtype:4} {case.matrix.name:7} t={case.num_tokens:<4}"
        for kind in ("gemv", "tiles", "matmul"):
            for timed in [timed for timed in own if timed.config.kind == kind][:1]:
                rate = f"{num_bytes / timed.us / 1e3:.0f} GB/s {flops / timed.us / 1e6:.0f} TF"
                line += f" | {shown(timed.config)} {timed.us:.1f} us {rate}"
        print(line, *(f"\n    failed {failure}" for failure in failures), flush=True)

    def write(self, done: Tuning) -> None:
        self.path.write_bytes(msgspec.json.format(msgspec.json.encode(done), indent=1))
        Path(f"{self.path}.all.json").write_bytes(msgspec.json.encode(self.timings))


def chained(run: Run, timer: Timer, dtype: Dtype, num_tokens: int, gpu_name: str) -> None:
    """A layer's four linears one behind the other as a model runs them, without and with programmatic launches."""
    tuning = table(gpu_name, run.timings, run.read)
    for mode in MODES:
        for pdl in (False, True):
            launches, num_bytes = [], 0
            for name in ("qkv", "o", "gate_up", "down"):
                matrix = next(m for m in LLAMA_8B if m.name == name)
                weights, case = run.weights[dtype, matrix], Case(dtype, matrix, num_tokens)
                config = tuning.linear(mode, dtype, matrix.num_rows, matrix.num_columns, num_tokens, matrix.glu)
                num_bytes += weights.num_bytes
                launches.append((case, config, weights, output(case, config, DEVICE), workspace_of(case)))

            def layer(copy: int, launches=launches, pdl=pdl) -> None:
                for case, config, weights, out, workspace in launches:
                    w = weights.copies[copy % len(weights.copies)]
                    launch(case, config, weights.x[: case.num_tokens], w, weights.scale, out, workspace, pdl)

            us = timer.us([lambda i=i: layer(i) for i in range(6)], num_bytes / 4e6)
            rate = num_bytes / us / 1e3
            print(f"{dtype} layer t={num_tokens} {mode} pdl={pdl}: {us:.1f} us, {rate:.0f} GB/s", flush=True)


def leading(timings: list[Timed], case: Case) -> list[LinearConfig]:
    """The best configuration for 16 tokens of each of the best reductions."""
    own = sorted((t for t in timings if (t.case.dtype, t.case.matrix) == (case.dtype, case.matrix)), key=cost)
    best: dict[tuple[int, int], LinearConfig] = {}
    for timed in own:
        if timed.case.num_tokens == 16:
            best.setdefault((timed.config.block_k, timed.config.num_splits), timed.config)
    return list(best.values())[:LEADING]


def tune_fp8_few(run: Run, pool: ProcessPoolExecutor, gpu_name: Callable[[], str]) -> None:
    """Tiles of fp8 for 16 tokens; then, of the reductions that led, for fewer and for more."""
    todo = [(case, fp8_candidates(case)) for case in (Case("fp8", matrix, 16) for matrix in LLAMA_8B)]
    for case, configs in todo:
        for config in configs:
            run.submit(pool, case, config)
    shipped = load_tuning(gpu_name())
    if shipped.gpu_name != gpu_name():
        shipped = Tuning(gpu_name())
    timer = Timer()
    later: list[tuple[Case, list[LinearConfig]]] = []
    for case, configs in todo:
        run.measure(timer, case, configs)
        leaders = leading(run.timings, case)
        for num_tokens in FEW_TOKENS:
            other, configs = Case("fp8", case.matrix, num_tokens), leaders
            if num_tokens > 16:
                reductions = {(config.block_k, config.num_splits) for config in leaders}
                configs = [c for c in fp8_candidates(other) if (c.block_k, c.num_splits) in reductions]
            later.append((other, configs))
            for config in configs:  # while the next matrix is measured
                run.submit(pool, other, config)
    for case, configs in sorted(later, key=lambda one: FEW_TOKENS.index(one[0].num_tokens)):
        if run.left_s < 2:
            print(f"budget spent before {case.dtype} {case.matrix.name} t={case.num_tokens}")
            break
        run.measure(timer, case, configs)
    run.write(pruned(merged(shipped, run.timings)))


def tune(run: Run, pool: ProcessPoolExecutor, gpu_name: Callable[[], str]) -> None:
    todo = list(cases())
    for case in todo:
        for config in candidates(case):
            run.submit(pool, case, config)
    timer = Timer()
    try:
        run.read = read_gb_per_s(timer)
    except Exception:
        traceback.print_exc()
    print(f"{gpu_name()}: {run.read:.0f} GB/s read; {len(run.compiling)} kernels to compile", flush=True)
    for index, case in enumerate(todo):
        if run.left_s < 2:
            print(
                f"budget spent before {case.dtype} {case.matrix.name} t={case.num_tokens}, {len(todo) - index} cases left"
            )
            break
        group = case.dtype, case.num_tokens
        try:
            run.measure(timer, case, candidates(case))
            following = todo[index + 1] if index + 1 < len(todo) else None
            ends = following is None or (following.dtype, following.num_tokens) != group
            if ends:
                run.write(table(gpu_name(), run.timings, run.read))
            if ends and group in CHAINED and run.left_s > 10:
                chained(run, timer, case.dtype, case.num_tokens, gpu_name())
        except Exception:
            traceback.print_exc()
    run.write(table(gpu_name(), run.timings, run.read))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=100.0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", choices=["fp8-few"])
    arguments = parser.parse_args()
    only_few = arguments.only == "fp8-few"
    run = Run(arguments.json, arguments.budget_s, 128 if only_few else 2048)
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_compiler)  # before CUDA is touched
    try:
        (tune_fp8_few if only_few else tune)(run, pool, torch.cuda.get_device_name)
        print(f"{len(run.timings)} timings, {run.left_s:.0f} s left", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
