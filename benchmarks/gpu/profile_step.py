"""Where a decode step's time goes on a GPU, kernel by kernel: `python -m benchmarks.gpu.profile_step --rows 1 64`.

Replays a captured step of the shape of Llama 3.1 8B under PyTorch's profiler. For each kernel how often it runs in a step, its mean time,
and the mean gap between the end of the kernel before it and its begin (negative: they overlap).
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from benchmarks.gpu.bench import CONTEXT, decode_batch, load

from jilju.backends.cuda.executor import CudaExecutor

STEPS = 4


def kernels(executor: CudaExecutor, num_rows: int) -> list[tuple[float, float, str]]:
    """(begin, end, name) in us, of STEPS steps in order of their begins."""
    batch = decode_batch(num_rows, CONTEXT)
    executor.decode_seconds(batch, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        executor.decode_seconds(batch, STEPS)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    return sorted(found)


def show(executor: CudaExecutor, num_rows: int, title: str) -> None:
    seconds = executor.decode_seconds(decode_batch(num_rows, CONTEXT), 8)
    found = kernels(executor, num_rows)
    total, gaps, counts = defaultdict(float), defaultdict(float), defaultdict(int)
    last_end = found[0][0]
    for begin, end, name in found:
        name = name.split("(")[0][:60]
        total[name] += end - begin
        gaps[name] += begin - last_end
        counts[name] += 1
        last_end = max(last_end, end)
    steps = STEPS + 3
    span = (found[-1][1] - found[0][0]) / steps
    print(f"-- {title}, {num_rows} rows: {seconds * 1e3:.3f} ms a step; profiled {span / 1e3:.3f} ms", flush=True)
    for name in sorted(total, key=lambda n: -total[n] - max(0.0, gaps[n]))[:14]:
        n = counts[name]
        print(
            f"{n / steps:7.1f} x {total[name] / n:8.2f} us, gap {gaps[name] / n:6.2f}, in all {total[name] / steps:8.1f} + {gaps[name] / steps:7.1f}  {name}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--weight-dtype", default="bf16")
    parser.add_argument("--mode", default="fast")
    parser.add_argument("--pdl-tokens", type=int, nargs="+", default=[256, 0], help="steps up to which kernels overlap")
    parser.add_argument("--brief", action="store_true", help="the time of a step alone")
    given = parser.parse_args()
    CudaExecutor._compile = lambda self: None  # type: ignore[method-assign]  # what is not run is not wanted
    executor, _, _, _ = load(given.weight_dtype, given.mode)
    for pdl_tokens in given.pdl_tokens:
        executor._forward.pdl_tokens = pdl_tokens
        executor._graphs.clear()
        for rows in given.rows:
            title = f"{given.weight_dtype} {given.mode}, overlap up to {pdl_tokens} tokens"
            if given.brief:
                ms = executor.decode_seconds(decode_batch(rows, CONTEXT), 12) * 1e3
                print(f"-- {title}, {rows} rows: {ms:.3f} ms a step", flush=True)
            else:
                show(executor, rows, title)


if __name__ == "__main__":
    main()
