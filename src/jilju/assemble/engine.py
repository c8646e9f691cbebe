"""What computes, put together: model file -> plan -> memory plan -> executor -> Engine.

Owns the choice of backend and the arithmetic of what fits into memory. The engine's process, the class LLM and the
benchmarks all come through here. Knows nothing of text or HTTP.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from jilju.assemble.fit import BLOCK_SIZE, Held, MemoryPlan, fit, show_bytes
from jilju.assemble.gpu import find_device, gpu_config
from jilju.assemble.packed import packed_folder
from jilju.backends.cuda.device import Gpu, kernel_set
from jilju.backends.cuda.memory import CudaNeeds, held_plan
from jilju.backends.native import NativeExecutor, NativeProbes, PackedCache
from jilju.backends.reference import ReferenceExecutor
from jilju.clock import Clock, WallClock
from jilju.config import AUTO, ServeConfig, available_memory_bytes, huge_pages_offered, usable_cores
from jilju.engine.grammars import Grammars
from jilju.engine.loop import Engine
from jilju.engine.matcher import MatcherSource
from jilju.engine.request import Request, SamplingParams
from jilju.engine.step_times import StepTimes
from jilju.formats.gguf import GgufFile
from jilju.model import sources
from jilju.model.checkpoint import Checkpoint, LoadFormat, open_checkpoint, plan_of, spec_of
from jilju.model.dummy import dummy_weights, given_weights
from jilju.model.sources import ModelEntry, Progress, no_progress
from jilju.model.spec import ModelSpec
from jilju.model.weights import load_weights
from jilju.plan import Executor, KvDtype, Limits, Linear, Plan, WeightDtype, WeightTensor
from jilju.plan.cost import Roofs

TEXT_TO_IDS = ("tokenizer.ggml.merges", "tokenizer.ggml.scores")  # the largest fields of a file's head
PROBE_BYTES, PROBE_S = 128 << 20, 0.01  # read by a probe of the machine, which no cache holds; its time
WARM_UP_TOKENS = 32  # computed at load, to see how long it takes
AUTO_HUGE_SHARE = 2  # --huge-pages auto wants all that an engine holds to fit into half of the available memory
MAX_ROWS, STEP_TOKENS = {"cpu": 32, "cuda": 256}, {"cpu": 256, "cuda": 2048}  # of a step, by default

Backend = Literal["native", "reference", "cuda"]
CpuBackend = Literal["native", "reference"]


class ModelFile(msgspec.Struct, frozen=True):
    """A model on this machine, read as far as needed to plan with it; the weights are not touched yet."""

    name: str
    path: str
    entry: ModelEntry | None  # of the model table, for a named model
    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan
    load_format: LoadFormat = "auto"


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an engine needs to start, as plain data: it crosses to the engine's process as JSON."""

    path: str
    num_blocks: int
    max_context: int
    max_rows: int
    step_tokens: int
    num_threads: int
    token_gap_ms: float = 0.0  # of a step beside a stream; 0: no bound
    packed_cache: str | None = None  # folder of packed weights; None: they are packed into memory
    huge_pages: bool = False  # weights in memory of the process's own instead of mapped
    block_size: int = BLOCK_SIZE
    kv_dtype: KvDtype = "f16"
    backend: Backend = "native"
    device: Gpu | None = None  # of the backend cuda; None: the first that CUDA sees
    weight_dtype: WeightDtype = "bf16"  # this and what follows are of the backend cuda
    fast: bool = False  # bits may depend on what else is in a step
    dummy_weights: bool = False  # random numbers in place of the model's; of all backends


def open_model(
    model: str, progress: Progress = no_progress, accept_licence: str | None = None, load_format: LoadFormat = "auto"
) -> ModelFile:
    """Find (and if needed fetch) a model by name or path, and read its head; before that, record that the caller accepts the
    terms of that name. With dummy weights a folder needs none of its own. Raises StartupError."""
    if accept_licence is not None:
        sources.accept_licence(accept_licence, "accept_licence=")
    resolved = sources.resolve(model, progress)
    checkpoint = open_checkpoint(str(resolved.path), load_format)
    spec, plan = spec_of(checkpoint), plan_of(checkpoint)
    return ModelFile(resolved.name, str(resolved.path), resolved.entry, checkpoint, spec, plan, load_format)


