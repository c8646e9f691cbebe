"""Model folders: a config.json becomes the same spec as a GGUF file's keys, tensors come under the plan's names, what does not fit is
refused by name; dummy weights have the plan's shapes.
"""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from jilju.assemble.engine import EngineOptions, build_engine, open_model
from jilju.assemble.server import fingerprint
from jilju.backends.reference import ReferenceExecutor
from jilju.engine.request import Request, SamplingParams, TokenEvent
from jilju.errors import ModelFileError, ModelSourceError
from jilju.formats.ggml import GgmlType
from jilju.formats.quants import dequantize
from jilju.model.checkpoint import open_checkpoint, plan_of
from jilju.model.dummy import BLOCK_ELEMENTS, STANDARD_DEVIATION, dummy_weights
from jilju.model.folder import ModelFolder
from jilju.model.generation_config import folder_defaults
from jilju.model.hf_config import LLAMA3_KEYS, llama3_factors, name_in_folder, spec_from_config, weight_type
from jilju.model.spec import ROPE_FACTORS, ModelSpec
from jilju.model.weights import load_weights
from jilju.plan import Limits, RmsNorm
from tests.model.batches import logits_of
from tests.model.folders import (
    FOLDER_SPECS,
    LLAMA3_ROPE,
    Stored,
    config_of,
    safetensors_bytes,
    stored,
    tensors_of,
    write_folder,
)
from tests.model.tiny import GEMMA3, QWEN2, QWEN3

LLAMA = FOLDER_SPECS[0]
TYPES = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


def read(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """`changes` replaces keys of the spec's config, None taking one out."""
    config = {key: value for key, value in (config_of(spec) | changes).items() if value is not None}
    return spec_from_config(config, file="config.json", name=spec.name)


def refusal(spec: ModelSpec, **changes: Any) -> ModelFileError:
    with pytest.raises(ModelFileError, match=r"^config\.json: ") as caught:
        read(spec, **changes)
    return caught.value


# ---- config.json


@pytest.mark.parametrize("spec", FOLDER_SPECS, ids=lambda spec: spec.family)
def test_a_config_says_what_the_keys_of_a_gguf_file_say(spec: ModelSpec) -> None:
    assert read(spec) == spec


NEW_ROPE = {"rope_theta": None, "rope_local_base_freq": None}


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (LLAMA, NEW_ROPE | {"rope_parameters": {"rope_type": "default", "rope_theta": LLAMA.rope_theta}}),
        (LLAMA, {"rope_scaling": {"type": "default"}, "head_dim": None}),
        (LLAMA, {"architectures": None, "attention_bias": False, "mlp_bias": False, "quantization_config": None}),
        (
            QWEN2,
            {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1, "attention_bias": True},
        ),
        (QWEN3, {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}),
        (GEMMA3, {"sliding_window_pattern": None, "layer_types": ["sliding_attention", "full_attention"]}),
        (GEMMA3, {"sliding_window_pattern": None, "_sliding_window_pattern": 2, "attn_logit_softcapping": 0.0}),
        (
            GEMMA3,
            NEW_ROPE
            | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        ),
        (GEMMA3, {"rope_local_base_freq": None}),
    ],
)
def test_other_ways_to_say_the_same(spec: ModelSpec, changes: dict[str, Any]) -> None:
    assert read(spec, **changes) == msgspec.structs.replace(spec, rope_style="halves")


def test_absent_keys_have_the_values_of_their_type() -> None:
    sizes = dict.fromkeys(("head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"))
    llama = read(LLAMA, **sizes, num_key_value_heads=None)
    assert (llama.head_dim, llama.num_kv_heads, llama.rope_theta) == (16, 4, 10_000.0)
    assert (llama.rms_eps, llama.tied_head) == (1e-6, False)
    assert read(QWEN3, **sizes).head_dim == 128
    gemma = read(GEMMA3, **sizes, query_pre_attn_scalar=None, rope_local_base_freq=None)
    assert (gemma.head_dim, gemma.tied_head, gemma.attention_scale) == (256, True, 256**-0.5)
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e6, 1e4)


