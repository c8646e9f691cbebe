"""Steps: single steps of an executor, made to order: a prompt of so many tokens, or so many rows at such a context.

Owns the batches: random but fixed token ids, blocks of its own for each row. A decode step is repeated at the same place, so that
its context stays what it is; the keys before it are computed once. Knows nothing of the engine, of text or of figures.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from jilju.plan import Batch, Executor, Limits, Plan, StepResult, StepShape


class OpTimes(Protocol):
    @property
    def ns(self) -> dict[str, int]: ...


class ProfiledExecutor(Executor, Protocol):
    """An executor that keeps count of where its time goes."""

    def profile(self) -> OpTimes:
        """Nanoseconds by kind of op, of all steps so far."""
        ...


class Sampling(NamedTuple):
    """How every row samples, and how many ids its lists have; which ids is random but fixed."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_top: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_penalized: int = 0
    num_biases: int = 0
    allowed_share: float | None = None  # of the vocabulary, by a mask a row; None: no mask


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
        ends = np.cumsum([part.count for part in parts])
        sampled = parts[len(parts) - num_logits :]
        n = num_logits
        return Batch(
            token_ids=np.concatenate([self._ids[p.row, p.start : p.start + p.count] for p in parts]),
            starts=np.array([p.start for p in parts], np.int32),
            counts=np.array([p.count for p in parts], np.int32),
            block_tables=tables.reshape(-1, self._blocks_per_row)[[p.row for p in parts]],
            logit_tokens=(ends[len(parts) - n :] - 1).astype(np.int32),
            targets=np.full(n, -1, np.int32),
            positions=np.array([p.start + p.count for p in sampled], np.int64),
            seeds=np.arange(n, dtype=np.uint64),
            temperatures=np.full(n, sampling.temperature, np.float32),
            top_ks=np.full(n, sampling.top_k, np.int32),
            top_ps=np.full(n, sampling.top_p, np.float32),
            min_ps=np.full(n, sampling.min_p, np.float32),
            num_top=np.full(n, sampling.num_top, np.int32),
            repetition_penalties=np.full(n, sampling.repetition_penalty, np.float32),
            presence_penalties=np.full(n, sampling.presence_penalty, np.float32),
            frequency_penalties=np.full(n, sampling.frequency_penalty, np.float32),
            penalty_starts=_starts(n, sampling.num_penalized),
            penalty_ids=self._lists(n, sampling.num_penalized),
            penalty_counts=np.ones(n * sampling.num_penalized, np.int32),
            bias_starts=_starts(n, sampling.num_biases),
            bias_ids=self._lists(n, sampling.num_biases),
            biases=np.ones(n * sampling.num_biases, np.float32),
            banned_starts=_starts(n, 0),
            banned_ids=self._lists(n, 0),
            mask_rows=np.arange(n, dtype=np.int32) if sampling.allowed_share is not None else np.full(n, -1, np.int32),
            masks=self._masks(n, sampling.allowed_share),
        )

    def _lists(self, num_rows: int, length: int) -> np.ndarray:
        """So many ids a row, each once in a row: int32 [num_rows * length]"""
        rng = np.random.default_rng(length)
        rows = [rng.permutation(self._vocab_size)[:length] for _ in range(num_rows)] if length else []
        return np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)

    def _masks(self, num_rows: int, share: float | None) -> np.ndarray:
        num_words = -(-self._vocab_size // 32)
        if share is None:
            return np.zeros((0, num_words), np.uint32)
        bits = np.random.default_rng(0).random((num_rows, 32 * num_words)) < share
        bits[:, 0] = True  # at least one id may be sampled
        return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def _starts(num_rows: int, length: int) -> np.ndarray:
    return np.arange(0, (num_rows + 1) * length, length, dtype=np.int32) if length else np.zeros(num_rows + 1, np.int32)


def prefill_shape(num_tokens: int) -> StepShape:
    """As one step: chunks change neither the operations nor, but for the weights read again, the bytes."""
    return StepShape((0,), (num_tokens,), 1)


def decode_shape(num_rows: int, context: int) -> StepShape:
    return StepShape((context,) * num_rows, (1,) * num_rows, num_rows)
