"""Folds: what the ledger of calls and the log of steps add up to.

Owns the sums and histograms; a ledger listener, and a listener of the log. Counts nothing that the two do not say, so its
totals are theirs. Knows nothing of names or formats.
"""

from typing import get_args

from jilju.engine.events import EventLog, StepRecord
from jilju.errors import ShedReason
from jilju.serve.ledger import Call
from jilju.serve.metrics.histogram import (
    BETWEEN_TOKENS_S,
    CHOICES,
    ETA_ERROR_S,
    FIRST_TOKEN_S,
    FRONTEND_S,
    LATENCY_S,
    PREEMPTIONS,
    STEP_ERROR,
    STEP_TOKENS,
    Histogram,
    token_edges,
)

CANCEL_PHASES = ("queued", "prefill", "decode", "writing")
ROW_FAULTS = {
    "nan_logits": "nan",
    "grammar_dead_end": "grammar",
    "internal": "other",
}  # by the code that a call ends with
FRONTEND_STAGES = ("parse", "render", "tokenize", "grammar", "write")
FINISHED_REASONS = ("stop", "length", "repetition", "abort", "error")
LOOK_BACK = 16  # steps; a prompt that is being computed has a row in one of so many
MINUTE = 60


class LastMinute:
    """What steps took and moved, by the second in which they ended."""

    def __init__(self) -> None:
        self._seconds = [-1] * MINUTE  # which one a cell holds
        self._cells = [(0, 0, 0)] * MINUTE  # ns, bytes, flops

    def add(self, step: StepRecord) -> None:
        second = step.end_ns // 10**9
        cell = second % MINUTE
        took_ns, moved, computed = self._cells[cell] if self._seconds[cell] == second else (0, 0, 0)
        self._seconds[cell] = second
        self._cells[cell] = (took_ns + step.end_ns - step.begin_ns, moved + step.bytes, computed + step.flops)

    def sums(self, now_ns: int) -> tuple[int, int, int]:
        """ns, bytes and flops of the steps that ended in the last minute."""
        first = now_ns // 10**9 - MINUTE
        cells = [cell for second, cell in zip(self._seconds, self._cells, strict=True) if second > first]
        took_ns, moved, computed = (sum(column) for column in zip((0, 0, 0), *cells, strict=True))
        return took_ns, moved, computed


class Folds:
    def __init__(self, max_context: int, log: EventLog):
        self._log = log
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
        self.prompt_tokens = Histogram(token_edges(max_context))
        self.output_tokens = Histogram(token_edges(max_context))
        self.computed_prompt_tokens = Histogram(token_edges(max_context))
        self.longest_output_tokens = Histogram(token_edges(max_context))
        self.max_tokens = Histogram(token_edges(max_context))
        self.choices = Histogram(CHOICES)
        self.preemptions = Histogram(PREEMPTIONS)
        self.frontend = {stage: Histogram(FRONTEND_S) for stage in FRONTEND_STAGES}
        self.num_finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.num_shed: dict[str, int] = dict.fromkeys(get_args(ShedReason), 0)
        self.num_cancelled = dict.fromkeys(CANCEL_PHASES, 0)
        self.num_row_faults = dict.fromkeys(ROW_FAULTS.values(), 0)
        self.num_computed_tokens = self.num_cached_tokens = self.num_output_tokens = self.num_disconnect_tokens = 0

        self.step_seconds = {kind: Histogram(LATENCY_S) for kind in ("prefill", "decode", "mixed")}
        self.step_error = Histogram(STEP_ERROR)
        self.step_tokens = {kind: Histogram(STEP_TOKENS) for kind in ("prefill", "decode")}
        self.all_step_tokens = Histogram(STEP_TOKENS)
        self.num_preemptions = self.num_recomputed_tokens = 0
        self.last_minute = LastMinute()
        self.closed_by = "open"  # of the last step: what kept out who waits

    def on_token(self, call: Call, gap_ns: int | None) -> None:
        self.num_output_tokens += 1
        if gap_ns is not None:
            self.inter_token.observe(gap_ns / 1e9)

    def on_end(self, call: Call) -> None:
        took_s = (call.ended_ns - call.received_ns) / 1e9
        self.e2e.observe(took_s)
        if call.shed_reason is not None:
            self.num_shed[call.shed_reason] += 1
            self.shed_decision.observe(took_s)
        if call.state == "client_cancelled":
            self.num_cancelled[phase_of(call, self._log)] += 1
            self.num_disconnect_tokens += call.num_output_tokens
        if call.code in ROW_FAULTS:
            self.num_row_faults[ROW_FAULTS[call.code]] += 1
        for error_ns in call.eta_errors_ns:
            self.eta_error.observe(error_ns / 1e9)
        if call.first_token_ns:
            self.ttft.observe((call.first_token_ns - call.received_ns) / 1e9)
        reason = finished_reason(call)
        if reason is not None:
            self.num_finished[reason] += 1
        for stage, took_ns in frontend_ns(call).items():
            self.frontend[stage].observe(took_ns / 1e9)
        if call.num_sequences:
            self._on_end_in_engine(call)

    def _on_end_in_engine(self, call: Call) -> None:
        """Of a call that came as far as the engine."""
        self.prompt_tokens.observe(call.num_prompt_tokens)
        self.output_tokens.observe(call.num_output_tokens)
        self.longest_output_tokens.observe(max(life.num_output_tokens for life in call.lives))
        if call.params is not None:
            self.choices.observe(call.num_choices)
            self.max_tokens.observe(call.params.max_tokens)
        self.preemptions.observe(sum(times.num_preemptions for times in call.times))
        self.num_cached_tokens += call.num_cached_tokens
        if call.num_output_tokens or any(times.scheduled_ns for times in call.times):  # else it never ran
            num_computed = call.num_prompt_tokens - call.num_cached_tokens
            self.num_computed_tokens += num_computed
            self.computed_prompt_tokens.observe(num_computed)
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
        self.all_step_tokens.observe(step.num_prefill_tokens + step.num_decode_tokens)
        self.last_minute.add(step)
        self.closed_by = step.closed_by


def finished_reason(call: Call) -> str | None:
    """Of a call that completed, why its sequence that ended last did. None: it was the caller's mistake, and no work."""
    if call.state == "failed":
        return "error" if call.status >= 500 else None
    if call.state != "completed":
        return "abort"
    last = max(call.lives, key=lambda life: life.ended_ns, default=None)
    reason = None if last is None else last.finish_reason
    return reason if reason in FINISHED_REASONS else "stop"  # "tool_calls" is a stop


def frontend_ns(call: Call) -> dict[str, int]:
    """What the server's own work took, of the stages that the call came to."""
    marks = call.marks
    if marks is None:
        return {}
    stages = {
        "parse": marks.parsed_ns - marks.body_ns if marks.parsed_ns else 0,
        "render": marks.render_ns,
        "tokenize": marks.tokenize_ns,
        "grammar": marks.grammar_ns,
        "write": call.ended_ns - marks.encoded_ns if marks.encoded_ns else 0,
    }
    return {stage: took_ns for stage, took_ns in stages.items() if took_ns > 0}


def phase_of(call: Call, log: EventLog) -> str:
    """How far a call had come whose client left."""
    if call.lives and all(life.finish_reason is not None for life in call.lives):
        return "writing"
    if call.num_output_tokens:
        return "decode"
    numbers = {life.number for life in call.lives}
    logged = [log.step(serial) for serial in range(log.num_steps - LOOK_BACK, log.num_steps)]
    in_step = any(row.number in numbers for step in logged if step is not None for row in step.rows)
    return "prefill" if in_step else "queued"
