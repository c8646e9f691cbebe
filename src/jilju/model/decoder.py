"""The decoder, written once: a spec becomes a plan.

Owns the order of the ops of a decoder-only transformer. Families differ in named branches of this one function, never in
classes of their own. Weights go by their names in the file. Knows nothing of files, number formats' bytes or backends.
"""

from collections.abc import Mapping

from jilju.formats.ggml import GgmlType
from jilju.model.spec import ROPE_FACTORS, ModelSpec
from jilju.plan import KvSpec, Plan, PlanBuilder, Value, WeightSpec


def build_plan(spec: ModelSpec, tensor_types: Mapping[str, GgmlType]) -> Plan:
    """The plan of a model whose tensors have these number formats."""
    b = PlanBuilder(KvSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim), spec.vocab_size)
    shapes = spec.tensor_shapes()

    def weight(name: str) -> WeightSpec:
        *num_outputs, num_inputs = shapes[name]
        return WeightSpec(name, tensor_types[name], num_outputs[0] if num_outputs else 1, num_inputs)

    def rms_norm(x: Value, name: str) -> Value:
        return b.rms_norm(x, weight(name), spec.rms_eps)

    def add(x: Value, h: Value, matrix: str, post_norm: str) -> Value:
        """The residual with h @ matrix.T, normed first in families of post norms: [tokens, hidden]"""
        if spec.post_norms:
            return b.rms_norm(b.linear(h, weight(matrix)), weight(post_norm), spec.rms_eps, add_to=x)
        return b.linear(h, weight(matrix), add_to=x)

    factors = weight(ROPE_FACTORS) if spec.rope_factors else None
    x = b.embed(weight("token_embd.weight"), spec.embedding_scale)  # [tokens, hidden]
    for index in range(spec.num_layers):
        blk, layer = f"blk.{index}", spec.layer(index)
        qkv = [weight(f"{blk}.attn_{part}.weight") for part in "qkv"]
        biases = [weight(f"{blk}.attn_{part}.bias") for part in "qkv"] if spec.attention_bias else []

        h = b.linear(rms_norm(x, f"{blk}.attn_norm.weight"), *qkv, biases=tuple(biases))  # [tokens, q + k + v]
        q, k, v = b.split(h, spec.q_width, spec.kv_width, spec.kv_width)
        if spec.head_norms:
            q, k = rms_norm(q, f"{blk}.attn_q_norm.weight"), rms_norm(k, f"{blk}.attn_k_norm.weight")
        q, k = (b.rope(part, spec.head_dim, layer.rope_theta, spec.rope_style, factors) for part in (q, k))
        h = b.attention(q, k, v, index, spec.num_heads, spec.attention_scale, layer.window)  # [tokens, q]
        x = add(x, h, f"{blk}.attn_output.weight", f"{blk}.post_attention_norm.weight")

        h = rms_norm(x, f"{blk}.ffn_norm.weight")
        h = b.linear(h, weight(f"{blk}.ffn_gate.weight"), weight(f"{blk}.ffn_up.weight"))  # [tokens, 2 ffn]
        x = add(x, b.glu(h, spec.activation), f"{blk}.ffn_down.weight", f"{blk}.post_ffw_norm.weight")

    head = weight("token_embd.weight" if spec.tied_head else "output.weight")
    b.sample(b.linear(rms_norm(b.take_rows(x), "output_norm.weight"), head))  # [logits, vocab]
    return b.build()
