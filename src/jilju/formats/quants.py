"""Unpacking and packing of GGUF number formats, in numpy.

Owns what the bytes of each GgmlType mean: `dequantize` is the definition that every backend's unpacking is tested against.
`quantize` covers the formats that tests and tools build models with. Knows nothing of files or models. A block's elements
are x = d * q (+ m), with d and m in float16 and q an unsigned integer, shifted where the format has no m.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 18  # unpacked at a time: 1 MiB of float32, so that intermediates stay in cache


def dequantize(data: Bytes, type_: GgmlType, num_columns: int) -> Floats:
    """uint8 bytes of whole rows -> float32 [rows, num_columns]."""
    assert data.dtype == np.uint8, f"bytes wanted, given {data.dtype}"
    bytes_per_row = row_bytes(type_, num_columns)
    assert data.size % bytes_per_row == 0, f"{data.size} bytes are no multiple of a row's {bytes_per_row}"
    layout = BLOCK_LAYOUTS[type_]
    blocks = np.ascontiguousarray(data).reshape(-1, layout.block_bytes)  # [blocks, block_bytes]
    out = np.empty((len(blocks), layout.block_elements), np.float32)
    step = CHUNK_ELEMENTS // layout.block_elements
    with np.errstate(invalid="ignore", over="ignore"):  # a scale that is NaN or infinite goes through as such
        for start in range(0, len(blocks), step):
            out[start : start + step] = _UNPACK[type_](blocks[start : start + step])
    return out.reshape(-1, num_columns)


# The high byte of each float16 in a block (d, and m or dmin): its exponent is all ones if the number is NaN or infinite.
_SCALE_HIGH_BYTES: dict[GgmlType, tuple[int, ...]] = {
    GgmlType.Q4_0: (1,),
    GgmlType.Q4_1: (1, 3),
    GgmlType.Q5_0: (1,),
    GgmlType.Q5_1: (1, 3),
    GgmlType.Q8_0: (1,),
    GgmlType.Q4_K: (1, 3),
    GgmlType.Q5_K: (1, 3),
    GgmlType.Q6_K: (209,),
}


def first_block_not_finite(data: Bytes, type_: GgmlType) -> int | None:
    """Index of the first block (of plain formats: element) with a NaN or an infinity; fast, as it looks at scales only."""
    bad = np.zeros(data.size // BLOCK_LAYOUTS[type_].block_bytes, np.bool_)
    if type_ is GgmlType.F32:
        bad |= ~np.isfinite(data.view("<f4"))
    elif type_ in (GgmlType.F16, GgmlType.BF16):
        exponent = 0x7C00 if type_ is GgmlType.F16 else 0x7F80
        bad |= data.view("<u2") & exponent == exponent
    else:
        blocks = data.reshape(-1, BLOCK_LAYOUTS[type_].block_bytes)
        for high_byte in _SCALE_HIGH_BYTES[type_]:
            bad |= blocks[:, high_byte] & 0x7C == 0x7C
    return int(bad.argmax()) if bad.any() else None


def quantize(x: Floats, type_: GgmlType) -> Bytes:
    """float32 [rows, columns] -> uint8 bytes, rounded as ggml's reference quantizers do."""
    assert type_ in _PACK, f"no packing into {type_.name}; there is {', '.join(t.name for t in _PACK)}"
    x = np.ascontiguousarray(x, np.float32)
    row_bytes(type_, x.shape[-1])  # the block divides the row
    return _PACK[type_](x.reshape(-1, BLOCK_LAYOUTS[type_].block_elements)).reshape(-1)


def _f16(raw: Bytes) -> Floats:
    """Bytes [blocks, 2n] -> float32 [blocks, n]"""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """Bytes [..., n] -> [..., 2n]: all low nibbles, then all high ones."""
    return np.concatenate((raw & 15, raw >> 4), axis=-1)


