"""Reading GGUF: what the `gguf` package writes is read as written, and no damaged file does worse than one ModelFileError."""

import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest

from jilju.errors import ModelFileError
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType
from jilju.formats.gguf import GgufFile

HOSTILE = (0, 1, -1, 2**31, 2**63, 2**64 - 1)
MIB = 1024 * 1024


def write_sample(path: Path, *, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> None:
    """About 4 KiB with every kind of value and a few number formats."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"x.{name}", 7 if name[0] == "u" else -7)
    writer.add_float32("x.float32", 0.5)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "질주")
    writer.add_array("x.strings", ["", "a", "Ġb", "학교"] * 4)
    writer.add_array("x.ints", [3, 1, -4])
    writer.add_array("x.floats", [0.25, -2.0])
    writer.add_array("x.bools", [True, False])
    rng = np.random.default_rng(1)
    if endian is gguf.GGUFEndian.LITTLE:
        for name, kind, shape in (
            ("a", "F32", (3, 32)),
            ("b", "Q4_1", (4, 64)),
            ("c", "Q8_0", (2, 32)),
            ("d", "F32", (5,)),
        ):
            x = rng.standard_normal(shape).astype(np.float32)
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, type_), raw_dtype=type_)
        writer.add_tensor("big.weight", rng.standard_normal((2, 4, 48)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    write_sample(path)
    return path.read_bytes()


@pytest.fixture
def opens(tmp_path: Path) -> Callable[[bytes], bool]:
    """Whether the bytes open and can be read to the last value; anything but a ModelFileError goes through."""
    path = tmp_path / "case.gguf"

    def check(raw: bytes) -> bool:
        path.write_bytes(raw)
        return can_be_read(path)

    return check


def can_be_read(path: Path) -> bool:
    try:
        with GgufFile.open(path) as file:
            for key in file.metadata:
                file.metadata[key]
            for name, tensor in file.tensors.items():
                data = file.tensor_data(name)
                assert len(data) == tensor.num_bytes
                assert tensor.offset + tensor.num_bytes <= file.file_bytes
    except ModelFileError as error:
        assert str(path) in str(error) and error.field and error.allowed
        return False
    return True


class Field(NamedTuple):
    name: str
    offset: int
    num_bytes: int


def walk(raw: bytes) -> Iterator[Field]:
    """Every number of the header, found without the reader under test."""
    offset = 0

    def number(name: str, num_bytes: int) -> Field:
        nonlocal offset
        offset += num_bytes
        return Field(name, offset - num_bytes, num_bytes)

    def value(field: Field) -> int:
        return int.from_bytes(raw[field.offset : field.offset + field.num_bytes], "little")

    scalar_bytes = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)))
    yield number("magic", 4)
    yield number("version", 4)
    tensors, pairs = number("tensor count", 8), number("pair count", 8)
    yield from (tensors, pairs)
    for i in range(value(pairs)):
        length = number(f"key {i} length", 8)
        yield length
        offset += value(length)
        kind = number(f"type {i}", 4)
        yield kind
        count = None
        if value(kind) == 9:
            kind, count = number(f"element type {i}", 4), number(f"array length {i}", 8)
            yield from (kind, count)
        for _ in range(1 if count is None else value(count)):
            if value(kind) == 8:
                length = number(f"string length {i}", 8)
                yield length
                offset += value(length)
            else:
                yield number(f"value {i}", scalar_bytes[value(kind)])
    for i in range(value(tensors)):
        length = number(f"tensor {i} name length", 8)
        yield length
        offset += value(length)
        dims = number(f"tensor {i} dimensions", 4)
        yield dims
        for d in range(value(dims)):
            yield number(f"tensor {i} dimension {d}", 8)
        yield number(f"tensor {i} type", 4)
        yield number(f"tensor {i} offset", 8)


def patched(raw: bytes, *changes: tuple[Field, int]) -> bytes:
    out = bytearray(raw)
    for field, value in changes:
        mask = (1 << 8 * field.num_bytes) - 1
        out[field.offset : field.offset + field.num_bytes] = (value & mask).to_bytes(field.num_bytes, "little")
    return bytes(out)


def field_of(raw: bytes, name: str) -> Field:
    return next(field for field in walk(raw) if field.name == name)


def refusal(opens_path: Path, raw: bytes) -> ModelFileError:
    opens_path.write_bytes(raw)
    with pytest.raises(ModelFileError) as caught:
        GgufFile.open(opens_path)
    return caught.value


def test_what_the_gguf_package_writes_is_read_as_written(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sample.gguf"
    path.write_bytes(sample)
    reader = gguf.GGUFReader(path)
    with GgufFile.open(path) as file:
        assert file.file_bytes == len(sample)
        written = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert dict(file.metadata) == written
        assert all(type(file.metadata[key]) is type(value) for key, value in written.items())
        assert file.metadata["x.strings"] == ["", "a", "Ġb", "학교"] * 4
        assert file.metadata.array_length("x.strings") == 16
        assert file.metadata.array_length("x.string") is None
        assert file.metadata.array_length("absent") is None
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            mine = file.tensors[tensor.name]
            assert (mine.type, mine.shape) == (tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))
            assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)
            assert file.tensor_data(tensor.name).tobytes() == np.ascontiguousarray(tensor.data).tobytes()


def test_views_outlive_close_and_are_read_only(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sample.gguf"
    path.write_bytes(sample)
    with GgufFile.open(path) as file:
        view, string = file.tensor_data("a.weight"), file.metadata["x.string"]
    assert not view.flags.writeable
    assert int(view.sum()) > 0
    assert file.metadata["x.string"] == string  # decoded before: stays


def test_truncation_at_every_byte(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "case.gguf"
    path.write_bytes(sample)
    reader = gguf.GGUFReader(path)
    last_byte = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    del reader
    for size in range(len(sample) - 1, -1, -1):
        os.truncate(path, size)
        assert can_be_read(path) == (size >= last_byte), f"cut to {size} of {len(sample)} bytes"


def test_every_number_of_the_header_set_to_hostile_values(sample: bytes, opens: Callable[[bytes], bool]) -> None:
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    try:
        for field in walk(sample):
            for value in HOSTILE:
                outcomes[opens(patched(sample, (field, value)))] += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert outcomes[True] > 50, "values, at least, may be anything"
    assert outcomes[False] > 200
    assert peak < 8 * MIB, f"peak {peak / MIB:.1f} MiB for files of {len(sample)} bytes"


def test_pairs_of_hostile_values(sample: bytes, opens: Callable[[bytes], bool]) -> None:
    fields = [field for field in walk(sample) if not field.name.startswith("value")]
    chance = random.Random(2)
    for _ in range(2000):
        first, second = chance.sample(fields, 2)
        opens(patched(sample, (first, chance.choice(HOSTILE)), (second, chance.choice(HOSTILE))))


def test_random_bit_flips(sample: bytes, opens: Callable[[bytes], bool]) -> None:
    rng = np.random.default_rng(3)
    header_bytes = max(field.offset + field.num_bytes for field in walk(sample))
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        raw = np.frombuffer(sample, np.uint8).copy()
        for bit in rng.integers(0, 8 * header_bytes, rng.integers(1, 5)):
            raw[bit // 8] ^= 1 << bit % 8
        outcomes[opens(raw.tobytes())] += 1
    assert min(outcomes.values()) > 50, f"both outcomes must be met: {outcomes}"


@pytest.mark.parametrize(
    ("name", "value", "field", "allowed"),
    [
        ("magic", 0x12345678, "magic", "not a GGUF file"),
        ("version", 1, "version", "2 or 3"),
        ("version", 4, "version", "2 or 3"),
        ("version", 3 << 24, "version", "big-endian"),
        ("tensor count", 2**40, "tensor count", "at most 65536"),
        ("pair count", 65537, "metadata pair count", "at most 65536"),
        ("key 0 length", 1025, "key of metadata pair 0, length", "1 to 1024"),
        ("type 1", 13, "metadata 'x.uint8', type", "0 to 12"),
        ("element type 13", 9, "metadata 'x.strings', element type", "arrays of arrays"),
        ("array length 13", 2**33, "metadata 'x.strings', array length", "16777216"),
        ("string length 12", 2**24 + 1, "metadata 'x.string', string 0, length", "bytes remain"),
        ("tensor 1 dimensions", 5, "tensor 'b.weight', number of dimensions", "1 to 4"),
        ("tensor 1 dimension 0", 65, "tensor 'b.weight', dimension 0", "Q4_1's block of 32"),
        ("tensor 1 dimension 1", 0, "tensor 'b.weight', dimension 1", "1 to"),
        ("tensor 1 dimension 1", 2**63, "tensor 'b.weight', dimension 1", "1 to"),
        ("tensor 1 dimension 1", 1000, "tensor 'b.weight', offset", "cut short or lies"),
        ("tensor 1 type", 4, "tensor 'b.weight', type", "Q4_0 (2)"),
        ("tensor 1 offset", 33, "tensor 'b.weight', offset", "multiple of the alignment 32"),
        ("tensor 1 offset", 32, "tensor 'b.weight', offset", "do not overlap"),
        ("tensor 1 offset", 2**63, "tensor 'b.weight', offset", "cut short or lies"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed(
    sample: bytes, tmp_path: Path, name: str, value: int, field: str, allowed: str
) -> None:
    error = refusal(tmp_path / "case.gguf", patched(sample, (field_of(sample, name), value)))
    assert error.field == field
    assert allowed in error.allowed


def test_two_equal_names_are_refused(sample: bytes, tmp_path: Path) -> None:
    assert "unique" in refusal(tmp_path / "k.gguf", sample.replace(b"x.uint8", b"x.int16")).allowed
    assert "unique" in refusal(tmp_path / "t.gguf", sample.replace(b"b.weight", b"a.weight")).allowed


def test_overlap_is_found_in_any_order(sample: bytes, tmp_path: Path) -> None:
    """The last tensor of the file moved onto the first."""
    error = refusal(tmp_path / "case.gguf", patched(sample, (field_of(sample, "tensor 4 offset"), 0)))
    assert "do not overlap" in error.allowed


@pytest.mark.parametrize("type_", [t for t in GgmlType if BLOCK_LAYOUTS[t].block_elements > 1])
def test_a_row_that_is_no_whole_number_of_blocks(type_: GgmlType, tmp_path: Path) -> None:
    block = BLOCK_LAYOUTS[type_].block_elements
    for columns, good in (
        (block, True),
        (block - 1, False),
        (block + 1, False),
        (block // 2, False),
        (3 * block, True),
    ):
        path = tmp_path / f"{columns}.gguf"
        name = b"t.weight"
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
        head += struct.pack("<IQQIQ", 2, columns, 2, type_, 0)
        path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(2 * 3 * BLOCK_LAYOUTS[type_].block_bytes))
        assert can_be_read(path) == good
        if not good:
            assert refusal(path, path.read_bytes()).field == "tensor 't.weight', dimension 0"


def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    write_sample(path, endian=gguf.GGUFEndian.BIG)
    assert "big-endian" in refusal(path, path.read_bytes()).allowed


@pytest.mark.parametrize("alignment", [64, 4096])
def test_other_alignments(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name in "ab":
        writer.add_tensor(name, np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        assert [tensor.offset % alignment for tensor in file.tensors.values()] == [0, 0]
        assert file.tensor_data("b").view(np.float32).tolist() == [0, 1, 2, 3, 4]
    raw = path.read_bytes()
    at = raw.index(b"general.alignment") + len(b"general.alignment") + 4
    for bad in (0, 1, 4, 48, 2**31):
        error = refusal(path, raw[:at] + struct.pack("<I", bad) + raw[at + 4 :])
        assert error.field == "metadata 'general.alignment'"


def test_text_that_is_no_utf8(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "case.gguf"
    assert "UTF-8" in refusal(path, sample.replace(b"x.uint8", b"x.u\xff\xff\xff\xff")).allowed
    path.write_bytes(sample.replace("질주".encode(), b"\xff" * 6))
    with GgufFile.open(path) as file, pytest.raises(ModelFileError, match=r"x\.string.*UTF-8"):
        file.metadata["x.string"]


def test_a_bool_is_0_or_1(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "case.gguf"
    path.write_bytes(patched(sample, (field_of(sample, "value 11"), 2)))
    with GgufFile.open(path) as file, pytest.raises(ModelFileError, match=r"x\.bool.* 2; allowed: 0 or 1"):
        file.metadata["x.bool"]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.gguf"
    empty.touch()
    for path, part in (
        (tmp_path / "absent.gguf", "No such file"),
        (tmp_path, "not a regular file"),
        (empty, "0 bytes"),
    ):
        with pytest.raises(ModelFileError, match=part) as caught:
            GgufFile.open(path)
        assert str(path) in str(caught.value)


def test_opening_holds_no_array_in_memory(tmp_path: Path) -> None:
    """300,000 two-byte strings would take 20 MB as str; 4 million numbers 32 MB as a list."""
    path = tmp_path / "wide.gguf"
    strings = (struct.pack("<Q", 2) + b"ab") * 300_000
    pairs = b"".join((
        struct.pack("<Q", 1), b"s", struct.pack("<IIQ", 9, 8, 300_000), strings,
        struct.pack("<Q", 1), b"n", struct.pack("<IIQ", 9, 0, 2**22), bytes(2**22),
    ))  # fmt: skip
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + pairs)
    tracemalloc.start()
    try:
        with GgufFile.open(path) as file:
            assert (file.metadata.array_length("s"), file.metadata.array_length("n")) == (300_000, 2**22)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB, f"peak {peak / MIB:.1f} MiB"
