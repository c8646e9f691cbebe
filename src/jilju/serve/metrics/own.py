"""Our own metrics: names, meanings and labels of the `jilju_*` set.

Owns what is shown of the folds and of what the engine and the system say now. Every label's values are a closed set. Knows
nothing of the text format.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from jilju.account.bill import Paid, Sums
from jilju.account.frame import Owned
from jilju.config import cpu_quota_cores
from jilju.engine.client import EngineInfo, EngineStatus
from jilju.serve.context import ServerContext
from jilju.serve.ledger import Ledger
from jilju.serve.metrics.folds import Folds
from jilju.serve.metrics.text import Exposition, Sample

WAITING_REASONS = ("step", "rows", "tokens", "blocks", "order", "loading", "restart", "drain")
NOT_READY = {"loading": "loading", "restarting": "restart", "draining": "drain", "gone": "restart"}  # by engine state


def waiting_reason(status: EngineStatus, folds: Folds, draining: bool) -> str:
    """Why those wait that do: what the last step says kept the first of them out, or that no step is to be had."""
    if draining:
        return "drain"
    if status.state in NOT_READY:
        return NOT_READY[status.state]
    return "step" if folds.closed_by == "open" else folds.closed_by  # they came while it ran


def show_state(out: Exposition, status: EngineStatus, folds: Folds, draining: bool) -> None:
    """Who runs, who waits, whether new calls are taken."""
    out.one("gauge", "num_requests_running", "Sequences that the engine runs", status.num_running)
    reason = waiting_reason(status, folds, draining)
    waiting = [({"reason": name}, status.num_waiting if name == reason else 0) for name in WAITING_REASONS]
    out.family("gauge", "num_requests_waiting", "Sequences that wait in the engine", waiting)
    ready = int(status.state == "ready" and not draining)
    out.one("gauge", "ready", "1 if new calls are taken", ready)
    out.one("gauge", "last_step_age_seconds", "Since the engine's last step ended", status.last_step_age_s)


def show_blocks(out: Exposition, status: EngineStatus) -> None:
    held, cached, free = status.num_blocks_held, status.num_blocks_cached, status.num_blocks_free
    states = (("free", free), ("cached", cached), ("held", held))
    out.family("gauge", "blocks", "KV blocks by state", [({"state": state}, count) for state, count in states])
    out.one("gauge", "kv_cache_usage_ratio", "Held blocks of all", usage_ratio(status))


def usage_ratio(status: EngineStatus) -> float:
    held = status.num_blocks_held
    return held / max(1, held + status.num_blocks_cached + status.num_blocks_free)


def show_machine(
    out: Exposition, context: ServerContext, info: EngineInfo | None, memory: Sequence[Owned], lag_s: float | None
) -> None:
    """What the engine runs on and with, and what the processes hold."""
    config: list[Sample] = []
    if info is not None:
        labels = {
            "version": context.version,
            "block_size": str(info.block_size),
            "num_blocks": str(info.num_blocks),
            "kv_dtype": context.kv_dtype,
            "kernel_set": info.kernel_set,
        }
        config.append((labels, 1))
    out.family("gauge", "config_info", "1, with the settings in force", config)
    out.one("gauge", "threads", "Threads that compute", None if info is None else info.num_threads)
    out.one("gauge", "cpu_quota_cores", "Cores that this process may use", cpu_quota_cores())
    held: Counter[tuple[str, str]] = Counter()
    for line in memory:
        held[line.process, line.owner] += line.bytes
    owned = [({"process": process, "owner": owner}, count) for (process, owner), count in held.items()]
    out.family("gauge", "memory_bytes", "Resident memory of a process, and used memory of the GPU, by owner", owned)
    used = sum(line.bytes for line in memory if line.process == "gpu")
    states: tuple[tuple[str, float], ...] = ()
    if context.gpu is not None and used:
        states = (("used", used), ("free", context.gpu.total_bytes - used))
    out.family("gauge", "gpu_memory_bytes", "Memory of the GPU, whoever uses it", by("state", states))
    kept = 0 if context.workers is None else context.workers.compile_cache_bytes
    out.one("gauge", "compile_cache_bytes", "Compiled grammars that are kept", kept)
    out.one("gauge", "event_loop_lag_seconds", "By how much the server came late, at worst in the last minute", lag_s)


def show_roofs(out: Exposition, info: EngineInfo | None, folds: Folds, now_ns: int) -> None:
    took_ns, moved, computed = folds.last_minute.sums(now_ns)
    text = "{} of the last minute's steps, as modelled, over what this machine was measured to {} in their time"
    read = info.read_bytes_per_s if info is not None else None
    flops = info.flops_per_s if info is not None else None
    out.one("gauge", "mbu", text.format("Bytes", "read"), moved * 1e9 / (took_ns * read) if took_ns and read else None)
    out.one(
        "gauge", "mfu", text.format("FLOPs", "do"), computed * 1e9 / (took_ns * flops) if took_ns and flops else None
    )


def show_calls(out: Exposition, ledger: Ledger, folds: Folds, imbalance: int) -> None:
    out.one("gauge", "ledger_imbalance", "Broken conservation laws; must be 0", imbalance)
    accepted = [({"route": route}, count) for route, count in sorted(ledger.num_accepted.items())]
    out.family("counter", "requests_accepted_total", "Calls with a ledger record", accepted)
    finished = [({"state": state, "code": code}, count) for (state, code), count in sorted(ledger.num_ended.items())]
    out.family("counter", "requests_finished_total", "Calls by how they ended", finished)
    refused = by("code", sorted(ledger.num_refused.items()))
    out.family("counter", "requests_refused_total", "Calls turned away before the ledger", refused)
    out.family("counter", "requests_shed_total", "Calls refused by load", by("reason", folds.num_shed.items()))
    cancelled = by("phase", folds.num_cancelled.items())
    out.family("counter", "requests_cancelled_total", "Calls whose client left, by how far they had come", cancelled)
    faults = by("kind", folds.num_row_faults.items())
    out.family("counter", "row_faults_total", "Calls that ended by a fault of their own computation", faults)
    out.one("counter", "ignored_fields_total", "Unknown fields that were dropped", ledger.num_ignored_fields)


def show_tokens(out: Exposition, folds: Folds) -> None:
    out.one("counter", "generation_tokens_total", "Tokens made and taken by the server", folds.num_output_tokens)
    computed, cached = folds.num_computed_tokens, folds.num_cached_tokens
    sources = by("source", (("computed", computed), ("cached", cached)))
    out.family("counter", "prompt_tokens_total", "Prompt tokens of ended calls", sources)
    out.one("counter", "prefix_cache_query_tokens_total", "Prompt tokens looked up", computed + cached)
    out.one("counter", "prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache", cached)
    out.one("counter", "recomputed_tokens_total", "Tokens computed again", folds.num_recomputed_tokens)
    wasted = by("reason", (("disconnect", folds.num_disconnect_tokens), ("recompute", folds.num_recomputed_tokens)))
    out.family("counter", "wasted_tokens_total", "Tokens computed for nobody, or twice", wasted)


def show_engine(out: Exposition, status: EngineStatus, folds: Folds, dropped_log_lines: int) -> None:
    for name, text, value in (
        ("preemptions_total", "Sequences put back to wait", folds.num_preemptions),
        ("engine_restarts_total", "Engines started after one died", status.num_restarts),
        ("resumed_streams_total", "Started sequences that an engine took over from a dead one", status.num_resumed),
        ("step_faults_total", "Steps that raised; parts of them were run again", status.num_step_faults),
        ("quarantined_requests_total", "Requests that are not run again after deaths of the engine", status.num_quarantined),
        ("dropped_log_lines_total", "Lines of the log that could not be written", dropped_log_lines),
    ):  # fmt: skip
        out.one("counter", name, text, value)


def show_bill(out: Exposition, sums: Sums, price_per_hour: float | None) -> None:
    """Whose the machine's time was, and what that was in money and energy where those are known. All lines sum to the uptime."""
    paid: list[tuple[str, Paid]] = [("requests", sums.requests), *sums.lines.items()]
    seconds = [({"line": line}, of_line.machine_ns / 1e9) for line, of_line in paid]
    out.family(
        "counter", "machine_seconds_total", "Time of the machine since the server's start, by whose it was", seconds
    )
    cost = [({"line": line}, of_line.cost(price_per_hour)) for line, of_line in paid]
    out.family("counter", "cost_usd_total", "The same in US dollars, at the price that was set", known(cost))
    joules = [({"line": line}, of_line.joules) for line, of_line in paid]
    out.family("counter", "energy_joules_total", "Energy, measured or declared", known(joules))


