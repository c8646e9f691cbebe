"""Batches for tests: written as rows and logit rows, packed into the flat arrays that a backend takes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jilju.backends.reference import ReferenceExecutor
from jilju.plan import Batch, Executor, StepResult


class BatchRow(NamedTuple):
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]


class Logit(NamedTuple):
    token: int  # index into the batch's tokens
    target: int = -1
    position: int = 0
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_top: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    counts: Mapping[int, int] = {}  # of ids in the output; 0: in the prompt alone
    bias: Mapping[int, float] = {}
    banned_ids: Sequence[int] = ()
    wanted_ids: Sequence[int] = ()
    mask: np.ndarray | None = None  # uint32 [ceil(vocab / 32)]


def make_batch(rows: Sequence[BatchRow], logits: Sequence[Logit] = ()) -> Batch:
    tables = np.full((len(rows), max(len(row.block_ids) for row in rows)), -1, np.int32)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.block_ids)] = row.block_ids

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(logit, name) for logit in logits], dtype)

    def starts(lists: Iterable[Collection[int]]) -> np.ndarray:
        return np.cumsum([0, *(len(part) for part in lists)], dtype=np.int32)

    def joined(lists: Iterable[Iterable[float]], dtype: type) -> np.ndarray:
        return np.array([x for part in lists for x in part], dtype)

    masks = [logit.mask for logit in logits if logit.mask is not None]
    has_mask = np.array([logit.mask is not None for logit in logits], bool)
    return Batch(
        token_ids=np.array([token for row in rows for token in row.token_ids], np.int32),
        starts=np.array([row.start for row in rows], np.int32),
        counts=np.array([len(row.token_ids) for row in rows], np.int32),
        block_tables=tables,
        logit_tokens=column("token", np.int32),
        targets=column("target", np.int32),
        positions=column("position", np.int64),
        seeds=column("seed", np.uint64),
        temperatures=column("temperature", np.float32),
        top_ks=column("top_k", np.int32),
        top_ps=column("top_p", np.float32),
        min_ps=column("min_p", np.float32),
        num_top=column("num_top", np.int32),
        repetition_penalties=column("repetition_penalty", np.float32),
        presence_penalties=column("presence_penalty", np.float32),
        frequency_penalties=column("frequency_penalty", np.float32),
        penalty_starts=starts(logit.counts for logit in logits),
        penalty_ids=joined((logit.counts for logit in logits), np.int32),
        penalty_counts=joined((logit.counts.values() for logit in logits), np.int32),
        bias_starts=starts(logit.bias for logit in logits),
        bias_ids=joined((logit.bias for logit in logits), np.int32),
        biases=joined((logit.bias.values() for logit in logits), np.float32),
        banned_starts=starts(logit.banned_ids for logit in logits),
        banned_ids=joined((logit.banned_ids for logit in logits), np.int32),
        wanted_starts=starts(logit.wanted_ids for logit in logits),
        wanted_ids=joined((logit.wanted_ids for logit in logits), np.int32),
        mask_rows=np.where(has_mask, np.cumsum(has_mask) - 1, -1).astype(np.int32),
        masks=np.stack(masks) if masks else np.zeros((0, 0), np.uint32),
    )


def run(executor: Executor, batch: Batch) -> StepResult:
    executor.launch(batch)
    return executor.wait()


def chunks_of(num_tokens: int, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """(start, count) parts that cover the tokens; the last takes what is left."""
    parts, start = [], 0
    for size in sizes:
        if start < num_tokens:
            parts.append((start, min(size, num_tokens - start)))
            start += size
    return parts if start >= num_tokens else [*parts, (start, num_tokens - start)]


def logits_of(
    executor: ReferenceExecutor, token_ids: Sequence[int], parts: Sequence[tuple[int, int]], block_ids: Sequence[int]
) -> np.ndarray:
    """Logits at every token of one sequence, computed part after part: float32 [tokens, vocab]"""
    logits = []
    for start, count in parts:
        row = BatchRow(token_ids[start : start + count], start, block_ids)
        run(executor, make_batch([row], [Logit(i, position=start + i + 1) for i in range(count)]))
        assert executor.last_logits is not None
        logits.append(executor.last_logits)
    return np.concatenate(logits)
