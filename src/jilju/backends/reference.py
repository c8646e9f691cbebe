"""The reference backend: the ops in numpy, float32, one function an op. It defines them.

Every other backend is tested against these functions. Weights are unpacked to float32 at load, the KV cache is float32 in
blocks. Written to be read, not to be fast. BLAS picks its kernels by shape, so it is not batch-invariant, and has its own
threads (OPENBLAS_NUM_THREADS), not those of Limits. Knows nothing of models, the engine or files.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jilju.errors import StartupError
from jilju.formats.quants import dequantize
from jilju.plan import (
    Activation,
    Attention,
    Batch,
    Embed,
    Glu,
    KvDtype,
    Limits,
    Linear,
    Plan,
    RmsNorm,
    Rope,
    Sample,
    StepResult,
    TakeRows,
    Value,
    WeightTensor,
)
from jilju.plan.batch import MAX_TOP

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]


def embed(table: Floats, token_ids: Ints, scale: float) -> Floats:
    """table [vocab, D], token_ids [tokens] -> [tokens, D]"""
    return table[token_ids] * np.float32(scale)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x [rows, groups * n], weight [n] -> like x; each group of n columns is normed by itself"""
    groups = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
    mean_square = np.square(groups).mean(axis=-1, keepdims=True)
    out: Floats = groups / np.sqrt(mean_square + np.float32(eps)) * weight
    return out.reshape(x.shape)


def linear(x: Floats, parts: list[Floats], biases: list[Floats]) -> Floats:
    """x [rows, K], parts [N_i, K], biases [N_i] -> [rows, sum N_i]"""
    out = np.concatenate([x @ part.T for part in parts], axis=-1)
    return out + np.concatenate(biases) if biases else out


