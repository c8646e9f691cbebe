"""NativeExecutor: the Executor protocol on the C++ core.

Owns the loaded model; keeps the packed weights and the file's mapping alive, for the kernels read them in place. Knows
nothing of sequences or requests. JILJU_ISA=avx512|avx2|neon|generic forces an instruction set; otherwise the CPU decides.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jilju.backends.native.encode import EncodedPlan, encode_plan
from jilju.backends.native.kernels import import_kernels
from jilju.backends.native.packed import PackedCache, PackedLayout, Progress, no_progress, pack_into_memory
from jilju.config import available_memory_bytes
from jilju.errors import ConfigError, StartupError
from jilju.plan import Batch, Embed, KvDtype, Limits, Plan, StepResult, WeightTensor
from jilju.plan.batch import MAX_TOP

KV_DTYPES: dict[KvDtype, int] = {"f16": 0, "int8": 1}  # as the core numbers them
KEYS_PER_RUN = 16  # the attention kernel unpacks runs of 16 keys, which must lie in one block


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where the steps' time went since profiling began. `other` is laying out tiles, waking threads and the like."""

    num_steps: int
    ns: dict[str, int]  # by kind of op


class NativeExecutor:
    name = "native"
    invariant = True

    def __init__(
        self, *, profile: bool = False, packed_cache: PackedCache | None = None, progress: Progress = no_progress
    ) -> None:
        self._kernels = import_kernels()
        self._isa = os.environ.get("JILJU_ISA", "")
        try:
            self.kernel_set: str = self._kernels.kernel_set(self._isa)
        except self._kernels.Unsupported as error:
            raise ConfigError(f"JILJU_ISA: {error}; unset it to let the CPU decide") from error
        self._profile = profile
        self._cache = packed_cache
        self._progress = progress
        self._found: tuple[bytes, np.ndarray] | None = None  # layout and packed weights, until they are loaded
        self._model: Any = None
        self._batch: Batch | None = None

    def find_packed(self, plan: Plan) -> bool:
        """Look for weights of the plan that were packed before; `load` takes what was found. True if there are any.

        They were packed from this very file, and its values had been checked.
        """
        layout = self._layout(encode_plan(plan))
        data = self._cache.find(layout) if self._cache is not None and layout.num_bytes else None
        self._found = (layout.digest, data) if data is not None else None
        return data is not None

    def weight_bytes(self, plan: Plan) -> int:
        """The packed weights, and in the file's form the tables of embeddings and what is not packed."""
        encoded = encode_plan(plan)
        layout = self._layout(encoded)
        packed = {encoded.weight_names[entry.weight_id] for entry in layout.entries}
        tables = {op.table.name for op in plan.ops if isinstance(op, Embed)}
        in_file = [spec.num_bytes for name, spec in plan.weights.items() if name in tables or name not in packed]
        return layout.num_bytes + sum(in_file)

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "f16") -> int:
        """Keys and values of all layers; a head's values are padded to a multiple of 8, and of int8 both have a float32 scale."""
        return self._memory_needs(encode_plan(plan), Limits(1, KEYS_PER_RUN, 1, 1, 1, 1, kv_dtype))[0]

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        return self._memory_needs(encode_plan(plan), limits)[1]

    def load(self, plan: Plan, weights: Mapping[str, WeightTensor], limits: Limits) -> None:
        """Check everything, pack the weights or take those found, allocate KV cache and workspace, start the threads."""
        _check_limits(limits)
        encoded = encode_plan(plan)
        data = [_checked_data(plan, weights, name) for name in encoded.weight_names]
        kv_bytes_per_token, workspace_bytes = self._memory_needs(encoded, limits)
        kv_bytes = kv_bytes_per_token * limits.block_size * limits.num_blocks
        _check_memory(kv_bytes, workspace_bytes, limits)
        packed = self._packed(encoded, data, limits.num_threads)
        try:
            self._model = self._kernels.Model(encoded.ints, encoded.reals, data, packed, _flat(limits), self._isa)
        except self._kernels.NoMemory as error:
            raise StartupError(f"{error}; lower the KV cache, the tokens of a step or the threads") from error
        except self._kernels.Unsupported as error:
            raise _unsupported(error) from error
        self._model.set_profiling(self._profile)

    def _layout(self, encoded: EncodedPlan) -> PackedLayout:
        try:
            version, entries = self._kernels.packed_layout(encoded.ints, encoded.reals)
        except self._kernels.Unsupported as error:
            raise _unsupported(error) from error
        return PackedLayout(version, entries, (encoded.ints.tobytes(), encoded.reals.tobytes()))

    def _packed(self, encoded: EncodedPlan, data: list[np.ndarray], num_threads: int) -> np.ndarray:
        """The packed weights, uint8 [bytes]: those that were found, or new ones."""
        layout = self._layout(encoded)
        found, self._found = self._found, None
        if found is not None and found[0] == layout.digest:
            return found[1]

        def pack(weight_id: int, out: np.ndarray) -> None:
            self._kernels.pack(encoded.ints, encoded.reals, weight_id, data[weight_id], out)

        if self._cache is not None and layout.num_bytes:
            return self._cache.make(layout, pack, self._progress)
        return pack_into_memory(layout, pack, self._progress, num_threads=num_threads)

    def launch(self, batch: Batch) -> None:
        assert self._model is not None, "launch before load"
        assert self._batch is None, "launch before wait of the step before"
        self._batch = batch

    def wait(self) -> StepResult:
        """Run the launched step, without the GIL. Raises ValueError, and computes nothing, if the batch is not sound."""
        batch, self._batch = self._batch, None
        assert batch is not None, "wait before launch"
        n = batch.num_logits
        result = StepResult(
            token_ids=np.empty(n, np.int32),
            logprobs=np.empty(n, np.float32),
            top_ids=np.empty((n, MAX_TOP), np.int32),
            top_logprobs=np.empty((n, MAX_TOP), np.float32),
            wanted_logprobs=np.empty(len(batch.wanted_ids), np.float32),
            finite=np.empty(n, np.bool_),
        )
        self._model.run(
            batch.token_ids, batch.starts, batch.counts, batch.block_tables, batch.logit_tokens, batch.targets, batch.positions,
            batch.seeds, batch.temperatures, batch.top_ks, batch.top_ps, batch.min_ps, batch.num_top, batch.repetition_penalties,
            batch.presence_penalties, batch.frequency_penalties, batch.penalty_starts, batch.penalty_ids, batch.penalty_counts,
            batch.bias_starts, batch.bias_ids, batch.biases, batch.banned_starts, batch.banned_ids, batch.wanted_starts, batch.wanted_ids,
            batch.mask_rows, batch.masks, batch.masks_ready, result.token_ids, result.logprobs, result.top_ids, result.top_logprobs, result.wanted_logprobs, result.finite,
        )  # fmt: skip
        return result

    def profile(self) -> StepProfile:
        """Nanoseconds by kind of op, as the calling thread saw them. Zeros unless made with profile=True."""
        assert self._model is not None, "profile before load"
        num_steps, ns = self._model.profile()
        return StepProfile(num_steps, dict(zip(self._kernels.OP_KINDS, ns, strict=True)))

    def free(self) -> None:
        self._model = None

    def _memory_needs(self, encoded: EncodedPlan, limits: Limits) -> tuple[int, int]:
        """Bytes of KV a token, bytes of workspace."""
        try:
            needs: tuple[int, int] = self._kernels.memory_needs(encoded.ints, encoded.reals, _flat(limits), self._isa)
        except self._kernels.Unsupported as error:
            raise _unsupported(error) from error
        return needs


