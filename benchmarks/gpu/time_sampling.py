"""Norms, embedding and sampling on a GPU: microseconds a call on the device, after a check against the reference.

`python -m benchmarks.gpu.time_sampling --json OUT`. Calls are captured as a graph, so that the time is the device's; of sampling
the host's time a step is told beside it. A case that fails is told and left out.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.gpu.llama import make_batch

from jilju.backends import reference
from jilju.backends.cuda.kernels.embed import embed
from jilju.backends.cuda.kernels.norm import add_norm, rms_norm
from jilju.backends.cuda.sampling import Sampler
from jilju.plan import Batch

WIDTH, VOCAB = 4096, 128256
NUM_ROWS = (1, 64, 256)
CALLS = 20  # of a captured graph
DEVICE = "cuda"


def batch_of(num_rows: int, **columns: Any) -> Batch:
    """Greedy rows but for `columns`, values for all rows or arrays."""
    ones = np.ones(num_rows)
    plain = make_batch(0 * ones, 0 * ones, ones, np.zeros((num_rows, 1)))
    filled = {name: np.broadcast_to(np.asarray(value, getattr(plain, name).dtype), num_rows).copy() for name, value in columns.items()}  # fmt: skip
    return replace(plain, seeds=np.arange(num_rows, dtype=np.uint64), **filled)


def penalised_and_masked(num_rows: int) -> Batch:
    """500 ids in each output; a mask a row, by which a tenth may be sampled."""
    rng = np.random.default_rng(0)
    ids = np.tile(rng.permutation(VOCAB)[:500].astype(np.int32), num_rows)
    masks = np.tile(rng.random(VOCAB) < 0.1, (num_rows, 1))
    return replace(
        batch_of(num_rows, temperatures=0.8, repetition_penalties=1.1, frequency_penalties=0.2),
        penalty_starts=np.arange(num_rows + 1, dtype=np.int32) * 500, penalty_ids=ids,
        penalty_counts=np.full(num_rows * 500, 2, np.int32), mask_rows=np.arange(num_rows, dtype=np.int32),
        masks=np.packbits(masks, axis=1, bitorder="little").view(np.uint32),
    )  # fmt: skip


CASES: dict[str, Callable[[int], Batch]] = {
    "greedy": batch_of,
    "greedy, 5 alternatives": lambda n: batch_of(n, num_top=5),
    "greedy, 20 alternatives": lambda n: batch_of(n, num_top=20),
    "temperature": lambda n: batch_of(n, temperatures=1.0),
    "temperature, top-p 0.9": lambda n: batch_of(n, temperatures=1.0, top_ps=0.9),
    "temperature, top-k 40": lambda n: batch_of(n, temperatures=1.0, top_ks=40),
    "temperature, top-k 40, top-p 0.9, min-p 0.02": lambda n: batch_of(
        n, temperatures=0.7, top_ks=40, top_ps=0.9, min_ps=0.02
    ),
    "penalties and masks": penalised_and_masked,
}


def normal_logits(num_rows: int, scale: float) -> np.ndarray:
    return (scale * np.random.default_rng(1).standard_normal((num_rows, VOCAB), np.float32)).astype(np.float32)


def model_logits(num_rows: int) -> np.ndarray:
    """As models give them: a few ids far above, the rest low, more of them far below than above."""
    rng = np.random.default_rng(2)
    logits = normal_logits(num_rows, 2.5) - rng.standard_exponential((num_rows, VOCAB), np.float32)
    ids = rng.integers(0, VOCAB, (num_rows, 30))
    np.put_along_axis(logits, ids, (10 + 2 * rng.standard_exponential(ids.shape)).astype(np.float32), axis=1)
    return logits


LOGITS: dict[str, Callable[[int], np.ndarray]] = {
    "normal, 3.0": lambda n: normal_logits(n, 3.0),
    "as of a model": model_logits,
    "normal, 1.0": lambda n: normal_logits(n, 1.0),  # flat: top-p keeps most ids
    "normal, 0.01": lambda n: normal_logits(n, 0.01),
}
TIMED_LOGITS = ("normal, 3.0", "as of a model", "normal, 1.0")


def device_us(call: Callable[[], object]) -> float:
    """The least of a few replays of a graph of CALLS calls, a call."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return min(times)


def check(sampler: Sampler) -> dict[str, Any]:
    """Rows of each case at the whole vocabulary: ids as the reference has them, logprobs within rounding."""
    differences = {}
    for (name, case), (shape, make) in itertools.product(CASES.items(), LOGITS.items()):
        batch, logits = case(4), make(4)
        inputs = sampler.upload(batch)
        got = sampler.begin_download(sampler.sample(torch.from_numpy(logits).to(DEVICE), inputs)).result()
        want = reference.sample(logits, batch)
        same = got.token_ids == want.token_ids
        worst = float(abs(got.logprobs - want.logprobs)[same].max(initial=0))
        top = (
            bool((got.top_ids == want.top_ids).all()) and float(abs(got.top_logprobs - want.top_logprobs).max()) < 4e-6
        )
        if not same.all() or worst > 4e-6 or not top or not got.finite.all():
            differences[f"{name}; {shape}"] = [got.token_ids.tolist(), want.token_ids.tolist(), worst, top]
    return {"cases": len(LOGITS) * len(CASES), "different": differences}