def _bits(raw: Bytes) -> Bytes:
    """Bytes [blocks, 4] -> [blocks, 32]: bit i of the little-endian word belongs to element i; here worth 16."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << np.uint8(4)


def _unpack_f32(b: Bytes) -> Floats:
    return b.view("<f4")


def _unpack_f16(b: Bytes) -> Floats:
    return b.view("<f2").astype(np.float32)


def _unpack_bf16(b: Bytes) -> Floats:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _unpack_q4_0(b: Bytes) -> Floats:
    return _f16(b[:, :2]) * (_nibbles(b[:, 2:]).view(np.int8) - np.int8(8)).astype(np.float32)


def _unpack_q4_1(b: Bytes) -> Floats:
    return _f16(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _f16(b[:, 2:4])


def _unpack_q5_0(b: Bytes) -> Floats:
    q = _nibbles(b[:, 6:]) | _bits(b[:, 2:6])
    return _f16(b[:, :2]) * (q.view(np.int8) - np.int8(16)).astype(np.float32)


def _unpack_q5_1(b: Bytes) -> Floats:
    q = _nibbles(b[:, 8:]) | _bits(b[:, 4:8])
    return _f16(b[:, :2]) * q.astype(np.float32) + _f16(b[:, 2:4])


def _unpack_q8_0(b: Bytes) -> Floats:
    return _f16(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _k_scales(raw: Bytes) -> tuple[Floats, Floats]:
    """The 12 scale bytes of Q4_K and Q5_K -> 6-bit scales and mins, float32 [blocks, 8] each.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 mins 0-3 in their low six bits; scales and mins 4-7 have their low nibbles in
    bytes 8-11 and their high pairs in the top bits of bytes 0-3 (scales) and 4-7 (mins).
    """
    low, mid, rest = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate((low & 63, rest & 15 | low >> 6 << 4), axis=-1)
    mins = np.concatenate((mid & 63, rest >> 4 | mid >> 6 << 4), axis=-1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _unpack_k(b: Bytes, q: Bytes) -> Floats:
    """Q4_K and Q5_K: x = (d * scale) * q - (dmin * min), eight groups of 32; q [blocks, 8, 32]"""
    scales, mins = _k_scales(b[:, 4:16])
    scales, mins = _f16(b[:, :2]) * scales, _f16(b[:, 2:4]) * mins
    return (scales[:, :, None] * q.astype(np.float32) - mins[:, :, None]).reshape(len(b), 256)


def _unpack_q4_k(b: Bytes) -> Floats:
    return _unpack_k(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _unpack_q5_k(b: Bytes) -> Floats:
    group = np.arange(8, dtype=np.uint8)[:, None]
    high = (b[:, None, 16:48] >> group & np.uint8(1)) << np.uint8(4)  # bit g of byte i belongs to element i of group g
    return _unpack_k(b, _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | high)


def _unpack_q6_k(b: Bytes) -> Floats:
    """x = (d * scale) * (q - 32), sixteen groups of 16; halves of 128 elements: 64 low-nibble bytes, 32 of high pairs"""
    low = _nibbles(b[:, :128].reshape(-1, 2, 64))  # [blocks, 2, 128]
    pair = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> pair & 3) << 4  # [blocks, 2, 4, 32]
    q = (low | high.reshape(-1, 2, 128)).view(np.int8) - np.int8(32)
    scales = _f16(b[:, 208:210]) * b[:, 192:208].view(np.int8).astype(np.float32)  # [blocks, 16]
    return (scales[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32)).reshape(len(b), 256)


# bytes [blocks, block_bytes] -> float32 [blocks, block_elements]
_UNPACK: dict[GgmlType, Callable[[Bytes], Floats]] = {
    GgmlType.F32: _unpack_f32,
    GgmlType.F16: _unpack_f16,
    GgmlType.BF16: _unpack_bf16,
    GgmlType.Q4_0: _unpack_q4_0,
    GgmlType.Q4_1: _unpack_q4_1,
    GgmlType.Q5_0: _unpack_q5_0,
    GgmlType.Q5_1: _unpack_q5_1,
    GgmlType.Q8_0: _unpack_q8_0,
    GgmlType.Q4_K: _unpack_q4_k,
    GgmlType.Q5_K: _unpack_q5_k,
    GgmlType.Q6_K: _unpack_q6_k,
}


def _inverse(d: Floats) -> Floats:
    """1 / d, and 0 for a block without spread"""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _f16_bytes(x: Floats) -> Bytes:
    return x.astype("<f2").view(np.uint8)


def _pack_nibbles(q: Bytes) -> Bytes:
    """[blocks, 32] below 16 -> bytes [blocks, 16]; first half low, second half high"""
    return q[:, :16] | q[:, 16:] << np.uint8(4)


def _pack_bits(q: Bytes) -> Bytes:
    return np.packbits(q >> 4, axis=-1, bitorder="little")


def _signed(x: Floats, half: int) -> tuple[Floats, Bytes]:
    """Scale and levels of formats without m: the element of the largest size becomes level 0, that is -half."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    d = extreme / np.float32(-half)
    q = np.trunc(x * _inverse(d) + np.float32(half + 0.5))
    return d, q.clip(0, 2 * half - 1).astype(np.uint8)


