"""Weights on the device: what a file holds, as the kernels take it, checked for numbers that are none.

Matrices are half or fp8 (e4m3 with a float32 scale per output channel), parts of one input one below the other; norms and
biases are float32; the table of embeddings is half, and the head's matrix too where both are one. Half data of a file is
copied as it is; other formats are unpacked to float32 first. Knows nothing of kernels or steps.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from jilju.backends.cuda.lowering import Decoder, Matrix, Norm
from jilju.errors import StartupError
from jilju.formats.ggml import GgmlType, row_bytes
from jilju.formats.quants import dequantize
from jilju.plan import WeightDtype, WeightSpec, WeightTensor

FP8_MAX = 448.0  # the largest finite number of e4m3
CHUNK_BYTES = (
    64 << 20
)  # of a matrix that is on the host at once, by each of the threads, or checked or converted at once
DUMMY_STD = 0.02  # as models are initialised
HALF: dict[WeightDtype, torch.dtype] = {"bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.bfloat16}
TORCH_TYPES = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    weight: torch.Tensor  # [N, K] half or float8_e4m3fn
    scale: torch.Tensor | None  # [N] float32, of fp8
    bias: torch.Tensor | None = None  # [N] float32


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    qkv: DeviceMatrix
    output: DeviceMatrix
    gate_up: DeviceMatrix
    down: DeviceMatrix
    input_norm: torch.Tensor  # float32, as all norms
    ffn_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    post_attention_norm: torch.Tensor | None
    post_ffn_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    table: torch.Tensor  # [V, D] half
    layers: tuple[DeviceLayer, ...]
    final_norm: torch.Tensor
    head: DeviceMatrix
    rope_factors: Mapping[str, torch.Tensor]  # float32 [head_dim / 2], by name: what tables of angles are made from

    @property
    def num_bytes(self) -> int:
        """Of all tensors, shared ones once."""
        seen = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(self)}
        return sum(seen.values())


class Source(Protocol):
    """Fills tensors of the device with what a weight's name says."""

    def fill(self, spec: WeightSpec, out: torch.Tensor) -> None:
        """out [num_outputs, num_inputs] half, or [num_inputs] float32 of a vector"""
        ...

    def close(self) -> None: ...