def _unsupported(error: Exception) -> StartupError:
    return StartupError(f"the native backend does not run this model: {error}; use the reference backend")


def _flat(limits: Limits) -> np.ndarray:
    return np.array(
        [limits.num_blocks, limits.block_size, limits.max_rows, limits.max_tokens, limits.max_context, limits.num_threads,
         KV_DTYPES[limits.kv_dtype]], np.int64
    )  # fmt: skip


def _check_limits(limits: Limits) -> None:
    if limits.block_size < KEYS_PER_RUN or limits.block_size % KEYS_PER_RUN:
        raise StartupError(f"block size {limits.block_size}; the native backend takes multiples of {KEYS_PER_RUN}")
    for name in ("num_blocks", "max_rows", "max_tokens", "max_context", "num_threads"):
        if getattr(limits, name) < 1:
            raise StartupError(f"{name} is {getattr(limits, name)}; at least 1 is needed")
    if limits.num_threads > 1024:
        raise StartupError(f"num_threads is {limits.num_threads}; at most 1024 are allowed")


def _checked_data(plan: Plan, weights: Mapping[str, WeightTensor], name: str) -> np.ndarray:
    spec = plan.weights[name]
    if name not in weights:
        raise StartupError(
            f"weight {name} is missing; the plan needs {spec.num_outputs} x {spec.num_inputs} of {spec.type.name}"
        )
    tensor = weights[name]
    data = tensor.data
    if tensor.type != spec.type or data.dtype != np.uint8 or data.size != spec.num_bytes or not data.flags.c_contiguous:
        raise StartupError(
            f"weight {name} is {data.size} bytes of {tensor.type.name}; "
            f"the plan needs {spec.num_bytes} bytes of {spec.type.name} ({spec.num_outputs} x {spec.num_inputs}), in one piece"
        )
    return data.reshape(-1)


def _check_memory(kv_bytes: int, workspace_bytes: int, limits: Limits) -> None:
    """The system grants more than it has and kills whoever touches it; so ask first what it has."""
    available = available_memory_bytes()
    if kv_bytes + workspace_bytes > available:
        raise StartupError(
            f"the KV cache needs {kv_bytes / 2**20:.0f} MiB ({limits.num_blocks} blocks of {limits.block_size} tokens) and the "
            f"workspace {workspace_bytes / 2**20:.0f} MiB, but {available / 2**20:.0f} MiB of memory are available; "
            "ask for a smaller KV cache"
        )
