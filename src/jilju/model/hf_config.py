"""Hyper-parameters of a model folder: what its config.json says, strictly.

Owns the model types that are read from folders and the names that their tensors have there. A key that is not understood or
asks for what no op computes is refused, not guessed, as with GGUF files (`model/spec.py`). Knows nothing of ops, tokenizers or
weights' bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np

from jilju.errors import ModelFileError
from jilju.formats.ggml import GgmlType
from jilju.model.spec import DEFAULT_ROPE_THETA, FAMILIES, MAX_INT32, FamilyName, ModelSpec

MAX_LAYERS = 1024
MAX_REAL = 1e30
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class RopeConfig(NamedTuple):
    theta: float
    local_theta: float  # of layers with a window
    factors: tuple[float, ...] = ()  # as ModelSpec has them


class ModelType(NamedTuple):
    """What `model_type` implies: the family it is one of, and the values of absent keys."""

    family: FamilyName
    architecture: str
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied_head: bool = False
    sliding_window: int | None = None
    rope_theta: float = DEFAULT_ROPE_THETA
    own_keys: frozenset[str] = frozenset()  # read beside READ_KEYS


_QWEN_KEYS = frozenset({"hidden_act", "layer_types", "sliding_window"})  # whose window is off: use_sliding_window
_GEMMA_KEYS = frozenset({
    "sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
    "query_pre_attn_scalar", "hidden_activation",
})  # fmt: skip
MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType("llama", "LlamaForCausalLM", own_keys=frozenset({"hidden_act"})),
    "mistral": ModelType(
        "llama", "MistralForCausalLM", sliding_window=4096, own_keys=frozenset({"hidden_act", "sliding_window"})
    ),
    "qwen2": ModelType("qwen2", "Qwen2ForCausalLM", own_keys=_QWEN_KEYS),
    "qwen3": ModelType("qwen3", "Qwen3ForCausalLM", head_dim=128, own_keys=_QWEN_KEYS),
    "gemma3_text": ModelType(
        "gemma3", "Gemma3ForCausalLM", head_dim=256, tied_head=True, sliding_window=4096, rope_theta=1e6,
        own_keys=_GEMMA_KEYS,
    ),
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # of a family, and how config.json calls it
WEIGHT_TYPES = {"bfloat16": GgmlType.BF16, "float16": GgmlType.F16, "float32": GgmlType.F32}

# Keys that are read below, of every model type.
READ_KEYS = frozenset({
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "rope_theta", "rope_parameters", "rope_scaling", "dtype", "torch_dtype",
})  # fmt: skip

# Keys that change the model unless they hold one of these values, or null.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "quantization_config": (),
    "sliding_window": (),  # of model types that do not read it
    "layer_types": (),
}

# Keys without effect on what is computed; any other is refused.
OTHER_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attention_dropout", "attn_implementation",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "embd_pdrop", "eos_token_id", "hidden_dropout",
    "id2label", "initializer_range", "is_llama_config", "label2id", "max_window_layers", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "tokenizer_class",
    "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip

# What the tensors of a plan are called in a folder; of a layer without its number.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORM_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def name_in_folder(spec: ModelSpec, name: str) -> str:
    """What the plan's tensor `name` is called in a folder."""
    if name in _NAMES:
        return _NAMES[name]
    _, layer, part, kind = name.split(".")
    names = _POST_NORM_NAMES if spec.post_norms else _LAYER_NAMES
    return f"model.layers.{layer}.{names[part]}.{kind}"


def spec_from_config(config: Mapping[str, Any], *, file: str, name: str) -> ModelSpec:
    """The hyper-parameters of a config.json; `file` names it in errors. Raises ModelFileError."""
    return _ConfigReader(config, file).read(name)


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, context: float
) -> tuple[float, ...]:
    """By what Llama 3.1 and later divide the rotary frequencies, theta^(-2i/head_dim), of each pair i: float32 values.

    A pair that turns r times in `context` positions, which the model was first trained on, has the factor
        1                              if r > high: short waves stay
        factor                         if r < low: long waves are stretched
        1 / ((1 - s) / factor + s)     between, s = (r - low) / (high - low)
    That is rope type llama3 of `transformers` (modeling_rope_utils.py), whose frequencies these factors give, and what the
    converter of llama.cpp writes as rope_freqs.weight.
    """
    pairs = np.arange(head_dim // 2) / (head_dim // 2)
    turns = context / (2 * np.pi * theta**pairs)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - smooth) / factor + smooth)).astype(np.float32).tolist())


def _rope_type(given: Mapping[str, Any]) -> Any:
    return given.get("rope_type", given.get("type", "default"))


