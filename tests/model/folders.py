"""Small model folders written by hand: a spec's config.json, its tensors under their names there, with a wrong one where a test wants it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from jilju.formats.ggml import GgmlType
from jilju.formats.quants import quantize
from jilju.model.hf_config import name_in_folder
from jilju.model.spec import ROPE_FACTORS, ModelSpec
from tests.model.tiny import GEMMA3, QWEN2, QWEN3, SCALED, SPEC

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def halves(spec: ModelSpec) -> ModelSpec:
    return msgspec.structs.replace(spec, rope_style="halves")


FOLDER_SPECS = tuple(map(halves, (SPEC, QWEN2, QWEN3, GEMMA3, SCALED)))
LLAMA3_ROPE = {  # of SCALED
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def config_of(spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": MODEL_TYPES[spec.family],
        "hidden_size": spec.hidden_width,
        "intermediate_size": spec.ffn_width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tied_head,
        "torch_dtype": "float32",
        "transformers_version": "4.51.0",
        "use_cache": True,
    }
    if spec.rope_factors:
        config["rope_scaling"] = LLAMA3_ROPE
    if spec.family == "gemma3":
        config |= {
            "query_pre_attn_scalar": spec.head_dim,
            "sliding_window": spec.window,
            "sliding_window_pattern": spec.global_every,
            "rope_local_base_freq": spec.local_rope_theta,
        }
    return config


def tensors_of(spec: ModelSpec, type_: GgmlType = GgmlType.F32, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 values by the plan's names, rounded to the number format; norms as the plan multiplies by them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in spec.tensor_shapes().items():
        x = (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        raw = quantize(x.reshape(-1, shape[-1]), type_)
        tensors[name] = (
            raw.view("<f4")
            if type_ is GgmlType.F32
            else raw.view("<f2").astype(np.float32)
            if type_ is GgmlType.F16
            else (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        ).reshape(shape)
    if spec.rope_factors:
        tensors[ROPE_FACTORS] = np.float32(spec.rope_factors)
    return tensors


def stored(spec: ModelSpec, tensors: Mapping[str, np.ndarray], type_: GgmlType = GgmlType.F32) -> dict[str, Stored]:
    """By the folder's names. Norms of Gemma are written less by 1, in float32, for in half types they would be rounded."""
    found = {}
    for name, x in tensors.items():
        if name == ROPE_FACTORS:  # config.json says them
            continue
        kind = type_
        if spec.family == "gemma3" and name.endswith("norm.weight"):
            x, kind = x - np.float32(1), GgmlType.F32
        data = quantize(x.reshape(-1, x.shape[-1]), kind).tobytes()
        found[name_in_folder(spec, name)] = Stored(kind.name, x.shape, data)
    return found


def safetensors_bytes(
    tensors: Mapping[str, Stored],
    *,
    metadata: Any = None,
    changes: Mapping[str, Any] | None = None,
    is_odd: bool = False,
) -> bytes:
    """A file; `changes` replaces entries of the header. Data begins at a multiple of 8, or one byte later."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header | dict(changes or {})).encode()
    text += b" " * (-len(text) % 8 + is_odd)
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values())


def write_folder(
    path: Path,
    spec: ModelSpec = FOLDER_SPECS[0],
    *,
    config: Mapping[str, Any] | None = None,
    type_: GgmlType = GgmlType.F32,
    num_files: int = 1,
    is_odd: bool = False,
) -> Path:
    """`config` replaces keys, None taking one out."""
    path.mkdir(exist_ok=True)
    keys = {key: value for key, value in (config_of(spec) | dict(config or {})).items() if value is not None}
    (path / "config.json").write_text(json.dumps(keys))
    tensors = list(stored(spec, tensors_of(spec, type_), type_).items())
    if num_files == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(dict(tensors), is_odd=is_odd))
        return path
    weight_map = {}
    for index in range(num_files):
        name = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = dict(tensors[index::num_files])
        (path / name).write_bytes(safetensors_bytes(part, is_odd=is_odd))
        weight_map |= dict.fromkeys(part, name)
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return path
