"""Moment: who ran, who waited and for what, and who held which blocks, as the log has it at some time.

Owns how that is read out of the newest rows of each live sequence. A sequence runs from the step of its first row; what a step
that is under way does is not known until it ends. Knows nothing of what came later: a moment looks the same whenever it is asked for.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jilju.account.frame import Blocks, HeldBlocks, RunningRow, Share, WaitingRow
from jilju.account.recording import BlockCounts, Recording
from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.sequence_rows import Newest, SequenceRows
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
    """A live sequence."""

    call: CallRecord
    sequence: SequenceRecord
    newest: Newest | None  # None: it had no row in the last minute
    is_running: bool


def make_moment(source: Recording, rows: SequenceRows, calls: Iterable[CallRecord], end_ns: int) -> Moment:
    """`rows` are those of the minute before `end_ns`, `calls` all that were live then, and perhaps others."""
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
        blocks=_shown_blocks(source, counts, running, rows.begin_ns),
        state=state,
    )


def _live(calls: Iterable[CallRecord], rows: SequenceRows, end_ns: int) -> list[_Live]:
    found: list[_Live] = []
    for call, sequence in _submitted(calls, end_ns):
        newest = rows.newest(sequence.number)
        # One that decodes has a row in every step, unless its blocks were taken.
        is_running = newest is not None and not (newest.is_sampled and rows.was_preempted_after(newest))
        found.append(_Live(call, sequence, newest, is_running))
    return found


def _submitted(calls: Iterable[CallRecord], end_ns: int) -> Iterator[tuple[CallRecord, SequenceRecord]]:
    """Those that the engine had at that moment."""
    for call in calls:
        if 0 < call.submitted_ns < end_ns and not 0 < call.ended_ns < end_ns:
            for sequence in call.sequences:
                if not 0 < sequence.ended_ns < end_ns:
                    yield call, sequence


def _running_row(each: _Live, block_size: int) -> RunningRow:
    newest = _newest(each)
    num_output = newest.sampled_computed + 1 - each.sequence.num_prompt_tokens if newest.sampled_ns else 0
    return RunningRow(
        run=each.call.run_id,
        phase="decode" if newest.is_sampled else "prefill",
        prompt_tokens=each.sequence.num_prompt_tokens,
        computed_tokens=newest.computed,
        output_tokens=max(0, num_output),
        blocks=_blocks_for(newest.computed, block_size),
        since_ms=each.call.received_ns / 1e6,
    )


def _newest(each: _Live) -> Newest:
    assert each.newest is not None, "who runs has had a row"
    return each.newest


def _num_cached(each: _Live, begin_ns: int) -> int:
    """Tokens that it found as it was last let in, if that was in the last minute; else what the engine told with its first token."""
    newest = _newest(each)
    is_seen = each.call.submitted_ns >= begin_ns or newest.before_stay_ns >= begin_ns
    return newest.stay_start if is_seen else each.sequence.num_cached_tokens


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
            since_ms=(each.newest.at_ns if each.newest is not None else each.call.submitted_ns) / 1e6,
            cause=cause,
            predicted_start_ms=None if predicted_ns is None else predicted_ns / 1e6,
            holders=self._holders.get(cause, []),
        )

    def _cause(self, each: _Live) -> str:
        if self._is_away:
            return "restart"
        if each.newest is not None:
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


def _shown_blocks(source: Recording, counts: BlockCounts, running: Sequence[_Live], begin_ns: int) -> Blocks:
    size = source.block_size
    held: dict[str, tuple[int, int]] = {}
    for each in running:
        blocks = _blocks_for(_newest(each).computed, size)
        cached = min(blocks, _num_cached(each, begin_ns) // size) if size else 0
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
