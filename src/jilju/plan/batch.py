"""Batch and StepResult: what goes down to a backend for one step, and what comes up.

Owns the flat arrays and their shapes. Knows nothing of sequences, requests or kernels. A batch holds `num_rows` rows;
row r is one sequence's part of the step: its tokens at positions [starts[r], starts[r] + counts[r]). The tokens of all
rows lie one after another in `token_ids`. A logit row is a token of the batch whose next-token logits are wanted, either
to sample from (targets < 0) or to score a given id (targets >= 0).
"""

import time
from dataclasses import dataclass, field

import numpy as np


def num_pairs_before(end: int, window: int) -> int:
    """Query-key pairs of the queries [0, end). `window` 0: none."""
    ramp = min(end, window or end)
    return ramp * (ramp + 1) // 2 + (end - ramp) * ramp


@dataclass(frozen=True, slots=True)
class StepShape:
    """The size of a step, as the cost formulas take it: per row the tokens before it and in it, and the logit rows."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    num_logits: int

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def num_attended(self, window: int = 0) -> int:
        """Query-key pairs of exact causal attention, one head: the query at position p sees p + 1 keys, at most a window."""
        rows = zip(self.starts, self.counts, strict=True)
        return sum(num_pairs_before(c + q, window) - num_pairs_before(c, window) for c, q in rows)

    def num_keys_read(self, window: int = 0) -> int:
        """Keys that some query sees: a row's, from the first that its first query sees."""
        total = 0
        for c, q in zip(self.starts, self.counts, strict=True):
            first = max(0, c + 1 - window) if window else 0
            total += c + q - first
        return total


@dataclass(frozen=True, slots=True)
class Batch:
    """The flat arrays of a step. All int arrays are C-contiguous."""

    token_ids: np.ndarray  # int32 [num_tokens]
    starts: np.ndarray  # int32 [num_rows]       tokens of the sequence that are in its blocks already
    counts: np.ndarray  # int32 [num_rows]       tokens of the row, >= 1
    block_tables: np.ndarray  # int32 [num_rows, max_blocks]  covers [0, start + count); unused entries are -1

    logit_tokens: np.ndarray  # int32 [num_logits]   index into token_ids, ascending
    targets: np.ndarray  # int32 [num_logits]   -1: sample; otherwise the id whose logprob is wanted
    positions: np.ndarray  # int64 [num_logits]   position of the token to be sampled, keys the noise
    seeds: np.ndarray  # uint64 [num_logits]
    temperatures: np.ndarray  # float32 [num_logits]   below 1e-4: greedy
    top_ks: np.ndarray  # int32 [num_logits]   0: off
    top_ps: np.ndarray  # float32 [num_logits]   1: off
    min_ps: np.ndarray  # float32 [num_logits]   0: off
    num_top: np.ndarray  # int32 [num_logits]   how many alternatives to report, 0..MAX_TOP
    repetition_penalties: np.ndarray  # float32 [num_logits]   1: off
    presence_penalties: np.ndarray  # float32 [num_logits]   0: off
    frequency_penalties: np.ndarray  # float32 [num_logits]   0: off

    # Lists of ids, of logit row i those of [starts[i], starts[i + 1]), each id at most once in a row.
    penalty_starts: np.ndarray  # int32 [num_logits + 1]
    penalty_ids: np.ndarray  # int32 [...]   that the penalties touch
    penalty_counts: np.ndarray  # int32 [...]   how often the id is in the output; 0: in the prompt alone
    bias_starts: np.ndarray  # int32 [num_logits + 1]   at most MAX_BIASES a row
    bias_ids: np.ndarray  # int32 [...]
    biases: np.ndarray  # float32 [...]
    banned_starts: np.ndarray  # int32 [num_logits + 1]
    banned_ids: np.ndarray  # int32 [...]   that must not be sampled
    wanted_starts: np.ndarray  # int32 [num_logits + 1]   at most MAX_WANTED a row; only here an id may come again
    wanted_ids: np.ndarray  # int32 [...]   whose logprobs are reported

    mask_rows: np.ndarray  # int32 [num_logits]   which mask says what may be sampled; -1: anything
    masks: np.ndarray  # uint32 [num_masks, ceil(vocab / 32)]   bit id % 32 of word id // 32 is set: id may be sampled
    # int32 [1]   0: masks are being filled while the step runs, a backend waits for a 1 before it reads them
    masks_ready: np.ndarray = field(default_factory=lambda: np.ones(1, np.int32))

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_logits(self) -> int:
        return len(self.logit_tokens)

    def wait_for_masks(self) -> None:
        """Until they are filled. Raises TimeoutError after so long that nobody fills them."""
        begin = time.monotonic()
        while not self.masks_ready[0]:
            if time.monotonic() - begin > MASKS_WAIT_S:
                raise TimeoutError(f"the masks of a step were not filled within {MASKS_WAIT_S} s")
            time.sleep(50e-6)

    @property
    def shape(self) -> StepShape:
        return StepShape(tuple(self.starts.tolist()), tuple(self.counts.tolist()), self.num_logits)


MASKS_WAIT_S = 10  # a mask takes some milliseconds at worst
MAX_TOP = 20  # alternatives a logit row may report; the contract's cap on top_logprobs
MAX_BIASES = 1024  # biased ids of a logit row; the contract's cap on logit_bias
MAX_WANTED = 128  # ids of a logit row whose logprobs are wanted; the contract's cap on logprob_token_ids


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per logit row. Logprobs are of the model's own distribution: log softmax of the raw float32 logits,
    before biases, penalties, bans, temperature and filters."""

    token_ids: np.ndarray  # int32 [num_logits]   sampled id, or the target
    logprobs: np.ndarray  # float32 [num_logits]   of token_ids
    top_ids: np.ndarray  # int32 [num_logits, MAX_TOP]   most probable first, ties to the lowest id; -1 beyond num_top
    top_logprobs: np.ndarray  # float32 [num_logits, MAX_TOP]
    wanted_logprobs: np.ndarray  # float32 [...]   of the batch's wanted_ids, in their order
    # bool [num_logits]   False: a logit was NaN or infinite, or no id was left to sample; the row's other fields mean nothing
    finite: np.ndarray
