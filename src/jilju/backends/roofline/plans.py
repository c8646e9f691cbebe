"""Plans without a model file: of sizes that tests want, and of the sizes of models that are known.

Owns the order of ops of a Llama-like decoder as simulation needs it, for its costs. Knows nothing of specs and files.
"""

from jilju.formats.ggml import GgmlType
from jilju.plan import KvSpec, Plan, PlanBuilder, WeightSpec


def llama_plan(
    num_layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    *,
    head_dim: int = 0,
    body: GgmlType = GgmlType.F16,
    head: GgmlType = GgmlType.F16,
    is_tied: bool = True,
) -> Plan:
    """`body` is the number format of the layers' matrices, `head` of the embeddings and, tied or not, the head.

    head_dim 0: hidden / heads.
    """
    head_dim = head_dim or hidden // heads
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    b = PlanBuilder(KvSpec(num_layers, kv_heads, head_dim), vocab)

    def norm(name: str) -> WeightSpec:
        return WeightSpec(name, GgmlType.F32, 1, hidden)

    table = WeightSpec("embed", head, vocab, hidden)
    x = b.embed(table)  # [tokens, hidden]
    for layer in range(num_layers):
        h = b.rms_norm(x, norm(f"{layer}.attention_norm"), 1e-5)
        widths = {"q": q_width, "k": kv_width, "v": kv_width}
        h = b.linear(h, *(WeightSpec(f"{layer}.{part}", body, width, hidden) for part, width in widths.items()))
        q, k, v = b.split(h, *widths.values())
        q, k = (b.rope(part, head_dim, 1e4, "halves") for part in (q, k))
        h = b.attention(q, k, v, layer, heads, head_dim**-0.5)  # [tokens, q]
        x = b.linear(h, WeightSpec(f"{layer}.o", body, hidden, q_width), add_to=x)
        h = b.rms_norm(x, norm(f"{layer}.ffn_norm"), 1e-5)
        h = b.linear(h, *(WeightSpec(f"{layer}.{part}", body, ffn, hidden) for part in ("gate", "up")))
        x = b.linear(b.glu(h), WeightSpec(f"{layer}.down", body, hidden, ffn), add_to=x)
    h = b.rms_norm(b.take_rows(x), norm("norm"), 1e-5)
    b.sample(b.linear(h, table if is_tied else WeightSpec("head", head, vocab, hidden)))  # [logits, vocab]
    return b.build()


def tiny_plan(vocab_size: int) -> Plan:
    """The smallest that has all ops: two layers, two heads that share keys and values."""
    return llama_plan(2, 8, 2, 1, 16, vocab_size, body=GgmlType.F32, head=GgmlType.F32)
