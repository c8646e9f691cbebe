"""Timings: where one call's time went, as a sum that is exact.

Owns the split of [received, encoded] into disjoint intervals, in integer ns, from the server's own marks and the engine's
RequestTimes, which share one monotonic clock; what no interval claims is `other`. Knows nothing of HTTP or text.
"""

from dataclasses import dataclass, field

import msgspec

from jilju.engine.request import RequestTimes


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    total_ms: float
    parse_ms: float
    render_ms: float
    tokenize_ms: float
    grammar_ms: float
    queue_ms: float
    prefill_ms: float
    stalled_ms: float
    decode_ms: float
    resume_ms: float
    write_ms: float
    client_ms: float
    other_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    seed: int
    steps: int
    preemptions: int
    resumes: int


@dataclass(slots=True)
class Marks:
    """What the server notes of a call as it goes. ns; 0: not reached."""

    received_ns: int
    parsed_ns: int = 0
    render_ns: int = 0  # lengths
    tokenize_ns: int = 0
    submitted_ns: int = 0
    first_token_ns: int = 0  # at hand, as are those below
    last_token_ns: int = 0
    last_event_ns: int = 0  # the engine's terminal event
    resume_ns: int = 0  # gaps between two tokens in which the engine was started again
    num_resumes: int = 0
    sends: list[tuple[int, int]] = field(default_factory=list)  # begin and end of each write to the socket


def make_timings(
    marks: Marks, times: RequestTimes | None, *, first_sent_ns: int, num_tokens: int, seed: int, now_ns: int
) -> Timings:
    """`times` are those of the call's sequence that ended last; None if it never reached a step.

    The engine's last token ends the part that the engine explains; after it there is only writing and waiting for the reader.
    """
    times = times or RequestTimes(queued_ns=marks.submitted_ns)
    total = now_ns - marks.received_ns
    parse = marks.parsed_ns - marks.received_ns
    queue = prefill = decode = 0
    resume = marks.resume_ns
    if resume:  # the first engine took its marks along; the server has its own
        prefill = marks.first_token_ns - marks.submitted_ns
        decode = marks.last_token_ns - marks.first_token_ns - resume
    elif times.first_token_ns:
        queue = times.scheduled_ns - times.queued_ns
        prefill = times.first_token_ns - times.scheduled_ns
        decode = times.last_token_ns - times.first_token_ns
    elif times.scheduled_ns:
        queue = times.scheduled_ns - times.queued_ns
    if marks.num_resumes and not resume:  # the engine died before the first token: all that was waited for an engine
        resume = times.queued_ns - marks.submitted_ns
    stalled = min(times.stalled_ns, decode)
    tail_ns = marks.last_event_ns or now_ns
    client = sum(max(0, end - max(begin, tail_ns)) for begin, end in marks.sends)
    write = now_ns - tail_ns - client
    parts = {
        "parse_ms": parse,
        "render_ms": marks.render_ns,
        "tokenize_ms": marks.tokenize_ns,
        "grammar_ms": 0,
        "queue_ms": queue,
        "prefill_ms": prefill,
        "stalled_ms": stalled,
        "decode_ms": decode - stalled,
        "resume_ms": resume,
        "write_ms": write,
        "client_ms": client,
    }
    other = total - sum(parts.values())
    first_ns = first_sent_ns or marks.first_token_ns
    ttft = first_ns - marks.received_ns if first_ns else None
    gaps = num_tokens - 1
    tpot = (times.last_token_ns - times.first_token_ns) / gaps if gaps > 0 and times.first_token_ns else None
    return Timings(
        total_ms=total / 1e6,
        **{name: ns / 1e6 for name, ns in parts.items()},
        other_ms=other / 1e6,
        ttft_ms=None if ttft is None else ttft / 1e6,
        tpot_ms=None if tpot is None else tpot / 1e6,
        seed=seed,
        steps=times.num_steps,
        preemptions=times.num_preemptions,
        resumes=marks.num_resumes,
    )
