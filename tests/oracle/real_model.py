"""A real file in `transformers`: its weights unpacked to float32 by the gguf package, not by jilju."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_models import GEMMA_LAYER_NAMES, LAYER_NAMES, NAMES
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def load_by_transformers(path: Path) -> PreTrainedModel:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    family = reader.fields["general.architecture"].contents()

    def field(key: str) -> float:
        return reader.fields[f"{family}.{key}"].contents()

    sizes = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": field("embedding_length"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "num_hidden_layers": field("block_count"),
        "intermediate_size": field("feed_forward_length"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attn_implementation": "eager",
    }
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base")}
    model, weight_of = {"llama": llama, "gemma3": gemma3}[family](sizes, rope, field)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weight_of(tensors, name)))
    return model.float().eval()


Field = Callable[[str], float]
WeightOf = Callable[
    [dict[str, np.ndarray], str], np.ndarray
]  # the file's tensor for a parameter, as the parameter is laid out


def llama(sizes: dict, rope: dict, field: Field) -> tuple[PreTrainedModel, WeightOf]:
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]

    def weight_of(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
        """The rows of q and k go from pairs side by side back to two halves a head."""
        x = tensors[name_in_file(name, LAYER_NAMES)]
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            x = x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        return x

    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)), weight_of


def gemma3(sizes: dict, rope: dict, field: Field) -> tuple[PreTrainedModel, WeightOf]:
    """The layers with a window and their rotary base are those that `transformers` takes by itself."""

    def weight_of(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
        x = tensors[name_in_file(name, GEMMA_LAYER_NAMES)]
        return x - 1 if name.endswith("norm.weight") else x

    config = Gemma3TextConfig(
        **sizes,
        head_dim=field("attention.key_length"),
        query_pre_attn_scalar=field("attention.key_length"),
        sliding_window=field("attention.sliding_window"),
        rope_parameters={"full_attention": rope},
    )
    return Gemma3ForCausalLM(config), weight_of


def name_in_file(name: str, layer_names: dict[str, str]) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.split(".", 3)
    part, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{layer_names[part]}.{kind}"


def greedy(model: PreTrainedModel, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """The most probable token, again and again; what ends a turn ends nothing here."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def greedy_at_each_place(model: PreTrainedModel, prompt_ids: list[int], answer_ids: list[int]) -> list[int]:
    """The most probable token after the prompt and after each token of the answer but the last; one pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids[:-1]]), logits_to_keep=len(answer_ids)).logits[0]
    return logits.argmax(dim=1).tolist()