def make_executor(backend: CpuBackend) -> Executor:
    return NativeExecutor() if backend == "native" else ReferenceExecutor()


def kernel_set_of(options: EngineOptions) -> str:
    """What will compute, of a GPU with the formats that were chosen for it; asked where no GPU's library is loaded."""
    if options.backend != "cuda":
        return make_executor(options.backend).kernel_set
    assert options.device is not None, "planned for a GPU"
    kernels = kernel_set(options.device.capability, options.fast)
    return f"{kernels}, {options.weight_dtype} weights, {options.kv_dtype} KV"


def resolve_engine(
    model: ModelFile, config: ServeConfig, backend: CpuBackend = "native", gpu: Gpu | None = None
) -> tuple[ServeConfig, EngineOptions, MemoryPlan]:
    """Fill in the open settings (threads, context, KV memory) and say what the engine will hold.

    `gpu` is the one of --device cuda; None: it is looked for. Raises ConfigError for settings that contradict each other or
    the model, StartupError if memory does not suffice.
    """
    gpu = gpu or find_device(config)
    for name, by_device in (("max_rows", MAX_ROWS), ("step_tokens", STEP_TOKENS)):
        if getattr(config, name) is None:
            config = config.with_auto(name, by_device[config.device], "for a CPU" if gpu is None else "for a GPU")
    if gpu is not None:
        return _resolve_cuda(model, config, gpu)
    if config.threads is None:
        cores, reason = usable_cores()
        config = config.with_auto("threads", cores, reason)
    folder = packed_folder(config)
    if config.packed_cache is None:
        config = config.with_auto("packed_cache", str(folder), "in the cache folder")
    kv_dtype: KvDtype = "int8" if config.kv_dtype == "int8" else "f16"
    if config.kv_dtype == AUTO:
        config = config.with_auto("kv_dtype", kv_dtype, "half precision")
    available = available_memory_bytes()
    held = Held(model.name, model.plan, model.spec.max_context, make_executor(backend), kv_dtype, available)
    config, memory = fit(held, config)
    if config.huge_pages == "auto":
        value, reason = choose_huge_pages(memory.total_bytes, available)
        config = config.with_auto("huge_pages", value, reason)
    options = msgspec.structs.replace(
        _options(model, config, memory), backend=backend, kv_dtype=kv_dtype, num_threads=config.threads,
        packed_cache=str(folder) if folder is not None else None, huge_pages=config.huge_pages == "on",
    )  # fmt: skip
    return config, options, memory


def _resolve_cuda(model: ModelFile, config: ServeConfig, gpu: Gpu) -> tuple[ServeConfig, EngineOptions, MemoryPlan]:
    config, weight_dtype, kv_dtype = gpu_config(model.plan, config)
    needs = CudaNeeds(weight_dtype)
    held = Held(model.name, model.plan, model.spec.max_context, needs, kv_dtype, gpu.free_bytes, gpu)
    config, memory = fit(held, config)
    options = msgspec.structs.replace(
        _options(model, config, memory), backend="cuda", device=gpu, weight_dtype=weight_dtype, kv_dtype=kv_dtype,
        fast=config.fast,
    )  # fmt: skip
    return config, options, memory


def _options(model: ModelFile, config: ServeConfig, memory: MemoryPlan) -> EngineOptions:
    """What all backends take."""
    assert config.max_rows is not None and config.step_tokens is not None, "filled in before"
    return EngineOptions(
        path=model.path, num_blocks=memory.num_blocks, max_context=memory.context, max_rows=config.max_rows,
        step_tokens=config.step_tokens, token_gap_ms=config.token_gap_ms, num_threads=1,
        dummy_weights=config.load_format == "dummy",
    )  # fmt: skip


