"""A model folder: config.json and its safetensors files, as tensors under the plan's names.

Owns which files of a folder hold weights, which of their tensors is which of the plan's, and what of them must change on the
way: vectors become float32, and norms of Gemma get the 1 that their folder leaves out. Matrices are views of the files' mappings.
Rotary factors are a tensor of the plan that config.json says. A folder without weights, as config.json alone describes it, has their
shapes. Knows nothing of tokenizers or backends.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import msgspec
import numpy as np

from jilju.errors import ModelFileError
from jilju.formats.ggml import GgmlType, row_bytes
from jilju.formats.json_file import read_object
from jilju.formats.quants import dequantize
from jilju.formats.safetensors import SafetensorsFile
from jilju.model.hf_config import name_in_folder, spec_from_config, weight_type
from jilju.model.spec import ROPE_FACTORS, ModelSpec

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
MAX_FILES = 1024
TYPES = {"BF16": GgmlType.BF16, "F16": GgmlType.F16, "F32": GgmlType.F32}
# Tables of rotary frequencies, which old files carry beside their weights.
_WITHOUT_USE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class FolderTensor(msgspec.Struct, frozen=True):
    """A tensor under the plan's name."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    num_bytes: int


class ModelFolder:
    """An open folder. Views from `tensor_data` keep a file's mapping alive after `close`."""

    def __init__(self, path: Path, config: Mapping[str, Any], files: Mapping[str, SafetensorsFile]):
        config_file = str(path / CONFIG)
        self.path = str(path)
        self.spec: ModelSpec = spec_from_config(config, file=config_file, name=path.resolve().name)
        self._files = files
        self._file_of: dict[str, SafetensorsFile] = {name: file for file in files.values() for name in file.tensors}
        if files:
            self.tensors = self._found_tensors()
        else:
            self.tensors = shaped_tensors(self.spec, weight_type(config, file=config_file))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, with_weights: bool = True) -> Self:
        """Raises ModelFileError. Without weights, config.json alone is read."""
        folder = Path(path)
        config = read_object(folder / CONFIG)
        if config is None:
            raise ModelFileError(
                str(folder), CONFIG, "missing", "a folder with config.json, safetensors files and tokenizer.json"
            )
        return cls(folder, config, _open_files(folder) if with_weights else {})

    def tensor_data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes]: of a matrix a read-only view of the mapping."""
        tensor = self.tensors[name]
        if name == ROPE_FACTORS:
            return np.array(self.spec.rope_factors, "<f4").view(np.uint8)
        given = name_in_folder(self.spec, name)
        file = self._file_of[given]
        data = file.tensor_data(given)
        if len(tensor.shape) == 1:
            vector = dequantize(data, TYPES[file.tensors[given].dtype], tensor.shape[0])
            if self.spec.family == "gemma3" and name.endswith("norm.weight"):
                vector = vector + np.float32(1)
            return vector.reshape(-1).view(np.uint8)
        # A header may leave data at any byte; kernels want whole elements.
        return data.copy() if file.tensors[given].offset % row_bytes(tensor.type, 1) else data

    def parts(self) -> list[tuple[Path, int]]:
        """The files in order, with the bytes of each one's head: of what is no weight."""
        folder = Path(self.path)
        texts = [folder / name for name in (CONFIG, *TEXT_FILES) if (folder / name).is_file()]
        heads = [(folder / name, file.head_bytes) for name, file in self._files.items()]
        return [(path, path.stat().st_size) for path in texts] + heads

    def drop_pages(self) -> None:
        for file in self._files.values():
            file.drop_pages()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _found_tensors(self) -> dict[str, FolderTensor]:
        """The plan's tensors, every one of them there and none besides."""
        shapes = self.spec.tensor_shapes()
        factors = shapes.pop(ROPE_FACTORS, None)  # in no file
        tensors = {} if factors is None else {ROPE_FACTORS: _shaped(ROPE_FACTORS, factors, GgmlType.F32)}
        wanted = {name_in_folder(self.spec, name): (name, shape) for name, shape in shapes.items()}
        for given, (name, shape) in wanted.items():
            file = self._file_of.get(given)
            if file is None:
                raise ModelFileError(self.path, f"tensor '{given}'", "missing", f"shape {shape}")
            tensor = file.tensors[given]
            if tensor.shape != shape:
                raise ModelFileError(file.path, f"tensor '{given}', shape", tensor.shape, f"{shape}, by {CONFIG}")
            if tensor.dtype not in TYPES:
                allowed = f"{', '.join(TYPES)}; quantized folders are not supported"
                raise ModelFileError(file.path, f"tensor '{given}', dtype", tensor.dtype, allowed)
            tensors[name] = _shaped(name, shape, TYPES[tensor.dtype])
        for given, file in self._file_of.items():
            if given not in wanted and not self._is_without_use(given):
                allowed = f"the {len(wanted)} tensors of a {self.spec.family} model of {self.spec.num_layers} layers"
                raise ModelFileError(file.path, f"tensor {given[:80]!r}", "there", allowed)
        return tensors

    def _is_without_use(self, given: str) -> bool:
        """Of a head that is the embedding table there may be a copy, which must be one."""
        if given != "lm_head.weight":
            return _WITHOUT_USE.fullmatch(given) is not None
        table = name_in_folder(self.spec, "token_embd.weight")
        head, embedding = (self._file_of[name].tensor_data(name) for name in (given, table))
        if not np.array_equal(head, embedding):
            allowed = f"absent or equal to {table}, as tie_word_embeddings says"
            raise ModelFileError(self._file_of[given].path, f"tensor '{given}'", "another than the table", allowed)
        return True


