"""The memory plan of the GPU backend: bytes by arithmetic of one's own, and that the parts are all that is counted."""

import dataclasses
from math import prod

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.backends.cuda import sampling_memory
from jilju.backends.cuda.lowering import lower
from jilju.backends.cuda.memory import (
    BUCKETS,
    ELEMENT_BYTES,
    MAX_LOGITS,
    PARTIAL_SPLITS,
    PARTIAL_TOKENS,
    UPLOADS,
    CudaNeeds,
    bucket_of,
    buffers,
    held_plan,
    kv_bytes_per_token,
    own_dtype,
    upload_bytes,
    weight_buffers,
    weight_bytes,
    workspace_bytes,
)
from jilju.formats.ggml import GgmlType
from jilju.model.decoder import build_plan
from jilju.model.spec import ModelSpec
from jilju.plan import Limits, Linear, Plan, StepShape
from tests.model.tiny import GEMMA3, QWEN2, QWEN3, SCALED, SPEC

LLAMA_8B = ModelSpec(
    family="llama", name="llama 3.1 8b", num_layers=32, hidden_width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
    ffn_width=14336, vocab_size=128256, max_context=131072, rope_theta=5e5, rope_style="halves", rms_eps=1e-5,
    tied_head=False, attention_bias=False, attention_scale=128**-0.5,
)  # fmt: skip
LIMITS = Limits(
    num_blocks=4096, block_size=16, max_rows=256, max_tokens=2048, max_context=8192, num_threads=1, kv_dtype="bf16"
)
FAMILIES = [SPEC, QWEN2, QWEN3, GEMMA3, SCALED]


def plan_of(spec: ModelSpec, type_: GgmlType = GgmlType.BF16) -> Plan:
    shapes = spec.tensor_shapes()
    return build_plan(spec, {name: type_ if len(shape) == 2 else GgmlType.F32 for name, shape in shapes.items()})


def test_llama_8b_by_the_book():
    plan = plan_of(LLAMA_8B)
    matrices = 32 * (4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 2 * 128256 * 4096
    norms = (2 * 32 + 1) * 4096
    assert weight_bytes(plan, "bf16") == weight_bytes(plan, "f16") == 2 * matrices + 4 * norms
    assert round(weight_bytes(plan, "bf16") / 1e9, 2) == 16.06
    assert kv_bytes_per_token(plan, "bf16") == kv_bytes_per_token(plan, "f16") == 131072
    assert kv_bytes_per_token(plan, "fp8") == 131072 // 2 + 32 * 8 * 2 * 4
    # the table of embeddings stays half, all else is one byte with a scale an output
    table, outputs = 128256 * 4096, 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096) + 128256
    assert weight_bytes(plan, "fp8") == 2 * table + (matrices - table) + 4 * outputs + 4 * norms


def test_a_head_that_is_the_table_stays_half():
    plan = plan_of(SPEC)
    found = weight_buffers(plan, "fp8")
    assert found["token_embd.weight"].dtype == "bfloat16" and "token_embd.weight.scale" not in found
    assert found["blk.0.attn_q.weight"].dtype == "float8_e4m3fn"
    assert found["blk.0.attn_q.weight.scale"].shape == (64,)
    untied = weight_buffers(plan_of(msgspec.structs.replace(SPEC, tied_head=False)), "fp8")
    assert untied["output.weight"].dtype == "float8_e4m3fn" and untied["token_embd.weight"].dtype == "bfloat16"


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.family)
def test_every_weight_has_its_place_in_its_shape(spec):
    found = weight_buffers(plan_of(spec), "f16")
    shapes = spec.tensor_shapes()
    assert {name: buffer.shape for name, buffer in found.items()} == shapes
    assert {name for name, buffer in found.items() if buffer.dtype == "float32"} == {
        name for name, shape in shapes.items() if len(shape) == 1
    }
    assert {buffer.dtype for buffer in found.values()} == {"float16", "float32"}


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.family)
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_the_parts_are_all_that_is_counted(spec, kv_dtype):
    plan, limits = plan_of(spec), dataclasses.replace(LIMITS, kv_dtype=kv_dtype)
    everything = buffers(plan, limits, "bf16").values()
    num_bytes = sum(prod(buffer.shape) * ELEMENT_BYTES[buffer.dtype] for buffer in everything)
    kv_bytes = limits.num_blocks * limits.block_size * kv_bytes_per_token(plan, kv_dtype)
    beside = UPLOADS * upload_bytes(limits) + sampling_memory.workspace_bytes(plan.vocab_size, MAX_LOGITS)
    assert workspace_bytes(plan, limits, "bf16") + kv_bytes == num_bytes + beside
    needs = CudaNeeds("bf16")
    assert needs.workspace_bytes(plan, limits) == workspace_bytes(plan, limits, "bf16")
    assert needs.kv_bytes_per_token(plan, kv_dtype) == kv_bytes_per_token(plan, kv_dtype)
    assert needs.weight_bytes(plan) == weight_bytes(plan, "bf16")


