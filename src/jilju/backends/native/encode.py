"""Encode: a plan as flat arrays, which is all that the C++ core reads of it.

`native/program.cpp` is the other end; VERSION changes when either does. Knows nothing of batches or of what ops compute.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jilju.plan import (
    Activation,
    Attention,
    Embed,
    Glu,
    Linear,
    Plan,
    RmsNorm,
    Rope,
    Sample,
    TakeRows,
    Value,
    WeightSpec,
)

VERSION = 3

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}


@dataclass(frozen=True, slots=True)
class EncodedPlan:
    ints: np.ndarray  # int64: header, buffers, weights, ops
    reals: np.ndarray  # float64: eps, theta, scale, in the order of the ops
    weight_names: tuple[str, ...]  # by weight id


def encode_plan(plan: Plan) -> EncodedPlan:
    weights = plan.weights
    ids = {name: i for i, name in enumerate(weights)}
    ints: list[int] = [VERSION, plan.vocab_size, plan.kv.num_layers, plan.kv.num_kv_heads, plan.kv.head_dim]
    ints += [len(plan.buffers), len(weights), len(plan.ops)]
    reals: list[float] = []

    def value(v: Value) -> list[int]:
        return [v.buffer, v.offset, v.width, v.rows == "logits"]

    def id_of(specs: Iterable[WeightSpec]) -> list[int]:
        return [ids[spec.name] for spec in specs]

    for buffer in plan.buffers:
        ints += [buffer.rows == "logits", buffer.width]
    for spec in weights.values():
        ints += [spec.type, spec.num_outputs, spec.num_inputs]
    for op in plan.ops:
        match op:
            case Embed():
                ints += [0, ids[op.table.name], *value(op.out)]
                reals += [op.scale]
            case RmsNorm():
                ints += [1, *value(op.x), *value(op.out), ids[op.weight.name], op.add_to is not None]
                reals += [op.eps]
            case Linear():
                ints += [2, *value(op.x), *value(op.out), op.add_to is not None, len(op.parts), len(op.biases)]
                ints += [*id_of(op.parts), *id_of(op.biases)]
            case Rope():
                factors = -1 if op.factors is None else ids[op.factors.name]
                ints += [3, *value(op.x), op.head_dim, op.style == "halves", factors]
                reals += [op.theta]
            case Attention():
                ints += [4, *value(op.q), *value(op.k), *value(op.v), *value(op.out), op.layer, op.num_heads]
                ints += [op.window]
                reals += [op.scale]
            case Glu():
                ints += [5, *value(op.x), *value(op.out), ACTIVATIONS[op.activation]]
            case TakeRows():
                ints += [6, *value(op.x), *value(op.out)]
            case Sample():
                ints += [7, *value(op.logits)]
    return EncodedPlan(np.array(ints, np.int64), np.array(reals, np.float64), tuple(weights))
