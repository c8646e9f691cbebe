"""Metrics: folds over the ledger of calls and the engine's log, read by Prometheus.

Owns names, buckets and the folds. Counts nothing that the ledger or the log does not say; a scrape reads, and never locks
the way of a token. Knows nothing of HTTP.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jilju.engine.events import StepRecord
from jilju.errors import ShedReason
from jilju.serve.context import ServerContext
from jilju.serve.drain import Drain
from jilju.serve.ledger import Call, Ledger

LATENCY_S = (.005, .01, .025, .05, .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
             1920, 7680)  # fmt: skip
FIRST_TOKEN_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
                 2560)  # fmt: skip
BETWEEN_TOKENS_S = (.0005, .001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40,
                    80)  # fmt: skip
ETA_ERROR_S = (-300, -60, -30, -10, -5, -2, -1, -.5, -.2, -.1, -.05, -.02, 0, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60,
               300)  # fmt: skip
STEP_ERROR = (-.75, -.5, -.3, -.2, -.1, -.05, 0, .05, .1, .2, .3, .5, 1, 2, 5)  # fmt: skip
STEP_TOKENS = (1, *(8 << shift for shift in range(12)))  # 1, 8, 16 … 16384


class Histogram:
    """Counts by bucket; an edge belongs to the bucket below it."""

    def __init__(self, edges: tuple[float, ...]):
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        total = 0
        buckets: list[tuple[str, float]] = []
        for edge, count in zip((*map(str, map(float, self._edges)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((edge, total))
        family.add_metric(labels, buckets, self._sum)


def token_edges(max_tokens: int) -> tuple[float, ...]:
    """1, 2, 5, 10 … up to the context's length."""
    edges = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return (*(edge for edge in edges if edge < max_tokens), max_tokens)