def test_shapes_of_the_buffers():
    found = buffers(plan_of(GEMMA3), LIMITS, "bf16")
    shapes = {name: buffer.shape for name, buffer in found.items()}
    assert shapes["kv"] == (2, 2, 4096 + 256, 2, 16, 24)  # a spare block for each row
    assert "kv_scales" not in shapes
    assert shapes["cos 0"] == shapes["sin 1"] == (8192, 12) and "cos 2" not in shapes  # two thetas
    assert shapes["residual"] == shapes["hidden"] == (2048, 64)
    assert shapes["query"] == shapes["attended"] == (2048, 96)
    assert shapes["gated"] == (2048, 96)
    assert shapes["logits"] == (256, 40) and shapes["logit_hidden"] == (256, 64)
    assert shapes["parts"] == (8 * 256 * 192,)  # gate and up are the widest, 2 * 96; not the head
    assert shapes["tables"] == (256, 512)
    assert shapes["slots"] == shapes["sampled_ids"] == (256,)
    scaled = buffers(plan_of(GEMMA3), dataclasses.replace(LIMITS, kv_dtype="fp8"), "f16")
    assert scaled["kv"].dtype == "float8_e4m3fn"
    assert (scaled["kv_scales"].shape, scaled["kv_scales"].dtype) == ((2, 2, 4096 + 256, 2, 16), "float32")
    assert scaled["hidden"].dtype == "float16" and scaled["residual"].dtype == "float32"


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.family)
def test_angles_are_those_of_the_lowered_model(spec):
    plan = plan_of(spec)
    names = [name for name in buffers(plan, LIMITS, "bf16") if name.startswith("cos ")]
    assert names == [f"cos {index}" for index in range(len(lower(plan).angles))]


@given(
    max_rows=st.integers(1, 256), max_tokens=st.integers(1, 8192), max_context=st.integers(1, 40000),
    block_size=st.sampled_from([16, 32]), num_blocks=st.integers(1, 10000),
)  # fmt: skip
def test_every_step_within_the_limits_has_room(max_rows, max_tokens, max_context, block_size, num_blocks):
    limits = Limits(num_blocks, block_size, max_rows, max_tokens, max_context, 1, "bf16")
    plan = plan_of(SPEC)
    found = buffers(plan, limits, "bf16")
    bucket = bucket_of(max_rows)
    for num_tokens in {1, min(PARTIAL_TOKENS, max_tokens), max_tokens, bucket}:
        assert all(found[name].shape[0] >= num_tokens for name in ("residual", "hidden", "query", "attended", "gated"))
        num_splits = PARTIAL_SPLITS if num_tokens <= PARTIAL_TOKENS else 1
        assert found["parts"].shape[0] >= num_splits * num_tokens * 2 * SPEC.ffn_width
    assert found["logits"].shape[0] >= min(MAX_LOGITS, max(max_tokens, bucket)) >= bucket
    assert found["tables"].shape[1] * block_size >= max_context
    assert found["tables"].shape[0] >= bucket >= max_rows
    more = dataclasses.replace(limits, num_blocks=num_blocks + 7)
    assert workspace_bytes(plan, more, "bf16") == workspace_bytes(plan, limits, "bf16")


def test_buckets():
    assert [bucket_of(n) for n in (1, 3, 33, 255, 256)] == [1, 4, 48, 256, 256]
    assert list(BUCKETS) == sorted(set(BUCKETS))
    with pytest.raises(ValueError, match="257"):
        bucket_of(257)


@pytest.mark.parametrize(
    ("type_", "wanted"), [("F16", "f16"), ("BF16", "bf16"), ("F32", "bf16"), ("Q4_K", "bf16"), ("Q8_0", "bf16")]
)
def test_the_own_type_of_a_file(type_, wanted):
    assert own_dtype(plan_of(LLAMA_8B, GgmlType[type_])) == wanted


def test_the_own_type_is_that_of_most_bytes():
    shapes = LLAMA_8B.tensor_shapes()
    types = {name: GgmlType.Q8_0 if len(shape) == 2 else GgmlType.F32 for name, shape in shapes.items()}
    assert own_dtype(build_plan(LLAMA_8B, types | {"token_embd.weight": GgmlType.F16})) == "bf16"


@pytest.mark.parametrize("dtype", ["bf16", "f16", "fp8"])
@pytest.mark.parametrize("spec", [SPEC, GEMMA3])
def test_a_plan_is_counted_by_what_is_held(spec, dtype):
    plan = plan_of(spec, GgmlType.Q8_0)
    held = held_plan(plan, dtype)
    held.verify()
    assert held.weight_bytes == weight_bytes(plan, dtype)
    step = StepShape((5, 0), (1, 7), 2)
    assert held.flops(step) == plan.flops(step)
    table, head = held.ops[0].table, held.ops[-2].parts[0]
    assert table.row_bytes == 2 * spec.hidden_width
    body = sum(op.bytes(step, 2) - sum(w.num_bytes for w in op.weights) for op in plan.ops if isinstance(op, Linear))
    of_linears = sum(w.num_bytes for op in held.ops if isinstance(op, Linear) for w in op.weights)
    assert sum(op.bytes(step, 2) for op in held.ops if isinstance(op, Linear)) == body + of_linears
    own_head = dtype == "fp8" and head.name != table.name
    assert head.row_bytes == (spec.hidden_width + 4 if own_head else 2 * spec.hidden_width)
