"""What fits: how much memory an engine will hold, and how many tokens that is.

Owns the arithmetic of the memory plan, for the machine's memory and for a GPU's, and how open sizes are filled in. Knows
nothing of backends but what they answer.
"""

from dataclasses import dataclass
from typing import Protocol

import msgspec

from jilju.backends.cuda.device import Gpu
from jilju.backends.cuda.memory import RESERVE_BYTES
from jilju.config import ServeConfig
from jilju.errors import ConfigError, StartupError
from jilju.plan import KvDtype, Limits, Plan

BLOCK_SIZE = 16  # slots of a KV block: small, so that a shared prefix is found to within 15 tokens
AUTO_KV_SHARE = 4  # --kv-memory auto takes a quarter of the available memory ...
AUTO_KV_CONTEXTS = 64  # ... but not more than this many full contexts
GPU_KV_PERCENT = (
    90  # on a GPU, whose memory is for nothing else: of what weights and workspace leave; at most max_rows contexts
)


class Needs(Protocol):
    """What an executor answers before it is loaded."""

    def weight_bytes(self, plan: Plan) -> int: ...

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype) -> int: ...

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int: ...


@dataclass(frozen=True, slots=True)
class Held:
    """A model that is to be held, and where."""

    name: str
    plan: Plan
    longest: int  # tokens that it was made for
    needs: Needs
    kv_dtype: KvDtype
    free_bytes: int  # that others leave
    gpu: Gpu | None = None  # whose memory it is; None: the machine's

    @property
    def reserve_bytes(self) -> int:
        return RESERVE_BYTES if self.gpu is not None else 0

    @property
    def available_bytes(self) -> int:
        return max(0, self.free_bytes - self.reserve_bytes)

    @property
    def kv_token(self) -> int:
        return self.needs.kv_bytes_per_token(self.plan, self.kv_dtype)


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine will hold, in bytes, told before it loads."""

    available_bytes: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    context: int
    reserve_bytes: int = 0  # kept free beside all of it, and not counted as available
    gpu: Gpu | None = None

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def pool_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE


def fit(held: Held, config: ServeConfig) -> tuple[ServeConfig, MemoryPlan]:
    """Fill in context and KV memory. Raises ConfigError for sizes that contradict each other or the model, StartupError if
    the memory does not suffice."""
    kv_token, longest = held.kv_token, held.longest
    if config.context is not None and config.context > longest:
        raise ConfigError(f"--context is {config.context}; {held.name} was made for at most {longest} tokens")
    if config.kv_memory is None:
        config = _fill_kv_memory(held, config)
    kv_memory = config.kv_memory
    assert kv_memory is not None, "filled in above"
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
    memory = MemoryPlan(
        available_bytes=held.available_bytes, weight_bytes=held.needs.weight_bytes(held.plan), kv_bytes=pool_tokens * kv_token,
        workspace_bytes=_workspace_bytes(held, config, num_blocks, config.context), kv_bytes_per_token=kv_token,
        num_blocks=num_blocks, context=config.context, reserve_bytes=held.reserve_bytes, gpu=held.gpu,
    )  # fmt: skip
    if memory.total_bytes > memory.available_bytes:
        raise _lacks(held, memory.weight_bytes, memory.kv_bytes, memory.workspace_bytes)
    return config, memory


def _fill_kv_memory(held: Held, config: ServeConfig) -> ServeConfig:
    """On a GPU also raises StartupError if nothing is left for a KV cache."""
    available, context = held.available_bytes, config.context or held.longest
    if held.gpu is None:
        most = AUTO_KV_CONTEXTS * context * held.kv_token
        share = available // AUTO_KV_SHARE
        reason = f"a quarter of {show_bytes(available)} available" if share < most else f"{AUTO_KV_CONTEXTS} contexts"
        return config.with_auto("kv_memory", min(share, most), reason)
    weights, workspace = held.needs.weight_bytes(held.plan), _workspace_bytes(held, config, 1, context)
    block = BLOCK_SIZE * held.kv_token
    left = available - weights - workspace
    share = left * GPU_KV_PERCENT // 100
    if share < block:
        raise _lacks(held, weights, block, workspace)
    assert config.max_rows is not None, "filled in before"
    most = config.max_rows * -(-context // BLOCK_SIZE) * block
    if share >= most:
        return config.with_auto("kv_memory", most, f"{config.max_rows} contexts")
    return config.with_auto("kv_memory", share, f"{GPU_KV_PERCENT} % of the {show_bytes(left)} that the rest leaves")


def _workspace_bytes(held: Held, config: ServeConfig, num_blocks: int, context: int) -> int:
    assert config.max_rows is not None and config.step_tokens is not None, "filled in before"
    limits = Limits(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_rows=config.max_rows, max_tokens=config.step_tokens,
        max_context=context, num_threads=config.threads or 1, kv_dtype=held.kv_dtype,
    )  # fmt: skip
    return held.needs.workspace_bytes(held.plan, limits)


def _lacks(held: Held, weights: int, kv: int, workspace: int) -> StartupError:
    parts = f"weights {show_bytes(weights)}, KV {show_bytes(kv)}, workspace {show_bytes(workspace)}"
    need = f"{held.name} needs {show_bytes(weights + kv + workspace)} ({parts}), {show_bytes(held.available_bytes)} are available"
    if held.gpu is None:
        return StartupError(f"{need}; give a smaller --kv-memory or model")
    return StartupError(
        f"{need} on {held.gpu.name}, of {show_bytes(held.gpu.total_bytes)} in all; give a smaller --kv-memory, --step-tokens or "
        "model, or --weight-dtype fp8, or free what others hold on it"
    )


def show_bytes(count: int) -> str:
    """ "1.3 GiB", "96.6 MB" style figures, in the binary unit that keeps one to four digits."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