def known(samples: Iterable[tuple[dict[str, str], float | None]]) -> list[Sample]:
    return [(labels, value) for labels, value in samples if value is not None]


def show_histograms(out: Exposition, folds: Folds) -> None:
    for name, text, histogram in (
        ("time_to_first_token_seconds", "From the head read to the first token's chunk", folds.ttft),
        ("inter_token_latency_seconds", "Between tokens of a sequence", folds.inter_token),
        ("time_per_output_token_seconds", "Mean gap, one sample a call", folds.per_output_token),
        ("e2e_request_latency_seconds", "From the head read to the last byte", folds.e2e),
        ("request_queue_time_seconds", "From queued to the first step", folds.queue_time),
        ("request_prefill_time_seconds", "From the first step to the first token", folds.prefill_time),
        ("request_decode_time_seconds", "From the first token to the last", folds.decode_time),
        ("request_inference_time_seconds", "From the first step to the last token", folds.inference_time),
        ("request_prompt_tokens", "Prompt tokens of a call", folds.prompt_tokens),
        ("request_generation_tokens", "Output tokens of a call", folds.output_tokens),
        ("request_max_num_generation_tokens", "Output tokens of a call's longest sequence", folds.longest_output_tokens),
        ("request_params_n", "Answers that a call asks for", folds.choices),
        ("request_params_max_tokens", "Output tokens that a sequence may have at most", folds.max_tokens),
        ("request_prefill_kv_computed_tokens", "Prompt tokens of a call that were computed", folds.computed_prompt_tokens),
        ("request_num_preemptions", "Times that sequences of a call were put back to wait", folds.preemptions),
        ("step_prediction_error_ratio", "Predicted minus measured time of a step, over measured", folds.step_error),
        ("eta_error_seconds", "Predicted minus actual wait of a sequence for its first step", folds.eta_error),
        ("shed_decision_seconds", "From the head read to a refusal by load", folds.shed_decision),
    ):  # fmt: skip
        out.histogram(name, text, histogram)
    stages = [({"stage": stage}, histogram) for stage, histogram in folds.frontend.items()]
    out.histograms("frontend_seconds", "The server's own work for a call", stages)
    for name, text, histograms in (
        ("step_seconds", "A step, from begin to committed", folds.step_seconds),
        ("step_tokens", "Tokens of a step", folds.step_tokens),
    ):
        out.histograms(name, text, [({"kind": kind}, histogram) for kind, histogram in histograms.items()])


def by(label: str, counts: Iterable[tuple[str, float]]) -> list[Sample]:
    return [({label: value}, count) for value, count in counts]
