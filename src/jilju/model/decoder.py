"""The decoder, written once: a spec becomes a plan.

Owns the order of the ops of a decoder-only transformer. Families differ in named branches of this one function, never in
classes of their own. Weights go by their names in the file. Knows nothing of files, number formats' bytes or backends.
"""

from collections.abc import Mapping

from jilju.formats.ggml import GgmlType
from jilju.model.spec import ModelSpec
from jilju.plan import KvSpec, Plan, PlanBuilder, Value, WeightSpec


def build_plan(spec: ModelSpec, tensor_types: Mapping[str, GgmlType]) -> Plan:
    """The plan of a model whose tensors have these number formats."""
    b = PlanBuilder(KvSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim), spec.vocab_size)
    shapes = spec.tensor_shapes()
    scale = spec.head_dim**-0.5

    def weight(name: str) -> WeightSpec:
        *num_outputs, num_inputs = shapes[name]
        return WeightSpec(name, tensor_types[name], num_outputs[0] if num_outputs else 1, num_inputs)

    def rms_norm(x: Value, name: str) -> Value:
        return b.rms_norm(x, weight(name), spec.rms_eps)

    def rope(x: Value) -> Value:
        return b.rope(x, spec.head_dim, spec.rope_theta, spec.rope_style)

    x = b.embed(weight("token_embd.weight"))  # [tokens, hidden]
    for layer in range(spec.num_layers):
        blk = f"blk.{layer}"
        qkv = [weight(f"{blk}.attn_{part}.weight") for part in "qkv"]
        biases = [weight(f"{blk}.attn_{part}.bias") for part in "qkv"] if spec.attention_bias else []

        h = b.linear(rms_norm(x, f"{blk}.attn_norm.weight"), *qkv, biases=tuple(biases))  # [tokens, q + k + v]
        q, k, v = b.split(h, spec.q_width, spec.kv_width, spec.kv_width)
        h = b.attention(rope(q), rope(k), v, layer, spec.num_heads, scale)  # [tokens, q]
        x = b.linear(h, weight(f"{blk}.attn_output.weight"), add_to=x)  # [tokens, hidden]

        h = rms_norm(x, f"{blk}.ffn_norm.weight")
        h = b.linear(h, weight(f"{blk}.ffn_gate.weight"), weight(f"{blk}.ffn_up.weight"))  # [tokens, 2 ffn]
        x = b.linear(b.glu(h), weight(f"{blk}.ffn_down.weight"), add_to=x)  # [tokens, hidden]

    head = weight("token_embd.weight" if spec.tied_head else "output.weight")
    b.sample(b.linear(rms_norm(b.take_rows(x), "output_norm.weight"), head))  # [logits, vocab]
    return b.build()
