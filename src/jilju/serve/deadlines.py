"""Deadlines: until when a call must be in a step, and until when it must be complete.

Owns the two headers that ask for less time, and what becomes of headers, fields and the server's own limits: of several
values the smallest holds. Knows nothing of what happens when a deadline passes.
"""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from jilju.errors import InvalidValue
from jilju.serve.context import ServeLimits
from jilju.serve.errors import shown
from jilju.serve.sampling import MAX_DEADLINE_MS, GenerationFields

DEADLINE_HEADER = "x-jilju-deadline-ms"
MAX_QUEUE_HEADER = "x-jilju-max-queue-ms"
MS = re.compile("[1-9][0-9]{0,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HeaderTimes:
    """What the headers ask for; None: nothing."""

    deadline_ms: int | None
    max_queue_ms: int | None


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Moments of the server's clock."""

    queue_ns: int
    total_ns: int


def header_times(headers: Headers) -> HeaderTimes:
    return HeaderTimes(_ms(headers, DEADLINE_HEADER), _ms(headers, MAX_QUEUE_HEADER))


def make_deadlines(received_ns: int, given: HeaderTimes, fields: GenerationFields, limits: ServeLimits) -> Deadlines:
    total_ms = _least(given.deadline_ms, fields.deadline_ms, limits.total_s * 1000)
    queue_ms = _least(given.max_queue_ms, fields.max_queue_ms)
    return Deadlines(
        queue_ns=received_ns + round((limits.queue_s * 1000 if queue_ms is None else queue_ms) * 1e6),
        total_ns=received_ns + round((total_ms or 0) * 1e6),
    )


def _ms(headers: Headers, name: str) -> int | None:
    values = headers.getlist(name)
    for value in values:
        if not MS.fullmatch(value) or int(value) > MAX_DEADLINE_MS:
            allowed = f"a whole number of milliseconds, 1..{MAX_DEADLINE_MS}"
            raise InvalidValue(f"the header {name} is {shown(value)}; allowed: {allowed}", param=name)
    return min(map(int, values), default=None)


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)
