"""Moment: who ran, who waited and for what, and who held which blocks, as the log has it at some time.

Owns how that is read out of the newest rows of each live sequence. A sequence runs from the step of its first row; what a step
that is under way does is not known until it ends. Knows nothing of what came later: a moment looks the same whenever it is asked for.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jilju.account.frame import Blocks, HeldBlocks, RunningRow, Share, WaitingRow
from jilju.account.recording import BlockCounts, Recording
from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.sequence_rows import SequenceRows
from jilju.account.time_ledger import held_by
from jilju.engine.events import LoggedStep

MAX_WAITING = 256  # that are shown, the longest waiting first
MAX_HOLDERS = 8  # of what one waits for


@dataclass(frozen=True, slots=True)
class Moment:
    running: list[RunningRow]
    waiting: list[WaitingRow]  # MAX_WAITING at most
    num_waiting: int
    blocks: Blocks
    state: str


@dataclass(frozen=True, slots=True)
class _Live:
    """A live sequence, and of its rows of the last minute what is of use; all 0 where it has none."""

    call: CallRecord
    sequence: SequenceRecord
    cached_start: int | None = None  # where its present stay began; None: before that minute
    computed: int = 0
    num_output: int = 0
    is_sampled: bool = False  # its newest row is
    last_step_ns: int = 0  # when that row's step ended
    is_running: bool = False


def make_moment(source: Recording, rows: SequenceRows, calls: Iterable[CallRecord], end_ns: int) -> Moment:
    """`rows` are those of the steps that ended in the minute before `end_ns`, `calls` all that were live then, and perhaps others."""
    serials = source.log.serials(0, end_ns)
    newest = source.log.step(serials.stop - 1)
    is_now = source.now is not None and end_ns >= source.now_ns
    live = _live(calls, rows, end_ns)
    state = source.state_at(end_ns)
    counts = source.now.blocks if is_now and source.now is not None else _blocks(source, newest)
    running = [each for each in live if each.is_running]
    waiting = sorted((each for each in live if not each.is_running), key=lambda each: each.call.submitted_ns)
    queue = _Queue(source, newest, state, running)
    starts = source.now.predicted_starts if is_now and source.now is not None else {}
    return Moment(
        running=[_running_row(each, source.block_size) for each in running],
        waiting=[queue.row(each, starts.get(each.sequence.number)) for each in waiting[:MAX_WAITING]],
        num_waiting=len(waiting),
        blocks=_shown_blocks(source, counts, running),
        state=state,
    )


def _live(calls: Iterable[CallRecord], rows: SequenceRows, end_ns: int) -> list[_Live]:
    found = list(_submitted(calls, end_ns))
    places = rows.of(sequence.number for _, sequence in found)
    return [
        _of_rows(call, sequence, rows, its) if len(its) else _Live(call, sequence)
        for (call, sequence), its in zip(found, places, strict=True)
    ]


def _submitted(calls: Iterable[CallRecord], end_ns: int) -> Iterator[tuple[CallRecord, SequenceRecord]]:
    """Those that the engine had at that moment."""
    for call in calls:
        if 0 < call.submitted_ns < end_ns and not 0 < call.ended_ns < end_ns:
            for sequence in call.sequences:
                if not 0 < sequence.ended_ns < end_ns:
                    yield call, sequence


def _of_rows(call: CallRecord, sequence: SequenceRecord, rows: SequenceRows, places: np.ndarray) -> _Live:
    """`places` are those of its rows, in their order."""
    last, last_step = rows.rows[places[-1]], int(rows.row_steps[places[-1]])
    sampled = next((row for place in places[::-1] if (row := rows.rows[place])["is_sampled"]), None)
    num_output = 0
    if sampled is not None:
        num_output = int(sampled["start"]) + int(sampled["num_tokens"]) + 1 - sequence.num_prompt_tokens
    # One that decodes has a row in every step, unless its blocks were taken.
    is_out = bool(last["is_sampled"]) and bool(rows.steps["num_preempted"][last_step + 1 :].any())
    return _Live(
        call,
        sequence,
        _stay_start(rows, places, is_whole=call.submitted_ns >= rows.begin_ns),
        int(last["start"]) + int(last["num_tokens"]),
        max(0, num_output),
        bool(last["is_sampled"]),
        int(rows.steps["end_ns"][last_step]),
        not is_out,
    )


def _stay_start(rows: SequenceRows, places: np.ndarray, *, is_whole: bool) -> int | None:
    """Where it began to compute when it was last let in: what is before that was cached. `is_whole`: these are all its rows."""
    starts = rows.rows["start"][places]
    breaks = np.flatnonzero(starts[1:] != starts[:-1] + rows.rows["num_tokens"][places[:-1]])
    if len(breaks):
        return int(starts[breaks[-1] + 1])
    return int(starts[0]) if is_whole else None


def _running_row(each: _Live, block_size: int) -> RunningRow:
    return RunningRow(
        run=each.call.run_id,
        phase="decode" if each.is_sampled else "prefill",
        prompt_tokens=each.sequence.num_prompt_tokens,
        computed_tokens=each.computed,
        output_tokens=each.num_output,
        blocks=_blocks_for(each.computed, block_size),
        since_ms=each.call.received_ns / 1e6,
    )


def _blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size) if block_size else 0


class _Queue:
    """What keeps those out that wait, and who has it."""

    def __init__(self, source: Recording, newest: LoggedStep | None, state: str, running: Sequence[_Live]):
        self._newest, self._is_away = newest, state not in ("ready", "draining")
        self._num_running = len(running)
        self._holders: dict[str, list[Share]] = {"grammar": [], "restart": []}
        if newest is not None:
            runs = {each.sequence.number: each.call.run_id for each in running}
            for cause in ("step", "rows", "tokens", "blocks", "order"):
                closed = "open" if cause == "step" else cause
                held = held_by(newest.rows, closed, source.block_size or 1)  # type: ignore[arg-type]
                self._holders[cause] = _shares({number: held[number] for number in held if number in runs}, runs)

    def row(self, each: _Live, predicted_ns: int | None) -> WaitingRow:
        cause = self._cause(each)
        return WaitingRow(
            run=each.call.run_id,
            prompt_tokens=each.sequence.num_prompt_tokens,
            since_ms=(each.last_step_ns or each.call.submitted_ns) / 1e6,
            cause=cause,
            predicted_start_ms=None if predicted_ns is None else predicted_ns / 1e6,
            holders=self._holders.get(cause, []),
        )

    def _cause(self, each: _Live) -> str:
        if self._is_away:
            return "restart"
        if each.last_step_ns:
            return "blocks"  # they were taken from it
        newest, has_grammar = self._newest, each.call.grammar_ns > 0
        if newest is None or newest.step.begin_ns < each.call.submitted_ns:
            return "grammar" if has_grammar and not self._num_running else "step"
        closed = newest.step.closed_by
        return closed if closed != "open" else "grammar" if has_grammar else "step"


def _shares(held: dict[int, int], runs: dict[int, str]) -> list[Share]:
    sums: dict[str, int] = {}
    for number, amount in held.items():
        sums[runs[number]] = sums.get(runs[number], 0) + amount
    total = sum(sums.values())
    largest = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:MAX_HOLDERS]
    return [Share(run=run, share=amount / total) for run, amount in largest if amount]


def _blocks(source: Recording, newest: LoggedStep | None) -> BlockCounts:
    if newest is None:
        return BlockCounts(0, 0, source.info.num_blocks if source.info is not None else 0)
    step = newest.step
    return BlockCounts(step.num_blocks_held, step.num_blocks_cached, step.num_blocks_free)


def _shown_blocks(source: Recording, counts: BlockCounts, running: Sequence[_Live]) -> Blocks:
    size = source.block_size
    held: dict[str, tuple[int, int]] = {}
    for each in running:
        blocks = _blocks_for(each.computed, size)
        found = each.cached_start if each.cached_start is not None else each.sequence.num_cached_tokens
        cached = min(blocks, found // size) if size else 0
        sums = held.get(each.call.run_id, (0, 0))
        held[each.call.run_id] = sums[0] + blocks, sums[1] + cached
    return Blocks(
        total=sum(counts),
        held=counts.held,
        cached=counts.cached,
        free=counts.free,
        block_size=size,
        bytes_per_block=size * source.info.kv_bytes_per_token if source.info is not None else 0,
        holders=[HeldBlocks(run=run, blocks=blocks, cached=cached) for run, (blocks, cached) in held.items()],
    )