def rope(x: Floats, positions: Ints, head_dim: int, theta: float, style: str, factors: Floats | None = None) -> Floats:
    """x [tokens, heads * head_dim], positions [tokens], factors [head_dim / 2] -> like x.

    Angles in float64, their sine and cosine in float32
    """
    half = head_dim // 2
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    angles = positions[:, None] / theta ** (np.arange(half) / half)  # [tokens, half]
    if factors is not None:
        angles = angles / factors.astype(np.float64)
    cos = np.cos(angles).astype(np.float32)[:, None, :]
    sin = np.sin(angles).astype(np.float32)[:, None, :]
    out = np.empty_like(heads)
    first, second = {
        "halves": (slice(0, half), slice(half, head_dim)),
        "interleaved": (slice(0, head_dim, 2), slice(1, head_dim, 2)),
    }[style]
    a, b = heads[..., first], heads[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out.reshape(x.shape)


def round_to_int8(x: Floats) -> Floats:
    """x [tokens, kv_heads, d] -> like x: what an int8 cache gives back, q * scale with whole |q| <= 127, a scale a token and head

    scale = max|x| / 127, and q = x / scale by the scale's float32 inverse, to nearest, ties to even. A scale below the smallest
    normal number makes zeros; a head that is not finite becomes NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        inverse = np.where(scale < np.finfo(np.float32).tiny, np.float32(0), np.float32(1) / scale)
        out: Floats = np.where(np.isfinite(scale), np.rint(x * inverse) * scale, np.float32(np.nan))
    return out


def attention(q: Floats, k: Floats, v: Floats, start: int, scale: float, window: int = 0) -> Floats:
    """One row of a batch: its queries over all keys and values of the sequence so far, or the last `window` of them, its
    own included.

    q [count, heads, d]; k, v [start + count, kv_heads, d] -> [count, heads, d]
    """
    count, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    queries = q.reshape(count, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # [kv_heads, group, count, d]
    keys, values = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]  # [kv_heads, 1, d, keys], [.., keys, d]
    scores = queries @ keys * np.float32(scale)  # [kv_heads, group, count, keys]
    distance = start + np.arange(count)[:, None] - np.arange(num_keys)  # [count, keys]; negative: a key of the future
    scores[..., (distance < 0) | (distance >= (window or num_keys))] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Floats = weights @ values  # [kv_heads, group, count, d]
    return out.transpose(2, 0, 1, 3).reshape(count, num_heads, head_dim)


def glu(x: Floats, activation: Activation = "silu") -> Floats:
    """x = [gate | up] [rows, 2F] -> activation(gate) * up [rows, F]; (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u))"""
    gate, up = np.split(x, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp may be infinite: the quotient is then 0, as it should
        match activation:
            case "silu":
                slope = gate
            case "gelu_tanh":
                slope = np.float32(2 * math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate * gate * gate)
        out: Floats = gate / (1 + np.exp(-slope)) * up
    return out


def philox(key: int, counter: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random words of a 64-bit key and a 128-bit counter."""
    word = 0xFFFFFFFF
    k0, k1 = key & word, key >> 32 & word
    c0, c1, c2, c3 = (counter >> shift & word for shift in (0, 32, 64, 96))
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = high >> 32 ^ c1 ^ k0, high & word, low >> 32 ^ c3 ^ k1, low & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The noise of one token: 53 random bits in [0, 1)"""
    w0, w1, _, _ = philox(seed, position)
    return ((w0 << 21 | w1 >> 11) & (1 << 53) - 1) * 2.0**-53


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """logits [vocab] -> log probabilities, summed in float64"""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    out: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return out


def penalise(logits: Floats, counts: Ints, repetition: float, presence: float, frequency: float) -> Floats:
    """logits [n] of ids that are counts [n] times in the output -> like logits, each operation in float32"""
    r, p, f = np.float32(repetition), np.float32(presence), np.float32(frequency)
    repeated = np.where(logits > 0, logits / r, logits * r)
    out: Floats = repeated - f * counts.astype(np.float32) - np.where(counts > 0, p, np.float32(0))
    return out


def changed(logits: Floats, batch: Batch, i: int) -> Floats:
    """Steps 2 and 3 of `Sample` for logit row i: logits [vocab] -> a copy, -inf where an id must not be sampled"""
    biased = slice(batch.bias_starts[i], batch.bias_starts[i + 1])
    penalised = slice(batch.penalty_starts[i], batch.penalty_starts[i + 1])
    banned = slice(batch.banned_starts[i], batch.banned_starts[i + 1])
    out = logits.copy()
    with np.errstate(over="ignore"):
        out[batch.bias_ids[biased]] += batch.biases[biased]
        ids = batch.penalty_ids[penalised]
        penalties = (x[i] for x in (batch.repetition_penalties, batch.presence_penalties, batch.frequency_penalties))
        out[ids] = penalise(out[ids], batch.penalty_counts[penalised], *penalties)
    limits = np.finfo(np.float32)
    out = np.clip(out, limits.min, limits.max)
    out[batch.banned_ids[banned]] = -np.inf
    if batch.mask_rows[i] >= 0:
        bits = np.unpackbits(batch.masks[batch.mask_rows[i]].view(np.uint8), bitorder="little")
        out[bits[: len(out)] == 0] = -np.inf
    return out


def choose(logits: Floats, u: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """Steps 4 to 6 of `Sample`: logits [vocab], -inf where banned, and noise u in [0, 1) -> an id"""
    assert np.isfinite(logits).any(), "every id is banned"
    if temperature < Sample.MAX_GREEDY_TEMPERATURE:
        return int(np.argmax(logits))  # the first of equal ones
    exact = logits.astype(np.float64)
    mass = np.exp((exact - exact.max()) / np.float64(np.float32(temperature)))
    order = np.argsort(-exact, kind="stable")[: top_k or None]  # descending, ties to lower ids
    if top_p < 1:
        prefix = np.cumsum(mass[order])
        order = order[: int(np.searchsorted(prefix, top_p * prefix[-1], side="left")) + 1]
    kept = np.sort(order[mass[order] >= min_p])
    cumulative = np.cumsum(mass[kept])
    index = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    return int(kept[min(index, len(kept) - 1)])


def sample(logits: Floats, batch: Batch) -> StepResult:
    """logits [num_logits, vocab] -> one id a row, with logprobs; `plan.ops.Sample` says the steps"""
    num_logits = len(logits)
    ids = np.zeros(num_logits, np.int32)
    logprobs = np.zeros(num_logits, np.float32)
    top_ids = np.full((num_logits, MAX_TOP), -1, np.int32)
    top_logprobs = np.zeros((num_logits, MAX_TOP), np.float32)
    wanted_logprobs = np.zeros(len(batch.wanted_ids), np.float32)
    finite = np.asarray(np.isfinite(logits).all(axis=-1))
    for i in np.flatnonzero(finite).tolist():
        distribution = log_softmax(logits[i])
        if batch.targets[i] >= 0:
            ids[i] = batch.targets[i]
        else:
            row = changed(logits[i], batch, i)
            if not np.isfinite(row).any():
                finite[i] = False
                continue
            u = uniform(int(batch.seeds[i]), int(batch.positions[i]))
            ids[i] = choose(
                row,
                u,
                float(batch.temperatures[i]),
                int(batch.top_ks[i]),
                float(batch.top_ps[i]),
                float(batch.min_ps[i]),
            )
        logprobs[i] = distribution[ids[i]]
        num_top = min(int(batch.num_top[i]), logits.shape[1])
        top = np.argsort(-logits[i], kind="stable")[:num_top]
        top_ids[i, :num_top] = top
        top_logprobs[i, :num_top] = distribution[top]
        wanted = slice(batch.wanted_starts[i], batch.wanted_starts[i + 1])
        wanted_logprobs[wanted] = distribution[batch.wanted_ids[wanted]]
    return StepResult(ids, logprobs, top_ids, top_logprobs, wanted_logprobs, finite)


class ReferenceExecutor:
    """Runs a plan with the functions above, op by op."""

    name = "reference"
    kernel_set = "numpy"
    invariant = False

    def __init__(self) -> None:
        self.last_logits: Floats | None = (
            None  # [num_logits, vocab] of the last step: for tests, which no other backend gives
        )
        self._result: StepResult | None = None

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "f16") -> int:
        """Float32, whatever the type: int8 is a rounding here, and f16 is left to backends that save memory by it."""
        return 4 * plan.kv.elements_per_token

    def weight_bytes(self, plan: Plan) -> int:
        return plan.weight_bytes

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        """The unpacked weights, and the plan's buffers for a step whose every token is a logit row."""
        unpacked = sum(4 * w.num_outputs * w.num_inputs for w in plan.weights.values())
        return unpacked + plan.workspace_bytes(limits.max_tokens, limits.max_tokens)

    def load(self, plan: Plan, weights: Mapping[str, WeightTensor], limits: Limits) -> None:
        self._plan, self._limits = plan, limits
        kv = plan.kv
        slots = limits.num_blocks * limits.block_size
        try:
            self._kv = np.zeros((kv.num_layers, 2, slots, kv.num_kv_heads, kv.head_dim), np.float32)
            self._buffers = [np.zeros((limits.max_tokens, buffer.width), np.float32) for buffer in plan.buffers]
            self._weights = {
                name: dequantize(weights[name].data, spec.type, spec.num_inputs).reshape(weights[name].shape)
                for name, spec in plan.weights.items()
            }
        except MemoryError:
            wanted = slots * self.kv_bytes_per_token(plan) + self.workspace_bytes(plan, limits)
            raise StartupError(
                f"the reference backend needs {wanted / 2**30:.1f} GiB, which this machine does not have; "
                "choose a smaller model, context or KV cache"
            ) from None

    def launch(self, batch: Batch) -> None:
        limits = self._limits
        assert self._result is None, "launch before the last step's wait"
        assert 1 <= batch.num_tokens <= limits.max_tokens, f"{batch.num_tokens} tokens, limit {limits.max_tokens}"
        assert batch.num_rows <= limits.max_rows, f"{batch.num_rows} rows, limit {limits.max_rows}"
        assert batch.counts.sum() == batch.num_tokens, f"rows hold {batch.counts.sum()} of {batch.num_tokens} tokens"
        assert batch.block_tables.max() < limits.num_blocks, f"block {batch.block_tables.max()} of {limits.num_blocks}"
        positions = np.concatenate([np.arange(s, s + c) for s, c in zip(batch.starts, batch.counts, strict=True)])
        for op in self._plan.ops:
            match op:
                case Embed():
                    self._view(op.out, batch)[:] = embed(self._weights[op.table.name], batch.token_ids, op.scale)
                case RmsNorm():
                    result = rms_norm(self._view(op.x, batch), self._weights[op.weight.name], op.eps)
                    out = self._view(op.out, batch)
                    out[:] = result if op.add_to is None else out + result
                case Linear():
                    parts, biases = ([self._weights[w.name] for w in group] for group in (op.parts, op.biases))
                    result = linear(self._view(op.x, batch), parts, biases)
                    out = self._view(op.out, batch)
                    out[:] = result if op.add_to is None else out + result
                case Rope():
                    x = self._view(op.x, batch)
                    factors = None if op.factors is None else self._weights[op.factors.name]
                    x[:] = rope(x, positions, op.head_dim, op.theta, op.style, factors)
                case Attention():
                    self._attend(op, batch)
                case Glu():
                    self._view(op.out, batch)[:] = glu(self._view(op.x, batch), op.activation)
                case TakeRows():
                    self._view(op.out, batch)[:] = self._view(op.x, batch)[batch.logit_tokens]
                case Sample():
                    self.last_logits = self._view(op.logits, batch).copy()
                    batch.wait_for_masks()
                    self._result = sample(self.last_logits, batch)

    def wait(self) -> StepResult:
        assert self._result is not None, "wait without a launch"
        result, self._result = self._result, None
        return result

    def free(self) -> None:
        del self._kv, self._buffers, self._weights
        self.last_logits = None

    def _view(self, value: Value, batch: Batch) -> Floats:
        """The value's part of its buffer: [rows of this step, width]"""
        rows = batch.num_tokens if value.rows == "tokens" else batch.num_logits
        return self._buffers[value.buffer][:rows, value.offset : value.offset + value.width]

    def _attend(self, op: Attention, batch: Batch) -> None:
        keys, values = self._kv[op.layer]  # [slots, kv_heads, d] each
        q, k, v, out = (
            self._view(x, batch).reshape(batch.num_tokens, -1, op.head_dim) for x in (op.q, op.k, op.v, op.out)
        )
        first = 0
        for start, count, table in zip(batch.starts, batch.counts, batch.block_tables, strict=True):
            tokens = slice(first, first + count)
            positions = np.arange(start + count)
            blocks = table[positions // self._limits.block_size]
            assert (blocks >= 0).all(), (
                f"a row of [0, {start + count}) has no block for position {int(np.argmax(blocks < 0))}"
            )
            slots = blocks * self._limits.block_size + positions % self._limits.block_size
            new_keys, new_values = k[tokens], v[tokens]
            if self._limits.kv_dtype == "int8":
                new_keys, new_values = round_to_int8(new_keys), round_to_int8(new_values)
            keys[slots[start:]], values[slots[start:]] = new_keys, new_values
            out[tokens] = attention(q[tokens], keys[slots], values[slots], int(start), op.scale, op.window)
            first += count
