"""Scripts on the native backend: in the simulation's engine a model is computed, while its clock goes by the cost model.

Owns what an engine of a script is loaded with, random models that are small enough to be computed a million times, and what
a request gets alone: batch of one, one thread, no prefix, no chunks. Knows nothing of scripts but their settings and seed.
Every engine loads anew into memory of its own, as the process does that it stands for: of an earlier one nothing is left.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from jilju.assemble.engine import open_model
from jilju.assemble.simulation import PRIOR, SLOW_MACHINE, limits_of
from jilju.backends.native import NativeExecutor, PackedCache
from jilju.backends.roofline import tiny_plan
from jilju.bench.batches import LogitRows, Sampling, batch_of
from jilju.clock import VirtualClock
from jilju.engine.grammars import Grammars
from jilju.engine.loop import Engine
from jilju.engine.request import PromptScored, Request, RequestEnded, RequestFailed, TokenEvent
from jilju.engine.step_times import StepTimes
from jilju.errors import GrammarDeadEnd
from jilju.formats.ggml import BLOCK_LAYOUTS, GgmlType, row_bytes
from jilju.formats.gguf import GgufFile
from jilju.formats.quants import quantize
from jilju.model.decoder import build_plan
from jilju.model.spec import FAMILIES, ModelSpec
from jilju.model.weights import load_weights
from jilju.plan import Batch, Executor, KvDtype, Limits, Plan, StepResult, StepShape, WeightTensor
from jilju.plan.cost import PlanCost
from jilju.simulation.automaton import AutomatonSource
from jilju.simulation.draw import NATIVE_VOCAB
from jilju.simulation.script import Script
from jilju.simulation.world import Solo

ALONE_CONTEXT = 512  # no script's is longer
ALONE_BLOCK_SIZE = 16
POISON_STEPS = 8  # at most, each time that free blocks are overwritten
PACE_VOCAB = 64  # steps take what those of the tiny plan of so many ids would, whatever the model


@dataclass(frozen=True, eq=False)
class NativeModel:
    """A model that can be loaded again and again. `cache`: of its packed weights; None: they are so few that each load packs them."""

    name: str
    plan: Plan
    weights: Mapping[str, WeightTensor]
    cache: PackedCache | None = None

    def load(self, limits: Limits) -> NativeExecutor:
        executor = NativeExecutor(packed_cache=self.cache)
        executor.find_packed(self.plan)
        executor.load(self.plan, self.weights, limits)
        return executor


def file_model(name: str, folder: Path) -> NativeModel:
    """A named model or one by its path; the packed weights of a file are kept in `folder`. Raises StartupError."""
    model = open_model(name)
    cache = None
    if isinstance(model.checkpoint, GgufFile):
        cache = PackedCache(folder, Path(model.path), model.checkpoint.status, num_threads=1)
    return NativeModel(model.name, model.plan, load_weights(model.checkpoint, model.plan), cache)


# ---- random models ---------------------------------------------------------------------------------------------------

_SPEC = ModelSpec(
    family="llama", name="llama, Q4_K", num_layers=2, hidden_width=256, num_heads=4, num_kv_heads=2, head_dim=32, ffn_width=256,
    vocab_size=NATIVE_VOCAB, max_context=ALONE_CONTEXT, rope_theta=1e4, rope_style="interleaved", rms_eps=1e-5, tied_head=True,
    attention_bias=False, attention_scale=32**-0.5,
)  # fmt: skip
_WINDOWS = msgspec.structs.replace(
    _SPEC, family="gemma3", name="gemma3 with windows, Q4_0 Q4_1 Q5_1 Q8_0", rope_style="halves", num_layers=3, hidden_width=64,
    num_kv_heads=1, head_dim=24, attention_scale=24**-0.5, ffn_width=96, head_norms=True, post_norms=True, activation="gelu_tanh",
    embedding_scale=8.0, window=20, global_every=3,
)  # fmt: skip
_FLOATS = msgspec.structs.replace(
    _SPEC, family="qwen2", name="qwen2, F16 BF16", rope_style="halves", hidden_width=64, num_kv_heads=1, head_dim=16,
    attention_scale=0.25, ffn_width=96, attention_bias=True, tied_head=False,
)  # fmt: skip
# A number format for each kind of matrix, by the last part of its name but one; of an embedding table too.
_Q8, _Q4_K = GgmlType.Q8_0, GgmlType.Q4_K
_SMALL: tuple[tuple[ModelSpec, Mapping[str, GgmlType]], ...] = (
    (_SPEC, {"attn_output": _Q8, "token_embd": _Q8, "": _Q4_K}),
    (_WINDOWS, {"attn_output": GgmlType.Q5_1, "ffn_gate": GgmlType.Q4_1, "ffn_up": GgmlType.Q4_1, "ffn_down": _Q8, "token_embd": _Q8,
                "": GgmlType.Q4_0}),
    (_FLOATS, {"ffn_gate": GgmlType.BF16, "ffn_up": GgmlType.BF16, "output": _Q8, "": GgmlType.F16}),
)  # fmt: skip
SMALL_NAMES = tuple(spec.name for spec, _ in _SMALL)


def small_models() -> list[NativeModel]:
    """Random weights, the same every time: every family of integer kernels' first formats, windows, and floats."""
    return [_random_model(spec, types) for spec, types in _SMALL]


