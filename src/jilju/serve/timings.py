"""Timings: where one call's time went, as a sum that is exact.

Owns the split of [received, encoded] into disjoint intervals, in integer ns, from the server's own marks and the engine's
RequestTimes, which share one monotonic clock; what no interval claims is `other`. Knows nothing of HTTP or text.
"""

from dataclasses import dataclass, field

import msgspec

from jilju.engine.request import RequestTimes

SLOW_SEND_NS = 1_000_000  # a write into a socket's buffer takes some 0.05 ms; above this it waited for room
MAX_WAITS = 16  # the newest: of interest are those after the last token, and a slow reader holds up every write


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
    body_ns: int = 0  # all of the body was there
    parsed_ns: int = 0
    render_ns: int = 0  # lengths
    tokenize_ns: int = 0
    grammar_ns: int = 0
    submitted_ns: int = 0
    first_token_ns: int = 0  # at hand
    last_event_ns: int = 0  # the engine's terminal event at hand
    encoded_ns: int = 0  # the last bytes ready to be written
    num_resumes: int = 0
    waits: list[tuple[int, int]] = field(default_factory=list)  # begin and end of writes that the reader held up

    def note_send(self, begin_ns: int, end_ns: int) -> None:
        if end_ns - begin_ns >= SLOW_SEND_NS:
            self.waits.append((begin_ns, end_ns))
            del self.waits[:-MAX_WAITS]


def make_timings(
    marks: Marks, times: RequestTimes | None, *, first_sent_ns: int, num_tokens: int, seed: int, now_ns: int
) -> Timings:
    """`times` are those of the call's sequence that ended last; None if it never reached a step.

    The engine's last token ends the part that the engine explains; after it there is only writing and waiting for the reader.
    """
    times = times or RequestTimes(queued_ns=marks.submitted_ns)
    total = now_ns - marks.received_ns
    parse = marks.parsed_ns - marks.received_ns
    queue = times.scheduled_ns - times.queued_ns if times.scheduled_ns else 0
    prefill = times.first_token_ns - times.scheduled_ns if times.first_token_ns else 0
    decode = times.last_token_ns - times.first_token_ns if times.first_token_ns else 0
    resume = min(times.resume_ns, decode)
    stalled = min(times.stalled_ns, decode - resume)
    tail_ns = marks.last_event_ns or now_ns
    client = sum(max(0, end - max(begin, tail_ns)) for begin, end in marks.waits)
    write = now_ns - tail_ns - client
    parts = {
        "parse_ms": parse,
        "render_ms": marks.render_ns,
        "tokenize_ms": marks.tokenize_ns,
        "grammar_ms": marks.grammar_ns,
        "queue_ms": queue,
        "prefill_ms": prefill,
        "stalled_ms": stalled,
        "decode_ms": decode - stalled - resume,
        "resume_ms": resume,
        "write_ms": write,
        "client_ms": client,
    }
    other = total - sum(parts.values())
    first_ns = first_sent_ns or marks.first_token_ns
    ttft = first_ns - marks.received_ns if first_ns else None
    gaps = num_tokens - 1
    tpot = decode / gaps if gaps > 0 else None
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
