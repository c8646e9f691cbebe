"""A real file of the llama family in `transformers`: its weights unpacked to float32 by the gguf package, not by jilju."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_models import LAYER_NAMES, NAMES
from transformers import LlamaConfig, LlamaForCausalLM


def field(reader: gguf.GGUFReader, key: str) -> float:
    return reader.fields[f"llama.{key}"].contents()


def load_by_transformers(path: Path) -> LlamaForCausalLM:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    num_heads, hidden_width = field(reader, "attention.head_count"), field(reader, "embedding_length")
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0], hidden_size=hidden_width, num_attention_heads=num_heads,
        num_key_value_heads=field(reader, "attention.head_count_kv"), num_hidden_layers=field(reader, "block_count"),
        intermediate_size=field(reader, "feed_forward_length"), max_position_embeddings=field(reader, "context_length"),
        rms_norm_eps=field(reader, "attention.layer_norm_rms_epsilon"), tie_word_embeddings="output.weight" not in tensors,
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "rope.freq_base")}, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weight_of(tensors, name, hidden_width // num_heads)))
    return model.float().eval()


def weight_of(tensors: dict[str, np.ndarray], name: str, head_dim: int) -> np.ndarray:
    """The file's tensor for a parameter; the rows of q and k go from pairs side by side back to two halves a head."""
    if name in NAMES:
        return tensors[NAMES[name]]
    _, _, layer, part = name.split(".", 3)
    part, kind = part.rsplit(".", 1)
    x = tensors[f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"]
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        x = x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
    return x


def greedy(model: LlamaForCausalLM, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """The most probable token, again and again; what ends a turn ends nothing here."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def greedy_at_each_place(model: LlamaForCausalLM, prompt_ids: list[int], answer_ids: list[int]) -> list[int]:
    """The most probable token after the prompt and after each token of the answer but the last; one pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids[:-1]])).logits[0]
    return logits[len(prompt_ids) - 1 :].argmax(dim=1).tolist()
