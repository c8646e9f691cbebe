"""The spec is strict: what a file says is read exactly, and what is not understood is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jilju.errors import ModelFileError
from jilju.formats.ggml import GgmlType
from jilju.formats.gguf import GgufFile
from jilju.model.decoder import build_plan
from jilju.model.spec import LayerSpec, ModelSpec, spec_from_gguf
from jilju.model.weights import load_weights

from .tiny import GEMMA3, QWEN2, QWEN3, SCALED, SPEC, write

BIASED = msgspec.structs.replace(SPEC, attention_bias=True)
WIDE_HEADS = msgspec.structs.replace(SPEC, head_dim=24, num_kv_heads=1, attention_scale=24**-0.5)


def read(path: Path) -> ModelSpec:
    with GgufFile.open(path) as file:
        return spec_from_gguf(file)


@pytest.mark.parametrize("spec", [SPEC, QWEN2, QWEN3, GEMMA3, SCALED], ids=lambda spec: spec.family)
def test_what_a_file_says_is_what_the_spec_holds(spec: ModelSpec, tmp_path: Path) -> None:
    assert read(write(tmp_path / "m.gguf", spec)) == spec


def test_head_size_of_its_own(tmp_path: Path) -> None:
    keys = {"llama.attention.key_length": 24, "llama.attention.value_length": 24, "llama.rope.dimension_count": 24}
    assert read(write(tmp_path / "m.gguf", WIDE_HEADS, keys=keys)) == WIDE_HEADS


def test_defaults_of_the_format(tmp_path: Path) -> None:
    """Without a key for it, every head has its own K and V, and the rotary base is 10,000."""
    spec = msgspec.structs.replace(SPEC, num_kv_heads=4)
    keys = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None, "general.name": None}
    assert read(write(tmp_path / "m.gguf", spec, keys=keys)) == msgspec.structs.replace(spec, name="llama")


def test_defaults_of_gemma3(tmp_path: Path) -> None:
    """As real files are: five windowed layers of base 10,000, then one that sees all."""
    keys = {"gemma3.attention.sliding_window_pattern": None, "gemma3.rope.freq_base_swa": None}
    spec = read(write(tmp_path / "m.gguf", msgspec.structs.replace(GEMMA3, num_layers=7), keys=keys))
    assert [spec.layer(index).window for index in range(7)] == [5, 5, 5, 5, 5, 0, 5]
    assert [spec.layer(index).rope_theta for index in range(7)] == [1e4, 1e4, 1e4, 1e4, 1e4, 1e6, 1e4]


def test_gemma3_without_a_window_sees_all_keys_in_every_layer(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(GEMMA3, window=0, global_every=1)
    assert read(write(tmp_path / "m.gguf", spec)) == spec
    assert {spec.layer(index) for index in range(2)} == {LayerSpec(0, 1e6)}


def test_the_27b_model_of_gemma3_scales_by_its_hidden_width(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(
        GEMMA3, num_layers=62, hidden_width=8, ffn_width=2, num_heads=2, embedding_scale=8**0.5
    )
    assert read(write(tmp_path / "m.gguf", spec)).attention_scale == 4**-0.5


NEUTRAL = {
    "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.expert_count": 0,
    "llama.attention.sliding_window": 128, "llama.vocab_size": 40, "tokenizer.ggml.tokens": ["a"] * 40,
}  # fmt: skip


def test_values_without_effect_are_accepted(tmp_path: Path) -> None:
    assert read(write(tmp_path / "m.gguf", keys=NEUTRAL)) == SPEC


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", "mamba"),
        ("llama.block_count", None),
        ("llama.block_count", 0),
        ("llama.block_count", 2**31),
        ("llama.block_count", 1),  # the second layer's tensors are then unknown
        ("llama.block_count", 3),  # the third layer's tensors are then missing
        ("llama.block_count", 2.0),
        ("llama.block_count", "2"),
        ("llama.context_length", None),
        ("llama.context_length", 0),
        ("llama.embedding_length", 128),
        ("llama.embedding_length", -64),
        ("llama.feed_forward_length", 95),
        ("llama.feed_forward_length", [96, 96]),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count", 64),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.head_count_kv", 4),
        ("llama.attention.key_length", 15),
        ("llama.attention.key_length", 32),
        ("llama.attention.value_length", 32),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.sliding_window", 127),
        ("llama.rope.dimension_count", 8),
        ("llama.rope.freq_base", float("inf")),
        ("llama.rope.freq_base", -1.0),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.expert_count", 8),
        ("llama.attention.causal", False),
        ("llama.vocab_size", 41),
        ("llama.logit_softcap", 30.0),
        ("llama.expert_count", False),
        ("llama.attention.sliding_window_pattern", 2),  # gemma3's own
        ("llama.rope.freq_base_swa", 1e4),
    ],
)
def test_what_contradicts_or_is_not_understood_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys={key: value})
    with pytest.raises(ModelFileError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    named_by_key = key in caught.value.field or (key.endswith("key_length") and "head_count" in caught.value.field)
    assert named_by_key or caught.value.field.startswith("tensor '")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma3.attention.sliding_window", 0),
        ("gemma3.attention.sliding_window", [5, 0]),
        ("gemma3.attention.sliding_window_pattern", 0),
        ("gemma3.attention.sliding_window_pattern", [True, False]),
        ("gemma3.rope.freq_base_swa", 0.0),
        ("gemma3.rope.local.freq_base", 1e4),
        ("gemma3.rope.scaling.type", "linear"),
        ("gemma3.rope.scaling.factor", 8.0),
        ("gemma3.final_logit_softcapping", 30.0),
        ("gemma3.attention.value_length", 16),
    ],
)
def test_what_gemma3_does_not_understand_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        read(write(tmp_path / "m.gguf", GEMMA3, keys={key: value}))
    assert key in caught.value.field


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys={"tokenizer.ggml.tokens": ["a"] * 39})
    with pytest.raises(ModelFileError, match=r"tokens', length is 39; allowed: the 40 rows"):
        read(path)


def missing(shapes: dict[str, tuple[int, ...]]) -> None:
    del shapes["blk.1.ffn_up.weight"]


def without_table(shapes: dict[str, tuple[int, ...]]) -> None:
    del shapes["token_embd.weight"]


def flat_table(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes["token_embd.weight"] = (64,)


def transposed(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes["blk.0.ffn_up.weight"] = (64, 96)


def extra(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes["blk.0.attn_q_norm.weight"] = (16,)


def longer_rope(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes["rope_freqs.weight"] = (16,)


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        (missing, "tensor 'blk.1.ffn_up.weight'", "missing"),
        (without_table, "tensor 'token_embd.weight'", "missing"),
        (flat_table, "tensor 'token_embd.weight'", "matrix"),
        (transposed, "tensor 'blk.0.ffn_up.weight', shape", r"\(96, 64\)"),
        (extra, "tensor 'blk.0.attn_q_norm.weight'", "the 20 tensors"),
        (longer_rope, "tensor 'rope_freqs.weight', shape", r"\(16,\); allowed: \(8,\), half the head size"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, tuple[int, ...]]], None], field: str, part: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", tensors=change)
    with pytest.raises(ModelFileError, match=part) as caught:
        read(path)
    assert caught.value.field == field


@pytest.mark.parametrize("factor", [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_rotary_factors_that_are_not_positive_are_refused(factor: float, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SCALED, rope_factors=(*SCALED.rope_factors[:5], factor, 8.0, 8.0))
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight', element 5 is .*; allowed: a positive number"):
        read(write(tmp_path / "m.gguf", spec))


def test_rotary_factors_of_another_type_or_family_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", SCALED, type_of=lambda name: GgmlType.F16 if "rope" in name else GgmlType.F32)
    with pytest.raises(ModelFileError, match=r"tensor 'rope_freqs.weight', type is F16; allowed: F32"):
        read(path)
    qwen = msgspec.structs.replace(QWEN2, rope_factors=SCALED.rope_factors)
    with pytest.raises(
        ModelFileError, match=r"tensor 'rope_freqs.weight' is there; allowed: the 27 tensors of a qwen2"
    ):
        read(write(tmp_path / "q.gguf", qwen))


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    def type_of(name: str) -> GgmlType:
        return GgmlType.Q4_1 if "ffn" in name and "norm" not in name else GgmlType.F32

    with GgufFile.open(write(tmp_path / "m.gguf", QWEN2, type_of=type_of)) as file:
        plan = build_plan(spec_from_gguf(file), {name: tensor.type for name, tensor in file.tensors.items()})
        weights = load_weights(file, plan)
        assert set(weights) == set(file.tensors)
        for name, weight in weights.items():
            assert (weight.type, weight.shape) == (file.tensors[name].type, QWEN2.tensor_shapes()[name])
            assert weight.data.ctypes.data == file.tensor_data(name).ctypes.data, "a copy"
        assert sum(weight.data.nbytes for weight in weights.values()) == plan.weight_bytes


def test_weights_that_differ_from_the_plan_are_refused(tmp_path: Path) -> None:
    with GgufFile.open(write(tmp_path / "m.gguf")) as file:
        types = {name: tensor.type for name, tensor in file.tensors.items()}
        cases = [
            (build_plan(SPEC, {**types, "blk.0.ffn_up.weight": GgmlType.F16}), "blk.0.ffn_up.weight", "allowed: F16"),
            (build_plan(msgspec.structs.replace(SPEC, ffn_width=128), types), "blk.0.ffn_gate.weight", r"\(128, 64\)"),
            (build_plan(BIASED, dict.fromkeys(BIASED.tensor_shapes(), GgmlType.F32)), "bias", "missing"),
        ]
        for plan, name, part in cases:
            with pytest.raises(ModelFileError, match=part) as caught:
                load_weights(file, plan)
            assert name in caught.value.field


def test_a_vector_in_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", type_of=lambda name: GgmlType.F16 if "ffn_norm" in name else GgmlType.F32)
    with GgufFile.open(path) as file:
        plan = build_plan(spec_from_gguf(file), {name: tensor.type for name, tensor in file.tensors.items()})
        with pytest.raises(ModelFileError, match="F32 for a vector"):
            load_weights(file, plan)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", type_of=lambda name: GgmlType.Q4_0 if "ffn_up" in name else GgmlType.F32)
    with GgufFile.open(path) as file:
        offset = file.tensors["blk.1.ffn_up.weight"].offset
    raw = bytearray(path.read_bytes())
    raw[offset + 5 * 18 + 1] = 0x7E
    path.write_bytes(raw)
    with GgufFile.open(path) as file:
        plan = build_plan(spec_from_gguf(file), {name: tensor.type for name, tensor in file.tensors.items()})
        with pytest.raises(ModelFileError, match=r"'blk.1.ffn_up.weight' is a NaN or an infinity in block 5 of Q4_0"):
            load_weights(file, plan)
