"""Safetensors files: named tensors of one file, mapped into memory.

Files are hostile input: every length, offset and product is checked against the file's size before it is used, and whatever
does not fit ends in one ModelFileError that names the field. The tensors must tile the data from its first byte to its last, as
the format demands. Knows no model, and of number formats nothing but their size.

    file     header length u64, little-endian | header, JSON | data
    header   {name: {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}, "__metadata__": {text: text}}
"""

import math
import mmap
import os
from typing import Any, NoReturn, Self

import msgspec
import numpy as np

from jilju.errors import ModelFileError
from jilju.formats.json_file import parse_object
from jilju.formats.mapped import map_file

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_TENSORS = 64 * 1024
MAX_DIMS = 8
MAX_NAME_CHARS = 1024
MAX_DIM = 2**48
METADATA = "__metadata__"

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class SafeTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


class SafetensorsFile:
    """An open file. Views from `tensor_data` keep the mapping alive after `close`."""

    def __init__(self, path: str, data: mmap.mmap, head_bytes: int, tensors: dict[str, SafeTensor]):
        self.path = path
        self.tensors = tensors
        self.head_bytes = head_bytes  # before the data
        self._data: mmap.mmap | None = data

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        shown = os.fspath(path)
        data, _ = map_file(shown, "safetensors", 10, "a header's length and a header")
        header_bytes = int.from_bytes(data[:8], "little")
        allowed = min(MAX_HEADER_BYTES, len(data) - 8)
        if not 2 <= header_bytes <= allowed:
            raise ModelFileError(shown, "header length", header_bytes, f"2 to {allowed}; is this a safetensors file?")
        head_bytes = 8 + header_bytes
        header = parse_object(data[8:head_bytes], file=shown, field="header")
        return cls(shown, data, head_bytes, _tensors(shown, header, head_bytes, len(data)))

    def tensor_data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes]: a read-only view of the mapping."""
        assert self._data is not None, f"{self.path} is closed"
        tensor = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)

    def drop_pages(self) -> None:
        """Count no more of the file as this process's memory; what is read again is mapped again."""
        assert self._data is not None, f"{self.path} is closed"
        self._data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mapping; it ends with the last view of it."""
        self._data = None


def _tensors(path: str, header: dict[str, Any], head_bytes: int, file_bytes: int) -> dict[str, SafeTensor]:
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(path, f"header, {METADATA}", type(metadata).__name__, "an object of texts")
    if len(header) > MAX_TENSORS:
        raise ModelFileError(path, "header", f"{len(header)} tensors", f"at most {MAX_TENSORS}")
    tensors = {name: _tensor(path, name, entry, head_bytes, file_bytes) for name, entry in header.items()}
    end, previous = head_bytes, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            what = "a gap" if tensor.offset > end else "an overlap"
            given = f"byte {tensor.offset - head_bytes}, which leaves {what} after {previous}"
            raise ModelFileError(path, f"tensor {_shown(tensor.name)}, begin", given, f"byte {end - head_bytes}")
        end, previous = tensor.offset + tensor.num_bytes, _shown(tensor.name)
    if end != file_bytes:
        raise ModelFileError(path, "file size", f"{file_bytes} bytes", f"the {end} bytes that its tensors take")
    return tensors


def _tensor(path: str, name: str, entry: Any, head_bytes: int, file_bytes: int) -> SafeTensor:
    field = f"tensor {_shown(name)}"

    def fail(part: str, given: object, allowed: str) -> NoReturn:
        raise ModelFileError(path, f"{field}{part}", given, allowed)

    if not 1 <= len(name) <= MAX_NAME_CHARS:
        fail(", name", f"of {len(name)} characters", f"1 to {MAX_NAME_CHARS} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        shown = ", ".join(map(repr, sorted(entry))) if isinstance(entry, dict) else type(entry).__name__
        fail("", f"an entry of {shown}", "an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fail(", dtype", repr(dtype), ", ".join(DTYPE_BYTES))
    if not _are_counts(shape, MAX_DIM) or len(shape) > MAX_DIMS:
        fail(", shape", shape, f"up to {MAX_DIMS} whole numbers from 0 to {MAX_DIM}")
    data_bytes = file_bytes - head_bytes
    if not _are_counts(offsets, data_bytes) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(", data_offsets", offsets, f"begin and end within the {data_bytes} bytes of data; the file is cut or lies")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        fail(", data_offsets", offsets, f"{num_bytes} bytes, for shape {tuple(shape)} of {dtype}")
    return SafeTensor(name, dtype, tuple(shape), head_bytes + offsets[0], num_bytes)


def _are_counts(values: Any, maximum: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= maximum for value in values)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "…")
