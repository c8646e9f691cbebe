"""Tiny models of each family: random weights in `transformers`, and the same weights as a GGUF file.

The export is that of llama.cpp's converter: its names and keys, the llama family's q and k rows permuted, 1 added to the
weights of Gemma's norms, a byte-level tokenizer beside them. Weights come from numpy's generator, so that they are the same with any version of torch.
"""

from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

NUM_TOKENS = 64
VOCAB_SIZE = 300


class Tiny(NamedTuple):
    name: str
    family: str
    num_layers: int
    hidden_width: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    tied: bool
    rope_theta: float
    head_dim: int | None = None  # None: hidden_width / num_heads
    window: int = 0  # of gemma3
    global_every: int | None = None  # None: no key says so, which is 6
    scaled_width: int | None = None  # None: attention's scale is that of the head size
    llama3_context: int = 0  # of rope type llama3: the context before its frequencies were scaled; 0: they are not

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_width // self.num_heads

    @property
    def rope_parameters(self) -> dict[str, str | float]:
        if not self.llama3_context:
            return {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "rope_type": "llama3", "rope_theta": self.rope_theta, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": self.llama3_context,
        }  # fmt: skip


GOLDEN = (
    Tiny("llama-tied", "llama", 2, 64, 4, 2, 96, tied=True, rope_theta=10_000.0),
    Tiny("qwen2-untied", "qwen2", 2, 64, 4, 1, 96, tied=False, rope_theta=1_000_000.0),
    Tiny("qwen3-tied", "qwen3", 2, 48, 4, 2, 64, tied=True, rope_theta=1_000_000.0, head_dim=20),
    Tiny("gemma3-windows", "gemma3", 3, 48, 4, 1, 64, True, 1_000_000.0, head_dim=24, window=20, global_every=3),
)
MODELS = (
    *GOLDEN,
    Tiny("llama-untied-wide-heads", "llama", 3, 80, 5, 1, 176, tied=False, rope_theta=100_000.0, head_dim=24),
    Tiny("llama-all-heads", "llama", 2, 72, 6, 6, 100, tied=False, rope_theta=500_000.0),
    Tiny("llama-scaled-rope", "llama", 3, 96, 4, 2, 100, False, 10_000.0, head_dim=32, llama3_context=40),
    Tiny("qwen2-tied", "qwen2", 3, 126, 9, 3, 130, tied=True, rope_theta=1_000_000.0),
    Tiny("qwen3-untied", "qwen3", 3, 64, 6, 2, 100, tied=False, rope_theta=1_000_000.0, head_dim=32),
    Tiny("gemma3-five-to-one", "gemma3", 13, 64, 4, 2, 80, tied=True, rope_theta=1_000_000.0, head_dim=16, window=9),
    Tiny("gemma3-window-of-one", "gemma3", 2, 64, 4, 4, 80, True, 1_000_000.0, head_dim=16, window=1, global_every=2),
    Tiny("gemma3-long-window", "gemma3", 2, 64, 4, 4, 80, True, 1_000_000.0, head_dim=16, window=500, global_every=2),
    Tiny("gemma3-27b", "gemma3", 62, 24, 2, 1, 24, True, 1_000_000.0, head_dim=8, window=16, scaled_width=12),
)