def choose_huge_pages(total_bytes: int, available_bytes: int) -> tuple[Literal["on", "off"], str]:
    """On or off, and why, for an engine that holds `total_bytes`."""
    if not huge_pages_offered():
        return "off", "the system offers none"
    if total_bytes > available_bytes // AUTO_HUGE_SHARE:
        return "off", f"more than half of {show_bytes(available_bytes)} would be held"
    return "on", "offered, and memory suffices"


def limits_of(options: EngineOptions) -> Limits:
    return Limits(
        num_blocks=options.num_blocks, block_size=options.block_size, max_rows=options.max_rows, max_tokens=options.step_tokens,
        max_context=options.max_context, num_threads=options.num_threads, kv_dtype=options.kv_dtype,
    )  # fmt: skip


def build_engine(
    options: EngineOptions,
    clock: Clock | None = None,
    progress: Progress = no_progress,
    *,
    makes_grammars_beside: bool = False,
) -> Engine:
    """Load the weights and make the engine. Raises StartupError. `makes_grammars_beside`: for who takes steps for others too
    while a grammar is made."""
    begin = time.perf_counter()
    checkpoint = open_checkpoint(options.path, "dummy" if options.dummy_weights else "auto")
    plan = plan_of(checkpoint)
    limits = limits_of(options)
    executor: Executor
    roofs: Roofs | None = None
    if options.backend == "native":
        folder = Path(options.packed_cache) if options.packed_cache is not None else None
        executor = load_native(
            checkpoint, plan, limits, folder, progress, huge_pages=options.huge_pages, is_dummy=options.dummy_weights
        )
    elif options.backend == "cuda":
        executor, roofs = load_cuda(checkpoint, plan, limits, options, progress)
    else:
        executor = ReferenceExecutor()
        executor.load(plan, _weights(checkpoint, plan, is_dummy=options.dummy_weights), limits)
    checkpoint.drop_pages()  # of what was checked and packed
    times = warm_up(plan, executor, limits)
    if options.backend == "native":
        roofs = measure_roofs(plan, limits.num_threads)
    load_ms = (time.perf_counter() - begin) * 1e3
    # the prefix cache's hash is keyed by a secret of this process, so that nobody can make two prompts collide
    return Engine(
        plan, executor, limits, clock or WallClock(), hash_key=os.urandom(16), load_ms=load_ms, times=times,
        gap_ms=options.token_gap_ms, roofs=roofs, held_plan=held_plan_of(plan, options),
        grammars=Grammars(_matchers_of(checkpoint, plan, options), makes_beside=makes_grammars_beside, fills_beside=True),
    )  # fmt: skip


def held_plan_of(plan: Plan, options: EngineOptions) -> Plan:
    """The plan with its weights as the backend holds them."""
    return held_plan(plan, options.weight_dtype) if options.backend == "cuda" else plan


def _weights(
    checkpoint: Checkpoint, plan: Plan, *, is_dummy: bool, check_values: bool = True
) -> Mapping[str, WeightTensor]:
    return (
        dummy_weights(spec_of(checkpoint), plan)
        if is_dummy
        else load_weights(checkpoint, plan, check_values=check_values)
    )


def _matchers_of(checkpoint: Checkpoint, plan: Plan, options: EngineOptions) -> Callable[[], MatcherSource]:
    """Makes the source of matchers when one is wanted. Until then it keeps what it needs of a GGUF file, whose rest can go; a
    folder's tokenizer is a file of its own, which is read then."""
    ids_to_bytes = None
    if isinstance(checkpoint, GgufFile):
        ids_to_bytes = {key: value for key, value in checkpoint.metadata.items() if key not in TEXT_TO_IDS}

    def make() -> MatcherSource:
        # imported here, for an engine that meets no grammar starts without it
        from jilju.text.matcher import GrammarSource
        from jilju.text.text_files import GgufText, open_text_files

        if ids_to_bytes is not None:
            table = GgufText(ids_to_bytes, options.path).token_table()
        else:
            table = open_text_files(options.path, plan.vocab_size, stands_in=options.dummy_weights).token_table()
        return GrammarSource(table, plan.vocab_size)

    return make


