"""Parts: a call that has ended, cut into the spans that are told of it.

Owns where each begins and ends, from the call's marks and the log's rows. Lengths that have no mark of their own (rendering,
tokenizing, compiling a grammar) are laid one after another from where the call was parsed. Knows nothing of OpenTelemetry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jilju.engine.events import EventLog
from jilju.engine.request import RequestTimes
from jilju.serve.ledger import Call, SequenceLife
from jilju.serve.otel import names
from jilju.serve.timings import Marks

MAX_CHUNKS = 128  # of a sequence that are told apart; the last one stands for the rest


@dataclass(frozen=True, slots=True)
class Part:
    """A child span. ns of the server's clock."""

    name: str
    begin_ns: int
    end_ns: int
    attributes: Mapping[str, int] = field(default_factory=dict)


def parts_of(call: Call, log: EventLog) -> list[Part]:
    """In order, those of each sequence after another; each lies within the call. One with a single sequence has no overlaps."""
    marks = call.marks
    if marks is None:
        return []
    parts = _before_the_engine(call, marks)
    for life in call.lives:
        own = {names.CHOICE_INDEX: life.index} if len(call.lives) > 1 else {}
        if life.times is not None and life.times.queued_ns:
            parts += [
                Part(part.name, part.begin_ns, part.end_ns, {**own, **part.attributes})
                for part in _of_sequence(life, life.times, log)
            ]
    if marks.last_event_ns:
        parts.append(Part(names.WRITE, marks.last_event_ns, call.ended_ns))
    return [part for part in parts if call.received_ns <= part.begin_ns <= part.end_ns <= call.ended_ns]


def _before_the_engine(call: Call, marks: Marks) -> list[Part]:
    parts = [Part(names.VALIDATE, call.received_ns, marks.parsed_ns or call.ended_ns)]
    begin_ns = marks.parsed_ns
    lengths = ((names.RENDER, marks.render_ns), (names.TOKENIZE, marks.tokenize_ns), (names.GRAMMAR, marks.grammar_ns))
    for name, took_ns in lengths:
        if took_ns:
            parts.append(Part(name, begin_ns, begin_ns + took_ns))
            begin_ns += took_ns
    return parts


def _of_sequence(life: SequenceLife, times: RequestTimes, log: EventLog) -> list[Part]:
    attributes = {names.NUM_PREEMPTIONS: times.num_preemptions} if times.num_preemptions else {}
    parts = [Part(names.QUEUE, times.queued_ns, times.scheduled_ns or life.ended_ns, attributes)]
    if times.scheduled_ns:
        parts += _prefill(life, times, log)
    if times.first_token_ns:
        end_ns = times.last_token_ns if life.finish_reason is not None else life.ended_ns  # else it was cut off
        parts.append(Part(names.DECODE, times.first_token_ns, end_ns, {names.NUM_TOKENS: life.num_output_tokens}))
    if life.num_resumes:
        parts += _resumes(life, times, log)
    return parts


def _prefill(life: SequenceLife, times: RequestTimes, log: EventLog) -> list[Part]:
    end_ns = times.first_token_ns or life.ended_ns
    steps = _steps_of(life, log, times.scheduled_ns, end_ns)
    if not steps:  # the log keeps them no more: one part for all
        chunks = [(times.scheduled_ns, end_ns, life.num_prompt_tokens - times.num_cached_tokens)]
    else:
        chunks = [(step.begin_ns, min(step.end_ns, end_ns), step.num_tokens) for step in steps]
    if len(chunks) > MAX_CHUNKS:
        rest = chunks[MAX_CHUNKS - 1 :]
        chunks[MAX_CHUNKS - 1 :] = [(rest[0][0], rest[-1][1], sum(count for _, _, count in rest))]
    cached = {names.NUM_CACHED_TOKENS: times.num_cached_tokens} if times.num_cached_tokens else {}
    return [
        Part(names.PREFILL_CHUNK.format(index + 1), begin, end, {names.NUM_TOKENS: count, **({} if index else cached)})
        for index, (begin, end, count) in enumerate(chunks)
    ]


def _resumes(life: SequenceLife, times: RequestTimes, log: EventLog) -> list[Part]:
    """From the last step of an engine that died to the end of the next one's first step that brought a token."""
    parts: list[Part] = []
    died_ns = 0
    steps = _steps_of(life, log, times.scheduled_ns, life.ended_ns)
    for before, step in zip((None, *steps), steps, strict=False):
        if before is not None and step.step_id <= before.step_id:  # a new engine counts anew
            died_ns = before.end_ns
        if died_ns and step.is_sampled:
            parts.append(Part(names.RESUME, died_ns, step.end_ns))
            died_ns = 0
    return parts


class _OwnStep(NamedTuple):
    """A step with a row of the sequence, and what that says."""

    step_id: int
    begin_ns: int
    end_ns: int
    num_tokens: int
    is_sampled: int


def _steps_of(life: SequenceLife, log: EventLog, begin_ns: int, end_ns: int) -> list[_OwnStep]:
    """Those that were under way at some moment of (begin_ns, end_ns). As arrays: there may be thousands, and streams wait for this."""
    serials = log.serials(begin_ns + 1, end_ns)
    found = log.arrays(range(serials.start, serials.stop + 1))
    own = found.rows["number"] == life.number
    steps, rows = found.steps[found.row_steps[own]], found.rows[own]
    columns = (steps["step_id"], steps["begin_ns"], steps["end_ns"], rows["num_tokens"], rows["is_sampled"])
    return [
        step for step in map(_OwnStep._make, zip(*(c.tolist() for c in columns), strict=True)) if step.begin_ns < end_ns
    ]