def build(tiny: Tiny, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform and every bias and norm matters."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": tiny.hidden_width,
        "intermediate_size": tiny.ffn_width,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tiny.tied,
        "rope_parameters": tiny.rope_parameters,
        "attn_implementation": "eager",
    }
    model: PreTrainedModel
    match tiny.family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=tiny.head_size))
        case "qwen2":
            assert tiny.head_dim is None, "qwen2 has no head size of its own"
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=tiny.head_size))
        case "gemma3":
            sizes["rope_parameters"] = {
                "full_attention": {"rope_type": "default", "rope_theta": tiny.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
            config = Gemma3TextConfig(
                **sizes,
                head_dim=tiny.head_size,
                sliding_window=tiny.window,
                sliding_window_pattern=tiny.global_every or 6,
                query_pre_attn_scalar=tiny.scaled_width or tiny.head_size,
            )
            model = Gemma3ForCausalLM(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            x = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
            if name.endswith("norm.weight"):
                x = norm_shift(tiny) + x / 5
            elif name.endswith("bias"):
                x = x / 2
            elif "embed_tokens" not in name:
                x = x * 1.5 / parameter.shape[1] ** 0.5
            elif tiny.family == "gemma3":
                x = x / parameter.shape[1] ** 0.5  # which the model undoes
            parameter.copy_(torch.from_numpy(x))
    return model.float().eval()


def norm_shift(tiny: Tiny) -> float:
    """1, as what a norm multiplies by; Gemma's weights in `transformers` are less by 1, not so in GGUF."""
    return 0.0 if tiny.family == "gemma3" else 1.0


def token_ids(seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, NUM_TOKENS).tolist()


def logits_by_transformers(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab], in one pass"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
GEMMA_LAYER_NAMES = {
    **LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tensors_for_gguf(model: PreTrainedModel, tiny: Tiny) -> dict[str, np.ndarray]:
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied head is named once, as the embedding
        x = parameter.detach().numpy()
        if name.endswith("norm.weight"):
            x = x + np.float32(1 - norm_shift(tiny))
        if name in NAMES:
            tensors[NAMES[name]] = x
            continue
        _, _, layer, part = name.split(".", 3)
        part, kind = part.rsplit(".", 1)
        if tiny.family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            x = interleaved(x, tiny.head_size)
        names = GEMMA_LAYER_NAMES if tiny.family == "gemma3" else LAYER_NAMES
        tensors[f"blk.{layer}.{names[part]}.{kind}"] = x
    if tiny.llama3_context:
        tensors["rope_freqs.weight"] = np.float32(rope_factors(tiny))
    return tensors


def rope_factors(tiny: Tiny) -> list[float]:
    """By what the frequencies of `transformers` are less than those without scaling, pair by pair."""
    config = LlamaConfig(head_dim=tiny.head_size, rope_parameters=tiny.rope_parameters)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = tiny.rope_theta ** -(np.arange(0, tiny.head_size, 2) / tiny.head_size)
    return (plain / frequencies.double().numpy()).tolist()


def interleaved(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs (i, i + head_dim/2) side by side."""
    return x.reshape(-1, 2, head_dim // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, model: PreTrainedModel, tiny: Tiny) -> None:
    writer = gguf.GGUFWriter(path, tiny.family)
    writer.add_name(tiny.name)
    writer.add_block_count(tiny.num_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(tiny.hidden_width)
    writer.add_feed_forward_length(tiny.ffn_width)
    writer.add_head_count(tiny.num_heads)
    writer.add_head_count_kv(tiny.num_kv_heads)
    writer.add_rope_freq_base(tiny.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    if tiny.head_dim is not None:
        writer.add_key_length(tiny.head_dim)
        writer.add_value_length(tiny.head_dim)
    if tiny.family == "llama":
        writer.add_rope_dimension_count(tiny.head_size)
    if tiny.window:
        writer.add_sliding_window(tiny.window)
    if tiny.global_every:
        writer.add_sliding_window_pattern(tiny.global_every)
    add_tokenizer(writer, "smollm" if tiny.family == "llama" else "qwen2")
    for name, x in tensors_for_gguf(model, tiny).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    """A byte-level vocabulary of 300: 256 bytes, 41 merged pairs, 3 special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    pairs = [(a, b) for a in ("Ġ", "t", "h", "e", "a", "i") for b in "thaeionsr"][: VOCAB_SIZE - 256 - 3]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([letters[byte] for byte in range(256)] + [a + b for a, b in pairs] + special)
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCAB_SIZE - 3) + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(VOCAB_SIZE - 3)
    writer.add_eos_token_id(VOCAB_SIZE - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
