"""Hyper-parameters of a model: what a GGUF file says of itself, strictly.

Owns the families that jilju knows and the tensors that each must have. A key or tensor that is not understood, is missing or
contradicts another is refused, not guessed: a model that runs slightly wrong is worse than one that does not run. Knows
nothing of ops, and of tensors' bytes only those of the rotary factors, which are hyper-parameters that lie among the weights.
"""

import math
from typing import Any, Literal, NoReturn

import msgspec

from jilju.errors import ModelFileError
from jilju.formats.ggml import GgmlType
from jilju.formats.gguf import GgufFile

FamilyName = Literal["llama", "qwen2", "qwen3", "gemma3"]
RopeStyle = Literal["halves", "interleaved"]
Activation = Literal["silu", "gelu_tanh"]
DEFAULT_ROPE_THETA = (
    10_000.0  # the GGUF specification's value of an absent rope.freq_base, and Gemma's of windowed layers
)
DEFAULT_GLOBAL_EVERY = 6  # Gemma 3: five windowed layers, then one that sees all keys
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that the plan has if a model's rotary frequencies are scaled
GEMMA3_27B_LAYERS = 62  # the one model of its family whose attention scale is not head_dim^-0.5, which no key says
MAX_INT32 = 2**31 - 1


class Family(msgspec.Struct, frozen=True):
    """What `general.architecture` implies and no key says."""

    rope_style: RopeStyle
    attention_bias: bool = False  # biases on q, k and v
    head_norms: bool = False  # norms of each head of q and k, before rope
    post_norms: bool = False  # norms of what attention and gate add to the residual
    activation: Activation = "silu"
    scaled_embedding: bool = False  # rows of the table times the root of their width
    scaled_rope: bool = False  # may have factors of rotary frequencies
    own_keys: frozenset[str] = frozenset()  # read beside READ_KEYS


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family(rope_style="interleaved", scaled_rope=True),  # its q and k rows are permuted in the file
    "qwen2": Family(rope_style="halves", attention_bias=True),
    "qwen3": Family(rope_style="halves", head_norms=True),
    "gemma3": Family(  # its norms' weights have their + 1 in the file
        rope_style="halves",
        head_norms=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        own_keys=frozenset({"attention.sliding_window_pattern", "rope.freq_base_swa"}),
    ),
}


class LayerSpec(msgspec.Struct, frozen=True):
    """What may differ from layer to layer."""

    window: int  # keys that a query sees, its own included; 0: all before it
    rope_theta: float


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides a model's plan, number formats aside."""

    family: FamilyName
    name: str
    num_layers: int
    hidden_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    max_context: int
    rope_theta: float
    rope_style: RopeStyle
    rms_eps: float
    tied_head: bool  # the head is the embedding table
    attention_bias: bool
    attention_scale: float
    head_norms: bool = False
    post_norms: bool = False
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    window: int = 0  # of all layers but every global_every-th, which sees all keys; 0: of none
    global_every: int = 1
    local_rope_theta: float = DEFAULT_ROPE_THETA  # of the layers with a window; rope_theta is of the others
    rope_factors: tuple[float, ...] = ()  # float32, by pair of a head: what rotary frequencies are divided by; none: 1

    def layer(self, index: int) -> LayerSpec:
        if self.window and (index + 1) % self.global_every:
            return LayerSpec(self.window, self.local_rope_theta)
        return LayerSpec(0, self.rope_theta)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file by name: (num_outputs, num_inputs) of a matrix, (width,) of a vector."""
        hidden, ffn = self.hidden_width, self.ffn_width
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, hidden),
            "output_norm.weight": (hidden,),
        }
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, hidden)
        if self.rope_factors:
            shapes[ROPE_FACTORS] = (len(self.rope_factors),)
        for layer in range(self.num_layers):
            prefix = f"blk.{layer}"
            shapes[f"{prefix}.attn_norm.weight"] = (hidden,)
            shapes[f"{prefix}.attn_q.weight"] = (self.q_width, hidden)
            shapes[f"{prefix}.attn_k.weight"] = (self.kv_width, hidden)
            shapes[f"{prefix}.attn_v.weight"] = (self.kv_width, hidden)
            shapes[f"{prefix}.attn_output.weight"] = (hidden, self.q_width)
            shapes[f"{prefix}.ffn_norm.weight"] = (hidden,)
            shapes[f"{prefix}.ffn_gate.weight"] = (ffn, hidden)
            shapes[f"{prefix}.ffn_up.weight"] = (ffn, hidden)
            shapes[f"{prefix}.ffn_down.weight"] = (hidden, ffn)
            if self.attention_bias:
                shapes[f"{prefix}.attn_q.bias"] = (self.q_width,)
                shapes[f"{prefix}.attn_k.bias"] = (self.kv_width,)
                shapes[f"{prefix}.attn_v.bias"] = (self.kv_width,)
            if self.head_norms:
                shapes[f"{prefix}.attn_q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.attn_k_norm.weight"] = (self.head_dim,)
            if self.post_norms:
                shapes[f"{prefix}.post_attention_norm.weight"] = (hidden,)
                shapes[f"{prefix}.post_ffw_norm.weight"] = (hidden,)
        return shapes


# Keys under the architecture's prefix that are read below, of every family.
READ_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
})  # fmt: skip

# Keys that change the model unless they hold this value; any key in neither table is refused.
NEUTRAL_VALUES: dict[str, Any] = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.finetuned": False,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.max_alibi_bias": 0.0,
    "attention.clamp_kqv": 0.0,
    "logit_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",  # q and k permuted, as in every llama file
}


def spec_from_gguf(gguf: GgufFile) -> ModelSpec:
    """The file's hyper-parameters, checked against its tensors. Raises ModelFileError."""
    return _SpecReader(gguf).read()


