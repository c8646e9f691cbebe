"""The model that GPU figures are of: the shape of Llama 3.1 8B with random weights, for speed does not depend on what they are."""

from dataclasses import dataclass

import numpy as np

from jilju.formats.ggml import GgmlType
from jilju.model.decoder import build_plan
from jilju.model.spec import ModelSpec
from jilju.plan import Batch, Limits, Plan

BLOCK_SIZE = 16
SPEC = ModelSpec(
    family="llama", name="llama-3.1-8b-shape", num_layers=32, hidden_width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
    ffn_width=14336, vocab_size=128256, max_context=131072, rope_theta=500000.0, rope_style="halves", rms_eps=1e-5,
    tied_head=False, attention_bias=False, attention_scale=128**-0.5,
)  # fmt: skip


def plan_of(spec: ModelSpec = SPEC) -> Plan:
    vectors = {name for name, shape in spec.tensor_shapes().items() if len(shape) == 1}
    types = {name: GgmlType.F32 if name in vectors else GgmlType.BF16 for name in spec.tensor_shapes()}
    return build_plan(spec, types)


def limits_of(max_rows: int, context: int, kv_dtype: str, step_tokens: int) -> Limits:
    """Room for so many rows of that context."""
    blocks = max_rows * (-(-context // BLOCK_SIZE))
    return Limits(
        num_blocks=blocks, block_size=BLOCK_SIZE, max_rows=max_rows, max_tokens=step_tokens, max_context=context,
        num_threads=1, kv_dtype=kv_dtype,  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Roof:
    """What a decode step must move at least, and a token of a prompt must multiply."""

    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int

    @classmethod
    def of(cls, spec: ModelSpec, weight_dtype: str, kv_dtype: str) -> "Roof":
        matrices = {name: shape for name, shape in spec.tensor_shapes().items() if len(shape) == 2}
        table = matrices.pop("token_embd.weight")
        head = matrices.pop("output.weight", table)
        body, head_size = sum(n * k for n, k in matrices.values()), head[0] * head[1]
        size = 1 if weight_dtype == "fp8" else 2
        scales = 4 * sum(n for n, _ in (*matrices.values(), head)) if weight_dtype == "fp8" else 0
        elements = 2 * spec.num_layers * spec.kv_width
        kv = elements * (1 if kv_dtype == "fp8" else 2)
        kv += 2 * spec.num_layers * spec.num_kv_heads * 4 if kv_dtype == "fp8" else 0
        return cls((body + head_size) * size + scales, kv, 2 * body)

    def decode_bytes(self, num_rows: int, context: int) -> int:
        return self.weight_bytes + num_rows * context * self.kv_bytes_per_token


def make_batch(
    token_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, tables: np.ndarray, is_sampled: bool = True
) -> Batch:
    """Rows whose last tokens are sampled greedily, without extras."""
    n = len(starts) if is_sampled else 0

    def filled(value: float, dtype: type) -> np.ndarray:
        return np.full(n, value, dtype)

    none, no_ids, no_values = np.zeros(n + 1, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
    return Batch(
        token_ids=token_ids.astype(np.int32), starts=starts.astype(np.int32), counts=counts.astype(np.int32),
        block_tables=tables.astype(np.int32), logit_tokens=(np.cumsum(counts) - 1).astype(np.int32)[:n],
        targets=filled(-1, np.int32), positions=(starts + counts).astype(np.int64)[:n], seeds=filled(0, np.uint64),
        temperatures=filled(0, np.float32), top_ks=filled(0, np.int32), top_ps=filled(1, np.float32), min_ps=filled(0, np.float32),
        num_top=filled(0, np.int32), repetition_penalties=filled(1, np.float32), presence_penalties=filled(0, np.float32),
        frequency_penalties=filled(0, np.float32), penalty_starts=none, penalty_ids=no_ids, penalty_counts=no_ids, bias_starts=none,
        bias_ids=no_ids, biases=no_values, banned_starts=none, banned_ids=no_ids, wanted_starts=none, wanted_ids=no_ids,
        mask_rows=filled(-1, np.int32), masks=np.zeros((0, 0), np.uint32),
    )  # fmt: skip
