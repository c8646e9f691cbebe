"""The names of vLLM: the `vllm:*` set, for boards and alerts that were made for it.

Owns vLLM's names, labels and meanings for what we count; the table in docs/observability.md says what stands for what. Shows
nothing that is not in our own set.
"""

from jilju.engine.client import EngineInfo, EngineStatus
from jilju.serve.context import ServerContext
from jilju.serve.metrics.folds import Folds
from jilju.serve.metrics.own import by, usage_ratio, waiting_reason
from jilju.serve.metrics.text import Exposition, Sample

CAPACITY = frozenset({"step", "rows", "tokens", "blocks", "order"})  # others wait for an engine


def show_vllm(
    out: Exposition,
    context: ServerContext,
    status: EngineStatus,
    info: EngineInfo | None,
    folds: Folds,
    draining: bool,
) -> None:
    out.one("gauge", "num_requests_running", "Number of sequences that run", status.num_running)
    out.one("gauge", "num_requests_waiting", "Number of sequences that wait", status.num_waiting)
    of_capacity = waiting_reason(status, folds, draining) in CAPACITY
    reasons = (("capacity", status.num_waiting * of_capacity), ("deferred", status.num_waiting * (not of_capacity)))
    out.family("gauge", "num_requests_waiting_by_reason", "Sequences that wait, by why", by("reason", reasons))
    out.one("gauge", "kv_cache_usage_perc", "Held KV blocks of all, 0 to 1", usage_ratio(status))
    out.family("gauge", "cache_config_info", "1, with the settings of the KV cache", _cache_config(context, info))

    computed, cached = folds.num_computed_tokens, folds.num_cached_tokens
    sources = (("local_compute", computed), ("local_cache_hit", cached), ("external_kv_transfer", 0))
    out.one("counter", "prompt_tokens_total", "Prompt tokens, cached ones too", computed + cached)
    out.one("counter", "prompt_tokens_cached_total", "Prompt tokens found in the prefix cache", cached)
    out.family("counter", "prompt_tokens_by_source_total", "Prompt tokens by source", by("source", sources))
    out.one("counter", "generation_tokens_total", "Tokens made", folds.num_output_tokens)
    out.one("counter", "prefix_cache_queries_total", "Prompt tokens looked up", computed + cached)
    out.one("counter", "prefix_cache_hits_total", "Prompt tokens found in the prefix cache", cached)
    finished = by("finished_reason", folds.num_finished.items())
    out.family("counter", "request_success_total", "Ended calls by why they did", finished)
    rejected = (
        ("max_num_queued_reqs", folds.num_shed["queue_requests"]),
        ("max_num_queued_tokens", folds.num_shed["queue_tokens"]),
    )
    out.family("counter", "admission_rejections_total", "Calls refused by a bound of the queue", by("reason", rejected))
    out.one("counter", "num_preemptions_total", "Sequences put back to wait", folds.num_preemptions)
    out.one("counter", "corrupted_requests_total", "Calls whose logits had NaNs", folds.num_row_faults["nan"])

    for name, text, histogram in (
        ("time_to_first_token_seconds", "Time to the first token", folds.ttft),
        ("inter_token_latency_seconds", "Time between tokens", folds.inter_token),
        ("request_time_per_output_token_seconds", "Mean time per token after the first, of a call", folds.per_output_token),
        ("e2e_request_latency_seconds", "Time of a whole call", folds.e2e),
        ("request_queue_time_seconds", "Time that a sequence waits", folds.queue_time),
        ("request_prefill_time_seconds", "Time from the first step to the first token", folds.prefill_time),
        ("request_decode_time_seconds", "Time from the first token to the last", folds.decode_time),
        ("request_inference_time_seconds", "Time from the first step to the last token", folds.inference_time),
        ("request_prompt_tokens", "Prompt tokens of a call", folds.prompt_tokens),
        ("request_generation_tokens", "Output tokens of a call", folds.output_tokens),
        ("request_max_num_generation_tokens", "Output tokens of a call's longest sequence", folds.longest_output_tokens),
        ("request_params_n", "Answers that a call asks for", folds.choices),
        ("request_params_max_tokens", "Output tokens that a sequence may have at most", folds.max_tokens),
        ("request_prefill_kv_computed_tokens", "Prompt tokens of a call that were computed", folds.computed_prompt_tokens),
        ("request_num_preemptions", "Preemptions of a call", folds.preemptions),
        ("iteration_tokens_total", "Tokens of a step", folds.all_step_tokens),
    ):  # fmt: skip
        out.histogram(name, text, histogram)


def _cache_config(context: ServerContext, info: EngineInfo | None) -> list[Sample]:
    if info is None:
        return []
    gpu, held = context.gpu, info.weight_bytes + info.kv_bytes + info.workspace_bytes
    labels = {
        "block_size": str(info.block_size),
        "cache_dtype": context.kv_dtype,
        "enable_prefix_caching": "True",
        "gpu_memory_utilization": "0.0" if gpu is None else f"{held / gpu.total_bytes:.2f}",
        "num_gpu_blocks": str(info.num_blocks),
    }
    return [(labels, 1)]
