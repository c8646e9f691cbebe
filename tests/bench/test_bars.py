"""The bars: each is read from the right figure, passes and falls short at its limit, and says if nothing was measured."""

import msgspec
import pytest

from jilju.bench.bars import (
    EIGHT,
    LLAMA_CPP,
    NAMED,
    ONE,
    PREFILL,
    SIXTEEN,
    CancellationFigures,
    HostileFigures,
    LedgerFigures,
    LongPromptFigures,
    MaskFigures,
    MemoryFigures,
    OpenLoop,
    OverheadFigures,
    OverloadFigures,
    QualityFigures,
    ServedFigures,
    StartFigures,
    StructuredFigures,
    bars_of,
    read_results,
)  # fmt: skip
from jilju.bench.contention import Contention
from jilju.bench.divergence import Compared
from jilju.bench.engine import EngineShare
from jilju.bench.load import LoadOptions, summarise
from jilju.bench.model import Figure, ModelReport, Rate
from jilju.bench.report import bars_table, compared_table, contention_table, engine_table
from jilju.errors import ConfigError
from tests.bench.test_load import seen


def figure(load, good: bool = True, **peers: float) -> Figure:
    share = 0.9 if good else 0.4
    return Figure(
        load=load, tokens_per_s=2000.0 if good else 100.0, gb_s=1.0, gop_s=1.0, bandwidth_gb_s=1.0, bandwidth_share=share,
        cap_tokens_per_s=1.0, cap_share=share, linear_share=share, kernel_gop_s={}, time_shares={"linear": 1.0},
        sampling_share=0.01 if good else 0.06, peers={name: Rate(1.0, ratio) for name, ratio in peers.items()}, others_share=0.0,
    )  # fmt: skip


def report(model: str, good: bool) -> ModelReport:
    peers = {"llama.cpp": 6.0 if good else 1.1, "openvino": 6.0 if good else 1.1, "transformers": 6.0 if good else 1.1}
    figures = [figure(load, good, **peers) for load in (PREFILL, ONE, EIGHT, SIXTEEN)]
    return ModelReport(model=model, kernel_set="k", num_threads=2, num_rounds=1, figures=figures, peer_notes={})


def served(shares_prefix: bool, times: float) -> ServedFigures:
    """Ours `times` as fast as the other server, from the first token on."""

    def result(rate: float):
        answer = seen(0.0, *[(i + 1) / rate for i in range(10)])
        return summarise(LoadOptions(url=""), "m", [answer], [], 0.0, 1, 0.0)

    return ServedFigures(
        load="a load", shares_prefix=shares_prefix, ours=result(5.0 * times), peer=result(5.0), peer_name="llama-server"
    )


def overload(goodput: float, refusal_ms: float, recovery_s: float | None, num_left: int = 0) -> OverloadFigures:
    """Of a peak of 10/s."""
    loop = OpenLoop(
        rate=100.0, goodput=goodput, by_status={"200": 80, "429": 920}, num_late=0, first_token_p50_ms=1.0, first_token_p99_ms=1.0,
        token_p99_ms=1.0, refusal_p50_ms=1.0, refusal_p99_ms=refusal_ms, client_lag_p99_ms=1.0, client_lag_max_ms=1.0, others_share=0.0,
    )  # fmt: skip
    return OverloadFigures(
        model="m", num_input=64, num_output=32, peak_goodput=10.0, peak_concurrency=16, base=loop, over=loop, after=loop,
        recovery_s=recovery_s, num_left=num_left,
    )  # fmt: skip


def long_prompt(num_over_bound: int, gap_share_p99: float) -> LongPromptFigures:
    return LongPromptFigures(
        model="m", num_prompt=6000, num_streams=8, token_gap_ms=100.0, first_token_s=10.0, num_steps=100, num_over_bound=num_over_bound,
        step_share_p50=1.0, step_share_p99=1.0, num_gaps=800, gap_p50_ms=90.0, gap_p99_ms=110.0, gap_share_p50=0.9,
        gap_share_p99=gap_share_p99, gap_share_max=2.0, others_share=0.0,
    )  # fmt: skip


def cancellations(num_late_steps: int, num_left: int) -> CancellationFigures:
    return CancellationFigures(
        model="m", num_cancelled=1000, num_before_first_token=600, num_steps=2000, num_late_steps=num_late_steps, settled_s=0.1,
        num_left=num_left,
    )  # fmt: skip


