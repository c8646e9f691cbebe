"""Checkpoints: what a model's weights are read from, a GGUF file or a model folder.

Owns what both have in common, and which of the two a path is. Knows nothing of what is in either.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from jilju.errors import ModelSourceError
from jilju.formats.ggml import GgmlType
from jilju.formats.gguf import GgufFile
from jilju.model.decoder import build_plan
from jilju.model.folder import ModelFolder
from jilju.model.spec import ModelSpec, spec_from_gguf
from jilju.plan import Plan

LoadFormat = Literal["auto", "dummy"]  # weights as they are, or made up: a folder's config.json is enough then


class Tensor(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def type(self) -> GgmlType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...  # (rows, columns) of a matrix, (columns,) of a vector

    @property
    def num_bytes(self) -> int: ...


class Checkpoint(Protocol):
    @property
    def path(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # by the plan's names

    def tensor_data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes]: of a matrix a read-only view of the mapping."""
        ...

    def parts(self) -> list[tuple[Path, int]]:
        """The files in order, with the bytes of each one's head: of what is no weight."""
        ...

    def drop_pages(self) -> None:
        """Count no more of the files as this process's memory; what is read again is mapped again."""
        ...

    def close(self) -> None: ...


def open_checkpoint(path: str, load_format: LoadFormat = "auto") -> Checkpoint:
    """Raises ModelFileError, and ModelSourceError for dummy weights of what is no folder."""
    if Path(path).is_dir():
        return ModelFolder.open(path, with_weights=load_format == "auto")
    if load_format == "dummy":
        raise ModelSourceError(
            f"{path} is a GGUF file; --load-format dummy makes up weights for a folder with config.json"
        )
    return GgufFile.open(path)


def spec_of(checkpoint: Checkpoint) -> ModelSpec:
    """Raises ModelFileError."""
    if isinstance(checkpoint, ModelFolder):
        return checkpoint.spec
    assert isinstance(checkpoint, GgufFile), f"{type(checkpoint)} has no hyper-parameters"
    return spec_from_gguf(checkpoint)


def plan_of(checkpoint: Checkpoint) -> Plan:
    """Raises ModelFileError."""
    return build_plan(spec_of(checkpoint), {tensor.name: tensor.type for tensor in checkpoint.tensors.values()})
