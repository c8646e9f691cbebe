"""Small random models for the native backend's tests, of any number format; a vocabulary of at most 20 shows all logits."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jilju.backends.native import NativeExecutor
from jilju.backends.reference import ReferenceExecutor
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes
from jilju.formats.quants import quantize
from jilju.plan import Activation, Executor, KvSpec, Limits, Plan, PlanBuilder, Value, WeightSpec, WeightTensor

LIMITS = Limits(num_blocks=96, block_size=16, max_rows=32, max_tokens=600, max_context=1024, num_threads=2)
EXECUTORS: dict[str, Callable[[], Executor]] = {"reference": ReferenceExecutor, "native": NativeExecutor}
FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


def random_blocks(rng: np.random.Generator, type_: GgmlType, num_rows: int, num_columns: int) -> np.ndarray:
    """Rows in a number format with every bit in use and scales near 1/64; uint8 [num_rows, row_bytes]"""
    if type_ in FLOATS:
        x = rng.standard_normal((num_rows, num_columns)).astype(np.float32) / 4
        return quantize(x, type_).reshape(num_rows, -1)
    raw = rng.integers(0, 256, (num_rows, row_bytes(type_, num_columns)), np.uint8)
    blocks = raw.reshape(-1, BLOCK_LAYOUTS[type_].block_bytes)  # a view: the scales are set in place
    d_at = {GgmlType.Q6_K: (208,), GgmlType.Q4_K: (0, 2), GgmlType.Q5_K: (0, 2)}.get(type_, (0,))
    fine = 1 / 2048 if type_ in (GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.Q8_0) else 1 / 64
    for at in (*d_at, *((2,) if type_ in (GgmlType.Q4_1, GgmlType.Q5_1) else ())):
        values = (rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks)) * fine).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return raw


class Weights:
    """Specs on demand, each with random contents."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.tensors: dict[str, WeightTensor] = {}

    def matrix(self, num_outputs: int, num_inputs: int, type_: GgmlType = GgmlType.F32) -> WeightSpec:
        data = random_blocks(self._rng, type_, num_outputs, num_inputs)
        return self._add(type_, (num_outputs, num_inputs), data)

    def vector(self, width: int, type_: GgmlType = GgmlType.F32) -> WeightSpec:
        values = self._rng.uniform(0.5, 1.5, (1, width)).astype(np.float32)
        return self._add(type_, (width,), quantize(values, type_))

    def values(self, values: np.ndarray) -> WeightSpec:
        """A float32 matrix with these values."""
        return self._add(GgmlType.F32, values.shape, quantize(values.astype(np.float32), GgmlType.F32))

    def _add(self, type_: GgmlType, shape: tuple[int, ...], data: np.ndarray) -> WeightSpec:
        name = f"w{len(self.tensors)}"
        self.tensors[name] = WeightTensor(name, type_, shape, np.ascontiguousarray(data).reshape(-1))
        return WeightSpec(name, type_, shape[0] if len(shape) == 2 else 1, shape[-1])


@dataclass(frozen=True)
class Shape:
    num_layers: int = 2
    hidden: int = 64
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    vocab: int = 20
    style: str = "halves"
    bias: bool = True
    post_norms: bool = False  # around attention and gate, as Gemma's
    activation: Activation = "silu"
    window: int = 0  # of every second layer
    theta: float = 10_000.0
    has_factors: bool = False  # of the rotary frequencies of every second layer
    type: GgmlType = GgmlType.F32
    mixed: tuple[GgmlType, ...] = ()  # formats that the matrices have in turn, instead of `type`


def decoder(shape: Shape, seed: int = 0) -> tuple[Plan, Mapping[str, WeightTensor]]:
    """A random decoder: every op, in the order in which models use them."""
    w = Weights(seed)
    types = itertools.cycle(shape.mixed or (shape.type,))
    b = PlanBuilder(KvSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim), shape.vocab)
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def add(h: Value, matrix: WeightSpec, x: Value) -> Value:
        if shape.post_norms:
            return b.rms_norm(b.linear(h, matrix), w.vector(shape.hidden), 1e-5, add_to=x)
        return b.linear(h, matrix, add_to=x)

    factors = w.vector(shape.head_dim // 2) if shape.has_factors else None
    x = b.embed(w.matrix(shape.vocab, shape.hidden, next(types)), scale=1.5)
    for layer in range(shape.num_layers):
        widths = (q_width, kv_width, kv_width)
        parts = [w.matrix(width, shape.hidden, next(types)) for width in widths]
        biases = tuple(w.vector(width) for width in widths) if shape.bias else ()
        h = b.linear(b.rms_norm(x, w.vector(shape.hidden), 1e-5), *parts, biases=biases)
        q, k, v = b.split(h, *widths)
        own = factors if layer % 2 == 0 else None
        q, k = (b.rope(part, shape.head_dim, shape.theta, shape.style, own) for part in (q, k))
        window = shape.window if layer % 2 == 0 else 0
        h = b.attention(q, k, v, layer, shape.num_heads, shape.head_dim**-0.5, window)
        x = add(h, w.matrix(shape.hidden, q_width, next(types)), x)
        h = b.linear(
            b.rms_norm(x, w.vector(shape.hidden), 1e-5), *(w.matrix(shape.ffn, shape.hidden, next(types)) for _ in "gu")
        )
        x = add(b.glu(h, shape.activation), w.matrix(shape.hidden, shape.ffn, next(types)), x)
    head = w.matrix(shape.vocab, shape.hidden, next(types))
    b.sample(b.linear(b.rms_norm(b.take_rows(x), w.vector(shape.hidden), 1e-5), head))
    return b.build(), w.tensors


def table_of_logits(logits: np.ndarray) -> tuple[Plan, Mapping[str, WeightTensor]]:
    """A plan whose logits for token t are exactly row t of the table; the vocabulary is the table's width [ids, ids]"""
    w = Weights(0)
    b = PlanBuilder(KvSpec(0, 1, 8), logits.shape[1])
    b.sample(b.take_rows(b.embed(w.values(logits))))
    return b.build(), w.tensors


def rows_of_logits(logits: np.ndarray) -> tuple[Plan, Mapping[str, WeightTensor]]:
    """A plan whose logits for token t are row t of the array [rows, vocab]: for a vocabulary too large to be a table's width."""
    num_rows, vocab = logits.shape
    w = Weights(0)
    b = PlanBuilder(KvSpec(0, 1, 8), vocab)
    x = b.take_rows(b.embed(w.values(np.eye(vocab, num_rows))))
    b.sample(b.linear(x, w.values(logits.T)))
    return b.build(), w.tensors


def loaded(
    plan: Plan,
    weights: Mapping[str, WeightTensor],
    backend: str = "native",
    limits: Limits = LIMITS,
    **changes: int | str,
) -> Executor:
    executor = EXECUTORS[backend]()
    executor.load(plan, weights, replace(limits, **changes))
    return executor