class _SpecReader:
    def __init__(self, gguf: GgufFile):
        self._gguf = gguf
        family = self._value("general.architecture", str)
        if family not in FAMILIES:
            self._fail(
                "metadata 'general.architecture'", family, f"{' or '.join(FAMILIES)}; jilju does not know this one"
            )
        self._family: FamilyName = family

    def read(self) -> ModelSpec:
        self._refuse_unknown_keys()
        family = FAMILIES[self._family]
        hidden = self._int("embedding_length")
        num_heads = self._int("attention.head_count")
        num_kv_heads = self._int("attention.head_count_kv", default=num_heads)
        if num_heads % num_kv_heads:
            self._fail_key("attention.head_count_kv", num_kv_heads, f"a divisor of the {num_heads} query heads")
        num_layers = self._int("block_count", maximum=len(self._gguf.tensors))
        head_dim = self._head_dim(hidden, num_heads)
        max_context = self._int("context_length")
        scaled_width = hidden / num_heads if (self._family, num_layers) == ("gemma3", GEMMA3_27B_LAYERS) else head_dim
        spec = ModelSpec(
            family=self._family,
            name=self._value("general.name", str, default=self._family),
            num_layers=num_layers,
            hidden_width=hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn_width=self._int("feed_forward_length"),
            vocab_size=self._vocab_size(),
            max_context=max_context,
            rope_theta=self._positive_float("rope.freq_base", default=DEFAULT_ROPE_THETA),
            rope_style=family.rope_style,
            rope_factors=self._rope_factors(head_dim) if family.scaled_rope else (),
            rms_eps=self._positive_float("attention.layer_norm_rms_epsilon"),
            tied_head="output.weight" not in self._gguf.tensors,
            attention_bias=family.attention_bias,
            head_norms=family.head_norms,
            post_norms=family.post_norms,
            activation=family.activation,
            embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
            attention_scale=scaled_width**-0.5,
            **self._windows(max_context),
        )
        self._check_tensors(spec)
        return spec

    def _refuse_unknown_keys(self) -> None:
        prefix, read_keys = f"{self._family}.", READ_KEYS | FAMILIES[self._family].own_keys
        for key in self._gguf.metadata:
            if not key.startswith(prefix) or key.removeprefix(prefix) in read_keys:
                continue
            name = key.removeprefix(prefix)
            if name not in NEUTRAL_VALUES:
                self._fail(
                    f"metadata {key!r}",
                    "a key that jilju does not know",
                    f"of {prefix}*: {', '.join(sorted(read_keys))}",
                )
            neutral, given = NEUTRAL_VALUES[name], self._gguf.metadata[key]
            if given != neutral or isinstance(given, bool) != isinstance(neutral, bool):
                self._fail_key(name, given, f"absent or {neutral!r}; other values are not supported")

    def _head_dim(self, hidden: int, num_heads: int) -> int:
        if f"{self._family}.attention.key_length" in self._gguf.metadata:
            head_dim = self._int("attention.key_length")
        elif hidden % num_heads:
            self._fail_key("attention.head_count", num_heads, f"a divisor of the embedding length {hidden}")
        else:
            head_dim = hidden // num_heads
        if head_dim % 2:
            self._fail_key(
                "attention.head_count", f"{num_heads}, of size {head_dim}", "an even head size, for rotary positions"
            )
        for key in ("attention.value_length", "rope.dimension_count"):
            given = self._int(key, default=head_dim)
            if given != head_dim:
                self._fail_key(key, given, f"absent or the head size {head_dim}")
        return head_dim

    def _rope_factors(self, head_dim: int) -> tuple[float, ...]:
        """Llama 3.1 and later have them, as a tensor."""
        tensor = self._gguf.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return ()
        if tensor.shape != (head_dim // 2,):
            self._fail(f"tensor '{ROPE_FACTORS}', shape", tensor.shape, f"{(head_dim // 2,)}, half the head size")
        if tensor.type is not GgmlType.F32:
            self._fail(f"tensor '{ROPE_FACTORS}', type", tensor.type.name, "F32")
        factors = self._gguf.tensor_data(ROPE_FACTORS).view("<f4").tolist()
        for index, factor in enumerate(factors):
            if not (math.isfinite(factor) and factor > 0):
                self._fail(f"tensor '{ROPE_FACTORS}', element {index}", factor, "a positive number")
        return tuple(factors)

    def _windows(self, max_context: int) -> dict[str, Any]:
        """The fields of windows. Of a family without windowed layers, a window is allowed if it never shuts out a key."""
        if self._family == "gemma3":
            if f"{self._family}.attention.sliding_window" not in self._gguf.metadata:
                return {}
            return {
                "window": self._int("attention.sliding_window"),
                "global_every": self._int("attention.sliding_window_pattern", default=DEFAULT_GLOBAL_EVERY),
                "local_rope_theta": self._positive_float("rope.freq_base_swa", default=DEFAULT_ROPE_THETA),
            }
        window = self._int("attention.sliding_window", default=max_context)
        if window < max_context:
            self._fail_key("attention.sliding_window", window, f"absent or at least the context of {max_context}")
        return {}

    def _vocab_size(self) -> int:
        """Rows of the embedding table, which other places of the file must agree with."""
        table = self._gguf.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            shown = "missing" if table is None else f"of shape {table.shape}"
            self._fail("tensor 'token_embd.weight'", shown, "a matrix (vocabulary, embedding length)")
        num_rows = table.shape[0]
        if num_rows > MAX_INT32:
            self._fail("tensor 'token_embd.weight', rows", num_rows, f"1 to {MAX_INT32}")
        given = self._int("vocab_size", default=num_rows)
        if given != num_rows:
            self._fail_key("vocab_size", given, f"the {num_rows} rows of token_embd.weight")
        num_tokens = self._gguf.metadata.array_length("tokenizer.ggml.tokens")
        if num_tokens not in (None, num_rows):
            self._fail(
                "metadata 'tokenizer.ggml.tokens', length", num_tokens, f"the {num_rows} rows of token_embd.weight"
            )
        return num_rows

    def _check_tensors(self, spec: ModelSpec) -> None:
        shapes = spec.tensor_shapes()
        for name, shape in shapes.items():
            tensor = self._gguf.tensors.get(name)
            if tensor is None:
                self._fail(f"tensor '{name}'", "missing", f"shape {shape}")
            if tensor.shape != shape:
                self._fail(f"tensor '{name}', shape", tensor.shape, f"{shape}, by the file's metadata")
        for name in self._gguf.tensors:
            if name not in shapes:
                self._fail(
                    f"tensor {name!r}",
                    "there",
                    f"the {len(shapes)} tensors of a {self._family} model of {spec.num_layers} layers",
                )

    def _int(self, key: str, *, default: int | None = None, maximum: int = MAX_INT32) -> int:
        value = self._value(f"{self._family}.{key}", int, default)
        if not 1 <= value <= maximum:
            self._fail_key(key, value, f"1 to {maximum}")
        return int(value)

    def _positive_float(self, key: str, *, default: float | None = None) -> float:
        value = self._value(f"{self._family}.{key}", float, default)
        if not (math.isfinite(value) and value > 0):
            self._fail_key(key, value, "a positive number")
        return float(value)

    def _value(self, key: str, type_: type, default: Any = None) -> Any:
        value = self._gguf.metadata.get(key, default)
        if value is None:
            self._fail(f"metadata {key!r}", "missing", f"one {type_.__name__}")
        if type(value) is not type_:
            shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            self._fail(f"metadata {key!r}", shown, f"one {type_.__name__}")
        return value

    def _fail_key(self, key: str, given: object, allowed: str) -> NoReturn:
        self._fail(f"metadata '{self._family}.{key}'", given, allowed)

    def _fail(self, field: str, given: object, allowed: str) -> NoReturn:
        raise ModelFileError(self._gguf.path, field, given, allowed)
