"""The bound on the gap between two tokens, on a virtual clock: a long prompt beside streams does not hold them up."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.backends.roofline import RooflineExecutor, llama_plan
from jilju.clock import VirtualClock
from jilju.engine.loop import Engine
from jilju.engine.request import Request, SamplingParams, TokenEvent
from jilju.engine.scheduler import MIN_CHUNK
from jilju.engine.step_times import StepTimes, num_pairs
from jilju.formats.ggml import GgmlType
from jilju.plan import Limits, StepShape
from jilju.plan.cost import TWO_CORE_CPU, PlanCost

SMOLLM2 = llama_plan(30, 576, 9, 3, 1536, 49152, body=GgmlType.Q4_1, head=GgmlType.Q8_0)
COST = PlanCost(SMOLLM2, 2)


class KnownTimes(StepTimes):
    """The machine's own bound; nothing is learnt."""

    def observe(self, num_tokens: int, pairs: int, measured_ns: int) -> None:
        pass


@given(st.lists(st.tuples(st.integers(0, 8000), st.integers(1, 300)), min_size=1, max_size=20))
def test_no_step_takes_longer_than_the_linear_bound(rows):
    starts, counts = zip(*rows, strict=True)
    times = KnownTimes(COST.linear_bound(TWO_CORE_CPU))
    pairs = sum(num_pairs(start, count) for start, count in rows)
    for num_logits in (len(rows), sum(counts)):
        shape = StepShape(starts, counts, num_logits)
        assert COST.step_ns(shape, TWO_CORE_CPU) <= times.predict_ns(sum(counts), pairs) + 1


def params(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens)


def test_a_logit_row_costs_its_share_of_the_plan():
    """In the long run, where weights are read once for many tokens."""
    num = 4096
    plain, scored = (COST.totals(StepShape((0,), (num,), num_logits))[0] for num_logits in (0, num))
    attended = COST.totals(StepShape((0,), (1,), 0))[0] * num  # without what keys far back cost
    assert (scored - plain) / attended == pytest.approx(COST.logit_work(), rel=1e-3)
    num_head, num_layers = 576 * 49152, 106.2e6  # weights
    assert COST.logit_work() == pytest.approx(num_head / num_layers, rel=0.03)


@pytest.mark.parametrize("gap_ms", [50, 100])
def test_a_prompt_that_is_scored_keeps_the_gap_too(gap_ms):
    """The model of step times is right about tokens without logits, and knows what those with logits add: chunks are so much
    smaller. Without that the same chunks take longer than the gap."""
    gaps, chunks = {}, {}
    for kind, score_work in (("plain", None), ("scored", None), ("unknown", 0.0)):
        clock, limits = VirtualClock(1), Limits(2048, 16, 32, 512, 8192, num_threads=2)
        executor = RooflineExecutor(clock, SMOLLM2, TWO_CORE_CPU, limits)
        engine = Engine(SMOLLM2, executor, limits, clock, times=KnownTimes(without_logits()), gap_ms=gap_ms)
        if score_work is not None:
            engine.scheduler._score_work = score_work
        engine.submit(Request(id="stream", prompt_ids=[1, 2, 3], params=params(0, 400)))
        engine.step()
        prompt_logprobs = None if kind == "plain" else 0
        engine.submit(Request(id="long", prompt_ids=[5] * 2000, params=params(1, 1), prompt_logprobs=prompt_logprobs))
        while engine.scheduler.find("long") is not None:
            engine.step()
        beside = [s for s in engine.log.steps if s.num_prefill_tokens and s.num_decode_tokens]
        assert sum(s.num_prefill_tokens for s in beside) == 2000
        gaps[kind] = max(s.end_ns - s.begin_ns for s in beside) / 1e6
        chunks[kind] = max(s.num_prefill_tokens for s in beside)
    assert gaps["plain"] <= 1.1 * gap_ms
    assert gaps["scored"] <= 1.05 * gaps["plain"] < 1.15 * gaps["plain"] < gaps["unknown"]
    assert chunks["scored"] < chunks["plain"] == chunks["unknown"]


def without_logits():
    """The coefficients of this machine for steps that want no logits, which chunks are until their last."""

    def took_ns(start, count):
        return COST.step_ns(StepShape((start,), (count,), 0), TWO_CORE_CPU)

    per_pair = (took_ns(1000, 256) - took_ns(0, 256)) / (1000 * 256)
    per_token = (took_ns(0, 512) - took_ns(0, 256) - per_pair * (num_pairs(0, 512) - num_pairs(0, 256))) / 256
    return took_ns(0, 256) - 256 * per_token - per_pair * num_pairs(0, 256), per_token, per_pair


@pytest.mark.parametrize("gap_ms", [20, 50, 100])
def test_a_prompt_of_six_thousand_tokens_keeps_the_gap_of_eight_streams(gap_ms):
    clock, limits = VirtualClock(1), Limits(2048, 16, 32, 512, 8192, num_threads=2)
    executor = RooflineExecutor(clock, SMOLLM2, TWO_CORE_CPU, limits)
    engine = Engine(SMOLLM2, executor, limits, clock, times=KnownTimes(COST.linear_bound(TWO_CORE_CPU)), gap_ms=gap_ms)
    rng = random.Random(gap_ms)
    for index in range(8):
        prompt = [rng.randrange(49152) for _ in range(40)]
        engine.submit(Request(id=f"s{index}", prompt_ids=prompt, params=params(index, 1200)))
    last_ns: dict[str, int] = {}
    gaps_ns: list[int] = []
    is_asked = False
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokenEvent):
                if event.request_id in last_ns and "long" not in event.request_id:
                    gaps_ns.append(clock.now_ns() - last_ns[event.request_id])
                last_ns[event.request_id] = clock.now_ns()
        if len(last_ns) == 8 and not is_asked:
            prompt = [rng.randrange(49152) for _ in range(6000)]
            engine.submit(Request(id="long", prompt_ids=prompt, params=params(9, 2)))
            is_asked = True
    beside = [s for s in engine.log.steps if s.num_prefill_tokens and s.num_decode_tokens]
    assert sum(s.num_prefill_tokens for s in beside) >= 6000
    assert max(gaps_ns) <= max(s.bound_ns for s in beside)
    for step in beside:  # the stated bound is the gap, unless the streams and the smallest chunk take longer
        assert step.end_ns - step.begin_ns <= step.bound_ns
        assert step.bound_ns == gap_ms * 1_000_000 or step.num_prefill_tokens <= MIN_CHUNK
    # without the bound steps would take what their tokens take
    longest = StepShape((5000,), (limits.max_tokens,), 0)
    assert COST.step_ns(longest, TWO_CORE_CPU) > 100_000_000