class FileSource:
    """From a file's tensors, in chunks of rows, by threads: the copy to the device runs beside the next chunk's reading."""

    def __init__(self, weights: Mapping[str, WeightTensor], device: torch.device, num_bytes: int, progress: Progress):
        self._weights, self._device = weights, device
        self._pool = ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)))
        self._progress, self._num_bytes, self._done_bytes = progress, num_bytes, 0

    def fill(self, spec: WeightSpec, out: torch.Tensor) -> None:
        tensor = self._weights[spec.name]
        rows, width = (1, spec.num_inputs) if spec.num_outputs == 1 else (spec.num_outputs, spec.num_inputs)
        out = out.view(rows, width)
        bytes_per_row = row_bytes(spec.type, width)
        data = tensor.data.reshape(rows, bytes_per_row)
        step = max(1, CHUNK_BYTES // (bytes_per_row if spec.type in TORCH_TYPES else 4 * width))
        spans = [(first, min(first + step, rows)) for first in range(0, rows, step)]

        def copy(span: tuple[int, int]) -> int:
            first, end = span
            chunk = self._host(data[first:end], spec, width)
            out[first:end].copy_(chunk, non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # the pinned chunk goes when this returns
            return (end - first) * bytes_per_row

        for num_bytes in self._pool.map(copy, spans):
            self._done_bytes += num_bytes
            self._progress(self._done_bytes, self._num_bytes, "copying weights to the GPU")
        if not all(torch.isfinite(part).all() for part in out.split(rows_at_once(width))):
            raise StartupError(
                f"weight {spec.name} has a NaN or an infinity as {out.dtype}: its file is damaged, or holds numbers beyond that "
                "type's range; --weight-dtype bf16 has the widest"
            )

    def _host(self, data: np.ndarray, spec: WeightSpec, width: int) -> torch.Tensor:
        """A chunk on the host, pinned where that serves: [rows, width] in the file's own type, or float32."""
        type_ = TORCH_TYPES.get(spec.type)
        pinned = self._device.type == "cuda"
        if type_ is None:
            unpacked = torch.from_numpy(dequantize(data.reshape(-1), spec.type, width))
            return unpacked.pin_memory() if pinned else unpacked
        chunk = torch.empty((len(data), width), dtype=type_, pin_memory=pinned)
        np.copyto(chunk.view(torch.uint8).numpy(), data.view(np.uint8).reshape(len(data), -1))
        return chunk

    def close(self) -> None:
        self._pool.shutdown()


class DummySource:
    """Random numbers made on the device: speed does not depend on what they are. Weights that are `given` are as they are."""

    def __init__(self, device: torch.device, seed: int, given: Mapping[str, WeightTensor]):
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed)
        self._given = given

    def fill(self, spec: WeightSpec, out: torch.Tensor) -> None:
        if spec.name in self._given:
            values = dequantize(self._given[spec.name].data, spec.type, spec.num_inputs)
            out.copy_(torch.from_numpy(values).view(out.shape))
        elif spec.num_outputs > 1:
            out.normal_(0.0, DUMMY_STD, generator=self._generator)
        else:
            out.fill_(0.0 if spec.name.endswith(".bias") else 1.0)

    def close(self) -> None:
        """Nothing is open."""


def load(decoder: Decoder, source: Source, dtype: WeightDtype, device: torch.device) -> DeviceWeights:
    """Every weight of the decoder on the device. `dtype` fp8 is of the linears; table and norms are never fp8."""
    half = HALF[dtype]

    def vector(weight: WeightSpec) -> torch.Tensor:
        out = torch.empty(weight.num_inputs, dtype=torch.float32, device=device)
        source.fill(weight, out)
        return out

    def norm(of: Norm | None) -> torch.Tensor | None:
        return None if of is None else vector(of.weight)

    def matrix(of: Matrix) -> DeviceMatrix:
        weight = torch.empty((of.num_outputs, of.num_inputs), dtype=half, device=device)
        first = 0
        for part in of.parts:
            source.fill(part, weight[first : first + part.num_outputs])
            first += part.num_outputs
        bias = torch.cat([vector(part) for part in of.biases]) if of.biases else None
        if dtype == "fp8":
            return DeviceMatrix(*to_fp8(weight), bias)
        return DeviceMatrix(weight, None, bias)

    try:
        table_spec = decoder.embed.table
        table = torch.empty((table_spec.num_outputs, table_spec.num_inputs), dtype=half, device=device)
        source.fill(table_spec, table)
        layers = []
        for layer in decoder.layers:
            q_norm, k_norm = layer.head_norms or (None, None)
            layers.append(
                DeviceLayer(
                    matrix(layer.qkv), matrix(layer.output), matrix(layer.gate_up), matrix(layer.down),
                    vector(layer.input_norm.weight), vector(layer.ffn_norm.weight), norm(q_norm), norm(k_norm),
                    norm(layer.post_attention_norm), norm(layer.post_ffn_norm),
                )
            )  # fmt: skip
        head = DeviceMatrix(table, None) if decoder.is_tied else matrix(decoder.head)
        factors = {angles.factors.name: vector(angles.factors) for angles in decoder.angles if angles.factors}
        return DeviceWeights(table, tuple(layers), vector(decoder.final_norm.weight), head, factors)
    finally:
        source.close()


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] half -> float8_e4m3fn [N, K] and scale [N] float32: scale = max|row| / 448, to nearest, ties to even"""
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    out = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    rows = rows_at_once(weight.shape[1])
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        values = weight[part].float()
        scale[part] = values.abs().amax(dim=1) / FP8_MAX
        inverse = torch.where(scale[part] > 0, 1.0 / scale[part], torch.zeros_like(scale[part]))
        out[part] = (values * inverse[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return out, scale


def rows_at_once(width: int) -> int:
    """Of a matrix of which a copy is made for a moment, at most one in float32."""
    return max(1, CHUNK_BYTES // (4 * width))


def _tensors(weights: DeviceWeights) -> Iterator[torch.Tensor]:
    matrices = [weights.head]
    yield weights.table
    yield weights.final_norm
    yield from weights.rope_factors.values()
    for layer in weights.layers:
        matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
        norms = (layer.input_norm, layer.ffn_norm, layer.q_norm, layer.k_norm, layer.post_attention_norm)
        yield from (norm for norm in (*norms, layer.post_ffn_norm) if norm is not None)
    for matrix in matrices:
        yield from (part for part in (matrix.weight, matrix.scale, matrix.bias) if part is not None)
