"""Telemetry: a call that has ended becomes spans and measurements.

Owns the turning of marks into OpenTelemetry's objects. A ledger listener: nothing of it runs before a call's end. The library
is imported here and in `setup`, which are imported only where it is wanted. Knows nothing of exporters.
"""

import logging
import time
from collections.abc import Callable, Mapping

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jilju.serve.context import ServerContext
from jilju.serve.ledger import Call, LedgerListener
from jilju.serve.otel import names
from jilju.serve.otel.attributes import (
    Value,
    content_attributes,
    error_of_call,
    measured_attributes,
    operation_of,
    span_attributes,
)
from jilju.serve.otel.origins import Origins
from jilju.serve.otel.parts import parts_of
from jilju.serve.otel.providers import Providers
from jilju.serve.runs.store import RunStore

logger = logging.getLogger("jilju.serve")


class Telemetry(LedgerListener):
    def __init__(
        self,
        context: ServerContext,
        providers: Providers,
        runs: RunStore,
        unix_ns: Callable[[], int] = time.time_ns,
    ):
        self.origins = Origins()
        self._context, self._providers, self._runs, self._unix_ns = context, providers, runs, unix_ns
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = providers.traces.get_tracer("jilju", context.version)
        meter = providers.metrics.get_meter("jilju", context.version)
        self._duration, self._first_token, self._per_token = (
            meter.create_histogram(name, "s", text, explicit_bucket_boundaries_advisory=edges)
            for name, text, edges in (
                (names.DURATION, "Time of a call, from its head read to its last byte", names.DURATION_S),
                (names.FIRST_TOKEN, "Time to the first token of a call that completed", names.FIRST_TOKEN_S),
                (names.PER_TOKEN, "Time per token after the first, of a call that completed", names.PER_TOKEN_S),
            )
        )

    def on_end(self, call: Call) -> None:
        """What goes wrong in here is logged and ends no call."""
        try:
            self._tell(call)
        except Exception:
            logger.exception("call %s could not be told to OpenTelemetry", call.id)

    def close(self) -> None:
        """Send what is left. May take a while: not on the event loop."""
        self._providers.close()

    def _tell(self, call: Call) -> None:
        origin = self.origins.find(call.id)
        common = measured_attributes(call, self._context.model_name, origin)
        error = error_of_call(call)
        self._measure(call, common, error)
        attributes = common | span_attributes(call)
        if error is not None:
            attributes[names.ERROR_TYPE] = error
        run = self._runs.find(call.id, call.key_name) if self._context.trace_content else None
        if run is not None:
            attributes |= content_attributes(run, self._context.tokenizer.decode)
        unix_offset_ns = self._unix_ns() - self._context.clock.now_ns()
        root = self._tracer.start_span(
            f"{operation_of(call)} {self._context.model_name}",
            context=self._propagator.extract(origin.trace),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=call.received_ns + unix_offset_ns,
        )
        if call.status >= 500:
            root.set_status(trace.StatusCode.ERROR, call.message)
        if root.is_recording():
            inside = trace.set_span_in_context(root)
            for part in parts_of(call, self._context.client.log):
                span = self._tracer.start_span(
                    part.name, inside, attributes=part.attributes, start_time=part.begin_ns + unix_offset_ns
                )
                span.end(part.end_ns + unix_offset_ns)
        root.end(call.ended_ns + unix_offset_ns)

    def _measure(self, call: Call, common: Mapping[str, Value], error: str | None) -> None:
        failed = {} if error is None else {names.ERROR_TYPE: error}
        self._duration.record((call.ended_ns - call.received_ns) / 1e9, {**common, **failed})
        if error is not None:
            return
        if call.first_token_ns:
            self._first_token.record((call.first_token_ns - call.received_ns) / 1e9, common)
        if len(call.times) == 1 and call.num_output_tokens > 1 and (times := call.times[0]).first_token_ns:
            took_ns = times.last_token_ns - times.first_token_ns
            self._per_token.record(took_ns / (call.num_output_tokens - 1) / 1e9, common)
