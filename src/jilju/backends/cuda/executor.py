"""CudaExecutor: the Executor protocol on one NVIDIA GPU.

Steps in which every row decodes are replayed as a CUDA graph, one per bucket of rows; others run kernel by kernel. After a
step the expected next one is queued at once (see run_ahead), so that the device computes while the host commits, decides and
packs. Owns what is on the device. Knows nothing of sequences or requests.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from jilju.backends.cuda import memory, run_ahead, weights
from jilju.backends.cuda.device import kernel_set
from jilju.backends.cuda.forward import Forward
from jilju.backends.cuda.kernels.inputs import expand
from jilju.backends.cuda.kernels.kv import copy_slots
from jilju.backends.cuda.lowering import Decoder, lower
from jilju.backends.cuda.memory import BUCKETS, MAX_LOGITS, bucket_of
from jilju.backends.cuda.sampling import Sampler
from jilju.backends.cuda.sampling_results import Download
from jilju.backends.cuda.step_inputs import InputMaker, StepInputs
from jilju.backends.cuda.tuning import Mode
from jilju.backends.cuda.uploads import Uploads
from jilju.backends.cuda.weights import Progress
from jilju.errors import DeviceLost, StartupError
from jilju.plan import Batch, KvDtype, Limits, Plan, Rope, StepResult, WeightDtype, WeightTensor
from jilju.plan.batch import MAX_TOP
from jilju.plan.cost import Roofs

logger = logging.getLogger(__name__)

COMPILED_TOKENS = (16, 32, 64, 128, 256, 512, 2048)  # of prompts: kernels differ by size up to the largest
PDL_TOKENS = 64  # of steps in which kernels overlap
PROBE_BYTES, PROBE_WIDTH = 1 << 30, 4096  # read, and width of the square matrices multiplied, by the probes of roofs()


def no_progress(done_bytes: int, total_bytes: int, text: str) -> None:
    """For callers without anyone to tell."""


@contextmanager
def lack_of_memory_told() -> Iterator[None]:
    """As a StartupError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the GPU's memory does not suffice: {error}; give a smaller --kv-memory, --step-tokens or model, "
            "or free what others hold on it"
        ) from error


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the model for some rows of a batch, under way: its results, and whose they are."""

    download: Download
    taken: np.ndarray  # rows of the pass's own logits that are wanted
    logits: np.ndarray  # logit rows of the batch that they are


@dataclass(slots=True)
class Ahead:
    """The expected next step, under way."""

    expected: Batch
    sources: np.ndarray  # of each of its rows the logit row of the step before that sampled its token
    download: Download
    token_ids: np.ndarray | None = None  # of its rows, once the step before is waited for


class CudaExecutor:
    name = "cuda"

    def __init__(
        self,
        weight_dtype: WeightDtype = "bf16",
        fast: bool = False,
        progress: Progress = no_progress,
        *,
        device: str = "cuda",
        runs_ahead: bool = True,
    ):
        """`device` "cpu" is for tests in Triton's interpreter: no graphs there."""
        self._dtype: WeightDtype = weight_dtype
        self._mode: Mode = "fast" if fast else "invariant"
        self.invariant = not fast
        self._progress = progress
        self._device = torch.device(device)
        self._runs_ahead = runs_ahead
        self._gpu_name, capability = _device_of_torch() if device == "cuda" else ("cpu", (0, 0))
        self.kernel_set = kernel_set(capability, fast)
        self.num_rows_ahead = 0  # that had run when their step came
        self.num_rows_moved = 0  # of them, those that had been written to a spare block
        self._batch: Batch | None = None
        self._ahead: Ahead | None = None
        self._passes: list[Pass] = []

    def weight_bytes(self, plan: Plan) -> int:
        return memory.weight_bytes(plan, self._dtype)

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "bf16") -> int:
        return memory.kv_bytes_per_token(plan, kv_dtype)

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        return memory.workspace_bytes(plan, limits, self._dtype)

    def load(self, plan: Plan, weights_: Mapping[str, WeightTensor], limits: Limits) -> None:
        """Raises StartupError for a plan that the kernels do not run, or if the device's memory does not suffice."""
        source = weights.FileSource(weights_, self._device, plan.weight_bytes, self._progress)
        with lack_of_memory_told():
            self._load(plan, source, limits)

    def load_dummy(
        self, plan: Plan, limits: Limits, seed: int = 0, given: Mapping[str, WeightTensor] | None = None
    ) -> None:
        """Random weights, made on the device, but for those `given`: of factors of rope every one must be."""
        given = given or {}
        factors = {op.factors.name for op in plan.ops if isinstance(op, Rope) and op.factors is not None}
        assert factors <= given.keys(), f"{factors - given.keys()} would be made up"
        with lack_of_memory_told():
            self._load(plan, weights.DummySource(self._device, seed, given), limits)

    def _load(self, plan: Plan, source: weights.Source, limits: Limits) -> None:
        self._plan, self._limits = plan, limits
        self._decoder: Decoder = lower(plan)
        half = weights.HALF[self._dtype]
        self._weights = weights.load(self._decoder, source, self._dtype, self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what loading took is no part of the plan, and others than torch need it
        self._buffers = {
            name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            for name, spec in memory.buffers(plan, limits, self._dtype).items()
        }
        self._uploads = Uploads(self._device, memory.upload_bytes(limits))
        self._sampler = Sampler(plan.vocab_size, MAX_LOGITS, self._device)
        self._buffers["decode_rows"].copy_(torch.arange(len(self._buffers["decode_rows"])))
        self._fill_angles()
        self._forward = Forward(
            self._decoder, self._weights, self._buffers, limits, self._mode, self._gpu_name, half,
            pdl_tokens=PDL_TOKENS if self._device.type == "cuda" else 0,
        )  # fmt: skip
        self._inputs = InputMaker(self._decoder, self._buffers, self._uploads, limits, self._forward.attention_config)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}  # None: it cannot be captured
        self._seen: set[tuple[int, int]] = set()  # buckets that ran once, so that their kernels are compiled
        self._graph_pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._sampled_ids = self._buffers["sampled_ids"]  # int32 [rows], of the last step, at their logit rows
        self._done = torch.cuda.Event() if self._device.type == "cuda" else None  # of the launched step
        if self._device.type == "cuda":
            self._compile()

    def _compile(self) -> None:
        """Every kernel once, in the sizes that serving takes, on rows that do nothing: what is compiled is kept on disk for the
        next start, and nobody who waits for an answer waits for a compiler."""
        sizes = [b for b in BUCKETS if b <= len(self._buffers["decode_rows"])]
        prompts = [n for n in COMPILED_TOKENS if n <= self._limits.max_tokens]
        self._progress(
            0, 0, "loading kernels; those that are new to this GPU and model are compiled, which takes a minute"
        )
        for size in sizes:
            for num_splits in (1, 2) if self._inputs.can_split(size, is_prefill=False) else (1,):
                inputs = self._inputs.decode(size, num_splits)
                inputs.slots.fill_(-1)
                inputs.tile_rows.fill_(-1)
                self._forward.run(inputs)
            self._forward.logits(self._buffers["decode_rows"][:size])
        for size in prompts:
            for num_splits in (1, 2) if self._inputs.can_split(size, is_prefill=True) else (1,):
                self._forward.run(self._inputs.nothing(size, num_splits))
        nowhere = torch.full((1,), -1, dtype=torch.int32, device=self._device)
        copy_slots(self._buffers["kv"], self._buffers.get("kv_scales"), nowhere, nowhere)
        self._sampler.warm_up()
        self._synchronize()

    def _fill_angles(self) -> None:
        """Tables of cos and sin, from angles in float64: [max_context, head_dim / 2] for each distinct rotation"""
        positions = torch.arange(self._limits.max_context, dtype=torch.float64)
        for index, (head_dim, theta, factors) in enumerate(self._decoder.angles):
            half = head_dim // 2
            angles = positions[:, None] / theta ** (torch.arange(half, dtype=torch.float64) / half)
            if factors is not None:
                angles = angles / self._weights.rope_factors[factors.name].cpu().double()
            self._buffers[f"cos {index}"].copy_(angles.cos())
            self._buffers[f"sin {index}"].copy_(angles.sin())

    def launch(self, batch: Batch) -> None:
        """Queue the step on the device, and behind it the one that is expected next."""
        assert self._batch is None, "launch before wait of the step before"
        _check(batch, self._limits)
        ahead, self._ahead = self._ahead, None
        self._passes = []
        self._batch = batch
        try:
            rest = np.arange(batch.num_rows)
            if ahead is not None and ahead.token_ids is not None:
                rest = self._take(ahead, batch)
            if len(rest) == batch.num_rows:
                self._run(batch, np.arange(batch.num_logits))
            elif len(rest):
                self._run(*run_ahead.part_of(batch, rest))
            if self._done is not None:
                self._done.record()
            if self._runs_ahead:
                self._ahead = self._run_ahead(batch)
        except BaseException as error:
            self._batch = None
            self._check_device(error)
            raise

    def wait(self) -> StepResult:
        """The results of the launched step; what was queued behind it goes on."""
        batch, self._batch = self._batch, None
        assert batch is not None, "wait before launch"
        try:
            if self._done is not None:
                self._done.synchronize()  # rows without logits have no results to wait for, but take the step's time
            result = _gather(batch, self._passes)
        except BaseException as error:
            self._ahead = None
            self._check_device(error)
            raise
        if self._ahead is not None:
            self._ahead.token_ids = result.token_ids[self._ahead.sources]
        return result

    def _check_device(self, error: BaseException) -> None:
        """Raises DeviceLost if what went wrong was not one step but the device: no call of this process succeeds from then on."""
        try:
            self._synchronize()
        except Exception as lost:
            raise DeviceLost(f"the GPU computes no more for this process: {lost}") from error

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        self._batch = self._ahead = None
        self._passes = []
        self._graphs.clear()
        for name in ("_forward", "_inputs", "_buffers", "_weights", "_sampler", "_uploads", "_sampled_ids"):
            if hasattr(self, name):
                delattr(self, name)
        if self._device.type == "cuda":
            with contextlib.suppress(Exception):  # a device that is lost has nothing to give back
                torch.cuda.synchronize()
                torch.cuda.empty_cache()

    def roofs(self) -> Roofs:
        """A short probe of each: reading memory, and a product of half matrices."""
        with lack_of_memory_told():
            data = torch.ones(PROBE_BYTES // 4, dtype=torch.float32, device=self._device)
            square = torch.randn(PROBE_WIDTH, PROBE_WIDTH, dtype=weights.HALF[self._dtype], device=self._device)
            read_s, product_s = _seconds(lambda: data.sum()), _seconds(lambda: square @ square)
        return Roofs(PROBE_BYTES / read_s, 2 * PROBE_WIDTH**3 / product_s)

    def decode_seconds(self, batch: Batch, num_steps: int) -> float:
        """Of a step in which every row decodes, on the device alone, sampling included: the mean of so many, for benchmarks."""
        sources = np.full(batch.num_rows, -1, np.int32)
        for _ in range(3):  # compiled, captured, replayed
            self._decode(batch, sources).result()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(num_steps):
            last = self._decode(batch, sources)
        end.record()
        last.result()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / num_steps

    # A batch, run whole or in parts.

    def _take(self, ahead: Ahead, batch: Batch) -> np.ndarray:
        """What of the batch has run already; returns the rows that have not."""
        assert ahead.token_ids is not None, "checked"
        block_size = self._limits.block_size
        found = run_ahead.match(ahead.expected, ahead.token_ids, batch, block_size)
        rows = np.flatnonzero(found >= 0)
        if not len(rows):
            return np.arange(batch.num_rows)
        taken = found[rows]
        logits = run_ahead.logit_of_rows(batch)[rows]
        self.num_rows_ahead += len(rows)
        self._passes.append(Pass(ahead.download, taken, logits))
        # what was written to a spare block goes where it belongs, before anything reads it
        wrote = run_ahead.written_slots(ahead.expected, block_size)[taken]
        belongs = run_ahead.written_slots(batch, block_size)[rows]
        moved = wrote != belongs
        if moved.any():
            sources, targets = self._uploads.put([wrote[moved], belongs[moved]])
            self.num_rows_moved += len(sources)
            copy_slots(self._buffers["kv"], self._buffers.get("kv_scales"), sources, targets)
        if batch.num_logits > len(self._sampled_ids):
            pass  # nothing runs ahead of such a step, which would read them
        elif np.array_equal(taken, logits) and taken[-1] + 1 == len(taken):
            self._sampled_ids[: len(taken)].copy_(ahead.download.token_ids[: len(taken)])
        else:
            sources, targets = self._uploads.put([taken.astype(np.int64), logits.astype(np.int64)])
            self._sampled_ids[targets] = ahead.download.token_ids[sources]
        return np.flatnonzero(found < 0)

    def _run(self, batch: Batch, logits: np.ndarray) -> None:
        """`logits`: which logit rows of the whole batch this one's are."""
        firsts = run_ahead.first_tokens(batch)
        decodes = batch.num_logits == batch.num_rows == batch.num_tokens and (batch.logit_tokens == firsts).all()
        if decodes:
            download = self._decode(batch, np.full(batch.num_rows, -1, np.int32))
            self._keep_ids(download, logits)
            self._passes.append(Pass(download, np.arange(batch.num_rows), logits))
            return
        self._forward.run(self._inputs.mixed(batch))
        for first in range(0, batch.num_logits, MAX_LOGITS):
            some = np.arange(first, min(first + MAX_LOGITS, batch.num_logits))
            part = batch if len(some) == batch.num_logits else run_ahead.logits_between(batch, first, first + len(some))
            (rows,) = self._uploads.put([part.logit_tokens])
            download = self._sample(self._forward.logits(rows), part)
            self._keep_ids(download, logits[some])
            self._passes.append(Pass(download, np.arange(len(some)), logits[some]))

    def _keep_ids(self, download: Download, logits: np.ndarray) -> None:
        """The ids stay on the device, at their logit rows of the batch, for the step that runs ahead."""
        if len(logits) and logits[-1] < len(self._sampled_ids):
            if logits[-1] - logits[0] + 1 == len(logits):
                self._sampled_ids[logits[0] : logits[-1] + 1].copy_(download.token_ids)
            else:
                (places,) = self._uploads.put([logits.astype(np.int64)])
                self._sampled_ids[places] = download.token_ids

    def _run_ahead(self, batch: Batch) -> Ahead | None:
        limits = self._limits
        if batch.num_logits != batch.num_rows:
            return None
        found = run_ahead.expect(batch, limits.block_size, limits.max_context, spare_block=limits.num_blocks)
        if found is None:
            return None
        expected, sources = found
        return Ahead(expected, sources, self._decode(expected, sources.astype(np.int32)))

    def _decode(self, batch: Batch, sources: np.ndarray) -> Download:
        """A batch of rows of one token, each sampled; `sources` int32 [num_rows]: where its id is on the device, or -1."""
        num_rows = batch.num_rows
        bucket = bucket_of(num_rows)
        heads = np.concatenate([sources, batch.token_ids, batch.starts])
        width = -(-(int(batch.starts.max()) + 1) // self._limits.block_size)
        given = self._uploads.put([heads, np.ascontiguousarray(batch.block_tables[:, :width])])
        inputs = self._inputs.decode(bucket, self._inputs.num_splits(bucket, batch))
        expand(
            given[0], given[1], self._sampled_ids, inputs.token_ids, inputs.positions, inputs.slots, inputs.counts,
            inputs.tile_rows, inputs.tables, self._limits.block_size, self._plan.vocab_size,
        )  # fmt: skip
        logits = self._replay(bucket, inputs)
        return self._sample(logits[:num_rows], batch)

    def _sample(self, logits: torch.Tensor, batch: Batch) -> Download:
        inputs = self._sampler.upload(batch)
        self._sampler.upload_masks(inputs, batch)
        return self._sampler.begin_download(self._sampler.sample(logits, inputs))

    # Graphs.

    def _replay(self, bucket: int, inputs: StepInputs) -> torch.Tensor:
        """Logits of a decode step, float32 [bucket, vocab]. A bucket's first step runs kernel by kernel, which compiles them;
        its second is captured. One that cannot be captured goes on kernel by kernel."""
        key = (bucket, inputs.num_splits)
        rows = self._buffers["decode_rows"][:bucket]
        if self._device.type == "cuda" and key in self._seen and key not in self._graphs:
            self._graphs[key] = self._capture(key, inputs, rows)
        self._seen.add(key)
        graph = self._graphs.get(key)
        if graph is None:
            self._forward.run(inputs)
            return self._forward.logits(rows)
        graph.replay()
        return self._buffers["logits"][:bucket]

    def _capture(self, key: tuple[int, int], inputs: StepInputs, rows: torch.Tensor) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._graph_pool):
                self._forward.run(inputs)
                self._forward.logits(rows)
        except RuntimeError as error:
            self._check_device(error)
            logger.warning("a step of %d rows and %d splits was not captured, and so is slower: %s", *key, error)
            return None
        logger.debug("captured a step of %d rows and %d splits", *key)
        return graph


def _device_of_torch() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the device that torch computes on. Raises StartupError where it can use none."""
    try:
        return torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        raise StartupError(
            f"torch {torch.__version__} cannot use the GPU: {error}; update the driver, or install a torch built for an older CUDA"
        ) from error


def _check(batch: Batch, limits: Limits) -> None:
    """Raises ValueError, before anything is queued: the device would not say what was wrong."""
    if not 1 <= batch.num_tokens <= limits.max_tokens or batch.num_rows > limits.max_rows:
        raise ValueError(
            f"{batch.num_tokens} tokens in {batch.num_rows} rows; limits are {limits.max_tokens} and {limits.max_rows}"
        )
    ends = batch.starts + batch.counts
    if batch.counts.min() < 1 or batch.counts.sum() != batch.num_tokens or batch.starts.min() < 0:
        raise ValueError(f"rows hold {batch.counts.sum()} of {batch.num_tokens} tokens")
    if ends.max() > limits.max_context:
        raise ValueError(f"a row ends at {ends.max()}, the context is {limits.max_context}")
    places = np.arange(batch.block_tables.shape[1])
    used = places < -(-ends // limits.block_size)[:, None]
    tables = batch.block_tables[used]
    if used.sum() != (-(-ends // limits.block_size)).sum() or tables.min() < 0 or tables.max() >= limits.num_blocks:
        raise ValueError(f"a block table does not cover its row with blocks below {limits.num_blocks}")


def _gather(batch: Batch, passes: list[Pass]) -> StepResult:
    """Results of the passes, in the order of the batch's logit rows."""
    n = batch.num_logits
    out = StepResult(
        token_ids=np.zeros(n, np.int32), logprobs=np.zeros(n, np.float32), top_ids=np.full((n, MAX_TOP), -1, np.int32),
        top_logprobs=np.zeros((n, MAX_TOP), np.float32), wanted_logprobs=np.zeros(len(batch.wanted_ids), np.float32),
        finite=np.zeros(n, np.bool_),
    )  # fmt: skip
    for of in passes:
        result = of.download.result()
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "finite"):
            getattr(out, name)[of.logits] = getattr(result, name)[of.taken]
        if len(result.wanted_logprobs):
            wanted = [np.arange(batch.wanted_starts[i], batch.wanted_starts[i + 1]) for i in of.logits]
            out.wanted_logprobs[np.concatenate(wanted)] = result.wanted_logprobs
    return out


def _seconds(work: object) -> float:
    """The best of a few runs on the device."""
    assert callable(work)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(4):
        begin.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best
