"""Lowering: a plan's ops as the decoder layers that the GPU's fused kernels run.

Owns which ops become one kernel: norms and residuals are taken into what follows a linear, rope and the write to the cache
into one, gate, up and activation into one. A plan that is no such decoder is refused by the op that does not fit. Knows
nothing of torch, weights' bytes or shapes of a step.
"""

from dataclasses import dataclass
from typing import NoReturn, TypeVar

from jilju.errors import StartupError
from jilju.plan import (
    Activation,
    Angles,
    Attention,
    Embed,
    Glu,
    Linear,
    Op,
    Plan,
    RmsNorm,
    Rope,
    Sample,
    TakeRows,
    WeightSpec,
)

OpType = TypeVar("OpType", bound=Op)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Parts of one input, one below the other: [sum of num_outputs, num_inputs]."""

    parts: tuple[WeightSpec, ...]
    biases: tuple[WeightSpec, ...] = ()

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def num_outputs(self) -> int:
        return sum(part.num_outputs for part in self.parts)

    @property
    def num_inputs(self) -> int:
        return self.parts[0].num_inputs


@dataclass(frozen=True, slots=True)
class Norm:
    weight: WeightSpec
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Norm
    qkv: Matrix
    head_norms: tuple[Norm, Norm] | None  # of each head of q and k
    rope: Rope
    attention: Attention
    output: Matrix
    post_attention_norm: Norm | None  # of what attention adds to the residual
    ffn_norm: Norm
    gate_up: Matrix
    activation: Activation
    down: Matrix
    post_ffn_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Decoder:
    embed: Embed
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Matrix

    @property
    def is_tied(self) -> bool:
        """The head is the table of embeddings."""
        return self.head.name == self.embed.table.name

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All but the table of embeddings, the head last."""
        each = [(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in self.layers]
        return (*(matrix for layer in each for matrix in layer), self.head)

    @property
    def angles(self) -> tuple[Angles, ...]:
        """The distinct ones, as each needs a table."""
        return tuple(dict.fromkeys(layer.rope.angles for layer in self.layers))


def lower(plan: Plan) -> Decoder:
    """Raises StartupError if the plan is not a decoder of the shape that the kernels are written for."""
    return _Lowering(plan).run()


class _Lowering:
    def __init__(self, plan: Plan):
        self._ops = plan.ops
        self._place = 0

    def run(self) -> Decoder:
        embed = self._take(Embed)
        residual, layers = embed.out, []
        while not isinstance(self._next(), TakeRows):
            layers.append(self._layer(embed))
        rows = self._take(TakeRows)
        norm = self._take(RmsNorm)
        head = self._take(Linear)
        sample = self._take(Sample)
        flows = rows.x == residual and norm.x == rows.out and head.x == norm.out and sample.logits == head.out
        self._require(flows and not head.biases and len(head.parts) == 1, "a head of one matrix behind a norm")
        return Decoder(embed, tuple(layers), Norm(norm.weight, norm.eps), Matrix(head.parts))

    def _layer(self, embed: Embed) -> Layer:
        residual = embed.out
        input_norm = self._take(RmsNorm)
        qkv = self._take(Linear)
        self._require(
            input_norm.x == residual and qkv.x == input_norm.out and len(qkv.parts) == 3, "q, k and v of a norm"
        )
        head_norms = None
        if isinstance(self._next(), RmsNorm):
            q_norm, k_norm = self._take(RmsNorm), self._take(RmsNorm)
            head_norms = Norm(q_norm.weight, q_norm.eps), Norm(k_norm.weight, k_norm.eps)
        q_rope, k_rope = self._take(Rope), self._take(Rope)
        same = (q_rope.angles, q_rope.style) == (k_rope.angles, k_rope.style)
        self._require(same, "one rotation of q and k")
        attention = self._take(Attention)
        widths = [attention.q.width, attention.k.width, attention.v.width]
        self._require([part.num_outputs for part in qkv.parts] == widths, "attention of that q, k and v")
        output, post_attention = self._add(attention.out, residual)
        ffn_norm = self._take(RmsNorm)
        gate_up, glu = self._take(Linear), self._take(Glu)
        flows = ffn_norm.x == residual and gate_up.x == ffn_norm.out and glu.x == gate_up.out
        self._require(flows and not gate_up.biases, "gate and up of a norm, without biases")
        down, post_ffn = self._add(glu.out, residual)
        return Layer(
            Norm(input_norm.weight, input_norm.eps), Matrix(qkv.parts, qkv.biases), head_norms, q_rope, attention,
            output, post_attention, Norm(ffn_norm.weight, ffn_norm.eps), Matrix(gate_up.parts), glu.activation,
            down, post_ffn,
        )  # fmt: skip

    def _add(self, x: object, residual: object) -> tuple[Matrix, Norm | None]:
        """A linear that is added to the residual, behind a norm of its own in some families."""
        linear, norm = self._take(Linear), None
        added = linear.add_to
        if added is None:
            post = self._take(RmsNorm)
            self._require(post.x == linear.out, "a norm of what is added")
            norm, added = Norm(post.weight, post.eps), post.add_to
        self._require(linear.x == x and added == residual, "a linear that is added to the residual")
        return Matrix(linear.parts, linear.biases), norm

    def _next(self) -> Op:
        return self._ops[self._place]

    def _take(self, wanted: type[OpType]) -> OpType:
        op = self._next()
        if not isinstance(op, wanted):
            self._refuse(wanted.__name__)
        self._place += 1
        return op

    def _require(self, ok: bool, wanted: str) -> None:
        if not ok:
            self._refuse(wanted)

    def _refuse(self, wanted: str) -> NoReturn:
        op = self._ops[min(self._place, len(self._ops) - 1)]
        raise StartupError(
            f"the cuda backend does not run this model: op {self._place} of its plan is {type(op).__name__}, wanted {wanted}; "
            "use --device cpu"
        )
