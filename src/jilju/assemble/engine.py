"""What computes, put together: model file -> plan -> memory plan -> executor -> Engine.

Owns the choice of backend and the arithmetic of what fits into memory. The engine's process, the class LLM and the
benchmarks all come through here. Knows nothing of text or HTTP.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from jilju.assemble.packed import packed_folder
from jilju.backends.native import NativeExecutor, NativeProbes, PackedCache
from jilju.backends.reference import ReferenceExecutor
from jilju.clock import Clock, WallClock
from jilju.config import ServeConfig, available_memory_bytes, huge_pages_offered, usable_cores
from jilju.engine.grammars import Grammars
from jilju.engine.loop import Engine
from jilju.engine.matcher import MatcherSource
from jilju.engine.request import Request, SamplingParams
from jilju.engine.step_times import StepTimes
from jilju.errors import ConfigError, StartupError
from jilju.formats.gguf import GgufFile
from jilju.model import sources
from jilju.model.decoder import build_plan
from jilju.model.sources import ModelEntry, Progress, no_progress
from jilju.model.spec import ModelSpec, spec_from_gguf
from jilju.model.weights import load_weights
from jilju.plan import Executor, KvDtype, Limits, Linear, Plan
from jilju.plan.cost import Roofs

BLOCK_SIZE = 16  # slots of a KV block: small, so that a shared prefix is found to within 15 tokens
AUTO_KV_SHARE = 4  # --kv-memory auto takes a quarter of the available memory ...
AUTO_KV_CONTEXTS = 64  # ... but not more than this many full contexts
TEXT_TO_IDS = ("tokenizer.ggml.merges", "tokenizer.ggml.scores")  # the largest fields of a file's head
PROBE_BYTES, PROBE_S = 128 << 20, 0.01  # read by a probe of the machine, which no cache holds; its time
WARM_UP_TOKENS = 32  # computed at load, to see how long it takes
AUTO_HUGE_SHARE = 2  # --huge-pages auto wants all that an engine holds to fit into half of the available memory

Backend = Literal["native", "reference"]


class ModelFile(msgspec.Struct, frozen=True):
    """A model on this machine, read as far as needed to plan with it; the weights are not touched yet."""

    name: str
    path: str
    entry: ModelEntry | None  # of the model table, for a named model
    gguf: GgufFile
    spec: ModelSpec
    plan: Plan


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


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine will hold, in bytes, told before it loads."""

    available_bytes: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    context: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def pool_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE


def open_model(model: str, progress: Progress = no_progress, accept_licence: str | None = None) -> ModelFile:
    """Find (and if needed fetch) a model by name or path, and read its head; before that, record that the caller accepts the
    terms of that name. Raises StartupError."""
    if accept_licence is not None:
        sources.accept_licence(accept_licence, "accept_licence=")
    resolved = sources.resolve(model, progress)
    gguf = GgufFile.open(resolved.path)
    spec = spec_from_gguf(gguf)
    plan = build_plan(spec, {tensor.name: tensor.type for tensor in gguf.tensors.values()})
    return ModelFile(resolved.name, str(resolved.path), resolved.entry, gguf, spec, plan)


def make_executor(backend: Backend) -> Executor:
    return NativeExecutor() if backend == "native" else ReferenceExecutor()


