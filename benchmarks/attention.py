"""Attention alone: time of the native kernels by number of tokens and context, beside the float32 FMA peak and the stream of K and V.

Owns the method: a plan of nothing but embed, rope and attention in the shape of a model, run through NativeExecutor with its
profile; the best of several steps counts, since a shared machine only ever adds time. Usage: attention.py [--shape smollm2]
[--contexts 512,2048,8192] [--threads 2] [--repeats 5]
"""

import argparse
import time

import numpy as np

from jilju.backends.native import NativeExecutor
from jilju.formats.ggml import GgmlType
from jilju.plan import Batch, KvSpec, Limits, Plan, PlanBuilder, WeightSpec, WeightTensor

SHAPES = {  # layers, query heads, KV heads, head size
    "smollm2": (30, 9, 3, 64),
    "qwen": (24, 14, 2, 64),
    "llama": (8, 32, 8, 128),  # a quarter of its layers
}
VOCAB = 64
BLOCK_SIZE = 16


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


def batch_of(rows: list[tuple[int, int]], blocks_per_row: int) -> Batch:
    """Rows of (start, count), nothing sampled but the last token."""
    num_tokens = sum(count for _, count in rows)
    zeros = np.zeros(1, np.int32)
    return Batch(
        token_ids=(np.arange(num_tokens, dtype=np.int32) * 7 + 3) % VOCAB,
        starts=np.array([start for start, _ in rows], np.int32),
        counts=np.array([count for _, count in rows], np.int32),
        block_tables=np.arange(len(rows) * blocks_per_row, dtype=np.int32).reshape(len(rows), blocks_per_row),
        logit_tokens=np.array([num_tokens - 1], np.int32),
        targets=zeros.copy(),
        positions=np.zeros(1, np.int64),
        seeds=np.zeros(1, np.uint64),
        temperatures=np.zeros(1, np.float32),
        top_ks=zeros,
        top_ps=np.ones(1, np.float32),
        min_ps=np.zeros(1, np.float32),
        repetition_penalties=np.ones(1, np.float32),
        penalty_starts=np.zeros(2, np.int32),
        penalty_ids=np.zeros(0, np.int32),
        banned_starts=np.zeros(2, np.int32),
        banned_ids=np.zeros(0, np.int32),
        num_top=zeros,
    )


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
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    num_layers, num_heads, _, head_dim = shape
    plan, weights = plan_of(*shape)
    contexts = [int(c) for c in args.contexts.split(",")]
    blocks = -(-(max(contexts) + 1) // BLOCK_SIZE)
    executor = NativeExecutor(profile=True)
    bytes_per_token = executor.kv_bytes_per_token(plan)
    limits = Limits(2 * blocks, BLOCK_SIZE, 16, 512, max(contexts) + 1, args.threads)
    executor.load(plan, weights, limits)
    print(
        f"{args.shape}: {shape}, {args.threads} threads, {bytes_per_token} bytes of KV a token, {executor.kernel_set}"
    )
    for context in contexts:
        for start in range(0, context, 512):  # fills the cache
            executor.launch(batch_of([(start, 512)], blocks))
            executor.wait()
        chunk = best(executor, batch_of([(context - 512, 512)], blocks), args.repeats)
        attended = 512 * (context - 512) + 512 * 513 // 2
        gmacs = 2 * num_layers * num_heads * head_dim * attended / (chunk["attention"] * 1e6) / args.threads
        one = best(executor, batch_of([(context, 1)], blocks), 5 * args.repeats)
        two = best(executor, batch_of([(context, 1), (context, 1)], blocks), 5 * args.repeats)
        gbps = bytes_per_token * context / (one["attention"] * 1e6)
        print(
            f"context {context}: last 512 tokens rope {chunk['rope']:.1f} + attention {chunk['attention']:.1f} ms "
            f"= {gmacs:.1f} GMAC/s a core; 1 row rope {one['rope']:.3f} + attention {one['attention']:.3f} ms "
            f"({(one['rope'] + one['attention']) * 1e3 / num_layers:.1f} us a layer, {gbps:.1f} GB/s); "
            f"2 rows {two['rope'] + two['attention']:.3f} ms"
        )


if __name__ == "__main__":
    main()
