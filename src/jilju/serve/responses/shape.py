"""The response object, and its stream of named events.

Owns how an answer looks to a client of /v1/responses, streamed or whole: the object around the items, the first and the last
events, their numbers. Knows nothing of the items' own shapes or of how deltas come to be.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from jilju.errors import JiljuError
from jilju.serve.answer import WAIT, Head, Usage
from jilju.serve.generation import Choice, Delta
from jilju.serve.responses.items import Output
from jilju.serve.responses.types import ResponseAnswer, ResponseSettings, ResponseUsage, Status
from jilju.serve.timings import Timings


class ResponseRenderer:
    silence = WAIT

    def __init__(
        self, head: Head, choice: Choice, output: Output, settings: ResponseSettings, unix_time: Callable[[], float]
    ):
        self._head, self._choice, self._output, self._settings = head, choice, output, settings
        self._unix_time = unix_time
        self._num_events = 0

    def chunk(self, delta: Delta, usage: Usage | None, timings: Timings | None) -> bytes:
        """The first token opens the response, whatever it shows; one that shows nothing has no event."""
        opening = b""
        if not self._num_events:
            response = self._response("in_progress")
            opening = self._event("created", {"response": response}) + self._event(
                "in_progress", {"response": response}
            )
        return opening + b"".join(self._event(name, fields) for name, fields in self._output.take(delta))

    def ending(self, usage: Usage, timings: Timings | None) -> bytes:
        status = self._status()
        return self._event(status, {"response": self._response(status, usage, timings)})

    def failure(self, error: JiljuError) -> bytes:
        self._output.fail()
        return self._event("failed", {"response": self._response("failed", error=error)})

    def add(self, delta: Delta) -> None:
        self._output.take(delta)

    def whole(self, usage: Usage, timings: Timings | None) -> bytes:
        return msgspec.json.encode(self._response(self._status(), usage, timings))

    def _status(self) -> Literal["completed", "incomplete"]:
        return "completed" if self._choice.finish_reason in ("stop", "tool_calls") else "incomplete"

    def _response(
        self,
        status: Status,
        usage: Usage | None = None,
        timings: Timings | None = None,
        error: JiljuError | None = None,
    ) -> ResponseAnswer:
        """The same fields at every time of its life."""
        response: ResponseAnswer = {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": int(self._unix_time()) if status == "completed" else None,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": f"{error.code}: {error.message}"},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output.values(),
            "model": self._head.model,
            "usage": None if usage is None else usage_fields(usage),
            **self._settings,
        }
        if timings is not None:
            response["timings"] = timings
        return response

    def _event(self, name: str, fields: Mapping[str, Any]) -> bytes:
        kind = f"response.{name}"
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def usage_fields(usage: Usage) -> ResponseUsage:
    """Of an answer that has ended: all is known."""
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    assert prompt is not None and completion is not None, "every sequence has ended"
    fields: ResponseUsage = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": prompt.cached_tokens,
            "cache_write_tokens": prompt.cache_write_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
    if usage.jilju_cache is not None:
        fields["jilju_cache"] = usage.jilju_cache
    return fields
