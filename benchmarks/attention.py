"""Attention alone: time of the native kernels by number of tokens and context, beside the float32 FMA peak and the stream of K and V.

Owns the method: a plan of nothing but embed, rope and attention in the shape of a model, run through NativeExecutor with its
profile; the best of several steps counts, since a shared machine only ever adds time. Usage: attention.py [--shape smollm2]
[--contexts 512,2048,8192] [--threads 2] [--repeats 5] [--kv-dtype f16]
"""

import argparse
import time

import numpy as np

from jilju.backends.native import NativeExecutor
from jilju.bench.batches import Sampling
from jilju.bench.steps import Part, Steps
from jilju.formats.ggml import GgmlType
from jilju.plan import Batch, KvDtype, KvSpec, Limits, Plan, PlanBuilder, WeightSpec, WeightTensor

SHAPES = {  # layers, query heads, KV heads, head size
    "smollm2": (30, 9, 3, 64),
    "qwen": (24, 14, 2, 64),
    "llama": (8, 32, 8, 128),  # a quarter of its layers
}
VOCAB = 64
BLOCK_SIZE = 16
CHUNK = 512  # tokens of a step of prefill


def plan_of(num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Plan, dict[str, WeightTensor]]:
    rng = np.random.default_rng(1)
    widths = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    tensors: dict[str, WeightTensor] = {}

    def matrix(name: str, rows: int, columns: int) -> WeightSpec:
        data = rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint8).reshape(-1)
        tensors[name] = WeightTensor(name, GgmlType.F32, (rows, columns), data)
        return WeightSpec(name, GgmlType.F32, rows, columns)

    b = PlanBuilder(KvSpec(num_layers, num_kv_heads, head_dim), VOCAB)
    q, k, v = b.split(b.embed(matrix("table", VOCAB, sum(widths))), *widths)
    for layer in range(num_layers):
        q, k = (b.rope(x, head_dim, 100_000.0, "halves") for x in (q, k))
        out = b.attention(q, k, v, layer, num_heads, head_dim**-0.5)
    b.sample(b.linear(b.take_rows(out), matrix("head", VOCAB, widths[0])))
    return b.build(), tensors


def best(executor: NativeExecutor, batch: Batch, repeats: int) -> dict[str, float]:
    """Milliseconds by kind of op of the fastest step, and of the whole step."""
    runs = []
    for _ in range(repeats):
        before = executor.profile().ns
        begin = time.perf_counter()
        executor.launch(batch)
        executor.wait()
        took = {kind: (ns - before[kind]) / 1e6 for kind, ns in executor.profile().ns.items()}
        runs.append({**took, "step": (time.perf_counter() - begin) * 1e3})
    return min(runs, key=lambda run: run["step"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-dtype", default="f16", choices=["f16", "int8"])
    args = parser.parse_args()
    kv_dtype: KvDtype = args.kv_dtype
    shape = SHAPES[args.shape]
    num_layers, num_heads, _, head_dim = shape
    plan, weights = plan_of(*shape)
    contexts = [int(c) for c in args.contexts.split(",")]
    longest = -(-(max(contexts) + 1) // BLOCK_SIZE) * BLOCK_SIZE
    executor = NativeExecutor(profile=True)
    bytes_per_token = executor.kv_bytes_per_token(plan, kv_dtype)
    limits = Limits(2 * longest // BLOCK_SIZE, BLOCK_SIZE, 2, CHUNK, longest, args.threads, kv_dtype)
    executor.load(plan, weights, limits)
    steps = Steps(executor, plan, limits)
    print(
        f"{args.shape}: {shape}, {args.threads} threads, {bytes_per_token} bytes of KV a token, {executor.kernel_set}"
    )
    for context in contexts:
        steps.fill(2, context)
        chunk = best(executor, steps.batch([Part(0, context - CHUNK, CHUNK)], 1, Sampling()), args.repeats)
        attended = CHUNK * (context - CHUNK) + CHUNK * (CHUNK + 1) // 2
        gmacs = 2 * num_layers * num_heads * head_dim * attended / (chunk["attention"] * 1e6) / args.threads
        one, two = (
            best(executor, steps.batch([Part(row, context, 1) for row in range(n)], n, Sampling()), 5 * args.repeats)
            for n in (1, 2)
        )
        gbps = bytes_per_token * context / (one["attention"] * 1e6)
        print(
            f"context {context}: last {CHUNK} tokens {chunk['attention']:.1f} ms = {gmacs:.1f} GMAC/s a core; "
            f"1 row {one['attention']:.3f} ms = {one['attention'] * 1e3 / num_layers:.1f} us a layer, {gbps:.1f} GB/s; "
            f"2 rows {two['attention']:.3f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
