"""Waterfalls: ended calls as ledger bars.

Owns how a ledger's intervals become the parts of a bar, and a bounded memory of bars: a call that has ended does not change.
Knows nothing of windows.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from jilju.account.frame import LedgerPart, Waterfall
from jilju.account.recording import Recording
from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.time_ledger import KINDS, Interval, Kind, make_time_ledger

MAX_BARS = 512  # that are remembered, some 2 KB each
# These alternate step by step within a wait, a prefill or a decode.
_WITHIN_STEPS: frozenset[Kind] = frozenset({"host", "stall_budget", "stall_blocks"})


class Waterfalls:
    """Bars by call, made when they are first asked for."""

    def __init__(self) -> None:
        self._bars: OrderedDict[str, Waterfall] = OrderedDict()

    def missing(self, calls: Iterable[CallRecord]) -> list[CallRecord]:
        return [call for call in calls if call.id not in self._bars]

    def add(self, bars: Iterable[tuple[CallRecord, Waterfall]]) -> None:
        for call, bar in bars:
            self._bars[call.id] = bar
            self._bars.move_to_end(call.id)
            if len(self._bars) > MAX_BARS:
                self._bars.popitem(last=False)

    def bar(self, call: CallRecord, source: Recording) -> Waterfall:
        bar = self._bars.get(call.id) or make_waterfall(call, source)
        self.add([(call, bar)])
        return bar


def make_waterfall(call: CallRecord, source: Recording) -> Waterfall:
    """Of a call that has ended, by its sequence that ended last."""
    ledger = make_time_ledger(
        call, last_sequence(call), source.log, source.step_model, block_size=source.block_size or 1, now_ns=call.ended_ns,
        names_blame=False,
    )  # fmt: skip
    return Waterfall(
        run=call.run_id,
        route=call.route,
        state=call.state or "",
        begin_ms=call.received_ns / 1e6,
        total_ms=ledger.total_ns / 1e6,
        prompt_tokens=call.num_prompt_tokens,
        cached_tokens=call.num_cached_tokens,
        output_tokens=call.num_output_tokens,
        parts=[LedgerPart(kind, ns / 1e6) for kind, ns in joined(ledger.intervals)],
    )


def last_sequence(call: CallRecord) -> SequenceRecord | None:
    return max(call.sequences, key=lambda sequence: sequence.ended_ns, default=None)


def joined(intervals: Sequence[Interval]) -> list[tuple[Kind, int]]:
    """Kinds and ns in order. Steps of a wait, of a prompt and of an answer are a stretch each, in which each kind is summed."""
    stretches: list[tuple[str, dict[Kind, int]]] = []
    for interval in intervals:
        before = stretches[-1][0] if stretches else ""
        phase = _phase(interval.kind, before)
        if not stretches or not phase or phase != before:
            stretches.append((phase, {}))
        sums = stretches[-1][1]
        sums[interval.kind] = sums.get(interval.kind, 0) + interval.ns
    parts: list[tuple[Kind, int]] = []
    for _, sums in stretches:
        for kind in sorted(sums, key=_rank):
            if parts and parts[-1][0] == kind:
                parts[-1] = kind, parts[-1][1] + sums[kind]
            else:
                parts.append((kind, sums[kind]))
    return parts


def _phase(kind: Kind, before: str) -> str:
    """ "": it is part of no stretch."""
    if kind.startswith(("queue_", "prefill_", "decode_")):
        return kind.partition("_")[0]
    return before if kind in _WITHIN_STEPS else ""


def _rank(kind: Kind) -> int:
    return KINDS.index(kind) + (len(KINDS) if kind in _WITHIN_STEPS else 0)