def memory(growth_mib: float) -> MemoryFigures:
    half = int(growth_mib / 2 * 2**20)
    return MemoryFigures(
        model="m", first_request=2000, last_request=10_000, num_steps=5000, server_anonymous=half, server_resident=9 << 20,
        engine_anonymous=half, engine_resident=9 << 20,
    )  # fmt: skip


def ledger(num_wrong: int, blamed_share: float) -> LedgerFigures:
    return LedgerFigures(
        model="m", num_requests=1000, num_unbalanced=num_wrong, num_off=num_wrong, num_timed=900, num_preempted=5, num_resumed=9,
        num_cancelled=90, num_kills=6, imbalance=num_wrong, excess_ms=0.5, excess_ms_max=4.0, blamed_share=blamed_share,
    )  # fmt: skip


def overhead(times: float) -> OverheadFigures:
    """So many times the limit."""
    return OverheadFigures(
        model="m", step_us=5.0 * times, row_us=0.7 * times, median_step_ms=10.0, log_share=0.001 * times, num_rounds=9,
        on_share=0.01 * times, on_share_low=0.0, on_share_high=0.02, page_core_share=0.005 * times, others_share=0.0,
    )  # fmt: skip


def structured(mask_share: float, refusal_s: float, change: float, num_failed: int) -> StructuredFigures:
    masks = MaskFigures(
        model="m", vocab_size=49152, num_rows=8, num_rounds=7, step_ms=10.0, held_step_ms=10.1, share=0.01, greedy_step_ms=10.0,
        greedy_held_step_ms=10.0, greedy_share=mask_share, in_loop_step_ms=11.0, in_loop_share=0.1, fill_p50_ms=0.4, fill_p99_ms=1.0,
        fill_max_ms=2.0, others_share=0.0,
    )  # fmt: skip
    hostile = HostileFigures(
        model="m", num_streams=4, rate=2.0, num_rounds=6, num_sent=100, num_refused=50, num_failed=num_failed, refusal_p50_s=0.01,
        refusal_max_s=refusal_s, answer_max_s=2.0, quiet_p50_ms=8.0, quiet_p99_ms=10.0, plain_p50_ms=8.0, plain_p99_ms=10.0,
        hostile_p50_ms=8.0, hostile_p99_ms=10.0, hostile_max_ms=20.0, p50_change=0.0, p99_change=change, p99_change_from_plain=0.0,
        others_share=0.0,
    )  # fmt: skip
    return StructuredFigures(masks=masks, hostile=hostile, first=None)


def write(folder, good: bool) -> None:
    def put(name: str, value: object) -> None:
        (folder / name).write_bytes(msgspec.json.encode(value))

    for model in LLAMA_CPP:
        put(f"model-{model}.json", report(model, good))
    put("engine.json", EngineShare(
        model="m", rows=16, num_steps=9, step_us=100.0, schedule_us=1.0, pack_us=1.0, backend_us=96.0, commit_us=1.0, link_us=1.0,
        share=0.04 if good else 0.06, others_share=0.0,
    ))  # fmt: skip
    put("contention.json", Contention(
        model="m", rows=1, context=512, num_threads=2, step_ms=1.0, disturbed_step_ms=1.5, ratio=1.5 if good else 1.6,
        neighbour_share=0.5, others_share=0.0,
    ))  # fmt: skip
    own = 100e6 if good else 130e6
    put("start.json", [
        StartFigures(
            model=model, first_ready_s=3.0, ready_s=0.9 if good else 2.1, first_token_s=1.0, engine_private_bytes=int(100e6 + 200e6 + own),
            weight_bytes=int(100e6), kv_bytes=int(200e6), server_resident_bytes=int(170e6 if good else 190e6),
            idle_share=0.0 if good else 0.01,
        )
        for model in ("smollm2-135m", "qwen2.5-coder-0.5b")
    ])  # fmt: skip
    compared = [
        Compared("float32 reference", 10.0, None, None),
        Compared("native", 10.04 if good else 9.9, 2e-3 if good else 4e-3, 1e-4),
    ]
    put("served.json", [served(shares_prefix, 6.0 if good else 2.0) for shares_prefix in (False, True)])
    put("overload.json", overload(8.5, 20.0, 3.0) if good else overload(7.5, 80.0, None, num_left=1))
    put("long-prompt.json", long_prompt(0, 1.1) if good else long_prompt(2, 1.4))
    put("cancellations.json", cancellations(0, 0) if good else cancellations(1, 3))
    put("memory.json", memory(1.5 if good else 2.5))
    put("ledger.json", ledger(0, 0.95) if good else ledger(1, 0.8))
    put("overhead.json", overhead(0.9 if good else 1.1))
    put("structured.json", structured(0.04, 1.0, 0.05, 0) if good else structured(0.06, 2.1, 0.2, 1))
    put("quality-m.json", {"extra": 1, **msgspec.to_builtins(QualityFigures(
        model="m", compared=[*compared, Compared("llama.cpp", 10.1, 3e-3, 1e-4)]))})  # fmt: skip


