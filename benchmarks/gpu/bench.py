"""Speed on a GPU, as tables beside the roofs: `make bench-gpu`. Under ten minutes on one H200.

First the bandwidth that a reading kernel reaches; then, with the shape of Llama 3.1 8B and random weights, decode at 1k context
by number of rows, prefill, and the whole engine beside the bare backend, in the fast and the invariant mode, in bf16 and fp8;
then plain PyTorch, compiled, and `transformers`, in processes of their own in the same run. A case that fails is told and left out.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.gpu.llama import BLOCK_SIZE, SPEC, Roof, limits_of, make_batch, plan_of
from benchmarks.gpu.tune_linear import Timer, read_gb_per_s

from jilju.backends.cuda.executor import CudaExecutor
from jilju.clock import WallClock
from jilju.engine.loop import Engine
from jilju.engine.request import Request, RequestFailed, SamplingParams

CONTEXT = 1024
MAX_ROWS = 256
STEP_TOKENS = 8192
ROWS = (1, 8, 32, 64, 128, 256)
PROMPTS = (2048, 8192)
SHEET_BYTES_PER_S, SHEET_FLOPS_PER_S = 4.8e12, 989e12  # of an H200, dense bf16
KV_DTYPE = "bf16"  # the default, with weights in fp8 too
MODES = (("bf16", "fast"), ("bf16", "invariant"), ("fp8", "fast"), ("fp8", "invariant"))


class Run:
    """What is measured, by case; kept in a file as it comes, for a run may be cut short."""

    def __init__(self, path: Path | None, budget_s: float):
        self._path, self._end = path, time.monotonic() + budget_s
        self.results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def case(self, name: str, needs_s: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        if self.left_s < needs_s:
            print(f"{name}: left out, {self.left_s:.0f} s are left", flush=True)
            return None
        try:
            result = measure()
        except Exception as error:
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-3, file=sys.stdout)
            torch.cuda.synchronize()
            return None
        self.results[name] = result
        if self._path is not None:
            self._path.write_text(json.dumps(self.results, indent=1))
        shown = ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
        print(f"{name}: {shown}", flush=True)
        return result


def device_s(work: Callable[[], object], repeats: int, rounds: int = 5) -> float:
    """Median seconds on the device of one piece of work, of rounds of so many."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(rounds):
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


def bandwidth() -> dict[str, Any]:
    """Reading, the best of a few kernels that only add up 4 GiB; and a copy, reading and writing."""
    data = torch.randn(1 << 30, device="cuda")
    out = torch.empty_like(data)
    out.copy_(data)
    return {
        "read GB/s": read_gb_per_s(Timer()),
        "copy GB/s": 2 * data.nbytes / device_s(lambda: out.copy_(data), 3) / 1e9,
    }


