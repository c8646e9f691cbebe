"""Memory: what an executor on a GPU holds, to the byte: weights, KV cache, buffers of a step.

Owns the shapes of what is allocated at load. The executor allocates what `buffers` names, so that the plan told at the
start and what is held are one. Knows nothing of torch, and of kernels only how much scratch they are given.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import msgspec

from jilju.backends.cuda import sampling_memory
from jilju.formats.ggml import GgmlType
from jilju.plan import Attention, Embed, Glu, KvDtype, KvSpec, Limits, Linear, Plan, Rope, WeightDtype, WeightSpec

Dtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int32"]  # as torch names them
ELEMENT_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4}
KV_DTYPES: dict[KvDtype, Dtype] = {"bf16": "bfloat16", "f16": "float16", "fp8": "float8_e4m3fn"}

# Kept free beside all that is planned: the CUDA context, loaded kernels, captured graphs, what libraries take for a matrix
# product, and what the allocator rounds up.
RESERVE_BYTES = 3 << 29
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # rows of captured decode steps
MAX_LOGITS = 256  # rows whose logits are there at once; a step with more of them takes them in turns
PARTIAL_TOKENS = 256  # a step of more tokens fills the device without splitting the inputs of its linears, or its keys
PARTIAL_SPLITS = 8  # of them, at most
UPLOADS, UPLOAD_ALIGNMENT = 4, 16  # copies of a step's inputs that may be under way; bytes, of each array in one
ATTENTION_PARTIALS = 4096  # tokens times splits of their keys, at most, whose sums are kept apart


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """One allocation."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


def own_dtype(plan: Plan) -> WeightDtype:
    """The half type that most of the matrices are in, by bytes; bf16 stands for what is quantized or float32, too."""
    by_type: dict[GgmlType, int] = {}
    for weight in plan.weights.values():
        by_type[weight.type] = by_type.get(weight.type, 0) + weight.num_bytes
    return "f16" if max(by_type, key=lambda type_: by_type[type_]) is GgmlType.F16 else "bf16"


def compute_dtype(weight_dtype: WeightDtype) -> Literal["bf16", "f16"]:
    """Of activations, of the table of embeddings, and of a cache of half precision."""
    return "f16" if weight_dtype == "f16" else "bf16"


@dataclass(frozen=True, slots=True)
class CudaNeeds:
    """What the Executor protocol asks before anything is loaded, answered without a GPU."""

    weight_dtype: WeightDtype

    def weight_bytes(self, plan: Plan) -> int:
        return weight_bytes(plan, self.weight_dtype)

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "bf16") -> int:
        return kv_bytes_per_token(plan, kv_dtype)

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        return workspace_bytes(plan, limits, self.weight_dtype)


def weight_bytes(plan: Plan, dtype: WeightDtype) -> int:
    return sum(spec.num_bytes for spec in weight_buffers(plan, dtype).values())


def kv_bytes_per_token(plan: Plan, kv_dtype: KvDtype) -> int:
    return sum(spec.num_bytes for spec in kv_buffers(plan.kv, 1, 1, kv_dtype).values())


def workspace_bytes(plan: Plan, limits: Limits, weight_dtype: WeightDtype) -> int:
    """All buffers, without the blocks of the KV cache that the engine gives out: of their number it is independent."""
    everything = sum(spec.num_bytes for spec in buffers(plan, limits, weight_dtype).values())
    kv = limits.num_blocks * limits.block_size * kv_bytes_per_token(plan, limits.kv_dtype)
    return (
        everything - kv + UPLOADS * upload_bytes(limits) + sampling_memory.workspace_bytes(plan.vocab_size, MAX_LOGITS)
    )


