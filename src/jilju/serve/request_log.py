"""The request log: one line a call, as text or JSON.

Owns the line's fields, the logger `jilju.access`, the two formatters and the handler that outlives a full disk. Holds no prompt
and no text. Knows nothing of how logging is set up: the command that starts a server does that.
"""

import logging
import time
from typing import Any, Literal, TextIO

import msgspec

from jilju.account.bill import Paid
from jilju.serve.ledger import Call, LedgerListener

access_log = logging.getLogger("jilju.access")

LogFormat = Literal["text", "json"]
WATCHED = frozenset({"/readyz", "/health"})
FIELDS = "jilju_fields"  # attribute of a record that carries its fields


class CallLog(LedgerListener):
    """A ledger listener: one line as a call ends. Of one that left a step it was in, its cost is without that step."""

    def __init__(self, price_per_hour: float | None = None):
        self._price_per_hour = price_per_hour

    def on_end(self, call: Call) -> None:
        first_ns = call.first_token_ns
        times = [life.times for life in call.lives if life.times is not None]
        cost = Paid(call.machine_ns, call.joules).cost(self._price_per_hour)
        fields = {
            "id": call.id,
            "route": call.route,
            "key": call.key_name,
            "prompt_tokens": call.num_prompt_tokens,
            "cached_tokens": call.num_cached_tokens,
            "output_tokens": call.num_output_tokens,
            "ms": round((call.ended_ns - call.received_ns) / 1e6, 3),
            "ttft_ms": round((first_ns - call.received_ns) / 1e6, 3) if first_ns else None,
            "machine_ms": round(call.machine_ns / 1e6, 3),
            "cost_usd": cost,
            "joules": None if call.joules is None else round(call.joules, 3),
            "preemptions": sum(t.num_preemptions for t in times),
            "resumes": max((life.num_resumes for life in call.lives), default=0),
            "state": call.state,
            "status": call.status,
            "code": call.code,
            "client_id": call.label,
            "request_id": call.request_id,
            "session_id": call.session_id,
        }
        access_log.info(_line(fields), extra={FIELDS: fields})


def log_arrival(*, call_id: str, method: str, path: str, key_name: str | None, status: int, ms: float) -> None:
    """A call that generates nothing: at info when it was refused, else at debug, as is the "not yet" that watchers ask for."""
    fields = {
        "id": call_id,
        "method": method,
        "route": path[:200],
        "key": key_name,
        "ms": round(ms, 3),
        "status": status,
    }
    refused = status >= 400 and not (status == 503 and path in WATCHED)
    access_log.log(logging.INFO if refused else logging.DEBUG, _line(fields), extra={FIELDS: fields})


def _line(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if value is not None)


def _plain(value: object) -> str:
    """No line break, no escape sequence and no blank gets into a line of the log from outside."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(char if "!" <= char <= "~" else f"\\u{ord(char):04x}" for char in text)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a call's fields stand at its top."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        data: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, FIELDS, None)
        data |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            data["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(data).decode()


def make_formatter(log_format: LogFormat) -> logging.Formatter:
    return JsonFormatter() if log_format == "json" else TextFormatter()


class CountingHandler(logging.StreamHandler[TextIO]):
    """A line that cannot be written, for the disk is full or nobody reads any more, is counted, and serving goes on."""

    def __init__(self, stream: TextIO | None = None):
        super().__init__(stream)
        self.num_dropped = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.num_dropped += 1
