"""The ops: eight operations with their shapes, formula, flops() and bytes().

This is the vocabulary in which every model is written. An op here says what it computes and counts; the numpy reference
backend defines it. Values are float32 [rows, width]; rows is the step's tokens ("tokens") or its logit rows ("logits").
FLOPs count 2 per multiply-add. Knows nothing of backends.
"""

from typing import ClassVar, Literal, NamedTuple

import msgspec

from jilju.formats.ggml import GgmlType, row_bytes
from jilju.plan.batch import StepShape

Rows = Literal["tokens", "logits"]
Activation = Literal["silu", "gelu_tanh"]
ACTIVATION_BYTES = 4  # float32 activations; what a fused op really moves is the backend's to say


class Value(msgspec.Struct, frozen=True):
    """Columns [offset, offset + width) of a buffer: what ops read and write."""

    buffer: int
    offset: int
    width: int
    rows: Rows


class WeightSpec(msgspec.Struct, frozen=True):
    """A weight that the plan needs. A matrix is [num_outputs, num_inputs]; a vector has num_outputs == 1."""

    name: str
    type: GgmlType
    num_outputs: int
    num_inputs: int
    held_row_bytes: int | None = None  # of a row in the form that a backend makes of it; None: that of the file

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.num_inputs) if self.held_row_bytes is None else self.held_row_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_outputs * self.row_bytes


class Op(msgspec.Struct, frozen=True, tag_field="op"):
    """Base of the ops. `reads` and `writes` list the values an op touches; an in-place op lists one value in both."""

    @property
    def reads(self) -> tuple[Value, ...]:
        raise NotImplementedError

    @property
    def writes(self) -> tuple[Value, ...]:
        raise NotImplementedError

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        return ()

    def flops(self, step: StepShape) -> int:
        raise NotImplementedError

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        raise NotImplementedError


def _rows(value: Value, step: StepShape) -> int:
    return step.num_tokens if value.rows == "tokens" else step.num_logits


class Embed(Op, frozen=True, tag="embed"):
    """out[t] = table[token_ids[t]] * scale        out [tokens, D]"""

    table: WeightSpec
    out: Value
    scale: float = 1.0

    @property
    def reads(self) -> tuple[Value, ...]:
        return ()

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        return (self.table,)

    def flops(self, step: StepShape) -> int:
        return 0

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        return step.num_tokens * (self.table.row_bytes + self.out.width * ACTIVATION_BYTES)


class RmsNorm(Op, frozen=True, tag="rms_norm"):
    """out = x / sqrt(mean(x^2) + eps) * weight (+ add_to), over each `weight.num_inputs` columns (a head, if narrower)

    With add_to, out is add_to: a norm of what is about to be added to the residual.
    """

    x: Value
    weight: WeightSpec
    eps: float
    out: Value
    add_to: Value | None = None

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,) if self.add_to is None else (self.x, self.add_to)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        return (self.weight,)

    def flops(self, step: StepShape) -> int:
        return (4 if self.add_to is None else 5) * _rows(self.x, step) * self.x.width

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        moved = self.x.width * (2 if self.add_to is None else 3)
        return _rows(self.x, step) * moved * ACTIVATION_BYTES + self.weight.num_bytes


class Linear(Op, frozen=True, tag="linear"):
    """out = x @ concat(parts).T (+ concat(biases)) (+ add_to)        x [rows, K], parts [N_i, K], out [rows, sum N_i]

    The parts are matrices of one input, each in its own number format (Q, K, V; gate, up). With add_to, out is add_to.
    """

    x: Value
    parts: tuple[WeightSpec, ...]
    out: Value
    biases: tuple[WeightSpec, ...] = ()  # none, or one vector a part
    add_to: Value | None = None

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,) if self.add_to is None else (self.x, self.add_to)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        return self.parts + self.biases

    def flops(self, step: StepShape) -> int:
        return 2 * _rows(self.x, step) * self.x.width * self.out.width

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        moved = self.x.width + self.out.width * (1 if self.add_to is None else 2)
        return sum(w.num_bytes for w in self.weights) + _rows(self.x, step) * moved * ACTIVATION_BYTES


class Angles(NamedTuple):
    """What the angles of a position depend on: ropes that agree in it can share a table of them."""

    head_dim: int
    theta: float
    factors: WeightSpec | None


