"""Packing: a Step as the flat arrays of a Batch.

Reads sequences and changes nothing. Knows the layout of `plan.batch` and nothing of why the scheduler chose these rows.
Noise is keyed by (seed, index of the token to be sampled), so chunks, neighbours, preemption and resume change nothing.
"""

import numpy as np

from jilju.engine.scheduler import Row, Step
from jilju.plan import Batch

_UINT64 = 2**64 - 1  # a seed is int64; its bits key the noise

_NO_IDS = np.empty(0, np.int32)


def pack(step: Step) -> Batch:
    rows = step.rows
    max_blocks = max(len(row.block_ids) for row in rows)
    block_tables = np.full((len(rows), max_blocks), -1, np.int32)
    logits = _Logits()
    first_token = 0
    for index, row in enumerate(rows):
        block_tables[index, : len(row.block_ids)] = row.block_ids
        logits.add(row, first_token)
        first_token += row.count
    return Batch(
        token_ids=np.concatenate([row.sequence.tokens[row.start : row.start + row.count] for row in rows]),
        starts=np.array([row.start for row in rows], np.int32),
        counts=np.array([row.count for row in rows], np.int32),
        block_tables=block_tables,
        logit_tokens=np.array(logits.tokens, np.int32),
        targets=np.array(logits.targets, np.int32),
        positions=np.array(logits.positions, np.int64),
        seeds=np.array(logits.seeds, np.uint64),
        temperatures=np.array(logits.temperatures, np.float32),
        top_ks=np.array(logits.top_ks, np.int32),
        top_ps=np.array(logits.top_ps, np.float32),
        min_ps=np.array(logits.min_ps, np.float32),
        repetition_penalties=np.array(logits.penalties, np.float32),
        penalty_starts=_offsets(logits.penalty_ids),
        penalty_ids=np.concatenate([_NO_IDS, *logits.penalty_ids]),
        banned_starts=_offsets(logits.banned_ids),
        banned_ids=np.concatenate([_NO_IDS, *logits.banned_ids]),
        num_top=np.array(logits.num_top, np.int32),
    )


class _Logits:
    """The columns of the logit rows, one entry each."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.positions: list[int] = []
        self.seeds: list[int] = []
        self.temperatures: list[float] = []
        self.top_ks: list[int] = []
        self.top_ps: list[float] = []
        self.min_ps: list[float] = []
        self.penalties: list[float] = []
        self.penalty_ids: list[np.ndarray] = []
        self.banned_ids: list[np.ndarray] = []
        self.num_top: list[int] = []

    def add(self, row: Row, first_token: int) -> None:
        """The logit rows of a row whose tokens begin at `first_token` of the batch, in ascending order."""
        sequence = row.sequence
        for position in row.scored:
            target = int(sequence.tokens[position + 1])
            self._add(row, first_token + position - row.start, target, position + 1, _NO_IDS, _NO_IDS)
        if row.is_sampled:
            params = sequence.request.params
            seen = sequence.tokens[: sequence.num_tokens] if params.repetition_penalty != 1.0 else _NO_IDS
            banned = _NO_IDS
            if sequence.num_output < params.min_tokens and sequence.end_ids:
                banned = np.array(sorted(sequence.end_ids), np.int32)
            self._add(row, first_token + row.count - 1, -1, sequence.num_tokens, seen, banned)

    def _add(self, row: Row, token: int, target: int, position: int, seen: np.ndarray, banned: np.ndarray) -> None:
        params = row.sequence.request.params
        self.tokens.append(token)
        self.targets.append(target)
        self.positions.append(position)
        self.seeds.append((params.seed or 0) & _UINT64)
        self.temperatures.append(params.temperature)
        self.top_ks.append(params.top_k)
        self.top_ps.append(params.top_p)
        self.min_ps.append(params.min_p)
        self.penalties.append(params.repetition_penalty if len(seen) else 1.0)
        self.penalty_ids.append(seen)
        self.banned_ids.append(banned)
        self.num_top.append(params.logprobs or 0 if target < 0 else 0)


def _offsets(parts: list[np.ndarray]) -> np.ndarray:
    """Where each part begins when they lie one after another, and where the last ends: int32 [len(parts) + 1]."""
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return offsets