def _random_model(spec: ModelSpec, types: Mapping[str, GgmlType]) -> NativeModel:
    assert spec.rope_style == FAMILIES[spec.family].rope_style, "a model as files have it"
    rng, weights = np.random.default_rng(0), {}
    for name, shape in spec.tensor_shapes().items():
        type_ = GgmlType.F32 if len(shape) == 1 else types.get(name.split(".")[-2], types[""])
        weights[name] = WeightTensor(name, type_, shape, _random_weight(rng, name, type_, shape))
    return NativeModel(spec.name, build_plan(spec, {name: w.type for name, w in weights.items()}), weights)


def _random_weight(rng: np.random.Generator, name: str, type_: GgmlType, shape: tuple[int, ...]) -> np.ndarray:
    if name == "output_norm.weight":  # wide logits, or all of them would be drawn alike
        return quantize(np.full(shape, 3, np.float32), type_)
    if type_ is GgmlType.Q4_K:
        return _random_q4_k(rng, *shape)
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return quantize(x / np.float32(8) + np.float32(not name.endswith(".bias")), type_)
    return quantize(x / np.float32(math.sqrt(shape[-1])), type_)


def _random_q4_k(rng: np.random.Generator, num_outputs: int, num_inputs: int) -> np.ndarray:
    """Scales, mins and nibbles are random; d and dmin are such that the mean is about 0 and the deviation num_inputs^-0.5.

    A weight is d * scale * nibble - dmin * min, of means 31.5 and 7.5: dmin = 7.5 d, and it deviates by about 170 d.
    """
    raw = rng.integers(0, 256, (num_outputs, row_bytes(GgmlType.Q4_K, num_inputs)), np.uint8)
    d = 1 / (170 * math.sqrt(num_inputs))
    raw.reshape(-1, BLOCK_LAYOUTS[GgmlType.Q4_K].block_bytes)[:, :4] = np.array([d, 7.5 * d], "<f2").view(np.uint8)
    return raw.reshape(-1)


# ---- the backend -----------------------------------------------------------------------------------------------------


