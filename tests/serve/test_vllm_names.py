"""The names of vLLM: its boards find what they ask for, with the labels that their queries use, and it means the same."""

import pytest

from .conftest import Connect
from .stub import StubClient, step_record
from .test_answers import CHAT, COMPLETIONS, chat_body
from .test_told import Samples, samples_of, value

pytestmark = pytest.mark.anyio

BASE = {"model_name": "stub", "engine": "0"}
QUANTILES = ("_bucket", "_sum", "_count")

# What the queries of vLLM's board for Prometheus and Grafana ask for: metrics, and labels beside the model's name that they
# sum by or select with.
BOARD: dict[str, dict[str, set[str]]] = {
    **{
        f"vllm:{name}{suffix}": {"le": set()} if suffix == "_bucket" else {}
        for name in ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")
        for suffix in QUANTILES
    },
    "vllm:prompt_tokens_total": {},
    "vllm:generation_tokens_total": {},
    "vllm:num_requests_running": {},
    "vllm:num_requests_waiting": {},
    "vllm:kv_cache_usage_perc": {},
    "vllm:request_prompt_tokens_bucket": {"le": set()},
    "vllm:request_generation_tokens_bucket": {"le": set()},
    "vllm:request_success_total": {"finished_reason": {"stop", "length", "repetition", "abort", "error"}},
    "vllm:request_queue_time_seconds_sum": {},
    "vllm:request_prefill_time_seconds_sum": {},
    "vllm:request_decode_time_seconds_sum": {},
    "vllm:request_max_num_generation_tokens_sum": {},
}
# Besides, its overview of several servers. It also asks for the HTTP server's own metrics and for caches that are not here.
OVERVIEW: dict[str, dict[str, set[str]]] = {
    **{
        f"vllm:{name}{suffix}": {"le": set()} if suffix == "_bucket" else {}
        for name in (
            "request_time_per_output_token_seconds", "request_queue_time_seconds", "iteration_tokens_total",
            "request_prompt_tokens", "request_generation_tokens",
        )
        for suffix in QUANTILES
    },
    "vllm:request_prefill_time_seconds_count": {},
    "vllm:request_decode_time_seconds_count": {},
    "vllm:num_requests_waiting_by_reason": {"reason": {"capacity", "deferred"}},
    "vllm:num_preemptions_total": {},
    "vllm:prefix_cache_hits_total": {},
    "vllm:prefix_cache_queries_total": {},
    "vllm:prompt_tokens_by_source_total": {"source": {"local_compute", "local_cache_hit", "external_kv_transfer"}},
}  # fmt: skip
# The rest of the set.
OTHERS: dict[str, dict[str, set[str]]] = {
    "vllm:cache_config_info": {
        name: set()
        for name in (
            "block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "num_gpu_blocks",
        )
    },
    "vllm:prompt_tokens_cached_total": {},
    "vllm:admission_rejections_total": {"reason": {"max_num_queued_reqs", "max_num_queued_tokens"}},
    "vllm:corrupted_requests_total": {},
    **{
        f"vllm:{name}_count": {}
        for name in (
            "request_inference_time_seconds", "request_params_n", "request_params_max_tokens",
            "request_prefill_kv_computed_tokens", "request_num_preemptions",
        )
    },
}  # fmt: skip


async def after_some_calls(connect: Connect) -> Samples:
    stub = StubClient()
    async with connect(stub, metrics_compat="vllm") as (http, _):
        stub.log.add_step(step_record(end_ns=5, num_prefill_tokens=20, num_decode_tokens=2, num_preempted=1))
        await http.post(CHAT, json=chat_body(max_tokens=5))
        await http.post(CHAT, json=chat_body(max_tokens=200))
        await http.post(COMPLETIONS, json={"prompt": "abcd", "n": 2, "max_tokens": 3})
        await http.post(CHAT, json={})
        return samples_of((await http.get("/metrics")).text)


async def test_boards_of_vllm_are_answered(connect: Connect) -> None:
    samples = await after_some_calls(connect)
    for name, wanted in {**BOARD, **OVERVIEW, **OTHERS}.items():
        found = [dict(labels) for (sample, labels) in samples if sample == name]
        assert found, f"{name} is not there"
        for labels in found:
            assert labels.keys() == BASE.keys() | wanted.keys(), name
            assert labels.items() >= BASE.items(), name
        for label, values in wanted.items():
            assert not values or {labels[label] for labels in found} == values, name


async def test_there_is_no_name_of_theirs_beside(connect: Connect) -> None:
    told = {name for name, _ in await after_some_calls(connect) if name.startswith("vllm:")}
    families = {name.removesuffix(suffix) for name in {**BOARD, **OVERVIEW, **OTHERS} for suffix in QUANTILES}
    extra = {name for name in told if not any(name == f or name in (f + s for s in QUANTILES) for f in families)}
    assert not extra


async def test_it_counts_what_ours_count(connect: Connect) -> None:
    samples = await after_some_calls(connect)

    def theirs(name: str, **labels: str) -> float:
        return samples[f"vllm:{name}", frozenset((BASE | labels).items())]

    computed = value(samples, "jilju_prompt_tokens_total", source="computed")
    cached = value(samples, "jilju_prompt_tokens_total", source="cached")
    assert theirs("prompt_tokens_total") == computed + cached
    assert theirs("prompt_tokens_by_source_total", source="local_compute") == computed > 0
    assert theirs("prompt_tokens_by_source_total", source="local_cache_hit") == cached > 0
    assert theirs("generation_tokens_total") == value(samples, "jilju_generation_tokens_total")
    assert theirs("iteration_tokens_total_sum") == 22
    assert theirs("num_preemptions_total") == 1
    assert theirs("kv_cache_usage_perc") == value(samples, "jilju_kv_cache_usage_ratio") == 1 / 64
    assert theirs("request_success_total", finished_reason="length") == 2
    assert theirs("request_success_total", finished_reason="stop") == 1
    assert theirs("request_success_total", finished_reason="error") == 0, "a call without messages never ran"
    assert theirs("request_max_num_generation_tokens_sum") == value(
        samples, "jilju_request_max_num_generation_tokens_sum"
    )
    assert theirs("request_time_per_output_token_seconds_count") == 2
    ours = {
        dict(labels)["le"]: count
        for (name, labels), count in samples.items()
        if name == "jilju_time_to_first_token_seconds_bucket"
    }
    assert ours == {
        dict(labels)["le"]: count
        for (name, labels), count in samples.items()
        if name == "vllm:time_to_first_token_seconds_bucket"
    }


async def test_they_are_not_there_unless_they_are_asked_for(connect: Connect) -> None:
    async with connect() as (http, _):
        await http.post(CHAT, json=chat_body(max_tokens=5))
        assert "vllm" not in (await http.get("/metrics")).text
