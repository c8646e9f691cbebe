"""The Executor protocol: who runs a plan.

Owns the contract of a backend and the bounds it is loaded with. Knows nothing of schedulers or models. Every backend keeps
its KV cache as `num_blocks` blocks of `block_size` slots per layer; block ids come from the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from jilju.formats.ggml import GgmlType
from jilju.plan.batch import Batch, StepResult
from jilju.plan.plan import Plan

# Of cached keys and values. int8 and fp8 have a scale per token, head and K or V. bf16 and fp8 are a GPU's, int8 is a CPU's.
KvDtype = Literal["f16", "int8", "bf16", "fp8"]
WeightDtype = Literal["bf16", "f16", "fp8"]  # of matrices on a GPU; fp8 has a scale per output, and computes in bf16


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """A weight as it lies in its file. `data` is a read-only uint8 view, C order, rows of row_bytes(type, columns)."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]  # (num_outputs, num_inputs) of a matrix, (width,) of a vector
    data: np.ndarray  # uint8 [bytes]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that an executor allocates for at load and may rely on."""

    num_blocks: int
    block_size: int  # slots of a block
    max_rows: int  # rows of a step
    max_tokens: int  # tokens of a step
    max_context: int  # tokens of a sequence
    num_threads: int
    kv_dtype: KvDtype = "f16"


class Executor(Protocol):
    """A backend. `launch` then `wait`, one step at a time; one thread calls."""

    name: str  # "reference", "native", ...
    kernel_set: str  # what computes, as shown to users: "numpy", "native-avx2", ...
    invariant: bool  # same bits whatever the batch, chunking, cache and thread count

    def weight_bytes(self, plan: Plan) -> int:
        """Bytes that the weights take in the form in which they are used, mapped files included."""
        ...

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "f16") -> int:
        """Bytes of all layers' keys and values of one token."""
        ...

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        """Bytes besides weights and KV that `load` will allocate."""
        ...

    def load(self, plan: Plan, weights: Mapping[str, WeightTensor], limits: Limits) -> None:
        """Allocate everything; afterwards `launch` allocates nothing big. Raises StartupError if it cannot."""
        ...

    def launch(self, batch: Batch) -> None: ...

    def wait(self) -> StepResult: ...

    def free(self) -> None:
        """Give back weights and KV; the executor is not used after that."""
        ...