class PacedExecutor:
    """`inner`, whose steps take of the virtual clock what `step_ns` says."""

    def __init__(
        self,
        inner: NativeExecutor,
        vocab_size: int,
        limits: Limits,
        clock: VirtualClock,
        step_ns: Callable[[StepShape], int],
    ):
        self._inner, self._limits, self._vocab_size = inner, limits, vocab_size
        self._clock, self._step_ns = clock, step_ns
        self._garbage = np.random.default_rng(0)
        self._batch: Batch | None = None
        self.name, self.kernel_set, self.invariant = inner.name, inner.kernel_set, inner.invariant
        self.weight_bytes, self.workspace_bytes = inner.weight_bytes, inner.workspace_bytes
        self.kv_bytes_per_token, self.load, self.free = inner.kv_bytes_per_token, inner.load, inner.free

    def launch(self, batch: Batch) -> None:
        self._batch = batch
        self._inner.launch(batch)

    def wait(self) -> StepResult:
        batch, self._batch = self._batch, None
        assert batch is not None, "wait before launch"
        result = self._inner.wait()
        self._clock.advance_ns(self._step_ns(batch.shape))
        return result

    def poison(self, block_ids: Sequence[int]) -> None:
        """Keys and values of random tokens into blocks that nobody holds, those first that will be taken first."""
        limits = self._limits
        per_step = max(1, min(limits.max_rows, limits.max_tokens // limits.block_size))
        wanted, num_steps = list(reversed(block_ids)), 0
        while wanted and num_steps < POISON_STEPS:
            blocks, wanted = wanted[:per_step], wanted[per_step:]
            chunk = min(limits.block_size, limits.max_tokens // len(blocks))
            for start in range(0, limits.block_size, chunk):
                count = min(chunk, limits.block_size - start)
                self._inner.launch(self._garbage_batch(blocks, start, count))
                self._inner.wait()
                num_steps += 1

    def _garbage_batch(self, blocks: Sequence[int], start: int, count: int) -> Batch:
        num = len(blocks)
        ids = self._garbage.integers(0, self._vocab_size, num * count, np.int32)
        table = np.array(blocks, np.int32).reshape(num, 1)
        nothing = LogitRows(tokens=[], positions=[], targets=[], seeds=[])
        return batch_of(ids, [start] * num, [count] * num, table, nothing, Sampling(), self._vocab_size)


@dataclass
class NativeBackend:
    """`models` are taken in turn, and number of threads and type of the cache with them, by a script's seed."""

    models: Sequence[NativeModel]
    num_threads: int = 0  # 0: one or two
    _pace: PlanCost = field(default_factory=lambda: PlanCost(tiny_plan(PACE_VOCAB), 2))
    _seed: int | None = None  # of the script whose requests alone are kept
    _solos: dict[bytes, Solo] = field(default_factory=dict)
    _alone: dict[tuple[str, KvDtype], NativeExecutor] = field(default_factory=dict)

    def engine(self, script: Script, clock: VirtualClock, wrap: Callable[[Executor], Executor]) -> Engine:
        model, num_threads, kv_dtype = self.choice(script)
        settings, noise = script.settings, Random(script.seed)
        limits = replace(limits_of(settings), num_threads=num_threads, kv_dtype=kv_dtype)

        def step_ns(shape: StepShape) -> int:
            factor = noise.uniform(1 - settings.noise, 1 + settings.noise)
            return round(factor * self._pace.step_ns(shape, SLOW_MACHINE))

        executor = wrap(PacedExecutor(model.load(limits), model.plan.vocab_size, limits, clock, step_ns))
        return Engine(
            model.plan, executor, limits, clock, hash_key=b"simulation", times=StepTimes(PRIOR), gap_ms=settings.gap_us / 1e3,
            grammars=Grammars(partial(AutomatonSource, settings.vocab_size), fills_beside=True),
        )  # fmt: skip

    def choice(self, script: Script) -> tuple[NativeModel, int, KvDtype]:
        turn, index = divmod(script.seed, len(self.models))
        return self.models[index], self.num_threads or 1 + turn % 2, "int8" if turn // 2 % 2 else "f16"

    def alone(self, script: Script, request: Request) -> Solo:
        if script.seed != self._seed:
            self._seed = script.seed
            self._solos.clear()
        key = msgspec.msgpack.encode(
            (request.prompt_ids, request.params, request.end_ids, request.prompt_logprobs, request.grammar)
        )
        solo = self._solos.get(key)
        if solo is None:
            solo = self._solos[key] = self._compute_alone(script, request)
        return solo

    def _compute_alone(self, script: Script, request: Request) -> Solo:
        """On an engine that has computed nothing else, and an executor in whose blocks other requests' keys may lie."""
        model, _, kv_dtype = self.choice(script)
        limits = Limits(
            num_blocks=ALONE_CONTEXT // ALONE_BLOCK_SIZE, block_size=ALONE_BLOCK_SIZE, max_rows=1, max_tokens=ALONE_CONTEXT,
            max_context=ALONE_CONTEXT, num_threads=1, kv_dtype=kv_dtype,
        )  # fmt: skip
        executor = self._alone.get((model.name, kv_dtype))
        if executor is None:
            executor = self._alone[model.name, kv_dtype] = model.load(limits)
        grammars = Grammars(partial(AutomatonSource, script.settings.vocab_size))
        engine = Engine(model.plan, executor, limits, VirtualClock(1), grammars=grammars)
        engine.submit(
            Request(
                id="alone", prompt_ids=request.prompt_ids, params=request.params, end_ids=request.end_ids, prompt_logprobs=request.prompt_logprobs,
                grammar=request.grammar,
            )
        )  # fmt: skip
        solo, finish_reason = Solo([], [], [], [], [], ""), ""
        while engine.has_work():
            for event in engine.step():
                if isinstance(event, TokenEvent):
                    solo.tokens.append(event.token_id)
                    solo.logprobs.append(math.nan if event.logprob is None else event.logprob)
                    solo.tops.append(event.top or [])
                    finish_reason = event.finish_reason or ""
                elif isinstance(event, PromptScored):
                    solo.scores.extend(event.logprobs)
                    solo.score_tops.extend(event.tops or [])
                elif isinstance(event, RequestFailed) and event.code == GrammarDeadEnd.code:
                    finish_reason = "no_token"
                else:
                    assert isinstance(event, RequestEnded), f"alone, a request that was accepted fails: {event}"
                    finish_reason = event.finish_reason
        if finish_reason == "no_token" and not solo.tokens and request.prompt_logprobs is not None:
            # its last step failed, which would have brought all scores at once: in other company chunks before it bring some
            scored = msgspec.structs.replace(
                request, grammar="", params=msgspec.structs.replace(request.params, max_tokens=0, min_tokens=0)
            )
            solo = self._compute_alone(script, scored)
        return replace(solo, finish_reason=finish_reason)