def test_mistral_is_llama_with_a_window_in_every_layer() -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config = config_of(LLAMA) | mistral | {"sliding_window": None}
    assert spec_from_config(config, file="f", name="tiny") == LLAMA
    windowed = read(LLAMA, **mistral, sliding_window=24)
    assert [windowed.layer(index).window for index in range(2)] == [24, 24]
    assert {windowed.layer(index).rope_theta for index in range(2)} == {LLAMA.rope_theta}
    assert read(LLAMA, **mistral).window == 4096, "where no key says it"


@pytest.mark.parametrize(
    ("theta", "factor", "context"), [(500_000.0, 8.0, 8192), (500_000.0, 32.0, 8192), (1e4, 1.0, 300)]
)
def test_llama3_factors_are_those_of_its_waves(theta: float, factor: float, context: int) -> None:
    """Of waves in positions, pair by pair: short ones stay, long ones are stretched, in between frequencies are mixed."""
    low, high, head_dim = 1.0, 4.0, 64
    got = llama3_factors(head_dim, theta, factor, low, high, context)
    assert len(got) == 32 and all(float(np.float32(f)) == f for f in got)
    kinds = set()
    for i, found in enumerate(got):
        frequency = theta ** (-2 * i / head_dim)
        wave = 2 * math.pi / frequency
        if wave < context / high:
            kind, scaled = "short", frequency
        elif wave > context / low:
            kind, scaled = "long", frequency / factor
        else:
            smooth = (context / wave - low) / (high - low)
            kind, scaled = "between", (1 - smooth) * frequency / factor + smooth * frequency
        kinds.add(kind)
        assert abs(frequency / found - scaled) <= 2.0**-23 * scaled, f"pair {i}, {kind}"
    assert kinds == {"short", "long", "between"}


def test_scaled_frequencies_in_the_ways_of_old_and_new_files() -> None:
    scaled = FOLDER_SPECS[4]
    old = {("type" if key == "rope_type" else key): value for key, value in LLAMA3_ROPE.items()}
    new = NEW_ROPE | {"rope_scaling": None, "rope_parameters": LLAMA3_ROPE | {"rope_theta": scaled.rope_theta}}
    for changes in ({}, {"rope_scaling": old}, new, {"rope_parameters": LLAMA3_ROPE}):
        assert read(scaled, **changes) == scaled
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    config = config_of(scaled) | mistral
    assert spec_from_config(config, file="f", name="tiny") == scaled
    assert read(scaled, rope_scaling=None).rope_factors == ()
    assert read(scaled, rope_theta=1e6).rope_factors != scaled.rope_factors, "waves go by theta"


