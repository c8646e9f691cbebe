"""What is measured, put together: an executor that keeps count of its time, and single steps on it.

Owns the sizes of such an executor. Knows nothing of what is measured with it.
"""

from typing import NamedTuple

from jilju.assemble.engine import BLOCK_SIZE, ModelFile, load_native, make_executor
from jilju.assemble.packed import packed_folder
from jilju.backends.native import NativeProbes
from jilju.bench.machine import Probes
from jilju.bench.steps import ProfiledExecutor, Steps
from jilju.config import ServeConfig
from jilju.errors import ConfigError
from jilju.model.sources import no_progress
from jilju.model.weights import load_weights
from jilju.plan import Executor, Limits, Plan

STEP_TOKENS = 512  # of one step of prefill


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


def load_stepped(model: ModelFile, max_rows: int, max_context: int, num_threads: int) -> SteppedModel:
    limits = limits_for(model, max_rows, max_context, num_threads)
    executor = load_native(model.gguf, model.plan, limits, packed_folder(ServeConfig()), no_progress, profile=True)
    kv_element_bytes = executor.kv_bytes_per_token(model.plan) // model.plan.kv.elements_per_token
    return SteppedModel(model.plan, executor, kv_element_bytes, limits, Steps(executor, model.plan, limits))


def load_reference(model: ModelFile, max_context: int) -> tuple[Executor, Plan, Limits]:
    """The definition of the ops on this model, one row at a time."""
    executor, limits = make_executor("reference"), limits_for(model, 1, max_context, 1)
    executor.load(model.plan, load_weights(model.gguf, model.plan), limits)
    return executor, model.plan, limits
