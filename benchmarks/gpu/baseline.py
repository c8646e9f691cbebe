"""What others reach with the same shape in the same run: plain PyTorch, compiled and captured; and `transformers`.

Run as a process of its own: `python -m benchmarks.gpu.baseline torch|transformers`; the last line of its output is JSON.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.llama import SPEC

CONTEXT = 1024
DTYPE = torch.bfloat16


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + SPEC.rms_eps)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def layer(x: torch.Tensor, w: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """One token a row. x [B, D]; keys, values [B, kv heads, context, d], written at `place`."""
    rows, d = x.shape[0], SPEC.head_dim
    q, k, v = F.linear(rms_norm(x, w["norm"]), w["qkv"]).split([SPEC.q_width, SPEC.kv_width, SPEC.kv_width], dim=-1)
    q = rotate(q.view(rows, SPEC.num_heads, 1, d), cos, sin)
    k = rotate(k.view(rows, SPEC.num_kv_heads, 1, d), cos, sin)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v.view(rows, SPEC.num_kv_heads, 1, d))
    h = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    x = x + F.linear(h.reshape(rows, SPEC.q_width), w["o"])
    gate, up = F.linear(rms_norm(x, w["ffn_norm"]), w["gate_up"]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, w["down"])


def plain_torch() -> dict[str, Any]:
    """The layer compiled once, the pass over all layers captured as one CUDA graph: what gpt-fast does."""

    def matrix(n: int, k: int) -> torch.Tensor:
        return torch.empty(n, k, device="cuda", dtype=DTYPE).normal_(0, 0.02)

    width, ffn = SPEC.hidden_width, SPEC.ffn_width
    ones = torch.ones(width, device="cuda", dtype=DTYPE)
    weights = [
        {
            "norm": ones, "ffn_norm": ones, "qkv": matrix(SPEC.q_width + 2 * SPEC.kv_width, width), "o": matrix(width, SPEC.q_width),
            "gate_up": matrix(2 * ffn, width), "down": matrix(width, ffn),
        }
        for _ in range(SPEC.num_layers)
    ]  # fmt: skip
    table, head = matrix(SPEC.vocab_size, width), matrix(SPEC.vocab_size, width)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    cos = torch.ones(SPEC.head_dim // 2, device="cuda", dtype=DTYPE)
    sin = torch.zeros_like(cos)
    place = torch.tensor([CONTEXT - 1], device="cuda")
    result: dict[str, Any] = {}
    for rows in (1, 64):
        shape = (rows, SPEC.num_kv_heads, CONTEXT, SPEC.head_dim)
        caches = [torch.randn(2, *shape, device="cuda", dtype=DTYPE) for _ in weights]
        ids = torch.zeros(rows, device="cuda", dtype=torch.long)

        def step(ids: torch.Tensor = ids, caches: list[torch.Tensor] = caches) -> torch.Tensor:
            x = table[ids]
            for w, cache in zip(weights, caches, strict=True):
                x = compiled(x, w, cache[0], cache[1], place, cos, sin)
            return F.linear(rms_norm(x, ones), head).argmax(-1)

        begin = time.perf_counter()
        with torch.no_grad():
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        result[f"compile {rows} s"] = time.perf_counter() - begin
        ms = _median_ms(graph.replay)
        result |= {f"decode {rows} ms": ms, f"decode {rows} tok/s": rows / ms * 1e3}
        del caches
    return result


def by_transformers() -> dict[str, Any]:
    """Its own model class, eager, with its dynamic cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SPEC.vocab_size, hidden_size=SPEC.hidden_width, intermediate_size=SPEC.ffn_width,
        num_hidden_layers=SPEC.num_layers, num_attention_heads=SPEC.num_heads, num_key_value_heads=SPEC.num_kv_heads,
        rms_norm_eps=SPEC.rms_eps, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(DTYPE)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cuda").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for name, buffer in model.named_buffers():  # made empty above: the frequencies of the rotary positions
        if name.endswith("inv_freq"):
            d = SPEC.head_dim
            buffer.copy_(SPEC.rope_theta ** -(torch.arange(0, d, 2, device="cuda").float() / d))
    result: dict[str, Any] = {}
    with torch.no_grad():
        for rows in (1, 64):
            cache = None
            for _ in range(0, CONTEXT, 128 if rows > 1 else CONTEXT):  # a prompt in parts, for its logits take memory
                count = 128 if rows > 1 else CONTEXT
                ids = torch.randint(0, 1000, (rows, count), device="cuda")
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
            token = torch.zeros(rows, 1, device="cuda", dtype=torch.long)
            times = []
            for _ in range(10):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                out.logits.argmax(-1).cpu()
                times.append(time.perf_counter() - begin)
                cache = out.past_key_values
            ms = statistics.median(times[3:]) * 1e3
            result |= {f"decode {rows} ms": ms, f"decode {rows} tok/s": rows / ms * 1e3}
    return result


def _median_ms(work: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(5):
        begin.record()
        for _ in range(10):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps({"torch": plain_torch, "transformers": by_transformers}[sys.argv[1]]()))
