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
    shape = StepShape(starts, counts, len(rows))
    times = KnownTimes(COST.linear_bound(TWO_CORE_CPU))
    pairs = sum(num_pairs(start, count) for start, count in rows)
    assert COST.step_ns(shape, TWO_CORE_CPU) <= times.predict_ns(sum(counts), pairs) + 1


def params(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens)


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
