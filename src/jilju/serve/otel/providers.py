"""Providers: the two ends of OpenTelemetry that a server is handed, and how they are made for a collector.

Owns the settings: a base URL, or what the standard OTEL_* variables say, which hold for all else (headers, service name,
resource, sampler, intervals) in either case. Imports the library only where it is wanted, and says what to install where it
is missing. Knows nothing of calls.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jilju.config import ENV, OFF
from jilju.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

CLOSE_S = 2.0  # for what is left to send when the server ends
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


@dataclass(frozen=True, slots=True)
class Providers:
    traces: "TracerProvider"
    metrics: "MeterProvider"
    close: Callable[[], None] = lambda: None


def check_telemetry(otel: str, trace_content: bool) -> None:
    """Before anything is loaded for it. Raises ConfigError."""
    if otel == OFF:
        if trace_content:
            raise ConfigError(
                "--trace-content is given and --otel is off; give --otel URL, or leave --trace-content out"
            )
        return
    if not all(map(_is_there, NEEDED)):
        raise ConfigError(
            f"--otel is {otel} and OpenTelemetry is not installed; pip install 'jilju[otel]', or --otel off"
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def make_providers(otel: str, version: str, environ: Mapping[str, str] = os.environ) -> Providers:
    """For a base URL, or "env"."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource.create({"service.name": "jilju", "service.version": version})
    resource = ours.merge(OTELResourceDetector().detect())  # what the environment says goes over ours
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    if environ.get("OTEL_TRACES_EXPORTER") != "none":
        spans = OTLPSpanExporter() if otel == ENV else OTLPSpanExporter(endpoint=f"{otel}/v1/traces")
        traces.add_span_processor(BatchSpanProcessor(spans))
    readers = []
    if environ.get("OTEL_METRICS_EXPORTER") != "none":
        points = OTLPMetricExporter() if otel == ENV else OTLPMetricExporter(endpoint=f"{otel}/v1/metrics")
        readers.append(PeriodicExportingMetricReader(points))
    metrics = MeterProvider(readers, resource=resource, shutdown_on_exit=False)

    def shut_down() -> None:
        traces.shutdown()
        metrics.shutdown()

    return Providers(traces, metrics, lambda: _within(CLOSE_S, shut_down))


def _within(seconds: float, work: Callable[[], None]) -> None:
    """A collector that does not answer keeps no server from ending."""
    thread = threading.Thread(target=work, name="jilju-otel-close", daemon=True)
    thread.start()
    thread.join(seconds)