def _affine(x: Floats, top: int) -> tuple[Floats, Floats, Bytes]:
    """Scale, minimum and levels of formats with m"""
    low = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - low) / np.float32(top)
    q = np.trunc((x - low) * _inverse(d) + np.float32(0.5))
    return d, low, q.clip(0, top).astype(np.uint8)


def _pack_f32(x: Floats) -> Bytes:
    return x.astype("<f4").view(np.uint8)


def _pack_bf16(x: Floats) -> Bytes:
    """Round to nearest, ties to even; a NaN stays one."""
    n = x.view(np.uint32)
    rounded = (n + (np.uint32(0x7FFF) + (n >> 16 & 1))) >> 16
    return np.where(np.isnan(x), n >> 16 | 64, rounded).astype("<u2").view(np.uint8)


def _pack_q4_0(x: Floats) -> Bytes:
    d, q = _signed(x, 8)
    return np.concatenate((_f16_bytes(d), _pack_nibbles(q)), axis=-1)


def _pack_q4_1(x: Floats) -> Bytes:
    d, m, q = _affine(x, 15)
    return np.concatenate((_f16_bytes(d), _f16_bytes(m), _pack_nibbles(q)), axis=-1)


def _pack_q5_0(x: Floats) -> Bytes:
    d, q = _signed(x, 16)
    return np.concatenate((_f16_bytes(d), _pack_bits(q), _pack_nibbles(q & np.uint8(15))), axis=-1)


def _pack_q5_1(x: Floats) -> Bytes:
    d, m, q = _affine(x, 31)
    return np.concatenate((_f16_bytes(d), _f16_bytes(m), _pack_bits(q), _pack_nibbles(q & np.uint8(15))), axis=-1)


def _pack_q8_0(x: Floats) -> Bytes:
    """Rounds half away from zero."""
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    y = x * _inverse(d)
    q = np.copysign(np.floor(np.abs(y) + np.float32(0.5)), y).astype(np.int8)
    return np.concatenate((_f16_bytes(d), q.view(np.uint8)), axis=-1)


# float32 [blocks, block_elements] -> bytes [blocks, block_bytes]
_PACK: dict[GgmlType, Callable[[Floats], Bytes]] = {
    GgmlType.F32: _pack_f32,
    GgmlType.F16: _f16_bytes,
    GgmlType.BF16: _pack_bf16,
    GgmlType.Q4_0: _pack_q4_0,
    GgmlType.Q4_1: _pack_q4_1,
    GgmlType.Q5_0: _pack_q5_0,
    GgmlType.Q5_1: _pack_q5_1,
    GgmlType.Q8_0: _pack_q8_0,
}
