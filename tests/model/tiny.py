"""Small GGUF files written by hand, with a wrong key or tensor where a test wants one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np

from jilju.formats.ggml import GgmlType
from jilju.formats.quants import quantize
from jilju.model.spec import ROPE_FACTORS, ModelSpec

SPEC = ModelSpec(
    family="llama",
    name="tiny",
    num_layers=2,
    hidden_width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=96,
    vocab_size=40,
    max_context=128,
    rope_theta=10_000.0,
    rope_style="interleaved",
    rms_eps=2.0**-17,
    tied_head=True,
    attention_bias=False,
    attention_scale=16**-0.5,
)
# As rope type llama3 scales by 8, from a context of 64, with low_freq_factor 0.25 and high_freq_factor 4.
SCALED = msgspec.structs.replace(
    SPEC,
    rope_factors=tuple(map(float, np.float32([1.0, 1.222121, 3.2858198, 7.0509453, 8.0, 8.0, 8.0, 8.0]))),
)
QWEN2 = msgspec.structs.replace(
    SPEC, family="qwen2", rope_style="halves", attention_bias=True, tied_head=False, num_kv_heads=1, rope_theta=1e6
)
QWEN3 = msgspec.structs.replace(
    SPEC, family="qwen3", rope_style="halves", head_norms=True, head_dim=24, attention_scale=24**-0.5, rope_theta=1e6
)
GEMMA3 = msgspec.structs.replace(
    SPEC, family="gemma3", rope_style="halves", head_norms=True, post_norms=True, activation="gelu_tanh", head_dim=24,
    attention_scale=24**-0.5, embedding_scale=8.0, rope_theta=1e6, window=5, global_every=2, local_rope_theta=1e4,
)  # fmt: skip


def keys_of(spec: ModelSpec) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.name": spec.name,
        f"{spec.family}.block_count": spec.num_layers,
        f"{spec.family}.context_length": spec.max_context,
        f"{spec.family}.embedding_length": spec.hidden_width,
        f"{spec.family}.feed_forward_length": spec.ffn_width,
        f"{spec.family}.attention.head_count": spec.num_heads,
        f"{spec.family}.attention.head_count_kv": spec.num_kv_heads,
        f"{spec.family}.attention.layer_norm_rms_epsilon": spec.rms_eps,
        f"{spec.family}.rope.freq_base": spec.rope_theta,
    }
    if spec.head_dim != spec.hidden_width // spec.num_heads:
        keys |= {f"{spec.family}.attention.{part}_length": spec.head_dim for part in ("key", "value")}
    if spec.window:
        keys |= {
            f"{spec.family}.attention.sliding_window": spec.window,
            f"{spec.family}.attention.sliding_window_pattern": spec.global_every,
            f"{spec.family}.rope.freq_base_swa": spec.local_rope_theta,
        }
    return keys


def write(
    path: Path,
    spec: ModelSpec = SPEC,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Callable[[dict[str, tuple[int, ...]]], None] = lambda shapes: None,
    type_of: Callable[[str], GgmlType] = lambda name: GgmlType.F32,
) -> Path:
    """`keys` replaces metadata, None removing a key; `tensors` changes the table of shapes; vectors are always F32
    unless `type_of` is asked for one by name."""
    writer = gguf.GGUFWriter(path, (keys or {}).get("general.architecture", spec.family))
    for key, value in {**keys_of(spec), **(keys or {})}.items():
        if value is not None and key != "general.architecture":
            add(writer, key, value)
    shapes = spec.tensor_shapes()
    tensors(shapes)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        x = (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        if name == ROPE_FACTORS and len(spec.rope_factors) == len(x):
            x = np.float32(spec.rope_factors)
        type_ = type_of(name)
        raw = quantize(x, type_).reshape(*shape[:-1], -1)
        raw = raw.view(np.float32) if type_ is GgmlType.F32 else raw
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(int(type_)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_int64(key, value) if value < 0 else writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {value!r}")
