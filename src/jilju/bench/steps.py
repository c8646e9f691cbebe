"""Steps: single steps of an executor, made to order: a prompt of so many tokens, or so many rows at such a context.

Owns the batches: random but fixed token ids, blocks of its own for each row. A decode step is repeated at the same place, so that
its context stays what it is; the keys before it are computed once. Knows nothing of the engine, of text or of figures.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jilju.bench.batches import LogitRows, Sampling, batch_of
from jilju.plan import Batch, Executor, Limits, Plan, StepResult, StepShape


class OpTimes(Protocol):
    @property
    def ns(self) -> dict[str, int]: ...


class ProfiledExecutor(Executor, Protocol):
    """An executor that keeps count of where its time goes."""

    def profile(self) -> OpTimes:
        """Nanoseconds by kind of op, of all steps so far."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [start, start + count) of a row."""

    row: int
    start: int
    count: int


class Steps:
    """`executor` has loaded `plan` within `limits`, whose blocks hold `max_context` tokens of each of `max_rows` rows."""

    def __init__(self, executor: Executor, plan: Plan, limits: Limits, seed: int = 0):
        self._executor, self._limits, self._vocab_size = executor, limits, plan.vocab_size
        self._blocks_per_row = -(-limits.max_context // limits.block_size)
        assert limits.num_blocks >= self._blocks_per_row * limits.max_rows, f"{limits} do not hold every row"
        shape = (limits.max_rows, limits.max_context)
        self._ids = np.random.default_rng(seed).integers(0, plan.vocab_size, shape, dtype=np.int32)
        self._filled = [0] * limits.max_rows  # tokens of each row that are in its blocks

    def prefill(self, num_tokens: int) -> float:
        """Seconds for one row's first `num_tokens` tokens, in steps of the limits' size, to the id that follows them."""
        begin = time.perf_counter()
        for start in range(0, num_tokens, self._limits.max_tokens):
            count = min(self._limits.max_tokens, num_tokens - start)
            self.run([Part(0, start, count)], num_logits=int(start + count == num_tokens))
        self._filled[0] = max(self._filled[0], num_tokens)
        return time.perf_counter() - begin

    def decode(self, num_rows: int, context: int, seconds: float, sampling: Sampling = Sampling()) -> float:  # noqa: B008
        """Seconds of a step of `num_rows` rows with `context` tokens before each, the mean over at least `seconds`."""
        self.fill(num_rows, context)
        parts = [Part(row, context, 1) for row in range(num_rows)]
        batch = self.batch(parts, num_rows, sampling)
        num_steps, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds or num_steps == 0:
            self._run(batch)
            num_steps += 1
        return passed / num_steps

    def fill(self, num_rows: int, context: int) -> None:
        """Compute what is missing of the first `context` tokens of each row."""
        for row in range(num_rows):
            while (start := self._filled[row]) < context:
                count = min(self._limits.max_tokens, context - start)
                self.run([Part(row, start, count)], num_logits=0)
                self._filled[row] = start + count

    def run(self, parts: Sequence[Part], num_logits: int, sampling: Sampling = Sampling()) -> StepResult:  # noqa: B008
        return self._run(self.batch(parts, num_logits, sampling))

    def _run(self, batch: Batch) -> StepResult:
        self._executor.launch(batch)
        return self._executor.wait()

    def batch(self, parts: Sequence[Part], num_logits: int, sampling: Sampling) -> Batch:
        """A batch that samples after the last token of each of the last `num_logits` parts."""
        tables = np.arange(self._limits.max_rows * self._blocks_per_row, dtype=np.int32)
        sampled = range(len(parts) - num_logits, len(parts))
        ends = np.cumsum([part.count for part in parts]).tolist()
        logits = LogitRows(
            tokens=[ends[index] - 1 for index in sampled],
            positions=[parts[index].start + parts[index].count for index in sampled],
            targets=[-1] * num_logits,
            seeds=list(sampled),
        )
        return batch_of(
            np.concatenate([self._ids[p.row, p.start : p.start + p.count] for p in parts]),
            [p.start for p in parts],
            [p.count for p in parts],
            tables.reshape(-1, self._blocks_per_row)[[p.row for p in parts]],
            logits,
            sampling,
            self._vocab_size,
        )


def prefill_shape(num_tokens: int) -> StepShape:
    """As one step: chunks change neither the operations nor, but for the weights read again, the bytes."""
    return StepShape((0,), (num_tokens,), 1)


def decode_shape(num_rows: int, context: int) -> StepShape:
    return StepShape((context,) * num_rows, (1,) * num_rows, num_rows)
