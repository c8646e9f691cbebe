"""Packed weights and integer linears in numpy: a second implementation, from the words of native/pack.h and native/ops.

Owns what the packed bytes mean and the order of every float32 operation of a linear, so that tests compare bit for bit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jilju.backends.native import _kernels
from jilju.backends.native.encode import EncodedPlan, encode_plan
from jilju.formats.ggml import GgmlType, row_bytes
from jilju.formats.quants import dequantize
from jilju.plan import KvSpec, PlanBuilder, WeightSpec

STRIP_ROWS = 16
HALF_ROWS = 8
BLOCK_COLUMNS = 32
HEAD_BLOCKS = 8  # that follow a head
LARGEST_X = 127  # of a quantized activation
LEAST = np.float32(1e-30)  # a block of activations below it is quantized to zeros


class Family(NamedTuple):
    """How pack.h packs a number format."""

    num_bits: int
    zero: int  # subtracted from each quant; 0 where there are offsets
    scales: str  # dtype of a block's scales
    offsets: str = ""  # dtype of a block's offsets, if it has any
    head: tuple[str, ...] = ()  # float32 [8] each

    def dtype(self) -> np.dtype:
        """Of what a strip repeats along K: a block, or a head and the blocks after it; of its two halves each."""
        fields: list[tuple] = [("scales", self.scales, (2 if self.num_bits == 6 else 1, HALF_ROWS))]
        if self.offsets:
            fields.append(("offsets", self.offsets, (HALF_ROWS,)))
        if self.num_bits == 8:
            fields.append(("quants", "i1", (8, HALF_ROWS, 4)))
        else:
            fields += [("quants", "u1", (4, HALF_ROWS, 4)), ("planes", "u1", (self.num_bits - 4, HALF_ROWS, 4))]
        head = [(name, "<f4", (HALF_ROWS,)) for name in self.head]
        return np.dtype([("head", head, (2,)), ("blocks", fields, (HEAD_BLOCKS if head else 1, 2))])

    def strip_bytes(self, num_inputs: int) -> int:
        dtype = self.dtype()
        return num_inputs // (BLOCK_COLUMNS * dtype["blocks"].shape[0]) * dtype.itemsize


FAMILIES = {
    GgmlType.Q4_0: Family(4, 8, "<f2"),
    GgmlType.Q4_1: Family(4, 0, "<f2", "<f2"),
    GgmlType.Q4_K: Family(4, 0, "u1", "u1", ("d", "dm")),
    GgmlType.Q5_0: Family(5, 16, "<f2"),
    GgmlType.Q5_1: Family(5, 0, "<f2", "<f2"),
    GgmlType.Q5_K: Family(5, 0, "u1", "u1", ("d", "dm")),
    GgmlType.Q6_K: Family(6, 32, "i1", "", ("d",)),
    GgmlType.Q8_0: Family(8, 0, "<f2"),
}


@dataclass(frozen=True)
class PackedWeight:
    """A weight is d * q + m, by blocks of 32 columns. `q` has its zero point taken off, and is s * (q - 32) of six bits."""

    type: GgmlType
    d: np.ndarray  # float32 [rows, blocks]
    m: np.ndarray | None  # float32 [rows, blocks]
    q: np.ndarray  # int64 [rows, K]

    def values(self) -> np.ndarray:
        """float32 [rows, K]; all products are exact, and so are the sums but those of a format with offsets"""
        values = np.repeat(self.d, BLOCK_COLUMNS, axis=1) * self.q.astype(np.float32)
        return values if self.m is None else values + np.repeat(self.m, BLOCK_COLUMNS, axis=1)


def _plan_of(type_: GgmlType, num_outputs: int, num_inputs: int) -> EncodedPlan:
    """A plan with one linear of such a weight, which has id 1."""
    b = PlanBuilder(KvSpec(0, 1, 8), num_outputs)
    table = WeightSpec("table", GgmlType.F32, num_outputs, num_inputs)
    b.sample(b.linear(b.take_rows(b.embed(table)), WeightSpec("weight", type_, num_outputs, num_inputs)))
    return encode_plan(b.build())


def packed_bytes_of(type_: GgmlType, num_outputs: int, num_inputs: int) -> int:
    encoded = _plan_of(type_, num_outputs, num_inputs)
    _version, [(weight_id, offset, num_bytes)] = _kernels.packed_layout(encoded.ints, encoded.reals)
    assert (weight_id, offset) == (1, 0)
    return int(num_bytes)


def pack(type_: GgmlType, data: np.ndarray, num_outputs: int, num_inputs: int) -> np.ndarray:
    """Rows as they lie in the file -> packed bytes; whatever lay there before is overwritten."""
    encoded = _plan_of(type_, num_outputs, num_inputs)
    out = np.full(packed_bytes_of(type_, num_outputs, num_inputs), 0xA5, np.uint8)
    _kernels.pack(encoded.ints, encoded.reals, 1, np.ascontiguousarray(data).reshape(-1), out)
    return out


def unpack(type_: GgmlType, packed: np.ndarray, num_outputs: int, num_inputs: int) -> PackedWeight:
    family = FAMILIES[type_]
    units = packed.view(family.dtype()).reshape(-(-num_outputs // STRIP_ROWS), -1)  # [strips, blocks or heads]
    blocks = units["blocks"].reshape(len(units), -1, 2)  # [strips, blocks, halves]

    def by_row(x: np.ndarray, axis: int = 3) -> np.ndarray:
        """[strips, units, halves, .., 8 at `axis`, ..] -> [rows, units, ..]"""
        moved = np.moveaxis(x, (2, axis), (1, 2))
        return moved.reshape(-1, *moved.shape[3:])[:num_outputs]

    def by_block(x: np.ndarray) -> np.ndarray:
        """[strips, heads, halves, 8] -> [rows, blocks]"""
        return np.repeat(by_row(x), HEAD_BLOCKS, axis=1)

    quants = by_row(blocks["quants"], 4)  # [rows, blocks, groups, 4]
    if family.num_bits == 8:
        q = quants.astype(np.int64)
    else:
        q = np.concatenate((quants & 15, quants >> 4), axis=2).astype(np.int64)  # [rows, blocks, 8, 4]
        if family.num_bits > 4:
            planes = by_row(blocks["planes"], 4)  # [rows, blocks, planes, 4]
            width, group = family.num_bits - 4, np.arange(8)
            plane, shift = group * width // 8, group * width % 8
            q |= (planes[:, :, plane] >> shift[:, None] & (1 << width) - 1).astype(np.int64) << 4
    q = q.reshape(num_outputs, num_inputs)

    scales = by_row(blocks["scales"], 4)  # [rows, blocks, 1 or 2]
    if type_ is GgmlType.Q6_K:
        s = np.repeat(scales.reshape(num_outputs, -1).astype(np.int64), 16, axis=1)
        return PackedWeight(type_, by_block(units["head"]["d"]), None, s * (q - family.zero))
    d = scales[..., 0].astype(np.float32)
    if family.head:
        offsets = by_row(blocks["offsets"]).astype(np.float32)
        return PackedWeight(type_, by_block(units["head"]["d"]) * d, by_block(units["head"]["dm"]) * offsets, q)
    if family.offsets:
        return PackedWeight(type_, d, by_row(blocks["offsets"]).astype(np.float32), q)
    return PackedWeight(type_, d, None, q - family.zero)


def unpacked(type_: GgmlType, data: np.ndarray, num_outputs: int, num_inputs: int) -> PackedWeight:
    with np.errstate(invalid="ignore"):  # scales may be NaN
        return unpack(type_, pack(type_, data, num_outputs, num_inputs), num_outputs, num_inputs)


# --- linear -----------------------------------------------------------------------------------------------------------


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once: the product is exact in float64, and the sum is rounded there to odd (what is cut
    off sets the last bit), so that rounding it again to float32 is right."""
    product, c = a.astype(np.float64) * b.astype(np.float64), np.asarray(c, np.float64)
    total = product + c
    with np.errstate(invalid="ignore"):
        part = total - product
        error = (product - (total - part)) + (c - part)
        inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded twice"""
    return a * b + c


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [rows, K] -> integers [rows, blocks, 32], scales and scaled sums float32 [rows, blocks]; these are NaN all along a
    row with a number that is not finite"""
    finite = np.isfinite(x).all(axis=1)[:, None]
    blocks = np.where(finite, x, np.float32(0)).reshape(len(x), -1, BLOCK_COLUMNS)
    most = abs(blocks).max(axis=2)
    factors = np.divide(np.float32(LARGEST_X), most, out=np.zeros_like(most), where=most > LEAST)
    q = np.rint(blocks * factors[:, :, None])
    scales = np.where(most > LEAST, most / np.float32(LARGEST_X), np.float32(0))
    bad = np.where(finite, np.float32(0), np.float32(np.nan))
    return q.astype(np.int64), scales + bad, scales * q.sum(axis=2).astype(np.float32) + bad