class Metrics:
    """A ledger listener, and the source of /metrics."""

    def __init__(self, context: ServerContext, ledger: Ledger, drain: Drain):
        self._context, self._ledger, self._drain = context, ledger, drain
        self.ttft = Histogram(FIRST_TOKEN_S)
        self.inter_token = Histogram(BETWEEN_TOKENS_S)
        self.per_output_token = Histogram(BETWEEN_TOKENS_S)
        self.e2e = Histogram(LATENCY_S)
        self.queue_time = Histogram(LATENCY_S)
        self.prefill_time = Histogram(LATENCY_S)
        self.decode_time = Histogram(LATENCY_S)
        self.inference_time = Histogram(LATENCY_S)
        self.eta_error = Histogram(ETA_ERROR_S)
        self.shed_decision = Histogram(LATENCY_S)
        self.num_shed: dict[str, int] = dict.fromkeys(get_args(ShedReason), 0)
        self.prompt_tokens = Histogram(token_edges(context.max_context))
        self.output_tokens = Histogram(token_edges(context.max_context))
        self.step_seconds = {kind: Histogram(LATENCY_S) for kind in ("prefill", "decode", "mixed")}
        self.step_error = Histogram(STEP_ERROR)
        self.step_tokens = {kind: Histogram(STEP_TOKENS) for kind in ("prefill", "decode")}
        self.num_computed_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self.num_preemptions = self.num_recomputed_tokens = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Scrape(self))

    def expose(self) -> bytes:
        return generate_latest(self._registry)

    def on_token(self, call: Call, gap_ns: int | None) -> None:
        self.num_output_tokens += 1
        if gap_ns is not None:
            self.inter_token.observe(gap_ns / 1e9)

    def on_end(self, call: Call) -> None:
        self.e2e.observe((call.ended_ns - call.received_ns) / 1e9)
        if call.shed_reason is not None:
            self.num_shed[call.shed_reason] += 1
            self.shed_decision.observe((call.ended_ns - call.received_ns) / 1e9)
        for error_ns in call.eta_errors_ns:
            self.eta_error.observe(error_ns / 1e9)
        if call.first_token_ns:
            self.ttft.observe((call.first_token_ns - call.received_ns) / 1e9)
        if call.num_sequences:
            self.prompt_tokens.observe(call.num_prompt_tokens)
            self.output_tokens.observe(call.num_output_tokens)
            self.num_cached_tokens += call.num_cached_tokens
            if call.num_output_tokens or any(times.scheduled_ns for times in call.times):  # else it never ran
                self.num_computed_tokens += call.num_prompt_tokens - call.num_cached_tokens
        for times in call.times:
            if times.scheduled_ns:
                self.queue_time.observe((times.scheduled_ns - times.queued_ns) / 1e9)
            if times.first_token_ns:
                self.prefill_time.observe((times.first_token_ns - times.scheduled_ns) / 1e9)
                self.decode_time.observe((times.last_token_ns - times.first_token_ns) / 1e9)
                self.inference_time.observe((times.last_token_ns - times.scheduled_ns) / 1e9)
        if len(call.times) == 1 and call.num_output_tokens > 1 and (times := call.times[0]).first_token_ns:
            gaps = call.num_output_tokens - 1
            self.per_output_token.observe((times.last_token_ns - times.first_token_ns) / gaps / 1e9)

    def on_step(self, step: StepRecord) -> None:
        kind = "decode" if not step.num_prefill_tokens else "mixed" if step.num_decode_tokens else "prefill"
        took_ns = step.end_ns - step.begin_ns
        self.step_seconds[kind].observe(took_ns / 1e9)
        self.step_error.observe((step.predicted_ns - took_ns) / max(1, took_ns))
        self.num_recomputed_tokens += step.num_recomputed_tokens
        self.num_preemptions += step.num_preempted
        for name, count in (("prefill", step.num_prefill_tokens), ("decode", step.num_decode_tokens)):
            if count:
                self.step_tokens[name].observe(count)

    def families(self) -> Iterator[Metric]:
        context, ledger = self._context, self._ledger
        status, info = context.client.status(), context.client.info
        model = [context.model_name]
        ready = status.state == "ready" and not self._drain.draining

        for name, text, value in (
            ("num_requests_running", "Sequences that the engine runs", status.num_running),
            ("num_requests_waiting", "Sequences that wait in the engine", status.num_waiting),
            ("ready", "1 if new calls are taken", int(ready)),
            ("ledger_imbalance", "Broken conservation laws; must be 0", ledger.imbalance() + status.imbalance),
            ("last_step_age_seconds", "Since the engine's last step ended", status.last_step_age_s),
            ("compile_cache_bytes", "Compiled grammars that are kept", _compile_cache_bytes(context)),
        ):
            gauge = GaugeMetricFamily(f"jilju_{name}", text, labels=["model"])
            gauge.add_metric(model, value)
            yield gauge
        blocks = GaugeMetricFamily("jilju_blocks", "KV blocks by state", labels=["model", "state"])
        held, cached, free = status.num_blocks_held, status.num_blocks_cached, status.num_blocks_free
        for state, count in (("free", free), ("cached", cached), ("held", held)):
            blocks.add_metric([*model, state], count)
        yield blocks
        usage = GaugeMetricFamily("jilju_kv_cache_usage_ratio", "Held blocks of all", labels=["model"])
        usage.add_metric(model, held / max(1, held + cached + free))
        yield usage
        if info is not None:
            config = GaugeMetricFamily(
                "jilju_config_info",
                "1, with the settings in force",
                labels=["model", "version", "block_size", "num_blocks", "kernel_set"],
            )
            config.add_metric([*model, context.version, str(info.block_size), str(info.num_blocks), info.kernel_set], 1)
            yield config

        for name, text, value in (
            ("generation_tokens", "Tokens that the engine made and the server took", self.num_output_tokens),
            ("prefix_cache_query_tokens", "Prompt tokens looked up", self.num_computed_tokens + self.num_cached_tokens),
            ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", self.num_cached_tokens),
            ("preemptions", "Sequences put back to wait", self.num_preemptions),
            ("recomputed_tokens", "Tokens computed again", self.num_recomputed_tokens),
            ("ignored_fields", "Unknown fields that were dropped", ledger.num_ignored_fields),
            ("engine_restarts", "Engines started after one died", status.num_restarts),
            ("resumed_streams", "Started sequences that an engine took over from a dead one", status.num_resumed),
            ("step_faults", "Steps that raised; parts of them were run again", status.num_step_faults),
            (
                "quarantined_requests",
                "Requests that are not run again after deaths of the engine",
                status.num_quarantined,
            ),
        ):
            counter = CounterMetricFamily(f"jilju_{name}", text, labels=["model"])
            counter.add_metric(model, value)
            yield counter
        prompt = CounterMetricFamily("jilju_prompt_tokens", "Prompt tokens of ended calls", labels=["model", "source"])
        prompt.add_metric([*model, "computed"], self.num_computed_tokens)
        prompt.add_metric([*model, "cached"], self.num_cached_tokens)
        yield prompt
        accepted = CounterMetricFamily(
            "jilju_requests_accepted", "Calls with a ledger record", labels=["model", "route"]
        )
        for route, count in sorted(ledger.num_accepted.items()):
            accepted.add_metric([*model, route], count)
        yield accepted
        finished = CounterMetricFamily(
            "jilju_requests_finished", "Calls by how they ended", labels=["model", "state", "code"]
        )
        for (state, code), count in sorted(ledger.num_ended.items()):
            finished.add_metric([*model, state, code], count)
        yield finished
        refused = CounterMetricFamily(
            "jilju_requests_refused", "Calls turned away before the ledger", labels=["model", "code"]
        )
        for code, count in sorted(ledger.num_refused.items()):
            refused.add_metric([*model, code], count)
        yield refused
        shed = CounterMetricFamily("jilju_requests_shed", "Calls refused by load", labels=["model", "reason"])
        for reason, count in self.num_shed.items():
            shed.add_metric([*model, reason], count)
        yield shed

        for name, text, histogram in (
            ("time_to_first_token_seconds", "From the head read to the first token's chunk", self.ttft),
            ("inter_token_latency_seconds", "Between tokens of a sequence", self.inter_token),
            ("time_per_output_token_seconds", "Mean gap, one sample a call", self.per_output_token),
            ("e2e_request_latency_seconds", "From the head read to the last byte", self.e2e),
            ("request_queue_time_seconds", "From queued to the first step", self.queue_time),
            ("request_prefill_time_seconds", "From the first step to the first token", self.prefill_time),
            ("request_decode_time_seconds", "From the first token to the last", self.decode_time),
            ("request_inference_time_seconds", "From the first step to the last token", self.inference_time),
            ("step_prediction_error_ratio", "Predicted minus measured time of a step, over measured", self.step_error),
            ("eta_error_seconds", "Predicted minus actual wait of a sequence for its first step", self.eta_error),
            ("shed_decision_seconds", "From the head read to a refusal by load", self.shed_decision),
            ("request_prompt_tokens", "Prompt tokens of a call", self.prompt_tokens),
            ("request_generation_tokens", "Output tokens of a call", self.output_tokens),
        ):
            family = HistogramMetricFamily(f"jilju_{name}", text, labels=["model"])
            histogram.add_to(family, model)
            yield family
        for name, text, histograms in (
            ("step_seconds", "A step, from begin to committed", self.step_seconds),
            ("step_tokens", "Tokens of a step", self.step_tokens),
        ):
            family = HistogramMetricFamily(f"jilju_{name}", text, labels=["model", "kind"])
            for kind, histogram in histograms.items():
                histogram.add_to(family, [*model, kind])
            yield family


class _Scrape(Collector):
    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()


def _compile_cache_bytes(context: ServerContext) -> int:
    return 0 if context.workers is None else context.workers.compile_cache_bytes
