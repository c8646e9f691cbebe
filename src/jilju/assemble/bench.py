"""What is measured, put together: an executor that keeps count of its time, and single steps on it.

Owns the sizes of such an executor. Knows nothing of what is measured with it.
"""

import asyncio
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np

from jilju.assemble.engine import ModelFile, load_native, make_executor, open_model, resolve_engine
from jilju.assemble.fit import BLOCK_SIZE
from jilju.assemble.launch import engine_command
from jilju.assemble.packed import packed_folder
from jilju.backends.native import NativeExecutor, NativeProbes
from jilju.bench.engine import PROMPT_TOKENS, EngineShare, run_rows, share_of
from jilju.bench.guard import Guard
from jilju.bench.machine import Probes
from jilju.bench.steps import ProfiledExecutor, Steps
from jilju.config import ServeConfig, engine_config, huge_pages_offered
from jilju.engine.events import StepRecord
from jilju.engine.process import SupervisedClient
from jilju.errors import ConfigError
from jilju.formats.ggml import GgmlType
from jilju.model.sources import Progress, no_progress
from jilju.model.weights import load_weights
from jilju.plan import Executor, KvDtype, KvSpec, Limits, Plan, PlanBuilder, WeightSpec, WeightTensor

STEP_TOKENS = 512  # of one step of prefill
HEAD_WIDTH = 64  # of a head without a model


class SteppedModel(NamedTuple):
    """A loaded model, driven step by step without an engine."""

    plan: Plan
    executor: ProfiledExecutor
    kv_element_bytes: int
    limits: Limits
    steps: Steps


def make_probes() -> Probes:
    return NativeProbes()


def limits_for(model: ModelFile, max_rows: int, max_context: int, num_threads: int) -> Limits:
    """Room for `max_rows` rows of `max_context` tokens each. Raises ConfigError if the model does not go that far."""
    if max_context > model.spec.max_context:
        raise ConfigError(f"{model.name} holds at most {model.spec.max_context} tokens, {max_context} are asked for")
    return Limits(
        num_blocks=max_rows * -(-max_context // BLOCK_SIZE), block_size=BLOCK_SIZE, max_rows=max_rows,
        max_tokens=STEP_TOKENS, max_context=max_context, num_threads=num_threads,
    )  # fmt: skip


def load_stepped(
    model: ModelFile, max_rows: int, max_context: int, num_threads: int, kv_dtype: KvDtype = "f16"
) -> SteppedModel:
    limits = replace(limits_for(model, max_rows, max_context, num_threads), kv_dtype=kv_dtype)
    huge_pages = huge_pages_offered()  # as auto does, where memory suffices
    executor = load_native(
        model.checkpoint,
        model.plan,
        limits,
        packed_folder(ServeConfig()),
        no_progress,
        huge_pages=huge_pages,
        profile=True,
    )
    kv_element_bytes = executor.kv_bytes_per_token(model.plan, kv_dtype) // model.plan.kv.elements_per_token
    return SteppedModel(model.plan, executor, kv_element_bytes, limits, Steps(executor, model.plan, limits))


def load_stepped_head(vocab_size: int, max_rows: int, num_threads: int) -> SteppedModel:
    """An output head alone, of random weights whose logits have a standard deviation of 3: for sampling from a vocabulary of any size."""
    rng, weights = np.random.default_rng(0), dict[str, WeightTensor]()

    def matrix(name: str, scale: float) -> WeightSpec:
        values = (scale * rng.standard_normal((vocab_size, HEAD_WIDTH), np.float32)).astype(np.float16)
        weights[name] = WeightTensor(name, GgmlType.F16, values.shape, values.view(np.uint8).reshape(-1))
        return WeightSpec(name, GgmlType.F16, vocab_size, HEAD_WIDTH)

    b = PlanBuilder(KvSpec(0, 1, 8), vocab_size)
    b.sample(b.linear(b.take_rows(b.embed(matrix("embedding", 1.0))), matrix("head", 3 / HEAD_WIDTH**0.5)))
    plan, executor = b.build(), NativeExecutor(profile=True)
    limits = Limits(max_rows, BLOCK_SIZE, max_rows, max_rows, BLOCK_SIZE, num_threads)
    executor.load(plan, weights, limits)
    return SteppedModel(plan, executor, 0, limits, Steps(executor, plan, limits))


def load_reference(model: ModelFile, max_context: int) -> tuple[Executor, Plan, Limits]:
    """The definition of the ops on this model, one row at a time."""
    executor, limits = make_executor("reference"), limits_for(model, 1, max_context, 1)
    executor.load(model.plan, load_weights(model.checkpoint, model.plan), limits)
    return executor, model.plan, limits


def measure_engine(
    model: str, rows: int, num_output: int, penalties: bool, threads: int | None, guard: Guard, progress: Progress
) -> EngineShare:
    """In a process of its own, as `jilju serve` runs it. Raises StartupError, BusyMachine."""
    context = PROMPT_TOKENS + num_output
    config = engine_config(model, context=context, kv_memory="256MiB", max_rows=rows, step_tokens=256, threads=threads)
    file = open_model(model, progress)
    _, options, _ = resolve_engine(file, config)
    client, run_ids = SupervisedClient(engine_command(options)), map("run-{}".format, count())
    with asyncio.Runner() as loop:
        loop.run(client.start())
        try:
            assert client.process_id is not None, "a started engine has a process"

            def run() -> list[StepRecord]:
                return loop.run(run_rows(client, file.plan.vocab_size, rows, num_output, next(run_ids), penalties))

            run()
            done = guard.run(run, [client.process_id])
            return share_of(file.name, rows, done.value, done.others_share)
        finally:
            loop.run(client.stop())