def rope_but(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (LLAMA3_ROPE | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("spec", "changes", "field", "told"),
    [
        (LLAMA, {"model_type": "mixtral"}, "model_type", "llama, mistral, qwen2, qwen3, gemma3_text"),
        (LLAMA, {"model_type": None}, "model_type", "None"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures", "['LlamaForCausalLM']"),
        *(
            (
                LLAMA,
                {"rope_scaling": {"rope_type": kind, "factor": 4.0}},
                "rope_scaling, type",
                f"is {kind}; allowed: default or llama3",
            )
            for kind in ("linear", "dynamic", "yarn", "longrope", "llama4", ["llama3"])
        ),
        (LLAMA, {"rope_scaling": {"type": "default", "factor": 4.0}}, "rope_scaling, keys", "['factor']"),
        (LLAMA, {"rope_scaling": rope_but(attention_factor=2.0)}, "rope_scaling, keys", "['attention_factor']"),
        *(
            (LLAMA, {"rope_scaling": rope_but(**{key: None})}, f"rope_scaling.{key}", "is missing")
            for key in LLAMA3_KEYS
        ),
        *(
            (LLAMA, {"rope_parameters": rope_but(**{key: value})}, f"rope_parameters.{key}", "a positive number")
            for key in LLAMA3_KEYS
            for value in (0, -1.0, "8", True, [8], float("nan"), float("inf"))
        ),
        (LLAMA, {"rope_scaling": rope_but(factor=0.5)}, "rope_scaling.factor", "1 or more"),
        (LLAMA, {"rope_scaling": rope_but(high_freq_factor=0.25)}, "rope_scaling.high_freq_factor", "more than"),
        (QWEN3, {"rope_scaling": LLAMA3_ROPE}, "rope_scaling, type", "is llama3; allowed: default; other scalings"),
        (GEMMA3, {"rope_scaling": LLAMA3_ROPE}, "rope_scaling, type", "allowed: default;"),
        (
            GEMMA3,
            {"rope_parameters": {"full_attention": LLAMA3_ROPE}},
            "rope_parameters.full_attention, type",
            "allowed: default;",
        ),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor", "or 1.0"),
        (LLAMA, {"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta", "a positive number"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters", "gemma3_text"),
        (LLAMA, {"rope_parameters": {}, "rope_scaling": {"type": "yarn"}}, "rope_scaling", "absent where"),
        (LLAMA, {"attention_bias": True}, "attention_bias", "absent or False"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias", "absent or False"),
        (LLAMA, {"sliding_window": 64}, "sliding_window", "absent; other values are not supported"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "not supported"),
        (LLAMA, {"num_local_experts": 8}, "key 'num_local_experts'", "take it out"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act", "absent or 'silu'"),
        (LLAMA, {"hidden_size": None}, "hidden_size", "missing"),
        (LLAMA, {"hidden_size": 64.0}, "hidden_size", "1 to"),
        (LLAMA, {"hidden_size": 65, "head_dim": None}, "num_attention_heads", "a divisor of hidden_size 65"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads", "a divisor of the 4 query heads"),
        (LLAMA, {"head_dim": 15}, "head_dim", "even"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers", "1 to 1024"),
        (LLAMA, {"vocab_size": True}, "vocab_size", "1 to"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps", "a positive number"),
        (LLAMA, {"rope_theta": 10**400}, "rope_theta", "a positive number"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
        (QWEN2, {"attention_bias": False}, "attention_bias", "absent or True"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window", "absent or False"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "layer_types", "full_attention for each of the 2 layers"),
        (QWEN3, {"num_key_value_heads": None}, "num_key_value_heads", "missing"),
        (GEMMA3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "each n-th"),
        (GEMMA3, {"layer_types": ["full_attention"]}, "layer_types", "each of the 2 layers"),
        (GEMMA3, {"layer_types": 5}, "layer_types", "each of the 2 layers"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping", "absent or 0.0"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention", "absent or False"),
        (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation", "gelu_pytorch_tanh"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    spec: ModelSpec, changes: dict[str, Any], field: str, told: str
) -> None:
    error = refusal(spec, **changes)
    assert error.field == field and told in str(error)


def test_any_value_of_a_key_is_read_or_refused() -> None:
    values = (0, -1, 1, 2**40, 10**400, 0.5, 1e308, "x", "", True, False, [], [1], {}, {"a": 1})
    for spec in FOLDER_SPECS:
        for key in [*config_of(spec), "rope_parameters", "rope_scaling", "layer_types", "dtype", "sliding_window"]:
            for value in values:
                config = config_of(spec) | {key: value}
                try:
                    spec_from_config(config, file="f", name="n").tensor_shapes()
                    weight_type(config, file="f")
                except ModelFileError as error:
                    assert error.file == "f" and error.field and error.allowed


# ---- tensors


@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
@pytest.mark.parametrize("spec", FOLDER_SPECS, ids=lambda spec: spec.family)
@pytest.mark.parametrize("num_files", [1, 3])
def test_weights_come_under_the_names_of_the_plan(
    spec: ModelSpec, type_: GgmlType, num_files: int, tmp_path: Path
) -> None:
    folder = ModelFolder.open(write_folder(tmp_path / "tiny", spec, type_=type_, num_files=num_files))
    assert folder.spec == spec
    plan, wanted = plan_of(folder), tensors_of(spec, type_)
    weights = load_weights(folder, plan)
    assert set(weights) == set(wanted)
    for name, x in wanted.items():
        is_vector = x.ndim == 1
        assert weights[name].type is (GgmlType.F32 if is_vector else type_)
        got = dequantize(weights[name].data, weights[name].type, x.shape[-1]).reshape(x.shape)
        # the 1 of Gemma's norms is taken off and put on again in float32
        assert np.array_equal(got, x) or (is_vector and spec.family == "gemma3" and abs(got - x).max() < 1e-6), name
        assert is_vector or not weights[name].data.flags.writeable, "a view of the mapping"
    folder.drop_pages()
    folder.close()
    assert weights["token_embd.weight"].data.size, "a view outlives close"


def test_data_at_an_odd_byte_is_copied_to_whole_elements(tmp_path: Path) -> None:
    folder = ModelFolder.open(write_folder(tmp_path / "tiny", type_=GgmlType.BF16, is_odd=True))
    assert folder.parts()[-1][1] % 2
    weights = load_weights(folder, plan_of(folder))
    for name, x in tensors_of(LLAMA, GgmlType.BF16).items():
        tensor = weights[name]
        assert np.array_equal(dequantize(tensor.data, tensor.type, x.shape[-1]).reshape(x.shape), x)
        assert tensor.data.ctypes.data % 2 == 0


def test_number_formats_may_differ_within_a_folder(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny")
    types = {"model.embed_tokens.weight": GgmlType.F16, "model.layers.0.mlp.up_proj.weight": GgmlType.BF16}
    tensors = stored(LLAMA, tensors_of(LLAMA))
    for name, type_ in types.items():
        tensors[name] = stored(LLAMA, tensors_of(LLAMA, type_), type_)[name]
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    folder = ModelFolder.open(path)
    assert folder.tensors["token_embd.weight"].type is GgmlType.F16
    assert folder.tensors["blk.0.ffn_up.weight"].type is GgmlType.BF16
    assert folder.tensors["blk.1.ffn_up.weight"].type is GgmlType.F32
    assert len(load_weights(folder, plan_of(folder))) == len(tensors)


def test_tensors_without_use_are_left_alone(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny")
    tensors = stored(LLAMA, tensors_of(LLAMA))
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = Stored("F32", (8,), bytes(32))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    assert ModelFolder.open(path).spec == LLAMA
    tensors["lm_head.weight"] = tensors["lm_head.weight"]._replace(data=bytes(len(tensors["lm_head.weight"].data)))
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(ModelFileError, match=r"another than the table; .*as tie_word_embeddings says"):
        ModelFolder.open(path)


def damaged(path: Path, change: str) -> None:
    tensors = stored(LLAMA, tensors_of(LLAMA))
    q = name_in_folder(LLAMA, "blk.1.attn_q.weight")
    match change:
        case "missing":
            del tensors[q]
        case "shape":
            tensors[q] = tensors[q]._replace(shape=(32, 128))
        case "dtype":
            tensors[q] = Stored("F8_E4M3", (64, 64), bytes(64 * 64))
        case "unknown":
            tensors["model.layers.1.block_sparse_moe.gate.weight"] = Stored("F32", (1,), bytes(4))
        case "nan":
            tensors[q] = tensors[q]._replace(data=np.full(64 * 64, np.nan, "<f4").tobytes())
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "missing",
            r"tiny: tensor 'model\.layers\.1\.self_attn\.q_proj\.weight' is missing; allowed: shape \(64, 64\)",
        ),
        ("shape", r"model\.safetensors: tensor 'model\..*q_proj\.weight', shape is \(32, 128\); allowed: \(64, 64\)"),
        ("dtype", r"q_proj\.weight', dtype is F8_E4M3; allowed: BF16, F16, F32; quantized folders are not supported"),
        ("unknown", r"tensor 'model\.layers\.1\.block_sparse_moe\.gate\.weight' is there"),
        ("nan", r"tensor 'blk\.1\.attn_q\.weight' is a NaN or an infinity in block 0 of F32"),
    ],
)
def test_a_folder_that_differs_from_its_config_is_refused(change: str, told: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny")
    damaged(path, change)
    with pytest.raises(ModelFileError, match=told):
        folder = ModelFolder.open(path)
        load_weights(folder, plan_of(folder))


def test_which_files_hold_the_weights(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny", num_files=2)
    index, second = path / "model.safetensors.index.json", path / "model-00002-of-00002.safetensors"
    text = index.read_text()

    def refused(told: str) -> None:
        with pytest.raises(ModelFileError, match=told):
            ModelFolder.open(path)

    index.write_text(text.replace(second.name, "../" + second.name))
    refused("names of safetensors files in the same folder")
    index.write_text(text.replace(second.name, "model-00003-of-00002.safetensors"))
    refused("files that are in the folder; this one is missing")
    index.write_text(text.replace(second.name, "model-00001-of-00002.safetensors"))
    refused("which has none of that name")
    index.write_text('{"weight_map": []}')
    refused("an object of tensor names and file names")
    index.write_text("{")
    refused("no JSON")
    index.unlink()
    assert ModelFolder.open(path).spec == LLAMA, "without an index, all files"
    (path / "again.safetensors").write_bytes(second.read_bytes())
    refused("every tensor in one file")
    for file in path.glob("*.safetensors"):
        file.unlink()
    refused(r"safetensors files is missing; allowed: model\.safetensors, .*--load-format dummy")
    (path / "pytorch_model.bin").touch()
    refused(r"missing; pytorch_model\.bin is not read")
    (path / "config.json").unlink()
    refused(r"config\.json is missing")


# ---- as a model


def greedy(options: EngineOptions, num_tokens: int = 6) -> list[int]:
    engine = build_engine(options)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, seed=0, ignore_eos=True)
    engine.submit(Request(id="a", prompt_ids=[1, 2, 3], params=params))
    ids = []
    while engine.has_work():
        ids += [event.token_id for event in engine.step() if isinstance(event, TokenEvent)]
    return ids


def options_of(path: Path, **others: Any) -> EngineOptions:
    return EngineOptions(
        path=str(path), num_blocks=8, max_context=64, max_rows=2, step_tokens=16, num_threads=1, **others
    )


@pytest.mark.parametrize("spec", FOLDER_SPECS, ids=lambda spec: spec.family)
@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
def test_native_and_reference_answer_alike(spec: ModelSpec, type_: GgmlType, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny", spec, type_=type_)
    assert greedy(options_of(path)) == greedy(options_of(path, backend="reference"))
    assert not list(tmp_path.glob("packed*")), "nothing of a folder is packed"


def test_a_folder_is_opened_by_its_path(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny", type_=GgmlType.BF16, num_files=2)
    model = open_model(str(path))
    assert (model.name, model.path, model.entry) == ("tiny", str(path), None)
    one = fingerprint(model, options_of(path))
    assert one == fingerprint(open_model(str(path)), options_of(path))
    with (path / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x00\x00")
    assert one != fingerprint(open_model(str(path)), options_of(path)), "another weight"
    (path / "tokenizer_config.json").write_text("{}")
    assert len({one, fingerprint(open_model(str(path)), options_of(path))}) == 2


# ---- dummy weights


def dummy_folder(path: Path, spec: ModelSpec, **config: Any) -> Path:
    path.mkdir()
    keys = {key: value for key, value in (config_of(spec) | config).items() if value is not None}
    (path / "config.json").write_text(json.dumps(keys))
    return path


@pytest.mark.parametrize("spec", FOLDER_SPECS, ids=lambda spec: spec.family)
def test_dummy_weights_need_a_config_alone(spec: ModelSpec, tmp_path: Path) -> None:
    path = dummy_folder(tmp_path / "tiny", spec, torch_dtype="bfloat16")
    checkpoint = open_checkpoint(str(path), "dummy")
    plan = plan_of(checkpoint)
    weights = dummy_weights(spec, plan)
    norms = {op.weight.name for op in plan.ops if isinstance(op, RmsNorm)}
    for name, shape in spec.tensor_shapes().items():
        tensor = weights[name]
        x = dequantize(tensor.data, tensor.type, shape[-1]).reshape(shape)
        if name in norms:
            assert (x == 1).all()
        elif name.endswith(".bias"):
            assert (x == 0).all()
        elif name == ROPE_FACTORS:
            assert tuple(x.tolist()) == spec.rope_factors, "the model's own"
        else:
            assert tensor.type is GgmlType.BF16
            assert abs(x.mean()) < 6 * STANDARD_DEVIATION / x.size**0.5
            assert abs(x.std() / STANDARD_DEVIATION - 1) < 6 / (2 * x.size) ** 0.5 + 2**-8
            assert len(np.unique(x, axis=0)) == len(x), "no two rows alike"
    assert {name: w.data.tobytes() for name, w in dummy_weights(spec, plan).items()} == {
        name: w.data.tobytes() for name, w in weights.items()
    }
    others = dummy_weights(spec, plan, seed=1)
    assert others["token_embd.weight"].data.tobytes() != weights["token_embd.weight"].data.tobytes()
    options = options_of(path, dummy_weights=True)
    assert greedy(options) == greedy(msgspec.structs.replace(options, backend="reference"))


def test_a_large_matrix_repeats_the_block_at_other_columns(tmp_path: Path) -> None:
    wide = msgspec.structs.replace(LLAMA, vocab_size=BLOCK_ELEMENTS // 64 + 500)
    plan = plan_of(open_checkpoint(str(dummy_folder(tmp_path / "tiny", wide, torch_dtype="float16")), "dummy"))
    tensor = dummy_weights(wide, plan)["token_embd.weight"]
    x = tensor.data.view("<f2")
    assert np.array_equal(x[:1000], x[BLOCK_ELEMENTS : BLOCK_ELEMENTS + 1000])
    rows = x.reshape(-1, 64)
    assert len(np.unique(rows[:, :4].copy().view("<u8"))) > 0.99 * len(rows)


def test_the_number_format_of_dummy_weights(tmp_path: Path) -> None:
    for given, want in (("float16", "F16"), ("torch.float32", "F32"), ("bfloat16", "BF16")):
        assert weight_type({"torch_dtype": given}, file="f").name == want
    assert weight_type({}, file="f") is GgmlType.BF16
    assert weight_type({"dtype": "float16", "torch_dtype": "float32"}, file="f") is GgmlType.F16
    with pytest.raises(ModelFileError, match=r"^f: dtype is float8; allowed: bfloat16, float16, float32"):
        weight_type({"dtype": "float8"}, file="f")
    gguf = Path(__file__).parents[1] / "golden" / "model" / "llama-tied.gguf"
    with pytest.raises(ModelSourceError, match="is a GGUF file; --load-format dummy makes up weights for a folder"):
        open_checkpoint(str(gguf), "dummy")


def test_the_reference_computes_finite_logits_on_dummy_weights(tmp_path: Path) -> None:
    plan = plan_of(open_checkpoint(str(dummy_folder(tmp_path / "tiny", LLAMA)), "dummy"))
    executor = ReferenceExecutor()
    executor.load(plan, dummy_weights(LLAMA, plan), Limits(4, 16, 1, 16, 64, 1))
    logits = logits_of(executor, [1, 2, 3], [(0, 3)], [0])
    assert np.isfinite(logits).all() and logits.std() > 0


# ---- sampling defaults


def test_sampling_defaults_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert folder_defaults(tmp_path) is None and folder_defaults(file) is None
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    assert folder_defaults(tmp_path) is None, "do_sample is not set: they are not what the makers recommend"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}))
    defaults = folder_defaults(tmp_path)
    assert defaults is not None and defaults.source == f"generation_config.json of {tmp_path.name}"
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (0.6, 1.0, 20, 0.0)
    assert defaults.repetition_penalty == 1.1
    for key, value in (("temperature", 3), ("top_p", 0), ("top_k", 1.5), ("min_p", "x"), ("repetition_penalty", True)):
        file.write_text(json.dumps({"do_sample": True, key: value}))
        with pytest.raises(ModelFileError, match=rf"generation_config\.json: {key} is "):
            folder_defaults(tmp_path)