def check_rows_alone(sampler: Sampler) -> dict[str, Any]:
    """The bits of each row alone, and among 64."""
    different, logits = [], torch.from_numpy(normal_logits(64, 3.0)).to(DEVICE)
    for name, case in CASES.items():
        batch = case(64)
        together = sampler.begin_download(sampler.sample(logits, sampler.upload(batch))).result()
        alone_batch = case(64)
        for row in (0, 17, 63):
            columns = {n: getattr(alone_batch, n)[row : row + 1] for n in ("targets", "positions", "seeds", "temperatures", "top_ks", "top_ps", "min_ps", "num_top", "repetition_penalties", "presence_penalties", "frequency_penalties", "mask_rows", "logit_tokens")}  # fmt: skip
            lists = {n: getattr(alone_batch, n)[row : row + 2] for n in ("penalty_starts", "bias_starts", "banned_starts", "wanted_starts")}  # fmt: skip
            one = replace(alone_batch, **columns, **lists)
            alone = sampler.begin_download(sampler.sample(logits[row : row + 1], sampler.upload(one))).result()
            different += [
                f"{name}, row {row}: {field}"
                for field in ("token_ids", "logprobs", "top_ids", "top_logprobs")
                if getattr(alone, field).tobytes() != getattr(together, field)[row : row + 1].tobytes()
            ]
    return {"cases": 3 * len(CASES), "different": different}


def time_norms(num_rows: int, pdl: bool = False) -> dict[str, float]:
    """`pdl`: each kernel is launched while the one before it ends."""
    weight = torch.ones(WIDTH, device=DEVICE)
    x = torch.randn(num_rows, WIDTH, device=DEVICE)
    out = torch.empty(num_rows, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    parts = torch.randn(4, num_rows, WIDTH, device=DEVICE)
    table = torch.randn(VOCAB, WIDTH, device=DEVICE).bfloat16()
    ids = torch.randint(VOCAB, (num_rows,), device=DEVICE, dtype=torch.int32)
    embedded = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: rms_norm(x, weight, 1e-5, out, pdl=pdl),
        "add_norm, 1 part": lambda: add_norm(parts[:1], x, out, weight=weight, eps=1e-5, pdl=pdl),
        "add_norm, 4 parts": lambda: add_norm(parts, x, out, weight=weight, eps=1e-5, pdl=pdl),
        "embed": lambda: embed(table, ids, 1.0, embedded, pdl=pdl),
    }
    return {name: round(device_us(call), 2) for name, call in calls.items()}


def time_sampling(
    sampler: Sampler, case: Callable[[int], Batch], num_rows: int, given: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Device time by the shape of the logits, of rows without chance only the first; the host's does not depend on it."""
    batch, told = case(num_rows), dict[str, float]()
    inputs = sampler.upload(batch)
    for shape, logits in given.items():
        if inputs.is_drawn or not told:
            us = device_us(lambda rows=logits[:num_rows]: sampler.sample(rows, inputs))
            told[f"device_us, {shape}"] = round(us, 1)
    rows, host = logits[:num_rows], list[float]()
    for _ in range(CALLS):  # one at a time, so that no queue is waited for
        torch.cuda.synchronize()
        begin = time.perf_counter()
        download = sampler.begin_download(sampler.sample(rows, sampler.upload(batch)))
        host.append(time.perf_counter() - begin)
        download.result()
    return {**told, "host_us": round(1e6 * sorted(host)[CALLS // 2], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.budget_s
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    sampler = Sampler(VOCAB, max(NUM_ROWS), DEVICE)
    given = {
        shape: torch.from_numpy(LOGITS[shape](64)).to(DEVICE).repeat(max(NUM_ROWS) // 64, 1) for shape in TIMED_LOGITS
    }
    cases: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("check", lambda: check(sampler)),
        ("check rows alone", lambda: check_rows_alone(sampler)),
        *((f"norms, {n} rows", lambda n=n: time_norms(n)) for n in NUM_ROWS),
        *((f"{name}, {n} rows", lambda case=case, n=n: time_sampling(sampler, case, n, given)) for n in NUM_ROWS for name, case in CASES.items()),
        *((f"norms with pdl, {n} rows", lambda n=n: time_norms(n, pdl=True)) for n in NUM_ROWS),
    ]  # fmt: skip
    for name, measure in cases:
        if time.monotonic() > end:
            print(f"{name}: left out, no time is left", flush=True)
            continue
        begin = time.monotonic()
        try:
            results[name] = measure()
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:400]}
        print(f"{name}: {results[name]}  ({time.monotonic() - begin:.1f} s)", flush=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
