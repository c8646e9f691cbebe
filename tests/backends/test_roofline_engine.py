"""The real engine on the roofline executor: every request gets what it gets alone."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends.roofline import RooflineExecutor, tiny_plan
from jilju.clock import VirtualClock
from jilju.engine.loop import Engine
from jilju.engine.request import (
    EngineEvent,
    PromptScored,
    RepetitionDetection,
    Request,
    RequestFailed,
    SamplingParams,
    TokenEvent,
    is_terminal,
)
from jilju.plan import Limits
from jilju.plan.cost import TWO_CORE_CPU

from .roofline import alone_of, make_limits


class Simulation:
    """An engine on a virtual clock; blocks that are free are poisoned after every step."""

    def __init__(self, limits: Limits, vocab_size: int):
        self.vocab_size = vocab_size
        clock, plan = VirtualClock(1), tiny_plan(vocab_size)
        self.executor = RooflineExecutor(clock, plan, TWO_CORE_CPU, limits, noise=lambda number: 1 + number % 7 / 10)
        self.engine = Engine(plan, self.executor, limits, clock)
        self.events: dict[str, list[EngineEvent]] = defaultdict(list)

    def run(self, arrivals: list[tuple[int, Request]]) -> None:
        """Requests, each with the number of steps before it comes."""
        num_steps = 0
        while self.engine.has_work() or any(at >= num_steps for at, _ in arrivals):
            for at, request in arrivals:
                if at == num_steps:
                    self.engine.submit(request)
            for event in self.engine.step():
                self.events[event.request_id].append(event)
            self.executor.poison(self.engine.scheduler.pool.free_ids)
            num_steps += 1
            assert num_steps < 50_000, "the engine does not come to an end"

    def assert_like_alone(self, request: Request) -> None:
        events = self.events[request.id]
        expected = alone_of(request, self.vocab_size)
        tokens = [e for e in events if isinstance(e, TokenEvent)]
        assert [is_terminal(e) for e in events] == [False] * (len(events) - 1) + [True]
        assert [e.token_id for e in tokens] == expected.tokens
        if request.params.wants_logprobs:
            assert [e.logprob for e in tokens] == expected.logprobs
            assert [e.top or [] for e in tokens] == (expected.tops or [[]] * len(tokens))
        pieces = [e for e in events if isinstance(e, PromptScored)]
        scores, tops = [s for e in pieces for s in e.logprobs], [t for e in pieces for t in e.tops or []]
        assert [e.start for e in pieces] == [1 + sum(len(e.logprobs) for e in pieces[:i]) for i in range(len(pieces))]
        if expected.finish_reason == "no_token":  # the step that should sample may have had the last scores
            assert isinstance(events[-1], RequestFailed)
            assert scores == expected.scores[: len(scores)] and tops == expected.score_tops[: len(tops)]
        else:
            assert events[-1].finish_reason == expected.finish_reason
            assert (scores, tops) == (expected.scores, expected.score_tops)


REPETITIONS = (
    RepetitionDetection(max_pattern_size=3, min_count=2),
    RepetitionDetection(min_pattern_size=2, max_pattern_size=2, min_count=3),
)


def bad_words(ids: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    return st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple)


@st.composite
def requests(draw, index: int, vocab_size: int) -> Request:
    ids = st.integers(0, vocab_size - 1)
    family = [(i * 7 + draw(st.integers(0, 1)) * 3) % vocab_size for i in range(draw(st.integers(0, 40)))]
    max_tokens = draw(st.integers(0, 14))
    return Request(
        id=f"r{index}",
        prompt_ids=family + draw(st.lists(ids, min_size=1, max_size=6)),
        end_ids=tuple(draw(st.sets(ids, max_size=2))),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0, 2])),
        params=SamplingParams(
            seed=draw(st.integers(-(2**63), 2**63 - 1)),
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, min(4, max_tokens))),
            temperature=draw(st.sampled_from([0.0, 0.99e-4, 1e-4, 1.0])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.1])),
            presence_penalty=draw(st.sampled_from([0.0, 0.0, -0.7])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 1.3])),
            logit_bias=draw(st.sampled_from([{}, {}, {1: -100.0, 0: 0.3}])),
            allowed_token_ids=draw(st.one_of(st.none(), st.none(), st.sets(ids, min_size=3, max_size=5).map(tuple)))
            if vocab_size > 4
            else None,
            logprobs=draw(st.sampled_from([None, None, 0, 2])),
            logprob_token_ids=draw(st.one_of(st.none(), st.none(), st.lists(ids, max_size=3).map(tuple))),
            bad_words_ids=draw(st.one_of(st.just(()), bad_words(ids))),
            repetition_detection=draw(st.sampled_from([None, None, *REPETITIONS])),
        ),
    )


@st.composite
def scenarios(draw):
    block_size, vocab_size = draw(st.sampled_from([1, 2, 16, 32])), draw(st.sampled_from([2, 3, 40, 64]))
    num_blocks = -(-(40 + 6 + 14) // block_size) + draw(st.sampled_from([0, 1, 8, 60]))
    limits = make_limits(num_blocks, block_size, draw(st.integers(1, 6)), draw(st.integers(1, 24)))
    arrivals = [(draw(st.integers(0, 20)), draw(requests(i, vocab_size))) for i in range(draw(st.integers(1, 8)))]
    return limits, vocab_size, arrivals


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_every_request_gets_what_it_gets_alone(scenario):
    limits, vocab_size, arrivals = scenario
    simulation = Simulation(limits, vocab_size)
    simulation.run(arrivals)
    for _, request in arrivals:
        simulation.assert_like_alone(request)


def crowd() -> list[tuple[int, Request]]:
    """Prompts that share a prefix, in a pool in which not all find room at once."""
    return [
        (i, Request(id=f"r{i}", prompt_ids=[*range(12), i], params=SamplingParams(seed=i, max_tokens=20)))
        for i in range(8)
    ]


def test_a_crowd_shares_blocks_is_preempted_and_gets_what_it_gets_alone():
    simulation = Simulation(make_limits(num_blocks=20, block_size=4), 40)
    simulation.run(crowd())
    for _, request in crowd():
        simulation.assert_like_alone(request)
    times = [simulation.events[r.id][-1].times for _, r in crowd()]
    assert any(t.num_cached_tokens for t in times) and any(t.num_preemptions for t in times)


@pytest.mark.parametrize("fault", ["slot", "table"])
def test_a_fault_behind_the_engine_shows_in_its_answers(monkeypatch, fault):
    """One slot of a shared block, or one entry of a table, is wrong in one step."""
    simulation = Simulation(make_limits(num_blocks=40, block_size=4), 40)
    launch = simulation.executor.launch

    def faulty_launch(batch):
        if simulation.executor.num_steps == 6:
            if fault == "slot":
                simulation.executor.slots.overwrite(int(batch.block_tables[0, 1]), 2, 1)
            else:
                batch.block_tables[0, 0] = batch.block_tables[0, 1]
        launch(batch)

    monkeypatch.setattr(simulation.executor, "launch", faulty_launch)
    simulation.run(crowd())
    with pytest.raises(AssertionError):
        for _, request in crowd():
            simulation.assert_like_alone(request)


def test_a_simulation_is_the_same_each_time():
    runs = []
    for _ in range(2):
        simulation = Simulation(make_limits(num_blocks=20, block_size=4), 40)
        simulation.run(crowd())
        runs.append(list(simulation.events.values()))
    assert runs[0] == runs[1]
    first, *_, last = [e for e in runs[0][0] if isinstance(e, TokenEvent)]
    assert last.times.last_token_ns > last.times.first_token_ns > first.index  # the clock of the cost model ran
