"""Tiles: the figures of a window's last minute.

Owns their definitions: percentiles, rates, shares of roofs, the error of predictions. Knows nothing of who runs or waits.
"""

from collections.abc import Sequence

import numpy as np

from jilju.account.frame import Percentiles, Tiles
from jilju.account.records import CallRecord
from jilju.account.sequence_rows import SequenceRows
from jilju.account.step_model import StepModel

SLO_TTFT_MS, SLO_GAP_MS = 2000.0, 100.0  # the preset `chat`: models of a size for CPUs


def make_tiles(
    steps: np.ndarray,
    rows: SequenceRows,
    begin_ns: int,
    end_ns: int,
    ended: Sequence[CallRecord],
    model: StepModel,
    *,
    streams: int,
    waiting: int,
    kv_used_share: float,
    imbalance: int,
) -> Tiles:
    """Of `steps` and calls that ended in [begin_ns, end_ns); `rows` are those of the minute before its end."""
    seconds = max(end_ns - begin_ns, 1) / 1e9
    took = steps["end_ns"].astype(np.int64) - steps["begin_ns"].astype(np.int64)
    took_ns = int(took.sum())
    computed = int(steps["num_prefill_tokens"].sum()) - int(steps["num_recomputed_tokens"].sum())
    error, bias = _prediction(steps, took)
    return Tiles(
        seconds=seconds,
        streams=streams,
        waiting=waiting,
        output_tokens_per_s=rows.num_sampled(begin_ns) / seconds,
        prompt_tokens_per_s=max(0, computed) / seconds,
        ttft_ms=_percentiles(np.array([ttft for call in ended if (ttft := ttft_ms(call)) is not None])),
        gap_ms=_percentiles(rows.gaps_ns(begin_ns) / 1e6),
        goodput_per_s=sum(map(is_good, ended)) / seconds,
        slo_ttft_ms=SLO_TTFT_MS,
        slo_gap_ms=SLO_GAP_MS,
        memory_roof_share=model.memory_roof_share(int(steps["bytes"].sum()), took_ns),
        compute_roof_share=model.compute_roof_share(int(steps["flops"].sum()), took_ns),
        kv_used_share=kv_used_share,
        imbalance=imbalance,
        prediction_error=error,
        prediction_bias=bias,
    )


def ttft_ms(call: CallRecord) -> float | None:
    return (call.first_sent_ns - call.received_ns) / 1e6 if call.first_sent_ns else None


def is_good(call: CallRecord) -> bool:
    """It completed within both limits."""
    ttft = ttft_ms(call)
    if call.state != "completed" or ttft is None or ttft > SLO_TTFT_MS:
        return False
    num_gaps = max((sequence.num_output_tokens for sequence in call.sequences), default=0) - 1
    return num_gaps < 1 or (call.last_event_ns - call.first_sent_ns) / 1e6 / num_gaps <= SLO_GAP_MS


def _percentiles(values: np.ndarray) -> Percentiles | None:
    if not len(values):
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return Percentiles(p50=round(float(p50), 3), p99=round(float(p99), 3))


def _prediction(steps: np.ndarray, took: np.ndarray) -> tuple[float | None, float | None]:
    """Median size and mean of (predicted - measured) / measured, of steps that were predicted."""
    is_told = (steps["predicted_ns"] > 0) & (took > 0)
    if not is_told.any():
        return None, None
    errors = steps["predicted_ns"][is_told] / took[is_told] - 1
    return float(np.median(np.abs(errors))), float(errors.mean())
