"""The event log: the one record of what happened.

Owns a bounded ring of step records and who listens to them, and nothing else: metrics and the time ledger are folds over them
and over the marks of requests. Holds no text and no tokens. Records are made in the engine process and travel with the step's
frame, so they outlive an engine's death. Times are ns of the monotonic clock.
"""

from collections import deque
from collections.abc import Callable

import msgspec

STEP_RING = 131_072  # steps kept: an hour of 30 ms steps


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step: schedule from begin to scheduled, pack to packed, backend to done, commit to end."""

    step_id: int
    begin_ns: int
    scheduled_ns: int
    packed_ns: int
    done_ns: int
    end_ns: int
    num_rows: int
    num_prefill_tokens: int  # tokens of rows that compute more than the newest token of a decoding sequence
    num_decode_tokens: int
    num_cached_tokens: int  # prompt tokens that rows of this step found in the prefix cache
    num_recomputed_tokens: int  # tokens computed again after a preemption or a restart
    num_logits: int
    num_running: int
    num_waiting: int
    num_blocks_held: int
    num_blocks_cached: int
    num_blocks_free: int
    num_preempted: int
    num_finished: int
    num_aborted: int
    flops: int
    bytes: int
    predicted_ns: int  # what it was expected to take
    bound_ns: int  # what it might be expected to take at most, for the streams that wait for it; 0: none does
    is_rerun: bool  # part of a step that raised


def prefill_share_ns(begin_ns: int, done_ns: int, num_prefill_tokens: int, num_decode_tokens: int) -> int:
    """What a decoding row of a step waited for the prefill of others: their share of its time, by token count."""
    return (done_ns - begin_ns) * num_prefill_tokens // (num_prefill_tokens + num_decode_tokens)


class EventLog:
    """A bounded ring of step records and a list of listeners, called once for each record as it is added."""

    def __init__(self, ring: int = STEP_RING):
        self.steps: deque[StepRecord] = deque(maxlen=ring)
        self._listeners: list[Callable[[StepRecord], None]] = []

    def add_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        for listener in self._listeners:
            listener(record)

    def resize(self, ring: int) -> None:
        """Keep the newest `ring` records from now on."""
        self.steps = deque(self.steps, maxlen=ring)

    def listen(self, listener: Callable[[StepRecord], None]) -> None:
        self._listeners.append(listener)