def test_what_reaches_every_bar_passes(tmp_path):
    write(tmp_path, good=True)
    bars = bars_of(read_results(tmp_path))
    assert all(bar.is_met for bar in bars), [bar for bar in bars if not bar.is_met]


def test_what_reaches_none_falls_short(tmp_path):
    write(tmp_path, good=False)
    bars = bars_of(read_results(tmp_path))
    assert not any(bar.is_met for bar in bars) and all(bar.is_met is False for bar in bars)
    assert "SHORT" in list(bars_table(bars).columns[0].cells)


def test_what_was_not_measured_is_told(tmp_path):
    (tmp_path / "model-x.json").write_bytes(msgspec.json.encode(report(NAMED[0], good=True)))
    bars = bars_of(read_results(tmp_path))
    missing = [bar for bar in bars if bar.measured == "not measured"]
    assert all(bar.is_met is None for bar in missing)
    assert {NAMED[0] in bar.text for bar in bars if bar.is_met} == {True}
    assert any(NAMED[1] in bar.text for bar in missing)


def test_a_divergence_may_be_that_of_llama_cpp(tmp_path):
    """The bar is 1e-3, or what llama.cpp has on the same file."""
    for kl, theirs, is_met in ((0.9e-3, None, True), (2e-3, None, False), (2e-3, 3e-3, True), (2e-3, 1e-3, False)):
        compared = [Compared("reference", 10.0, None, None), Compared("native", 10.0, kl, 0.0)]
        compared += [Compared("llama.cpp", 10.0, theirs, 0.0)] if theirs is not None else []
        (tmp_path / "quality-m.json").write_bytes(msgspec.json.encode(QualityFigures(model="m", compared=compared)))
        (bar,) = [bar for bar in bars_of(read_results(tmp_path)) if bar.text.startswith("m: KL")]
        assert bar.is_met is is_met, (kl, theirs)


@pytest.mark.parametrize("shares_prefix", [False, True])
@pytest.mark.parametrize("good", [False, True])
def test_a_served_load_has_limits_beside_the_other_server(tmp_path, shares_prefix, good):
    times = 6.0 if good else 2.0
    (tmp_path / "served.json").write_bytes(msgspec.json.encode([served(shares_prefix, times)]))
    rate, first = [bar for bar in bars_of(read_results(tmp_path)) if bar.text.startswith("a load")]
    assert (rate.is_met, first.is_met) == (good, good)
    assert rate.measured == f"{times:.1f}x" and first.measured == f"{1 / times:.2f}x"
    assert ("p95" in first.text) == shares_prefix


def test_loads_are_measured_against_their_own_limits(tmp_path):
    (tmp_path / "overload.json").write_bytes(msgspec.json.encode(overload(8.0, 50.0, 10.0)))
    (tmp_path / "long-prompt.json").write_bytes(msgspec.json.encode(long_prompt(0, 1.26)))
    (tmp_path / "memory.json").write_bytes(msgspec.json.encode(memory(-4.0)))
    found = {
        bar.text.rpartition(": ")[2]: (bar.measured, bar.is_met)
        for bar in bars_of(read_results(tmp_path))
        if bar.part == "load"
    }
    assert found == {
        "goodput, of the peak": ("80%", True),
        "p99 of a refusal, ms": ("50", True),
        "s until first tokens are as before": ("10", True),
        "sequences left over": ("0", True),
        "steps predicted above their bound": ("0", True),
        "p99 gap of a stream, of the bound": ("1.26", False),
        "steps that still hold one a step later": ("not measured", None),
        "sequences, blocks, calls left over": ("not measured", None),
        "growth of both processes over 8,000 requests, MiB": ("-4.0", True),
    }


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "engine.json").write_text('{"rows": "many"}')
    with pytest.raises(ConfigError, match=r"engine\.json is no result"):
        read_results(tmp_path)


def test_tables_hold_the_shares(tmp_path):
    write(tmp_path, good=True)
    results = read_results(tmp_path)
    assert "4.0%" in list(engine_table(results.engines[0]).columns[2].cells)
    assert "1.50x" in list(contention_table(results.contentions[0]).columns[2].cells)
    assert list(compared_table(results.qualities[0].compared).columns[2].cells) == ["+0.00%", "+0.40%", "+1.00%"]
