"""What the native executor refuses, what it says it needs, and that it leaves the caller's thread as it was."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from jilju.backends.native import NativeExecutor
from jilju.errors import ConfigError, PlatformError, StartupError
from jilju.formats.ggml import GgmlType
from jilju.plan import Rope
from tests.model.batches import BatchRow, Logit, make_batch, run
from tests.native.plans import LIMITS, Shape, decoder, loaded

PLAN, WEIGHTS = decoder(Shape())
GOOD = make_batch([BatchRow([1, 2, 3], 0, [0])], [Logit(2)])


@pytest.fixture(scope="module")
def executor() -> NativeExecutor:
    return loaded(PLAN, WEIGHTS)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("rows", "logits", "text"),
    [
        ([BatchRow([1, 20], 0, [0])], [Logit(0)], "token id 20 at index 1; allowed: 0..19"),
        ([BatchRow([-1], 0, [0])], [Logit(0)], "token id -1"),
        ([BatchRow([1], 0, [96])], [Logit(0)], "block id 96 in row 0; allowed: 0..95"),
        ([BatchRow([1], 16, [0, -1])], [Logit(0)], "block id -1"),
        ([BatchRow([1], 16, [0])], [Logit(0)], "needs 2 blocks, its table has 1"),
        ([BatchRow([1], 1024, range(65))], [Logit(0)], "within 0..1024"),
        ([BatchRow([1] * 601, 0, range(40))], [Logit(0)], "601 tokens; allowed: 1..600"),
        ([BatchRow([1], 0, [0])] * 33, [Logit(0)], "33 rows; allowed: 1..32"),
        ([BatchRow([1], 0, [0])], [Logit(1)], "takes token 1; allowed: ascending, 0..0"),
        ([BatchRow([1, 2], 0, [0])], [Logit(1), Logit(0)], "logit row 1 takes token 0"),
        ([BatchRow([1], 0, [0])], [Logit(0, target=20)], "target 20"),
        ([BatchRow([1], 0, [0])], [Logit(0, num_top=21)], "21 alternatives"),
        ([BatchRow([1], 0, [0])], [Logit(0, counts={20: 1})], "penalty id 20"),
        ([BatchRow([1], 0, [0])], [Logit(0, bias={20: 1.0})], "bias id 20"),
        ([BatchRow([1], 0, [0])], [Logit(0, bias={2: float("inf")})], "a bias that is not a finite number"),
        ([BatchRow([1], 0, [0])], [Logit(0, banned_ids=[1] * 21)], "logit row 0 has 21 banned ids; allowed: 20"),
        ([BatchRow([1], 0, [0])], [Logit(0, mask=np.ones(2, np.uint32))], "masks have 2 words; the vocabulary needs 1"),
        ([BatchRow([1], 0, [0])], [Logit(0, presence_penalty=float("nan"))], "sampling parameters"),
        ([BatchRow([1], 0, [0])], [Logit(0, frequency_penalty=float("inf"))], "sampling parameters"),
        ([BatchRow([1], 0, [0])], [Logit(0, banned_ids=[-2])], "banned id -2"),
        ([BatchRow([1], 0, [0])], [Logit(0, temperature=float("nan"))], "sampling parameters"),
        ([BatchRow([1], 0, [0])], [Logit(0, repetition_penalty=0.0)], "sampling parameters"),
    ],
)
def test_an_unsound_batch_raises_and_the_next_one_runs(executor, rows, logits, text) -> None:
    with pytest.raises(ValueError, match=text):
        run(executor, make_batch(rows, logits))
    assert run(executor, GOOD).finite.all()


def test_rows_that_do_not_add_up_raise(executor) -> None:
    with pytest.raises(ValueError, match="the rows have 2 tokens, the batch 3"):
        run(executor, replace(GOOD, counts=np.array([2], np.int32)))
    with pytest.raises(ValueError, match="differ in length"):
        run(executor, replace(GOOD, seeds=np.zeros(2, np.uint64)))
    with pytest.raises(ValueError, match="penalty_counts or biases and their ids differ in length"):
        run(executor, replace(GOOD, penalty_counts=np.zeros(2, np.int32)))
    with pytest.raises(ValueError, match="has mask 0; allowed"):
        run(executor, replace(GOOD, mask_rows=np.zeros(1, np.int32)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"block_size": 8}, "block size 8; the native backend takes multiples of 16"),
        ({"block_size": 24}, "multiples of 16"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_blocks": 2**40}, "MiB of memory are available"),
    ],
)
def test_limits_it_cannot_have_stop_the_start(changes: dict[str, int], text: str) -> None:
    with pytest.raises(StartupError, match=text):
        loaded(PLAN, WEIGHTS, **changes)


def test_weights_that_do_not_match_stop_the_start() -> None:
    name = next(iter(WEIGHTS))
    with pytest.raises(StartupError, match=f"weight {name} is missing"):
        loaded(PLAN, {k: v for k, v in WEIGHTS.items() if k != name})
    short = replace(WEIGHTS[name], data=WEIGHTS[name].data[:-4])
    with pytest.raises(StartupError, match=f"weight {name} is {len(short.data)} bytes of F32"):
        loaded(PLAN, {**WEIGHTS, name: short})


@pytest.mark.parametrize("isa", ["avx9", "AVX2", "none"])
def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("JILJU_ISA", isa)
    with pytest.raises(
        ConfigError, match=f"JILJU_ISA: the instruction set '{isa}' is unknown here; allowed: .*generic"
    ):
        NativeExecutor()


def test_a_missing_extension_is_one_clear_error() -> None:
    """The package imports without it; making the executor says what to do."""
    code = """
