"""GGUF files, versions 2 and 3, little-endian: metadata and tensors of one model file, mapped into memory.

Files are hostile input: every count, length, offset and product is checked against the bytes that remain before it is used,
and whatever does not fit ends in one ModelFileError that names the field. Opening reads the header only and holds no array
in memory: strings and arrays of the metadata are decoded when asked for. Knows no model, no text and no number format
beyond its bytes.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import msgspec
import numpy as np

from jilju.errors import ModelFileError
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes
from jilju.formats.mapped import map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_PAIRS = 64 * 1024
MAX_TENSORS = 64 * 1024
MAX_DIMS = 4
MAX_NAME_BYTES = 1024
MAX_STRING_BYTES = 16 * 1024 * 1024
MAX_ARRAY_ELEMENTS = 16 * 1024 * 1024
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 1024 * 1024


class ValueType(IntEnum):
    """Types of metadata values; numbers of the GGUF specification."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("<u1"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GgufTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies. The shape is row-major: (rows, columns) of a matrix; the file writes columns first."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


class _Extent(msgspec.Struct, frozen=True):
    """Where a metadata value lies. `count` is None for a scalar, else the number of elements of an array."""

    type: ValueType
    offset: int
    num_bytes: int
    count: int | None


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a file: int, float, bool, str, or a list of these.

    A value is decoded when it is asked for. Lists are not kept: a tokenizer's are asked for once and take many megabytes.
    """

    def __init__(self, path: str, data: mmap.mmap, extents: dict[str, _Extent]):
        self._path = path
        self._data: mmap.mmap | None = data
        self._extents = extents
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self._decoded:
            return self._decoded[key]
        value = self._decode(key, self._extents[key])
        if not isinstance(value, list):
            self._decoded[key] = value
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._extents

    def __iter__(self) -> Iterator[str]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)

    def __repr__(self) -> str:
        return f"Metadata({self._path!r}, {len(self)} keys)"

    def array_length(self, key: str) -> int | None:
        """Elements of the array `key`, without decoding it; None if there is no such array."""
        return self._extents[key].count if key in self._extents else None

    def close(self) -> None:
        """Let go of the mapping; values decoded so far stay."""
        self._data = None

    def _decode(self, key: str, extent: _Extent) -> Any:
        assert self._data is not None, f"{self._path} is closed"
        raw = self._data[extent.offset : extent.offset + extent.num_bytes]
        if extent.type is ValueType.STRING:
            strings = self._decode_strings(key, raw, 1 if extent.count is None else extent.count)
            return strings[0] if extent.count is None else strings
        array = np.frombuffer(raw, _SCALARS[extent.type])
        if extent.type is ValueType.BOOL:
            if (array > 1).any():
                raise ModelFileError(self._path, f"metadata {_shown(key)}", int(array.max()), "0 or 1 in a bool")
            array = array.astype(bool)
        return array[0].item() if extent.count is None else array.tolist()

    def _decode_strings(self, key: str, raw: bytes, count: int) -> list[str]:
        """`raw` is `count` times a length and that many bytes, as the scan at opening made sure."""
        strings: list[str] = []
        length_at, offset = _U64.unpack_from, 0
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + length_at(raw, offset)[0]
                strings.append(raw[start:offset].decode())
        except UnicodeDecodeError as error:
            field = f"metadata {_shown(key)}, string {len(strings)}"
            raise ModelFileError(self._path, field, error.object[:40], "valid UTF-8") from None
        return strings


class GgufFile:
    """An open file. Views from `tensor_data` keep the mapping alive after `close`."""

    def __init__(
        self, path: str, status: os.stat_result, data: mmap.mmap, metadata: Metadata, tensors: dict[str, GgufTensor]
    ):
        self.path = path
        self.status = status  # of the file when it was opened
        self.metadata = metadata
        self.tensors = tensors
        self.file_bytes = len(data)
        self._data: mmap.mmap | None = data

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        shown = os.fspath(path)
        data, status = map_file(shown, "GGUF", 24, "at least the 24 bytes of a GGUF header")
        reader = _HeaderReader(shown, data)
        extents, tensors = reader.read()
        return cls(shown, status, data, Metadata(shown, data, extents), tensors)

    def tensor_data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes]: a read-only view of the mapping."""
        assert self._data is not None, f"{self.path} is closed"
        tensor = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)

    def parts(self) -> list[tuple[Path, int]]:
        """This file, with the bytes of its head: of what is before the first tensor's data."""
        return [(Path(self.path), min((tensor.offset for tensor in self.tensors.values()), default=self.file_bytes))]

    def drop_pages(self) -> None:
        """Count no more of the file as this process's memory; what is read again is mapped again."""
        assert self._data is not None, f"{self.path} is closed"
        self._data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mapping; it ends with the last view of it."""
        self._data = None
        self.metadata.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _HeaderReader:
    """Walks the header once, from byte 0; `_offset` never passes the end of the file."""

    def __init__(self, path: str, data: mmap.mmap):
        self._path = path
        self._data = data
        self._size = len(data)
        self._offset = 0

    def read(self) -> tuple[dict[str, _Extent], dict[str, GgufTensor]]:
        magic = self._take(4, "magic")
        if magic != MAGIC:
            self._fail("magic", magic, "b'GGUF'; this is not a GGUF file")
        version = self._u32("version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            note = "; the file is big-endian, which is not supported" if swapped in VERSIONS else ""
            self._fail("version", version, f"2 or 3, little-endian{note}")
        num_tensors = self._count("tensor count", MAX_TENSORS, min_bytes=8 + 4 + 8 + 4 + 8)
        num_pairs = self._count("metadata pair count", MAX_PAIRS, min_bytes=8 + 4 + 1)
        extents: dict[str, _Extent] = {}
        for index in range(num_pairs):
            key = self._name(f"key of metadata pair {index}")
            if key in extents:
                self._fail(f"metadata key {_shown(key)}", "there twice", "unique keys")
            extents[key] = self._extent(f"metadata {_shown(key)}")
        alignment = self._alignment(extents)
        infos: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
        for index in range(num_tensors):
            name = self._name(f"name of tensor {index}")
            if name in infos:
                self._fail(f"tensor name {_shown(name)}", "there twice", "unique names")
            infos[name] = self._tensor_info(f"tensor {_shown(name)}", alignment)
        return extents, self._place(infos, alignment)

    def _extent(self, field: str) -> _Extent:
        type_ = self._value_type(f"{field}, type")
        count = None
        if type_ is ValueType.ARRAY:
            type_ = self._value_type(f"{field}, element type")
            if type_ is ValueType.ARRAY:
                self._fail(
                    f"{field}, element type", "array", "numbers, bools or strings; arrays of arrays are not supported"
                )
            element_bytes = 8 if type_ is ValueType.STRING else _SCALARS[type_].itemsize
            count = self._count(f"{field}, array length", MAX_ARRAY_ELEMENTS, min_bytes=element_bytes)
        start = self._offset
        if type_ is ValueType.STRING:
            self._skip_strings(field, 1 if count is None else count)
        else:
            self._skip(_SCALARS[type_].itemsize * (1 if count is None else count), field)
        return _Extent(type_, start, self._offset - start, count)

    def _skip_strings(self, field: str, count: int) -> None:
        """A chain of lengths: the one loop of the reader that must be fast (300,000 strings in a usual file)."""
        data, size, offset = self._data, self._size, self._offset
        length_at, last_length = _U64.unpack_from, size - 8
        for index in range(count):
            if offset > last_length:
                self._fail(
                    f"{field}, string {index}", f"cut off at byte {size}", "a length and its bytes inside the file"
                )
            length = length_at(data, offset)[0]
            offset += 8 + length
            if length > MAX_STRING_BYTES or offset > size:
                remaining = size - (offset - length)
                allowed = f"0 to {min(MAX_STRING_BYTES, remaining)} ({remaining} bytes remain)"
                self._fail(f"{field}, string {index}, length", length, allowed)
        self._offset = offset

    def _alignment(self, extents: dict[str, _Extent]) -> int:
        extent = extents.get(ALIGNMENT_KEY)
        if extent is None:
            return DEFAULT_ALIGNMENT
        if extent.type is not ValueType.UINT32 or extent.count is not None:
            self._fail(f"metadata '{ALIGNMENT_KEY}', type", extent.type.name, "UINT32")
        alignment: int = _U32.unpack_from(self._data, extent.offset)[0]
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"metadata '{ALIGNMENT_KEY}'", alignment, f"a power of two from 8 to {MAX_ALIGNMENT}")
        return alignment

    def _tensor_info(self, field: str, alignment: int) -> tuple[GgmlType, tuple[int, ...], int]:
        """Type, row-major shape, and offset from the start of the tensor data."""
        num_dims = self._u32(f"{field}, number of dimensions")
        if not 1 <= num_dims <= MAX_DIMS:
            self._fail(f"{field}, number of dimensions", num_dims, f"1 to {MAX_DIMS}")
        dims = []
        for index in range(num_dims):
            dim = self._u64(f"{field}, dimension {index}")
            if not 1 <= dim <= 8 * self._size:  # no format takes less than a bit an element
                self._fail(f"{field}, dimension {index}", dim, f"1 to {8 * self._size} in a file of {self._size} bytes")
            dims.append(dim)
        type_id = self._u32(f"{field}, type")
        if type_id not in GgmlType._value2member_map_:
            known = ", ".join(f"{t.name} ({t})" for t in GgmlType)
            self._fail(f"{field}, type", type_id, known)
        type_ = GgmlType(type_id)
        block_elements = BLOCK_LAYOUTS[type_].block_elements
        if dims[0] % block_elements:
            self._fail(f"{field}, dimension 0", dims[0], f"a multiple of {type_.name}'s block of {block_elements}")
        offset = self._u64(f"{field}, offset")
        if offset % alignment:
            self._fail(f"{field}, offset", offset, f"a multiple of the alignment {alignment}")
        return type_, tuple(reversed(dims)), offset

    def _place(self, infos: dict[str, tuple[GgmlType, tuple[int, ...], int]], alignment: int) -> dict[str, GgufTensor]:
        """Check that each tensor lies in the data section and that no two overlap."""
        data_start = -(-self._offset // alignment) * alignment
        data_bytes = max(0, self._size - data_start)
        tensors: dict[str, GgufTensor] = {}
        for name, (type_, shape, offset) in infos.items():
            num_bytes = row_bytes(type_, shape[-1])
            for dim in shape[:-1]:
                num_bytes *= dim
            if offset + num_bytes > data_bytes:
                given = f"{offset}, with {num_bytes} bytes for shape {shape} of {type_.name}"
                allowed = f"an end within the {data_bytes} bytes of tensor data; the file is cut short or lies"
                self._fail(f"tensor {_shown(name)}, offset", given, allowed)
            tensors[name] = GgufTensor(name, type_, shape, data_start + offset, num_bytes)
        previous: GgufTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if previous is not None and tensor.offset < previous.offset + previous.num_bytes:
                given = f"{tensor.offset - data_start}, inside tensor {_shown(previous.name)}"
                self._fail(f"tensor {_shown(tensor.name)}, offset", given, "tensors that do not overlap")
            previous = tensor
        return tensors

    def _fail(self, field: str, given: object, allowed: str) -> NoReturn:
        raise ModelFileError(self._path, field, given, allowed)

    def _skip(self, num_bytes: int, field: str) -> None:
        remaining = self._size - self._offset
        if num_bytes > remaining:
            self._fail(
                field,
                f"cut off at byte {self._size}",
                f"{num_bytes} bytes from byte {self._offset} on, {remaining} remain",
            )
        self._offset += num_bytes

    def _take(self, num_bytes: int, field: str) -> bytes:
        start = self._offset
        self._skip(num_bytes, field)
        return self._data[start : self._offset]

    def _u32(self, field: str) -> int:
        value: int = _U32.unpack(self._take(4, field))[0]
        return value

    def _u64(self, field: str) -> int:
        value: int = _U64.unpack(self._take(8, field))[0]
        return value

    def _count(self, field: str, cap: int, min_bytes: int) -> int:
        """A number of things of at least `min_bytes` each."""
        count = self._u64(field)
        remaining = self._size - self._offset
        allowed = min(cap, remaining // min_bytes)
        if count > allowed:
            self._fail(field, count, f"0 to {allowed} (at most {cap}, and {remaining} bytes remain)")
        return count

    def _name(self, field: str) -> str:
        length = self._u64(f"{field}, length")
        if not 1 <= length <= MAX_NAME_BYTES:
            self._fail(f"{field}, length", length, f"1 to {MAX_NAME_BYTES}")
        raw = self._take(length, field)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(field, raw[:40], "valid UTF-8")

    def _value_type(self, field: str) -> ValueType:
        type_id = self._u32(field)
        if type_id not in ValueType._value2member_map_:
            self._fail(field, type_id, f"0 to {max(ValueType)}")
        return ValueType(type_id)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "…")
