"""Packing: a Step as the flat arrays of a Batch.

Reads sequences and changes nothing. Knows the layout of `plan.batch` and nothing of why the scheduler chose these rows.
Noise is keyed by (seed, index of the token to be sampled), so chunks, neighbours, preemption and resume change nothing.
"""

from itertools import accumulate

import numpy as np

from jilju.engine.scheduler import Row, Step
from jilju.engine.sequence import Sequence
from jilju.plan import Batch

_UINT64 = 2**64 - 1  # a seed is int64; its bits key the noise
_LEAST_PENALTY = float(np.finfo(np.float32).tiny)  # in a batch's precision less would be 0, which nothing is divided by

_NO_IDS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)
_NO_WORDS = np.empty(0, np.uint32)


def pack(step: Step, vocab_size: int) -> Batch:
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
        num_top=np.array(logits.num_top, np.int32),
        repetition_penalties=np.array(logits.repetition_penalties, np.float32),
        presence_penalties=np.array(logits.presence_penalties, np.float32),
        frequency_penalties=np.array(logits.frequency_penalties, np.float32),
        penalty_starts=_offsets(logits.penalty_ids),
        penalty_ids=_joined(logits.penalty_ids, _NO_IDS),
        penalty_counts=_joined(logits.penalty_counts, _NO_IDS),
        bias_starts=_offsets(logits.bias_ids),
        bias_ids=_joined(logits.bias_ids, _NO_IDS),
        biases=_joined(logits.biases, _NO_VALUES),
        banned_starts=_offsets(logits.banned_ids),
        banned_ids=_joined(logits.banned_ids, _NO_IDS),
        wanted_starts=_offsets(logits.wanted_ids),
        wanted_ids=_joined(logits.wanted_ids, _NO_IDS),
        mask_rows=np.array(logits.mask_rows, np.int32),
        masks=_masks(logits.masks, -(-vocab_size // 32)),
        masks_ready=np.array([not logits.has_grammar], np.int32),
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
        self.num_top: list[int] = []
        self.repetition_penalties: list[float] = []
        self.presence_penalties: list[float] = []
        self.frequency_penalties: list[float] = []
        self.penalty_ids: list[np.ndarray] = []
        self.penalty_counts: list[np.ndarray] = []
        self.bias_ids: list[np.ndarray] = []
        self.biases: list[np.ndarray] = []
        self.banned_ids: list[np.ndarray] = []
        self.wanted_ids: list[np.ndarray] = []
        self.mask_rows: list[int] = []
        self.masks: list[np.ndarray] = []
        self.has_grammar = False

    def add(self, row: Row, first_token: int) -> None:
        """The logit rows of a row whose tokens begin at `first_token` of the batch, in ascending order."""
        sequence = row.sequence
        for position in row.scored:
            self._add(
                sequence, first_token + position - row.start, position + 1, target=int(sequence.tokens[position + 1])
            )
        if row.is_sampled:
            self._add(sequence, first_token + row.count - 1, sequence.num_tokens)

    def _add(self, sequence: Sequence, token: int, position: int, target: int = -1) -> None:
        params = sequence.request.params
        self.tokens.append(token)
        self.targets.append(target)
        self.positions.append(position)
        self.seeds.append((params.seed or 0) & _UINT64)
        self.temperatures.append(params.temperature)
        self.top_ks.append(params.top_k)
        self.top_ps.append(params.top_p)
        self.min_ps.append(params.min_p)
        self.repetition_penalties.append(max(params.repetition_penalty, _LEAST_PENALTY))
        self.presence_penalties.append(params.presence_penalty)
        self.frequency_penalties.append(params.frequency_penalty)
        if target < 0:
            self._add_changes(sequence)
        else:  # a token that is there already is scored as it is
            self.num_top.append(sequence.request.prompt_logprobs or 0)
            self.mask_rows.append(-1)
            for column in (
                self.penalty_ids,
                self.penalty_counts,
                self.bias_ids,
                self.biases,
                self.banned_ids,
                self.wanted_ids,
            ):
                column.append(_NO_IDS)

    def _add_changes(self, sequence: Sequence) -> None:
        """What changes the logits of a row that is sampled from."""
        params, counts = sequence.request.params, sequence.counts
        self.num_top.append((params.logprobs or 0) if params.logprob_token_ids is None else 0)
        self.penalty_ids.append(_NO_IDS if counts is None else counts.ids)
        self.penalty_counts.append(_NO_IDS if counts is None else counts.counts)
        self.bias_ids.append(sequence.bias_ids)
        self.biases.append(sequence.biases)
        self.banned_ids.append(sequence.banned_ids)
        self.wanted_ids.append(sequence.wanted_ids)
        has_grammar = sequence.grammar is not None  # whose mask is filled later, with what `mask` allows
        mask = _NO_WORDS if has_grammar else sequence.mask
        self.has_grammar |= has_grammar
        self.mask_rows.append(-1 if mask is None else len(self.masks))
        if mask is not None:
            self.masks.append(mask)


def _masks(masks: list[np.ndarray], num_words: int) -> np.ndarray:
    """Masks one under another: uint32 [num_masks, num_words]. What a mask is shorter than that is not allowed."""
    out = np.zeros((len(masks), num_words), np.uint32)
    for row, mask in zip(out, masks, strict=True):
        row[: len(mask)] = mask
    return out


def _joined(parts: list[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    """The parts one after another; mostly all of them are empty."""
    found = [part for part in parts if len(part)]
    return np.concatenate(found) if found else nothing


def _offsets(parts: list[np.ndarray]) -> np.ndarray:
    """Where each part begins when they lie one after another, and where the last ends: int32 [len(parts) + 1]."""
    return np.array(list(accumulate(map(len, parts), initial=0)), np.int32)