def product() -> dict[str, Any]:
    """The dense peak that a library reaches, on random numbers."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "xy")
    x @ y
    return {"TFLOP/s": 2 * 8192**3 / device_s(lambda: x @ y, 5) / 1e12}


def load(weight_dtype: str, mode: str, max_rows: int = MAX_ROWS) -> tuple[CudaExecutor, Any, Any, float]:
    torch.cuda.empty_cache()
    plan = plan_of()
    limits = limits_of(max_rows, CONTEXT + 192, KV_DTYPE, STEP_TOKENS)
    limits = limits if limits.max_context >= STEP_TOKENS else _longer(limits)
    executor = CudaExecutor(weight_dtype, fast=mode == "fast")  # type: ignore[arg-type]
    begin = time.perf_counter()
    executor.load_dummy(plan, limits)
    executor._buffers["kv"].view(torch.uint8).random_(0, 64)  # numbers that are finite and not all the same
    torch.cuda.synchronize()
    return executor, plan, limits, time.perf_counter() - begin


def _longer(limits: Any) -> Any:
    """Tables for the longest prompt too; the blocks suffice for it."""
    from dataclasses import replace

    return replace(limits, max_context=STEP_TOKENS)


def decode_batch(num_rows: int, context: int) -> Any:
    """A step of rows with that many tokens before them, on blocks in no order."""
    width = (context + 1) // BLOCK_SIZE + 1
    tables = np.random.default_rng(0).permutation(num_rows * width).reshape(num_rows, width)
    ids = np.arange(num_rows) % 1000 + 7
    return make_batch(ids, np.full(num_rows, context), np.ones(num_rows, np.int64), tables)


def decode(executor: CudaExecutor, roof: Roof, num_rows: int, read_bytes_per_s: float) -> dict[str, Any]:
    """The bare backend: the kernels of a step, sampling too, one after another without the host between them."""
    batch = decode_batch(num_rows, CONTEXT)
    seconds = executor.decode_seconds(batch, num_steps=20 if num_rows < 64 else 8)
    moved = roof.decode_bytes(num_rows, CONTEXT) / seconds
    return {
        "ms": seconds * 1e3,
        "tok/s": num_rows / seconds,
        "GB/s": moved / 1e9,
        "of reachable": moved / read_bytes_per_s,
        "of the sheet": moved / SHEET_BYTES_PER_S,
    }


def prefill(executor: CudaExecutor, roof: Roof, num_tokens: int) -> dict[str, Any]:
    width = num_tokens // BLOCK_SIZE
    batch = make_batch(np.arange(num_tokens) % 1000, np.zeros(1), np.array([num_tokens]), np.arange(width)[None])
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        executor.launch(batch)
        executor.wait()
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    seconds = statistics.median(times[1:])
    attended = 4 * SPEC.num_layers * SPEC.q_width * (num_tokens * (num_tokens + 1) // 2)
    flops = (roof.flops_per_token * num_tokens + attended) / seconds
    return {
        "ms": seconds * 1e3,
        "tok/s": num_tokens / seconds,
        "TFLOP/s": flops / 1e12,
        "of the sheet": flops / SHEET_FLOPS_PER_S,
    }


def engine(executor: CudaExecutor, plan: Any, limits: Any, num_rows: int, bare_ms: float) -> dict[str, Any]:
    """Requests side by side through the real engine; steps in which every row decodes."""
    made = Engine(plan, executor, limits, WallClock())
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=100, ignore_eos=True)
    rng = np.random.default_rng(1)
    begin = time.perf_counter()
    ahead = executor.num_rows_ahead
    for index in range(num_rows):
        ids = rng.integers(0, 1000, CONTEXT - 50).tolist()
        made.submit(Request(id=f"{num_rows}-{index}", prompt_ids=ids, params=params))
    while made.has_work():
        for event in made.step():
            assert not isinstance(event, RequestFailed), event
    wall_s = time.perf_counter() - begin
    steps = [step for step in made.log.steps if step.num_decode_tokens == num_rows and not step.num_prefill_tokens]
    steps = steps[len(steps) // 5 :]  # the first are captured
    ms = statistics.median(b.begin_ns - a.begin_ns for a, b in itertools.pairwise(steps)) / 1e6
    host = [a.done_ns - a.packed_ns for a in steps]
    return {
        "ms": ms,
        "tok/s": num_rows / ms * 1e3,
        "bare ms": bare_ms,
        "overhead": ms / bare_ms - 1,
        "wall s": wall_s,
        "in backend ms": statistics.median(host) / 1e6,
        "rows ahead": executor.num_rows_ahead - ahead,
    }


def measure_mode(run: Run, weight_dtype: str, mode: str, read: float, quick: bool) -> None:
    name = f"{weight_dtype} {mode}"
    roof = Roof.of(SPEC, weight_dtype, KV_DTYPE)
    made: dict[str, Any] = {}

    def loaded() -> dict[str, Any]:
        made["it"] = load(weight_dtype, mode)
        return {"s": made["it"][3]}

    if run.case(f"{name}: load", 10, loaded) is None:
        return
    executor, plan, limits, _ = made["it"]
    bare: dict[int, float] = {}
    for rows in (1, 64, 256) if quick else ROWS:
        result = run.case(f"{name}: decode {rows}", 6, lambda rows=rows: decode(executor, roof, rows, read))  # type: ignore[misc]
        if result is not None:
            bare[rows] = result["ms"]
    for tokens in PROMPTS[:1] if quick else PROMPTS:
        run.case(f"{name}: prefill {tokens}", 6, lambda tokens=tokens: prefill(executor, roof, tokens))  # type: ignore[misc]
    for rows in (1, 256):
        if rows in bare:
            run.case(f"{name}: engine {rows}", 15, lambda rows=rows: engine(executor, plan, limits, rows, bare[rows]))  # type: ignore[misc]
    executor.free()
    made.clear()


def baseline(run: Run, which: str, timeout_s: float) -> None:
    def measure() -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.gpu.baseline", which]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10, min(timeout_s, run.left_s)))
        if done.returncode:
            raise RuntimeError(done.stderr[-600:])
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result

    run.case(which, 20, measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--budget-s", type=float, default=540, help="cases that do not fit are left out")
    parser.add_argument(
        "--only", nargs="*", help="of: bf16-fast bf16-invariant fp8-fast fp8-invariant torch transformers"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases of each")
    given = parser.parse_args()
    run = Run(given.json, given.budget_s)
    print(f"{run.results['gpu']}, torch {torch.__version__}", flush=True)
    read = run.case("bandwidth", 1, bandwidth)
    run.case("product", 1, product)
    read_bytes_per_s = read["read GB/s"] * 1e9 if read else SHEET_BYTES_PER_S
    wanted = given.only or [f"{d}-{m}" for d, m in MODES] + ["torch", "transformers"]
    for weight_dtype, mode in MODES:
        if f"{weight_dtype}-{mode}" in wanted:
            measure_mode(run, weight_dtype, mode, read_bytes_per_s, given.quick)
    torch.cuda.empty_cache()
    for which, timeout_s in (("torch", 150), ("transformers", 90)):
        if which in wanted:
            baseline(run, which, timeout_s)


if __name__ == "__main__":
    main()
