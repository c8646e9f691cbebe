"""Reading safetensors: what was written is read as written, and no damaged file does worse than one ModelFileError."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.errors import ModelFileError
from jilju.formats.safetensors import DTYPE_BYTES, MAX_HEADER_BYTES, SafetensorsFile
from tests.model.folders import Stored, safetensors_bytes

A = Stored("BF16", (3, 4), bytes(range(24)))
B = Stored("F32", (5,), bytes(range(100, 120)))
SAMPLE = {"a.weight": A, "학교": B, "empty": Stored("F16", (0, 7), b""), "one": Stored("U8", (), b"\x07")}
HOSTILE = (0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, True, None, "1", [], {})


@pytest.fixture
def opens(tmp_path: Path) -> Callable[[bytes], bool]:
    """Whether the bytes open and can be read to the last; anything but a ModelFileError goes through."""
    path = tmp_path / "case.safetensors"

    def check(raw: bytes) -> bool:
        path.write_bytes(raw)
        return can_be_read(path)

    return check


def can_be_read(path: Path) -> bool:
    try:
        file = SafetensorsFile.open(path)
    except ModelFileError as error:
        assert str(path) in str(error) and error.field and error.allowed
        return False
    for name, tensor in file.tensors.items():
        assert len(file.tensor_data(name)) == tensor.num_bytes
    file.close()
    return True


def refusal(path: Path, raw: bytes) -> ModelFileError:
    path.write_bytes(raw)
    with pytest.raises(ModelFileError) as caught:
        SafetensorsFile.open(path)
    return caught.value


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def test_what_was_written_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(SAMPLE, metadata={"format": "pt"}))
    file = SafetensorsFile.open(path)
    assert list(file.tensors) == list(SAMPLE)
    for name, (dtype, shape, data) in SAMPLE.items():
        tensor = file.tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.num_bytes) == (dtype, shape, len(data))
        assert file.tensor_data(name).tobytes() == data
    view = file.tensor_data("a.weight")
    assert not view.flags.writeable
    file.drop_pages()
    file.close()
    assert view.tobytes() == A.data, "a view outlives close"


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_any_tensors_come_back(tmp_path_factory: pytest.TempPathFactory, wanted: dict, chance: random.Random) -> None:
    tensors = {}
    for name, (dtype, shape) in wanted.items():
        num_bytes = int(np.prod(shape, dtype=int)) * DTYPE_BYTES[dtype]
        tensors[name] = Stored(dtype, tuple(shape), chance.randbytes(num_bytes))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    file = SafetensorsFile.open(path)
    assert {
        name: Stored(t.dtype, t.shape, file.tensor_data(name).tobytes()) for name, t in file.tensors.items()
    } == tensors


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    whole = safetensors_bytes(SAMPLE)
    path.write_bytes(whole)
    assert can_be_read(path)
    for size in range(len(whole) - 1, -1, -1):
        os.truncate(path, size)
        assert not can_be_read(path), f"cut to {size} of {len(whole)} bytes"


def test_every_number_and_text_of_the_header_set_to_hostile_values(opens: Callable[[bytes], bool]) -> None:
    outcomes = {True: 0, False: 0}
    for name, tensor in SAMPLE.items():
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, len(tensor.data)]}
        for value in HOSTILE:
            for key in entry:
                outcomes[opens(safetensors_bytes(SAMPLE, changes={name: entry | {key: value}}))] += 1
            for key in ("shape", "data_offsets"):
                for index in range(len(entry[key])):
                    changed = [*entry[key][:index], value, *entry[key][index + 1 :]]
                    outcomes[opens(safetensors_bytes(SAMPLE, changes={name: entry | {key: changed}}))] += 1
            outcomes[opens(safetensors_bytes(SAMPLE, changes={name: value}))] += 1
    assert outcomes[True] >= 1 and outcomes[False] > 200, outcomes


def test_random_bytes_of_the_header_changed(opens: Callable[[bytes], bool]) -> None:
    rng, whole = np.random.default_rng(3), safetensors_bytes(SAMPLE)
    head_bytes = 8 + int.from_bytes(whole[:8], "little")
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        raw = bytearray(whole)
        for place in rng.integers(0, head_bytes, rng.integers(1, 5)):
            raw[place] = rng.integers(256)
        outcomes[opens(bytes(raw))] += 1
    assert min(outcomes.values()) > 5, f"both outcomes must be met: {outcomes}"


TWICE = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}'


@pytest.mark.parametrize(
    ("raw", "field", "told"),
    [
        (b"", "file size", "a header's length"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "header length", "is this a safetensors file"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(99), "header length", "2 to"),
        (with_header(b"[]"), "header", "a JSON list"),
        (with_header(b"\xff\xfe{}"), "header", "no JSON"),
        (with_header(b"[" * 100_000), "header", "nested too deeply"),
        (with_header(b'{"a": NaN}'), "header", "NaN is no number"),
        (with_header(TWICE, b"\x00"), "header", "'a' stands there twice"),
        (with_header(b'{"__metadata__": {"a": 1}}'), "header, __metadata__", "an object of texts"),
        (safetensors_bytes(SAMPLE) + b"\x00", "file size", "that its tensors take"),
    ],
)
def test_a_refusal_of_the_file(raw: bytes, field: str, told: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / "case.safetensors", raw)
    assert error.field == field and told in str(error)


@pytest.mark.parametrize(
    ("entry", "field", "told"),
    [
        ({"dtype": "F4"}, ", dtype", "'F4'; allowed: BOOL"),
        ({"shape": [3, -4]}, ", shape", "whole numbers"),
        ({"shape": [1] * 9}, ", shape", "up to 8"),
        ({"shape": [2**47, 2**47]}, ", data_offsets", "bytes, for shape"),
        ({"shape": [3, 5]}, ", data_offsets", "30 bytes, for shape (3, 5) of BF16"),
        ({"data_offsets": [0, 24, 24]}, ", data_offsets", "begin and end"),
        ({"data_offsets": [24, 0]}, ", data_offsets", "begin and end"),
        ({"data_offsets": [0, 1000]}, ", data_offsets", "within the 45 bytes of data"),
        ({"data_offsets": [1, 25]}, ", begin", "leaves a gap after the header"),
        ({"data_offsets": [20, 44]}, ", begin", "a gap after the header"),
        ({"offset": 1}, "", "'offset', 'shape'; allowed: an object of dtype, shape and data_offsets"),
    ],
)
def test_a_refusal_of_a_tensor(entry: dict[str, Any], field: str, told: str, tmp_path: Path) -> None:
    whole = {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}
    raw = safetensors_bytes(SAMPLE, changes={"a.weight": whole | entry})
    error = refusal(tmp_path / "case.safetensors", raw)
    assert told in str(error)
    assert error.field.endswith(field)


def test_tensors_that_overlap(tmp_path: Path) -> None:
    changed = {"학교": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}}
    error = refusal(tmp_path / "case.safetensors", safetensors_bytes(SAMPLE, changes=changed))
    assert "an overlap after 'a.weight'" in str(error)


def test_names_and_counts_have_bounds(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    assert "1 to 1024 characters" in str(refusal(path, safetensors_bytes({"n" * 1025: B})))
    assert "1 to 1024 characters" in str(refusal(path, safetensors_bytes({"": B})))
    many = {str(index): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(64 * 1024 + 1)}
    assert "at most 65536" in str(refusal(path, with_header(json.dumps(many).encode())))


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "absent.safetensors", "No such file"), (tmp_path, "not a regular file")):
        with pytest.raises(ModelFileError, match=message):
            SafetensorsFile.open(path)
