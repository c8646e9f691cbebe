"""Dummy weights: numbers made up for a plan, to measure and try a model whose weights are not at hand.

Matrices are normal with a standard deviation of 0.02, norms 1, biases 0; rotary factors are the model's own. All matrices of a number format repeat one block of a few
MB, each from a place of its own: that many random numbers cost a moment, a model's would cost minutes. The block's length is prime,
so that rows of one matrix differ. Knows nothing of files.
"""

import numpy as np

from jilju.formats.ggml import GgmlType
from jilju.formats.quants import quantize
from jilju.model.spec import ROPE_FACTORS, ModelSpec
from jilju.plan import Linear, Plan, RmsNorm, WeightTensor

BLOCK_ELEMENTS = 4_194_301  # the largest prime below 2^22
STANDARD_DEVIATION = 0.02


def given_weights(spec: ModelSpec) -> dict[str, WeightTensor]:
    """Those that are hyper-parameters, and never made up."""
    if not spec.rope_factors:
        return {}
    factors = np.array(spec.rope_factors, "<f4")
    return {ROPE_FACTORS: WeightTensor(ROPE_FACTORS, GgmlType.F32, factors.shape, factors.view(np.uint8))}


def dummy_weights(spec: ModelSpec, plan: Plan, seed: int = 0) -> dict[str, WeightTensor]:
    """Every weight of the plan by name, in its own number format: F32, F16 or BF16."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(BLOCK_ELEMENTS, np.float32) * np.float32(STANDARD_DEVIATION)
    norms = {op.weight.name for op in plan.ops if isinstance(op, RmsNorm)}
    biases = {bias.name for op in plan.ops if isinstance(op, Linear) for bias in op.biases}
    blocks: dict[GgmlType, np.ndarray] = {}
    weights = given_weights(spec)
    for name, wanted in plan.weights.items():
        if name in weights:
            continue
        if name in norms or name in biases:
            vector = np.full(wanted.num_inputs, name in norms, np.float32)
            weights[name] = WeightTensor(name, wanted.type, vector.shape, quantize(vector, wanted.type))
            continue
        if wanted.type not in blocks:
            blocks[wanted.type] = quantize(values[:, None], wanted.type)  # [bytes]
        data = _repeated(blocks[wanted.type], wanted.num_bytes, rng)
        weights[name] = WeightTensor(name, wanted.type, (wanted.num_outputs, wanted.num_inputs), data)
    return weights


def _repeated(block: np.ndarray, num_bytes: int, rng: np.random.Generator) -> np.ndarray:
    """The block's bytes again and again, from a random element on. uint8 [num_bytes]"""
    data = np.empty(num_bytes, np.uint8)
    element = block.size // BLOCK_ELEMENTS
    start = int(rng.integers(BLOCK_ELEMENTS)) * element
    done = 0
    while done < num_bytes:
        part = block[start : start + num_bytes - done]
        data[done : done + part.size] = part
        done, start = done + part.size, 0
    return data