def resolve_engine(
    model: ModelFile, config: ServeConfig, backend: Backend = "native"
) -> tuple[ServeConfig, EngineOptions, MemoryPlan]:
    """Fill in the open settings (threads, context, KV memory) and say what the engine will hold.

    Raises ConfigError for settings that contradict each other or the model, StartupError if memory does not suffice.
    """
    executor, available, longest = make_executor(backend), available_memory_bytes(), model.spec.max_context
    if config.threads is None:
        cores, reason = usable_cores()
        config = config.with_auto("threads", cores, reason)
    folder = packed_folder(config)
    if config.packed_cache is None:
        config = config.with_auto("packed_cache", str(folder), "in the cache folder")
    if config.context is not None and config.context > longest:
        raise ConfigError(f"--context is {config.context}; {model.name} was made for at most {longest} tokens")

    kv_token = executor.kv_bytes_per_token(model.plan, config.kv_dtype)
    if config.kv_memory is None:
        most = AUTO_KV_CONTEXTS * (config.context or longest) * kv_token
        share = available // AUTO_KV_SHARE
        reason = f"a quarter of {show_bytes(available)} available" if share < most else f"{AUTO_KV_CONTEXTS} contexts"
        config = config.with_auto("kv_memory", min(share, most), reason)
    kv_memory, threads = config.kv_memory, config.threads
    assert kv_memory is not None and threads is not None, "filled in above"
    num_blocks = kv_memory // (kv_token * BLOCK_SIZE)
    pool_tokens = num_blocks * BLOCK_SIZE
    if num_blocks == 0:
        need = kv_token * BLOCK_SIZE
        raise ConfigError(
            f"--kv-memory of {show_bytes(kv_memory)} holds no block of {BLOCK_SIZE} tokens; give at least --kv-memory {need}"
        )
    if config.context is None:
        context = min(longest, pool_tokens)
        config = config.with_auto(
            "context", context, "the model's own maximum" if context == longest else "what the KV memory holds"
        )
    assert config.context is not None
    if config.context > pool_tokens:
        need = -(-config.context // BLOCK_SIZE) * BLOCK_SIZE * kv_token
        raise ConfigError(
            f"--kv-memory of {show_bytes(kv_memory)} holds {pool_tokens} tokens, one context of {config.context} needs {show_bytes(need)}; "
            f"give at least --kv-memory {need} or a smaller --context"
        )

    options = EngineOptions(
        path=model.path, num_blocks=num_blocks, max_context=config.context, max_rows=config.max_rows, step_tokens=config.step_tokens,
        token_gap_ms=config.token_gap_ms, num_threads=threads, packed_cache=str(folder) if folder is not None else None, backend=backend,
        kv_dtype=config.kv_dtype,
    )  # fmt: skip
    memory = MemoryPlan(
        available_bytes=available, weight_bytes=executor.weight_bytes(model.plan), kv_bytes=num_blocks * BLOCK_SIZE * kv_token,
        workspace_bytes=executor.workspace_bytes(model.plan, limits_of(options)), kv_bytes_per_token=kv_token, num_blocks=num_blocks,
        context=config.context,
    )  # fmt: skip
    if config.huge_pages == "auto":
        value, reason = choose_huge_pages(memory.total_bytes, available)
        config = config.with_auto("huge_pages", value, reason)
    options = msgspec.structs.replace(options, huge_pages=config.huge_pages == "on")
    if memory.total_bytes > available:
        raise StartupError(
            f"{model.name} needs {show_bytes(memory.total_bytes)} (weights {show_bytes(memory.weight_bytes)}, KV {show_bytes(memory.kv_bytes)}, "
            f"workspace {show_bytes(memory.workspace_bytes)}), {show_bytes(available)} are available; give a smaller --kv-memory or model"
        )
    return config, options, memory


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
    gguf = GgufFile.open(options.path)
    plan = build_plan(spec_from_gguf(gguf), {tensor.name: tensor.type for tensor in gguf.tensors.values()})
    limits = limits_of(options)
    executor: Executor
    if options.backend == "native":
        folder = Path(options.packed_cache) if options.packed_cache is not None else None
        executor = load_native(gguf, plan, limits, folder, progress, huge_pages=options.huge_pages)
    else:
        executor = ReferenceExecutor()
        executor.load(plan, load_weights(gguf, plan), limits)
    gguf.drop_pages()  # of what was checked and packed
    times = warm_up(plan, executor, limits)
    roofs = measure_roofs(plan, limits.num_threads) if options.backend == "native" else None
    load_ms = (time.perf_counter() - begin) * 1e3
    # the prefix cache's hash is keyed by a secret of this process, so that nobody can make two prompts collide
    return Engine(
        plan, executor, limits, clock or WallClock(), hash_key=os.urandom(16), load_ms=load_ms, times=times,
        gap_ms=options.token_gap_ms, roofs=roofs,
        grammars=Grammars(_matchers_of(gguf, plan), makes_beside=makes_grammars_beside, fills_beside=True),
    )  # fmt: skip


def _matchers_of(gguf: GgufFile, plan: Plan) -> Callable[[], MatcherSource]:
    """Makes the source of matchers when one is wanted. Until then it keeps what it needs of the file, whose rest can go."""
    ids_to_bytes = {key: value for key, value in gguf.metadata.items() if key not in TEXT_TO_IDS}
    path, vocab_size = str(gguf.path), plan.vocab_size

    def make() -> MatcherSource:
        # imported here, for an engine that meets no grammar starts without it
        from jilju.text.gguf_tokenizer import load_token_table
        from jilju.text.matcher import GrammarSource

        return GrammarSource(load_token_table(ids_to_bytes, file=path), vocab_size)

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
    gguf: GgufFile,
    plan: Plan,
    limits: Limits,
    folder: Path | None,
    progress: Progress,
    *,
    huge_pages: bool,
    profile: bool = False,
) -> NativeExecutor:
    """The native backend, loaded; `folder` keeps packed weights, `huge_pages` puts them into memory. Raises StartupError.

    Values of the file are checked, unless weights are found that were packed from it: then they were checked before that.
    """
    cache = (
        PackedCache(folder, Path(gguf.path), gguf.status, limits.num_threads, huge_pages)
        if folder is not None
        else None
    )
    executor = NativeExecutor(profile=profile, packed_cache=cache, progress=progress)
    is_checked = executor.find_packed(plan)
    executor.load(plan, load_weights(gguf, plan, check_values=not is_checked), limits)
    return executor


def show_bytes(count: int) -> str:
    """ "1.3 GiB", "96.6 MB" style figures, in the binary unit that keeps one to four digits."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
