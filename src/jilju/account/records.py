"""Records of calls: the marks of each call and its sequences, as folds read them and as a recorded file keeps them.

Owns the types, and the bounded memory of calls that have ended. Holds no text and no tokens. Times are ns of the log's clock,
0 where it did not get that far; lengths say so.
"""

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from jilju.engine.request import CacheMiss

MAX_CALLS = 16_384  # ended ones that are kept: some 10 MB, ...
MAX_SEQUENCES = 65_536  # ... and 10 MB more where each has several sequences

CALL_BYTES, SEQUENCE_BYTES = 960, 340  # as they were seen to take with all that they hold


class SequenceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of a call. Rows of the log name it by its number."""

    number: int
    index: int  # of the choice
    prompt_index: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queued_ns: int  # in the engine's inbox; 0: not known (yet)
    ended_ns: int  # its terminal event at hand, or given up
    num_preemptions: int
    num_resumes: int
    finish_reason: str | None
    miss: CacheMiss | None


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted call."""

    id: str  # as the server minted it
    run_id: str  # as its answer has it: "chatcmpl-" and the id
    route: str
    key_name: str | None
    received_ns: int
    body_ns: int  # all of the body was there
    parsed_ns: int
    render_ns: int  # length
    tokenize_ns: int  # length
    grammar_ns: int  # length
    submitted_ns: int
    first_sent_ns: int  # the first token's chunk was handed on, or was ready to be
    last_event_ns: int  # the engine's last event at hand
    encoded_ns: int  # the last bytes ready to be written
    ended_ns: int  # 0: it still runs
    waits: list[tuple[int, int]]  # begin and end of writes that the reader held up
    is_streamed: bool
    state: str | None  # None: it still runs
    status: int
    code: str | None
    sequences: list[SequenceRecord]
    machine_ns: int = 0  # its share of the machine's time: what it pays for; 0 while it runs
    joules: float | None = None  # None: this machine tells of none

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum({s.prompt_index: s.num_prompt_tokens for s in self.sequences}.values())

    @property
    def num_cached_tokens(self) -> int:
        """Of all prompts, each once: what the first sequence of it found."""
        return sum({s.prompt_index: s.num_cached_tokens for s in reversed(self.sequences)}.values())

    @property
    def num_output_tokens(self) -> int:
        return sum(s.num_output_tokens for s in self.sequences)


class CallRing:
    """The newest ended calls, in the order of their ends, found by id, or by the number of a sequence."""

    def __init__(self, size: int = MAX_CALLS, max_sequences: int = MAX_SEQUENCES):
        self._size, self._max_sequences = size, max_sequences
        self._calls: OrderedDict[str, CallRecord] = OrderedDict()
        self._by_number: dict[int, str] = {}
        self.dropped_ns = 0  # when the newest ended that is not kept any more

    def add(self, call: CallRecord) -> None:
        """In place of what was known of it before."""
        self._calls[call.id] = call
        for sequence in call.sequences:
            self._by_number[sequence.number] = call.id
        while len(self._calls) > self._size or (len(self._by_number) > self._max_sequences and len(self._calls) > 1):
            _, oldest = self._calls.popitem(last=False)
            self.dropped_ns = oldest.ended_ns
            for sequence in oldest.sequences:
                self._by_number.pop(sequence.number, None)

    @property
    def num_bytes(self) -> int:
        """Roughly."""
        return CALL_BYTES * len(self._calls) + SEQUENCE_BYTES * len(self._by_number)

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[CallRecord]:
        return iter(self._calls.values())

    def __reversed__(self) -> Iterator[CallRecord]:
        return reversed(self._calls.values())

    def find(self, call_id: str) -> CallRecord | None:
        return self._calls.get(call_id)

    def of_number(self, number: int) -> CallRecord | None:
        call_id = self._by_number.get(number)
        return None if call_id is None else self._calls.get(call_id)