class Rope(Op, frozen=True, tag="rope"):
    """Rotate pairs of each head by position / (theta^(2i/head_dim) * factors[i]), in place on x [tokens, heads * head_dim].

    style "halves" pairs (i, i + head_dim/2) (NeoX, Hugging Face); "interleaved" pairs (2i, 2i + 1) (GGUF's llama).
    """

    x: Value
    head_dim: int
    theta: float
    style: Literal["halves", "interleaved"]
    factors: WeightSpec | None = None  # a vector of head_dim / 2 positive numbers; None: all 1

    @property
    def angles(self) -> Angles:
        return Angles(self.head_dim, self.theta, self.factors)

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        return () if self.factors is None else (self.factors,)

    def flops(self, step: StepShape) -> int:
        return 3 * step.num_tokens * self.x.width

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        return 2 * step.num_tokens * self.x.width * ACTIVATION_BYTES + sum(w.num_bytes for w in self.weights)


class Attention(Op, frozen=True, tag="attention"):
    """Write k, v to the row's slots, then out = softmax(scale * q K^T) V over positions [0, own position], causal.

    With a window, over positions (own position - window, own position]: `window` keys, its own included.
    q, out [tokens, num_heads * head_dim]; k, v [tokens, num_kv_heads * head_dim]; query head h uses KV head
    h // (num_heads / num_kv_heads). K and V of the step are read back from the cache, in its number format.
    """

    q: Value
    k: Value
    v: Value
    out: Value
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0  # 0: none

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.q, self.k, self.v)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.out,)

    def flops(self, step: StepShape) -> int:
        return 4 * self.num_heads * self.head_dim * step.num_attended(self.window)

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        kv_width = 2 * self.num_kv_heads * self.head_dim * kv_element_bytes
        num_keys = step.num_keys_read(self.window) + step.num_tokens  # read, and written
        return kv_width * num_keys + 2 * step.num_tokens * self.q.width * ACTIVATION_BYTES


class Glu(Op, frozen=True, tag="glu"):
    """out = activation(gate) * up        x = [gate | up] [rows, 2F], out [rows, F]

    silu(g) = g / (1 + exp(-g)); gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3))).
    """

    x: Value
    out: Value
    activation: Activation = "silu"

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.out,)

    def flops(self, step: StepShape) -> int:
        return (5 if self.activation == "silu" else 9) * _rows(self.x, step) * self.out.width

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        return 3 * _rows(self.x, step) * self.out.width * ACTIVATION_BYTES


class TakeRows(Op, frozen=True, tag="take_rows"):
    """out[i] = x[logit_tokens[i]]        x [tokens, D], out [logits, D]"""

    x: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.out,)

    def flops(self, step: StepShape) -> int:
        return 0

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        return 2 * step.num_logits * self.x.width * ACTIVATION_BYTES


class Sample(Op, frozen=True, tag="sample"):
    """One id a logit row, by these steps in this order, all in the backend:

    1. Logprobs are the log softmax of the raw logits. finite: no logit is NaN or infinite.
    2. Some logits change, by float32 operations: bias, l + b. Then the penalties of an id that is `count` times in the output:
       repetition r, l > 0 ? l / r : l * r; frequency f, l - f * count; presence p, l - p if count > 0. A logit that leaves
       the range of finite numbers becomes the nearest one that is in it.
    3. Banned ids and ids that the row's mask leaves out become -inf. If no other is left, finite is False.
    4. temperature < 1e-4: the largest logit, ties to the lowest id.
    5. Otherwise the order of ids is by descending logit, ties to the lowest id, and an id's mass is
       exp((l - largest) / temperature). top-k keeps the first k of the order. top-p keeps of those the shortest prefix with
       at least the share p of their mass, never none. min-p keeps of those the masses >= min_p (the largest is 1).
    6. u in [0, 1) from Philox4x32-10, key = seed, counter = position (low word, high word, 0, 0), first two output words:
       u = ((w0 << 21 | w1 >> 11) & (2^53 - 1)) * 2^-53. The id is the first that was kept, in ascending order of ids, at
       which their cumulative mass exceeds u * total.
    A row with target >= 0 takes the target and skips 2-6. The most probable ids and the wanted ones are reported of every
    row, with the logprobs of step 1.
    """

    logits: Value

    MAX_GREEDY_TEMPERATURE: ClassVar[float] = 1e-4

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.logits,)

    @property
    def writes(self) -> tuple[Value, ...]:
        return ()

    def flops(self, step: StepShape) -> int:
        return 5 * step.num_logits * self.logits.width

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        return step.num_logits * self.logits.width * ACTIVATION_BYTES