def weight_type(config: Mapping[str, Any], *, file: str) -> GgmlType:
    """The number format that the config names for weights; bfloat16 where it names none. Raises ModelFileError."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    given = config.get(key)
    if given is None:
        return GgmlType.BF16
    if not isinstance(given, str) or given.removeprefix("torch.") not in WEIGHT_TYPES:
        raise ModelFileError(file, key, given, ", ".join(WEIGHT_TYPES))
    return WEIGHT_TYPES[given.removeprefix("torch.")]


class _ConfigReader:
    def __init__(self, config: Mapping[str, Any], file: str):
        self._config = config
        self._file = file
        name = config.get("model_type")
        if not isinstance(name, str) or name not in MODEL_TYPES:
            self._fail("model_type", name, f"{', '.join(MODEL_TYPES)}; jilju does not know this one")
        self._type = MODEL_TYPES[name]
        given = config.get("architectures")
        if given is not None and given != [self._type.architecture]:
            self._fail("architectures", given, f"absent or [{self._type.architecture!r}] for model_type {name}")

    def read(self, name: str) -> ModelSpec:
        self._refuse_unknown_keys()
        type_ = self._type
        family = FAMILIES[type_.family]
        hidden, num_heads = self._int("hidden_size"), self._int("num_attention_heads")
        num_layers = self._int("num_hidden_layers", maximum=MAX_LAYERS)
        max_context = self._int("max_position_embeddings")
        num_kv_heads = self._int("num_key_value_heads", num_heads if type_.architecture == "LlamaForCausalLM" else None)
        if num_heads % num_kv_heads:
            self._fail("num_key_value_heads", num_kv_heads, f"a divisor of the {num_heads} query heads")
        head_dim = self._head_dim(hidden, num_heads)
        self._check_fixed("attention_bias", family.attention_bias)
        activation = ACTIVATIONS[family.activation]
        self._check_fixed("hidden_activation" if "hidden_activation" in type_.own_keys else "hidden_act", activation)
        rope = self._rope(head_dim)
        scaled_width = self._positive("query_pre_attn_scalar", type_.head_dim) if type_.family == "gemma3" else head_dim
        spec = ModelSpec(
            family=type_.family,
            name=name,
            num_layers=num_layers,
            hidden_width=hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn_width=self._int("intermediate_size"),
            vocab_size=self._int("vocab_size"),
            max_context=max_context,
            rope_theta=rope.theta,
            rope_factors=rope.factors,
            rope_style="halves",  # rows of q and k are permuted in GGUF files alone
            rms_eps=self._positive("rms_norm_eps", 1e-6),
            tied_head=self._flag("tie_word_embeddings", type_.tied_head),
            attention_bias=family.attention_bias,
            head_norms=family.head_norms,
            post_norms=family.post_norms,
            activation=family.activation,
            embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
            attention_scale=scaled_width**-0.5,
        )
        return msgspec.structs.replace(spec, **self._windows(num_layers, rope.local_theta))

    def _refuse_unknown_keys(self) -> None:
        read_keys = READ_KEYS | self._type.own_keys
        for key, given in self._config.items():
            if key in read_keys or key in OTHER_KEYS or given is None:
                continue
            if key not in NEUTRAL_VALUES:
                allowed = f"of {', '.join(sorted(read_keys))}; take it out if the model computes the same without it"
                self._fail(f"key {key[:80]!r}", "one that jilju does not know", allowed)
            neutral = NEUTRAL_VALUES[key]
            if not any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in neutral):
                values = "".join(f" or {value!r}" for value in neutral)
                self._fail(key, given, f"absent{values}; other values are not supported")

    def _head_dim(self, hidden: int, num_heads: int) -> int:
        if self._config.get("head_dim") is None and self._type.head_dim is None and hidden % num_heads:
            self._fail("num_attention_heads", num_heads, f"a divisor of hidden_size {hidden}, as head_dim is absent")
        head_dim = self._int("head_dim", self._type.head_dim or hidden // num_heads)
        if head_dim % 2:
            self._fail("head_dim", head_dim, "an even number, for rotary positions")
        return head_dim

    def _rope(self, head_dim: int) -> RopeConfig:
        """Old files say thetas by keys of their own and the scaling in rope_scaling, newer ones all of it in rope_parameters, for
        each type of layer where they differ."""
        theta = self._positive("rope_theta", self._type.rope_theta)
        is_gemma = self._type.family == "gemma3"
        local = self._positive("rope_local_base_freq", DEFAULT_ROPE_THETA) if is_gemma else theta
        key = "rope_parameters" if self._config.get("rope_parameters") is not None else "rope_scaling"
        given = self._config.get(key)
        if given is None:
            return RopeConfig(theta, local)
        if key == "rope_parameters" and self._config.get("rope_scaling") not in (None, given):
            self._fail("rope_scaling", self._config["rope_scaling"], "absent where rope_parameters is there")
        if not isinstance(given, dict):
            self._fail(key, given, "an object")
        if given.keys() & {FULL, SLIDING}:
            if not is_gemma or given.keys() - {FULL, SLIDING}:
                self._fail(key, given, f"{FULL} and {SLIDING} in a model of type gemma3_text, or one for all layers")
            parts = {FULL: (given.get(FULL), theta), SLIDING: (given.get(SLIDING), local)}
            thetas = [
                self._rope_theta(f"{key}.{name}", {} if part is None else part, default)
                for name, (part, default) in parts.items()
            ]
            return RopeConfig(thetas[0], thetas[1])
        scaled = ("llama3",) if FAMILIES[self._type.family].scaled_rope else ()
        theta = self._rope_theta(key, given, theta, scaled)
        factors = self._llama3_factors(key, given, theta, head_dim) if _rope_type(given) == "llama3" else ()
        return RopeConfig(theta, local if is_gemma else theta, factors)

    def _rope_theta(self, field: str, given: Any, default: float, scaled: Sequence[str] = ()) -> float:
        """`scaled`: the types beside default that may stand here."""
        if not isinstance(given, dict):
            self._fail(field, given, "an object")
        kind = _rope_type(given)
        if kind not in ("default", *scaled):
            allowed = f"{' or '.join(('default', *scaled))}; other scalings of rotary frequencies are not supported"
            self._fail(f"{field}, type", kind, allowed)
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(LLAMA3_KEYS if kind in scaled else ())}
        if given.keys() - known:
            self._fail(f"{field}, keys", sorted(given.keys() - known), f"of {', '.join(sorted(known))} for type {kind}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            self._fail(f"{field}.partial_rotary_factor", given["partial_rotary_factor"], "absent or 1.0")
        return self._positive("rope_theta", default, given, f"{field}.rope_theta")

    def _llama3_factors(self, field: str, given: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
        factor, low, high, context = (self._positive(key, None, given, f"{field}.{key}") for key in LLAMA3_KEYS)
        if factor < 1:
            self._fail(f"{field}.factor", factor, "1 or more")
        if high <= low:
            self._fail(f"{field}.high_freq_factor", high, f"more than low_freq_factor, which is {low}")
        return llama3_factors(head_dim, theta, factor, low, high, context)

    def _windows(self, num_layers: int, local_rope_theta: float) -> dict[str, Any]:
        """The fields of windows."""
        is_windowed = self._windowed_layers(num_layers)
        if not any(is_windowed):
            return {}
        every = num_layers + 1 if all(is_windowed) else is_windowed.index(False) + 1
        if any(windowed != bool((index + 1) % every) for index, windowed in enumerate(is_windowed)):
            allowed = f"{SLIDING} for all layers but each n-th, which is {FULL}"
            self._fail("layer_types", self._config.get("layer_types"), allowed)
        window = self._int("sliding_window", self._type.sliding_window)
        return {"window": window, "global_every": every, "local_rope_theta": local_rope_theta}

    def _windowed_layers(self, num_layers: int) -> Sequence[bool]:
        """By layer: whether it has a window."""
        has_window = self._type.sliding_window is not None and self._config.get("sliding_window", 0) is not None
        allowed, types = [FULL, SLIDING] if has_window else [FULL], self._config.get("layer_types")
        if types is not None and "layer_types" in self._type.own_keys:
            if not isinstance(types, list) or len(types) != num_layers or any(type_ not in allowed for type_ in types):
                self._fail("layer_types", types, f"{' or '.join(allowed)} for each of the {num_layers} layers")
            return [type_ == SLIDING for type_ in types]
        if not has_window or self._type.family != "gemma3":
            return [has_window] * num_layers
        every = self._int("sliding_window_pattern", self._int("_sliding_window_pattern", 6))
        return [bool((index + 1) % every) for index in range(num_layers)]

    def _check_fixed(self, key: str, value: object) -> None:
        """A key that may be absent, but says nothing else than the family does."""
        given = self._config.get(key)
        if given is not None and (given != value or isinstance(given, bool) != isinstance(value, bool)):
            self._fail(key, given, f"absent or {value!r}, as every model of its type has it")

    def _flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self._fail(key, value, "true or false")
        return value

    def _int(self, key: str, default: int | None = None, maximum: int = MAX_INT32) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= maximum:
            self._fail(key, "missing" if value is None else value, f"1 to {maximum}")
        return value

    def _positive(
        self, key: str, default: float | None, values: Mapping[str, Any] | None = None, field: str | None = None
    ) -> float:
        value: Any = (self._config if values is None else values).get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < MAX_REAL:
            self._fail(field or key, "missing" if value is None else value, "a positive number")
        return float(value)

    def _fail(self, field: str, given: object, allowed: str) -> NoReturn:
        raise ModelFileError(self._file, field, given, allowed)