def held_plan(plan: Plan, dtype: WeightDtype) -> Plan:
    """The plan with its weights in the form in which they are held and read here, which is what steps are counted by."""
    specs = plan.weights
    by_name: dict[str, int] = {}
    for name, buffer in weight_buffers(plan, dtype).items():
        name = name.removesuffix(".scale") if name not in specs else name
        by_name[name] = by_name.get(name, 0) + buffer.num_bytes
    held = {
        name: msgspec.structs.replace(spec, held_row_bytes=by_name[name] // spec.num_outputs)
        for name, spec in specs.items()
    }

    def moved(value: object) -> object:
        if isinstance(value, WeightSpec):
            return held[value.name]
        return tuple(moved(part) for part in value) if isinstance(value, tuple) else value

    ops = [msgspec.structs.replace(op, **{f: moved(getattr(op, f)) for f in op.__struct_fields__}) for op in plan.ops]
    return msgspec.structs.replace(plan, ops=tuple(ops))


def weight_buffers(plan: Plan, dtype: WeightDtype) -> dict[str, BufferSpec]:
    """Every weight, by its name in the plan: matrices in `dtype`, the scales of fp8 as NAME.scale, vectors in float32.

    The table of embeddings is half even where the rest is fp8, and so is the head if it is the same matrix. Matrices of
    one linear lie in one piece; that is how they are laid out, and takes no more.
    """
    half = KV_DTYPES[compute_dtype(dtype)]
    tables = {op.table.name for op in plan.ops if isinstance(op, Embed)}
    found: dict[str, BufferSpec] = {}
    for op in plan.ops:
        matrices: tuple[WeightSpec, ...] = op.parts if isinstance(op, Linear) else ()
        matrices += (op.table,) if isinstance(op, Embed) else ()
        for weight in op.weights:
            if weight not in matrices:
                found[weight.name] = BufferSpec((weight.num_inputs,), "float32")
            elif dtype == "fp8" and weight.name not in tables:
                found[weight.name] = BufferSpec((weight.num_outputs, weight.num_inputs), "float8_e4m3fn")
                found[weight.name + ".scale"] = BufferSpec((weight.num_outputs,), "float32")
            else:
                found[weight.name] = BufferSpec((weight.num_outputs, weight.num_inputs), half)
    return found


def kv_buffers(kv: KvSpec, num_blocks: int, block_size: int, kv_dtype: KvDtype) -> dict[str, BufferSpec]:
    """Keys and values of all layers, and of fp8 their scales: kv[layer, 0] are keys, kv[layer, 1] values."""
    shape = (kv.num_layers, 2, num_blocks, kv.num_kv_heads, block_size)
    found = {"kv": BufferSpec((*shape, kv.head_dim), KV_DTYPES[kv_dtype])}
    if kv_dtype == "fp8":
        found["kv_scales"] = BufferSpec(shape, "float32")
    return found


def buffers(plan: Plan, limits: Limits, weight_dtype: WeightDtype) -> dict[str, BufferSpec]:
    """Everything but the weights, the sampler's own and the ring of uploads.

    Of KV blocks one a row more than the engine gives out: a step that runs ahead may need a place before the engine gives
    it one.
    """
    half = KV_DTYPES[compute_dtype(weight_dtype)]
    return {
        **kv_buffers(plan.kv, limits.num_blocks + limits.max_rows, limits.block_size, limits.kv_dtype),
        **angle_buffers(plan, limits),
        **activation_buffers(plan, limits, half),
        **partial_buffers(plan, limits),
        **logit_buffers(plan, limits, half),
        **decode_buffers(limits),
    }


def angle_buffers(plan: Plan, limits: Limits) -> dict[str, BufferSpec]:
    """Of each distinct rotation, in the order of the layers, cosines and sines."""
    distinct = dict.fromkeys(op.angles for op in plan.ops if isinstance(op, Rope))
    return {
        f"{name} {index}": BufferSpec((limits.max_context, angles.head_dim // 2), "float32")
        for index, angles in enumerate(distinct)
        for name in ("cos", "sin")
    }


def activation_buffers(plan: Plan, limits: Limits, half: Dtype) -> dict[str, BufferSpec]:
    """Between the kernels of a layer: the residual stream in float32, all else half."""
    num_tokens, width = num_step_tokens(limits), _width(plan)
    query_width = max(op.q.width for op in plan.ops if isinstance(op, Attention))
    gated_width = max(op.out.width for op in plan.ops if isinstance(op, Glu))
    return {
        "residual": BufferSpec((num_tokens, width), "float32"),
        "hidden": BufferSpec((num_tokens, width), half),
        "query": BufferSpec((num_tokens, query_width), half),
        "attended": BufferSpec((num_tokens, query_width), half),
        "gated": BufferSpec((num_tokens, gated_width), half),
    }


def partial_buffers(plan: Plan, limits: Limits) -> dict[str, BufferSpec]:
    """What is summed by who reads it, flat: parts of linears over their inputs, [splits, tokens, outputs], and of attention
    over its keys, [tokens, heads, splits, ...], beside a count of what is done for each tile and KV head: zero at first."""
    num_tokens = num_step_tokens(limits)
    num_rows = max(PARTIAL_SPLITS * min(PARTIAL_TOKENS, num_tokens), num_tokens)
    outputs = max(op.out.width for op in plan.ops if isinstance(op, Linear) and op.out.rows == "tokens")
    num_sums = ATTENTION_PARTIALS * max(op.num_heads for op in plan.ops if isinstance(op, Attention))
    return {
        "parts": BufferSpec((num_rows * outputs,), "float32"),
        "attention_acc": BufferSpec((num_sums * plan.kv.head_dim,), "float32"),
        "attention_stats": BufferSpec((num_sums * 2,), "float32"),
        "attention_counters": BufferSpec((min(PARTIAL_TOKENS, num_tokens) * plan.kv.num_kv_heads,), "int32"),
    }


def logit_buffers(plan: Plan, limits: Limits, half: Dtype) -> dict[str, BufferSpec]:
    """Of the rows whose logits are wanted."""
    num_rows = min(MAX_LOGITS, num_step_tokens(limits))
    return {
        "logit_hidden": BufferSpec((num_rows, _width(plan)), half),
        "logits": BufferSpec((num_rows, plan.vocab_size), "float32"),
    }


def decode_buffers(limits: Limits) -> dict[str, BufferSpec]:
    """What captured graphs read: rows of one token each."""
    num_rows = bucket_of(limits.max_rows)
    names = ("token_ids", "positions", "slots", "counts", "decode_rows", "tile_rows", "tile_tokens", "sampled_ids")
    return {
        **{name: BufferSpec((num_rows,), "int32") for name in names},
        "tables": BufferSpec((num_rows, num_table_blocks(limits)), "int32"),
    }


def upload_bytes(limits: Limits) -> int:
    """Of one copy: per token its id, position and slot and at most a tile, per row three numbers and a table, in int32."""
    tokens, rows = 4 * limits.max_tokens, 4 * limits.max_rows
    sizes = [tokens] * 6 + [rows] * 6 + [rows * num_table_blocks(limits)] + [64] * 16
    return sum(-(-size // UPLOAD_ALIGNMENT) * UPLOAD_ALIGNMENT for size in sizes)


def num_table_blocks(limits: Limits) -> int:
    """Of a row's table."""
    return -(-limits.max_context // limits.block_size)


def bucket_of(num_rows: int) -> int:
    """The bucket in which a decode step of so many rows runs."""
    if num_rows > BUCKETS[-1]:
        raise ValueError(f"{num_rows} rows of a step; the GPU backend computes at most {BUCKETS[-1]}")
    return next(bucket for bucket in BUCKETS if bucket >= num_rows)


def num_step_tokens(limits: Limits) -> int:
    """Of the largest step, decode steps filled up to their bucket."""
    return max(limits.max_tokens, bucket_of(limits.max_rows))


def _width(plan: Plan) -> int:
    """Of the residual stream."""
    return next(op.out.width for op in plan.ops if isinstance(op, Embed))
