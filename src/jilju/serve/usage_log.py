"""The usage log: a file with a line of JSON for each call that ended, however it ended.

Owns the line's fields and the file. What cannot be written is counted and dropped: serving goes on with a full disk. Holds no
prompt and no text. Knows nothing of how a cost comes about.
"""

import logging
import os
import stat
import time

import msgspec

from jilju.account.bill import Paid
from jilju.errors import ConfigError
from jilju.serve.ledger import Call

logger = logging.getLogger("jilju.serve")


class UsageLine(msgspec.Struct, frozen=True, kw_only=True):
    """Null: it did not come that far, or nothing is known of it."""

    time: str  # UTC, when the line was written
    id: str  # as the log names the call
    route: str
    model: str
    key: str | None  # its name
    streamed: bool
    state: str  # "completed", "client_cancelled", "deadline", "shed", "failed"
    status: int
    code: str | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    sequences: int
    ms: float  # from the head read to the end
    queue_ms: float | None  # of the first sequence that was in a step
    ttft_ms: float | None
    machine_ms: float  # of the machine's time, its share of the steps it was in: what it pays for
    cost_usd: float | None  # None: there is no --price
    joules: float | None
    preemptions: int
    resumes: int
    client_id: str | None
    request_id: str | None
    session_id: str | None


def usage_line(call: Call, model: str, price_per_hour: float | None, unix_time: float) -> UsageLine:
    sequences = [life.record() for life in call.lives]
    waits = [t.scheduled_ns - t.queued_ns for life in call.lives if (t := life.times) is not None and t.scheduled_ns]
    num_cached = {s.prompt_index: s.num_cached_tokens for s in reversed(sequences)}
    first_ns = call.first_token_ns
    return UsageLine(
        time=f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(unix_time))}.{int(unix_time % 1 * 1000):03d}Z",
        id=call.id,
        route=call.route,
        model=model,
        key=call.key_name,
        streamed=call.is_streamed,
        state=call.state or "",
        status=call.status,
        code=call.code,
        prompt_tokens=call.num_prompt_tokens,
        cached_tokens=sum(num_cached.values()),
        output_tokens=call.num_output_tokens,
        sequences=len(sequences),
        ms=(call.ended_ns - call.received_ns) / 1e6,
        queue_ms=min(waits) / 1e6 if waits else None,
        ttft_ms=(first_ns - call.received_ns) / 1e6 if first_ns else None,
        machine_ms=call.machine_ns / 1e6,
        cost_usd=Paid(call.machine_ns, call.joules).cost(price_per_hour),
        joules=call.joules,
        preemptions=sum(s.num_preemptions for s in sequences),
        resumes=max((s.num_resumes for s in sequences), default=0),
        client_id=call.label,
        request_id=call.request_id,
        session_id=call.session_id,
    )


class UsageLog:
    def __init__(self, path: str):
        """Raises ConfigError if nothing can be written there."""
        self.num_dropped = 0
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--usage-log {path} cannot be written: {error.strerror}; name another file") from error
        status = os.fstat(self._file)
        is_begun = stat.S_ISREG(status.st_mode) and status.st_size > 0
        self._is_torn = is_begun and os.pread(self._file, 1, status.st_size - 1) != b"\n"  # by a death or a full disk

    def write(self, line: UsageLine) -> None:
        data = (b"\n" if self._is_torn else b"") + msgspec.json.encode(line) + b"\n"
        try:
            written = data[: os.write(self._file, data)]
        except OSError as error:
            self._drop(error.strerror or "")
            return
        if written:
            self._is_torn = not written.endswith(b"\n")
        if len(written) < len(data):
            self._drop("the disk is full")

    def close(self) -> None:
        os.close(self._file)

    def _drop(self, why: str) -> None:
        self.num_dropped += 1
        if self.num_dropped & (self.num_dropped - 1) == 0:  # the 1st, 2nd, 4th, ...
            logger.error("%d lines could not be written to the usage log %s: %s", self.num_dropped, self._path, why)


def check_usage_log(path: str | None) -> None:
    """Raises ConfigError if nothing could be written there."""
    if path is not None:
        UsageLog(path).close()