def shaped_tensors(spec: ModelSpec, type_: GgmlType) -> dict[str, FolderTensor]:
    """Every tensor of the spec, matrices in one number format."""
    return {name: _shaped(name, shape, type_) for name, shape in spec.tensor_shapes().items()}


def _shaped(name: str, shape: tuple[int, ...], type_: GgmlType) -> FolderTensor:
    type_ = GgmlType.F32 if len(shape) == 1 else type_
    *num_outputs, num_inputs = shape
    return FolderTensor(name, type_, shape, (num_outputs[0] if num_outputs else 1) * row_bytes(type_, num_inputs))


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """By name. Those of the index; without one the one file, or else every safetensors file."""
    index = read_object(folder / INDEX)
    if index is not None:
        weight_map = _weight_map(folder, index)
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).exists():
        weight_map, names = {}, [SINGLE]
    else:
        weight_map, names = {}, sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        _fail_without_files(folder)
    if len(names) > MAX_FILES:
        raise ModelFileError(str(folder), "safetensors files", len(names), f"at most {MAX_FILES}")
    files = {name: SafetensorsFile.open(folder / name) for name in names}
    seen: dict[str, str] = {}
    for file_name, file in files.items():
        for name in file.tensors:
            if name in seen:
                given = f"there, and in {seen[name]} too"
                raise ModelFileError(file.path, f"tensor {name[:80]!r}", given, "every tensor in one file")
            seen[name] = file_name
    for name, file_name in weight_map.items():
        if seen.get(name) != file_name:
            given = f"in {file_name}, which has none of that name"
            raise ModelFileError(str(folder / INDEX), f"tensor {name[:80]!r}", given, "the file that has it")
    return files


def _weight_map(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    file, weight_map = str(folder / INDEX), index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(file, "weight_map", type(weight_map).__name__, "an object of tensor names and file names")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFileError(file, "weight_map", repr(name), "names of safetensors files in the same folder")
        if not (folder / name).is_file():
            raise ModelFileError(file, "weight_map", repr(name), "files that are in the folder; this one is missing")
    return weight_map


def _fail_without_files(folder: Path) -> NoReturn:
    pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
    given = f"missing; {pickled} is not read" if pickled else "missing"
    allowed = f"{SINGLE}, or several with {INDEX}; --load-format dummy serves made-up weights, from {CONFIG} alone"
    raise ModelFileError(str(folder), "safetensors files", given, allowed)