def linear(w: PackedWeight, x: np.ndarray, *, fused: bool) -> np.ndarray:
    """x [T, K] -> x @ w.T, float32 [T, N], as the integer kernels compute it; `fused`: with fused multiply-adds"""
    add = fma if fused else multiply_add
    with np.errstate(over="ignore"):
        xq, scales, scaled_sums = quantize_rows(x)
    wq = w.q.reshape(len(w.q), -1, BLOCK_COLUMNS)
    dots = np.moveaxis(xq, 1, 0).astype(np.float64) @ np.transpose(wq, (1, 2, 0)).astype(
        np.float64
    )  # [blocks, T, N], exact
    assert abs(dots).max() < 2**31, f"a sum of {abs(dots).max()} leaves int32"
    dots = dots.astype(np.int64).astype(np.float32)
    out = np.zeros((len(x), len(w.q)), np.float32)
    with np.errstate(all="ignore"):
        for block in range(len(dots)):
            out = add(w.d[:, block] * scales[:, block, None], dots[block], out)
            if w.m is not None:
                out = add(w.m[:, block], scaled_sums[:, block, None], out)
    return out


def float_linear(data: np.ndarray, type_: GgmlType, x: np.ndarray, *, fused: bool) -> np.ndarray:
    """x @ w.T of a float format: lane j of eight sums columns j, j + 8, ... ascending; then one tree"""
    add = fma if fused else multiply_add
    num_rows, num_inputs = x.shape
    padding = ((0, 0), (0, -num_inputs % 8))
    w = np.pad(dequantize(data, type_, num_inputs), padding).reshape(-1, -(-num_inputs // 8), 8)  # [N, K / 8, 8]
    parts = np.pad(x, padding).reshape(num_rows, -1, 8)
    lanes = np.zeros((num_rows, len(w), 8), np.float32)
    for i in range(w.shape[1]):
        lanes = add(w[None, :, i], parts[:, None, i], lanes)
    fours = lanes[..., :4] + lanes[..., 4:]
    return (fours[..., 0] + fours[..., 1]) + (fours[..., 2] + fours[..., 3])


def native_linear(isa: str, type_: GgmlType, data: np.ndarray, x: np.ndarray, *, num_threads: int = 1) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    num_outputs = data.size // row_bytes(type_, x.shape[1])
    out = np.full((len(x), num_outputs), np.nan, np.float32)
    _kernels.linear(isa, type_, np.ascontiguousarray(data).reshape(-1), x, out, num_threads)
    return out