import sys
sys.modules["jilju.backends.native._kernels"] = None
from jilju.backends.native import NativeExecutor
from jilju.errors import PlatformError
try:
    NativeExecutor()
except PlatformError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.startswith("the native backend's extension is missing") and done.stdout.count("\n") == 1
    assert PlatformError.__mro__[1] is StartupError


def test_memory_needs_are_counted_as_they_are() -> None:
    executor = NativeExecutor()
    shape = Shape()
    assert executor.kv_bytes_per_token(PLAN) == 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    heads = shape.num_layers * shape.num_kv_heads
    assert executor.kv_bytes_per_token(PLAN, "int8") == 2 * heads * (shape.head_dim + 4)  # a float32 scale each
    small, large = (executor.workspace_bytes(PLAN, replace(LIMITS, max_tokens=n)) for n in (16, 256))
    per_token = sum(4 * buffer.width for buffer in PLAN.buffers if buffer.rows == "tokens")
    assert (large - small) / 240 >= per_token
    assert executor.workspace_bytes(PLAN, replace(LIMITS, max_tokens=512)) == large  # steps run in tiles of 256 tokens


def test_layers_of_other_rotary_factors_have_a_table_of_angles_of_their_own() -> None:
    executor, shape = NativeExecutor(), Shape(num_layers=3, has_factors=True)
    plain, scaled = (decoder(s)[0] for s in (replace(shape, has_factors=False), shape))
    needs = [executor.workspace_bytes(plan, replace(LIMITS, max_tokens=256)) for plan in (plain, scaled)]
    assert needs[1] - needs[0] == 256 * shape.head_dim * 4


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_rotary_factors_that_are_not_positive_are_refused(factor: float) -> None:
    plan, weights = decoder(Shape(has_factors=True))
    name = next(op.factors.name for op in plan.ops if isinstance(op, Rope) and op.factors is not None)
    data = weights[name].data.copy()
    data.view(np.float32)[3] = factor
    with pytest.raises(ValueError, match="rope: a factor that is not positive"):
        loaded(plan, {**weights, name: replace(weights[name], data=data)})


def test_idle_workers_use_no_cpu() -> None:
    executor = loaded(PLAN, WEIGHTS, num_threads=4)
    run(executor, GOOD)
    time.sleep(0.05)  # workers spin for some 30 us after a step, then park
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
    executor.free()


def test_other_threads_run_while_a_step_runs() -> None:
    """The GIL is free inside a step: a Python thread counts on meanwhile."""
    shape = Shape(num_layers=8, hidden=512, ffn=2048, type=GgmlType.Q4_0, bias=False)
    executor = loaded(*decoder(shape), num_threads=1)
    batch = make_batch([BatchRow([t % 20 for t in range(600)], 0, range(38))], [Logit(599)])
    running, counts = threading.Event(), []

    def step() -> None:
        executor.launch(batch)
        running.set()
        executor.wait()
        running.clear()

    thread = threading.Thread(target=step)
    thread.start()
    running.wait()
    while running.is_set():
        counts.append(1)
    thread.join()
    assert len(counts) > 1000


def test_the_profile_accounts_for_the_steps() -> None:
    executor = NativeExecutor(profile=True)
    executor.load(PLAN, WEIGHTS, LIMITS)
    begin = time.perf_counter_ns()
    for _ in range(3):
        run(executor, GOOD)
    took = time.perf_counter_ns() - begin
    profile = executor.profile()
    assert profile.num_steps == 3
    assert all(
        profile.ns[kind] > 0 for kind in ("embed", "rms_norm", "linear", "attention", "glu", "take_rows", "sample")
    )
    assert 0 < sum(profile.ns.values()) <= took