def warm_up(plan: Plan, executor: Executor, limits: Limits) -> StepTimes:
    """Run a short request, so that the first real one meets warm memory and an engine that knows how long its steps take.

    Two of the three figures are learnt here: what a step takes in any case, and what a token adds. Nothing of it stays in
    the cache that the scheduler knows of.
    """
    num_prompt = max(
        1, min(WARM_UP_TOKENS, limits.max_tokens, limits.max_context - 3, limits.num_blocks * limits.block_size - 3)
    )
    engine = Engine(plan, executor, limits, WallClock())
    params = SamplingParams(
        seed=0, temperature=0.0, max_tokens=min(3, limits.max_context - num_prompt), ignore_eos=True
    )
    took_ns: list[list[int]] = []
    for token_id in range(2):  # the first meets cold memory, and says nothing of steps to come
        engine.submit(Request(id=f"warm-up {token_id}", prompt_ids=[token_id] * num_prompt, params=params))
        num_before = len(engine.log.steps)
        while engine.has_work():
            engine.step()
        took_ns.append([step.end_ns - step.begin_ns for step in engine.log.steps[num_before:]])
    prefill_ns, decode_ns = min(steps[0] for steps in took_ns), min(min(steps) for steps in took_ns)
    token_ns = max(0.0, (prefill_ns - decode_ns) / max(1, num_prompt - 1))
    return StepTimes((max(0.0, decode_ns - token_ns), token_ns, 0.0), is_measured=True)


def measure_roofs(plan: Plan, num_threads: int) -> Roofs:
    """One short probe of each: steps are shown beside them, and `jilju bench machine` measures with more care."""
    probes = NativeProbes()
    by_family: dict[str, int] = {}
    for op in plan.ops:
        if isinstance(op, Linear):
            for weight in op.parts:
                family = probes.family_of(weight.type)
                by_family[family] = by_family.get(family, 0) + weight.num_bytes
    family = max(by_family, key=lambda name: by_family[name])
    gb_s = probes.read_bandwidth(PROBE_BYTES, num_threads, PROBE_S)
    return Roofs(gb_s * 1e9, probes.kernel_peak(family, num_threads, PROBE_S) * 1e9)


def load_native(
    checkpoint: Checkpoint,
    plan: Plan,
    limits: Limits,
    folder: Path | None,
    progress: Progress,
    *,
    huge_pages: bool,
    profile: bool = False,
    is_dummy: bool = False,
) -> NativeExecutor:
    """The native backend, loaded; `folder` keeps packed weights, `huge_pages` puts them into memory. Raises StartupError.
    Nothing is kept of a model folder, whose number formats are not packed, nor of dummy weights.

    Values of the file are checked, unless weights are found that were packed from it: then they were checked before that.
    """
    cache = (
        PackedCache(folder, Path(checkpoint.path), checkpoint.status, limits.num_threads, huge_pages)
        if folder is not None and isinstance(checkpoint, GgufFile) and not is_dummy
        else None
    )
    executor = NativeExecutor(profile=profile, packed_cache=cache, progress=progress)
    is_checked = executor.find_packed(plan)
    executor.load(plan, _weights(checkpoint, plan, is_dummy=is_dummy, check_values=not is_checked), limits)
    return executor


def load_cuda(
    checkpoint: Checkpoint, plan: Plan, limits: Limits, options: EngineOptions, progress: Progress
) -> tuple[Executor, Roofs]:
    """The GPU backend, loaded, and what the GPU can do at most. Raises StartupError."""
    # in the process that computes alone: it takes seconds, and memory
    from jilju.backends.cuda.executor import CudaExecutor

    executor = CudaExecutor(options.weight_dtype, options.fast, progress=progress)
    roofs = executor.roofs()  # before the memory is taken that they need for a moment
    if options.dummy_weights:
        executor.load_dummy(plan, limits, given=given_weights(spec_of(checkpoint)))
    else:
        executor.load(plan, load_weights(checkpoint, plan, check_values=False), limits)  # it checks them on the GPU
    return executor, roofs
