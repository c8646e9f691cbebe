"""Generated calls against the server, by its own description: what was called, and what went against the description.

Owns the settings of schemathesis and the laws that are looked at. A call that the description allows is mended so that it runs;
one that it does not allow is sent as it came. Knows nothing of where the server runs.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from .mended import mended

LAST_EVENTS = (b"data: [DONE]", b"event: response.completed", b"event: response.incomplete", b"event: message_stop")
ENDLESS = "/v1/jilju/events"  # a stream that ends with its reader
ENOUGH_MS = 20_000  # of a deadline that a call here can keep


@dataclass(slots=True)
class Findings:
    num_calls: int = 0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)  # by route and status
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)  # route, law, what; with one call to see it
    errors: list[str] = field(default_factory=list)  # of the exploration itself

    def text(self) -> str:
        return "\n".join([*self.errors, *(f"{key}\n    {curl}" for key, curl in self.failures.items())])


def strict(description: dict[str, Any]) -> dict[str, Any]:
    """Answers may hold nothing that the description does not name; bodies say so of themselves."""
    description = copy.deepcopy(description)
    for schema in description["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return description


def explore(
    description: dict[str, Any],
    *,
    app: Any = None,
    url: str | None = None,
    phases: list[str],
    routes: str = "",
    num_examples: int,
    vocab_size: int,
    seed: int = 1,
    timeout_s: float = 60,
    on_call: Callable[[int], None] = lambda num_calls: None,
) -> Findings:
    """`num_examples` are those of each route in the phase `fuzzing`; `coverage` has as many as there are bounds."""
    config = SchemathesisConfig.from_dict({"seed": seed})
    schema = schemathesis.openapi.from_dict(strict(description), config=config)
    schema = schema.include(path_regex=routes) if routes else schema
    schema = schema.exclude(path=ENDLESS)
    schema.app = app
    settings = schema.config
    settings.update(base_url=url, request_timeout=timeout_s, continue_on_failure=True)
    settings.phases.update(phases=phases)
    settings.generation.update(max_examples=num_examples, deterministic=True, allow_x00=True, no_shrink=True)
    settings.output.sanitization.enabled = False
    settings.checks.not_a_server_error.expected_statuses = ["2xx", "3xx", "4xx", "504"]  # a deadline may be short
    settings.checks.positive_data_acceptance.enabled = False  # what fields say of one another is in no schema
    findings = Findings()

    @schemathesis.hook
    def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
        if case.meta is not None and case.meta.generation.mode.is_positive:
            case.headers = {name: value for name, value in (case.headers or {}).items() if float(value) >= ENOUGH_MS}
            case.body = mended(case.path, case.body, vocab_size)

    @schemathesis.hook
    def after_call(context: Any, case: Any, response: Any) -> None:
        findings.num_calls += 1
        findings.statuses[f"{case.method} {case.path}", f"{response.status_code}{_fault(response)}"] += 1
        if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            _look_at_stream(findings, case, response.content)
        on_call(findings.num_calls)

    try:
        for event in engine.from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                _take_failures(findings, event.recorder)
            elif isinstance(event, events.NonFatalError | events.FatalError):
                findings.errors.append(
                    f"{event.label}: {event.value!r}"
                    if isinstance(event, events.NonFatalError)
                    else repr(event.exception)
                )
    finally:
        for hook in (before_call, after_call):
            schemathesis.hooks.unregister(hook)
    return findings


def _fault(response: Any) -> str:
    """Of a 5xx its code, or its words where its form has no code."""
    if response.status_code < 500 or response.status_code == 504:
        return ""
    error = response.json()["error"]
    return f": {error.get('code') or error['message'][:80]}"


def _look_at_stream(findings: Findings, case: Any, data: bytes) -> None:
    """A stream says of itself that it is whole."""
    last = data.rstrip(b"\n").rpartition(b"\n\n")[2]
    if not (data.endswith(b"\n\n") and last.startswith(LAST_EVENTS)):
        findings.failures.setdefault((case.operation.label, "stream ends", repr(last[:200])), case.as_curl_command())


def _take_failures(findings: Findings, recorder: Any) -> None:
    for checks in recorder.checks.values():
        for check in checks:
            if check.failure_info is not None:
                failure = check.failure_info.failure
                key = (recorder.label, check.name, f"{failure.title}: {failure.message}"[:200])
                findings.failures.setdefault(key, check.failure_info.code_sample)
