"""Small random models for the GPU backend's tests, and engines that run them."""

from dataclasses import replace

import numpy as np

from jilju.backends.cuda.executor import CudaExecutor
from jilju.backends.reference import ReferenceExecutor
from jilju.clock import WallClock
from jilju.engine.loop import Engine
from jilju.engine.request import Request, RequestFailed, TokenEvent
from jilju.formats.ggml import GgmlType
from jilju.plan import Limits, WeightDtype
from tests.native.plans import Shape, decoder

LIMITS = Limits(
    num_blocks=40, block_size=16, max_rows=8, max_tokens=96, max_context=256, num_threads=1, kv_dtype="bf16"
)
LLAMA = Shape(num_heads=4, num_kv_heads=2, bias=False, vocab=60, type=GgmlType.BF16)
QWEN = Shape(num_heads=6, num_kv_heads=2, hidden=64, ffn=96, vocab=60, type=GgmlType.Q8_0, num_layers=1)
GEMMA = Shape(
    head_dim=24, num_heads=4, num_kv_heads=1, bias=False, post_norms=True, activation="gelu_tanh", window=9,
    vocab=60, type=GgmlType.BF16,
)  # fmt: skip
HALVES: dict[WeightDtype, str] = {"bf16": "bf16", "f16": "f16", "fp8": "bf16"}


def loaded(
    shape: Shape,
    device: str,
    dtype: WeightDtype = "bf16",
    *,
    fast: bool = False,
    runs_ahead: bool = True,
    **changes: object,
) -> CudaExecutor:
    plan, weights = decoder(shape)
    executor = CudaExecutor(dtype, fast, device=device, runs_ahead=runs_ahead)
    changes.setdefault("kv_dtype", HALVES[dtype])
    executor.load(plan, weights, replace(LIMITS, **changes))  # type: ignore[arg-type]
    return executor


def reference(shape: Shape, **changes: object) -> ReferenceExecutor:
    plan, weights = decoder(shape)
    executor = ReferenceExecutor()
    executor.load(plan, weights, replace(LIMITS, kv_dtype="f16", **changes))  # type: ignore[arg-type]
    return executor


def engine_of(shape: Shape, executor: CudaExecutor, **changes: object) -> Engine:
    plan, _ = decoder(shape)
    changes.setdefault("kv_dtype", executor._limits.kv_dtype)
    return Engine(plan, executor, replace(LIMITS, **changes), WallClock())  # type: ignore[arg-type]


def answers(
    engine: Engine, requests: list[Request], aborted: dict[str, int], rng: np.random.Generator
) -> dict[str, list[tuple[int, float]]]:
    """Tokens and logprobs of requests that arrive while others run; some are aborted after so many tokens."""
    waiting, got = list(requests), dict[str, list[tuple[int, float]]]()
    while waiting or engine.has_work():
        for _ in range(int(rng.integers(0, 3)) if engine.has_work() else 1):
            if waiting:
                request = waiting.pop(0)
                got[request.id] = []
                engine.submit(request)
        for event in engine.step():
            assert not isinstance(event, RequestFailed), event
            if isinstance(event, TokenEvent):
                assert event.logprob is not None
                got[event.request_id].append((event.token_id, event.logprob))
                if len(got[event.request_id]) == aborted.get(event.request_id):
                    engine.abort(event.request_id)
    return got
