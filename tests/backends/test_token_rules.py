"""What the engine does per token, on backends that compute a model: prompt logprobs, given ids, bad words, ends at repetitions."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.backends import reference
from jilju.backends.reference import ReferenceExecutor
from jilju.clock import VirtualClock
from jilju.engine.loop import Engine
from jilju.engine.request import EngineEvent, RepetitionDetection, Request, SamplingParams, TokenEvent
from tests.engine.fakes import ends_with, joined_scores, repeats
from tests.model.batches import logits_of
from tests.native.plans import LIMITS, Shape, decoder, loaded

MODEL = decoder(Shape())
VOCAB = Shape().vocab
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 150).tolist()
SHORT = PROMPT[:60]  # of which every prefix is computed
OTHER = np.random.default_rng(2).integers(0, VOCAB, 90).tolist()
BACKENDS = ("reference", "native")
TOLERANCE = {"reference": 1e-5, "native": 0.03}  # the one keeps keys and values as float32, the other as float16


class Answers:
    """An engine on a model, and the events of each request."""

    def __init__(self, backend: str, **limits: int):
        executor = loaded(*MODEL, backend=backend, **limits)
        self.engine = Engine(MODEL[0], executor, replace(LIMITS, **limits), VirtualClock(1))
        self.events: dict[str, list[EngineEvent]] = defaultdict(list)

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.engine.submit(request)
        while self.engine.has_work():
            for event in self.engine.step():
                self.events[event.request_id].append(event)

    def tokens(self, request_id: str) -> list[TokenEvent]:
        return [event for event in self.events[request_id] if isinstance(event, TokenEvent)]


def asking(request_id: str, prompt: list[int], prompt_logprobs: int | None = None, **params: object) -> Request:
    own = SamplingParams(**{"seed": 0, "max_tokens": 0} | params)  # type: ignore[arg-type]
    return Request(id=request_id, prompt_ids=prompt, prompt_logprobs=prompt_logprobs, params=own)


@pytest.fixture(scope="module")
def distributions() -> np.ndarray:
    """By brute force: the logprobs of all ids after each token of the prompt, each from a pass of its own over all before it."""
    executor = loaded(*MODEL, backend="reference")
    assert isinstance(executor, ReferenceExecutor)
    passes = [logits_of(executor, SHORT[: n + 1], [(0, n + 1)], range(4))[-1] for n in range(len(SHORT))]
    return np.stack([reference.log_softmax(logits) for logits in passes])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_prompt_logprobs_are_those_of_a_pass_for_each_token(
    backend: str, num_top: int, distributions: np.ndarray
) -> None:
    answers = Answers(backend, max_tokens=24)
    answers.run(asking("a", SHORT, num_top, max_tokens=2))
    tolerance = TOLERANCE[backend]
    scores, tops = joined_scores(answers.events["a"])
    want = [distributions[i, SHORT[i + 1]] for i in range(len(SHORT) - 1)]
    np.testing.assert_allclose(scores, want, atol=tolerance)
    assert len(tops) == (len(scores) if num_top else 0)
    for place, top in enumerate(tops):
        ids, logprobs = zip(*top, strict=True)
        assert len(set(ids)) == num_top and list(logprobs) == sorted(logprobs, reverse=True)
        np.testing.assert_allclose(logprobs, distributions[place, list(ids)], atol=tolerance)
        np.testing.assert_allclose(logprobs, np.sort(distributions[place])[::-1][:num_top], atol=tolerance)
    assert len(answers.tokens("a")) == 2


@pytest.fixture(scope="module")
def whole() -> tuple[list[float], list[list[tuple[int, float]]]]:
    """In one step, alone, on one thread."""
    answers = Answers("native", num_threads=1)
    answers.run(asking("a", PROMPT, 3))
    return joined_scores(answers.events["a"])


@settings(max_examples=20, deadline=None)
@given(
    max_tokens=st.integers(4, 200), num_threads=st.integers(1, 3), num_blocks=st.sampled_from([11, 12, 96]), others=st.integers(0, 3),
    cached=st.integers(0, 150),
)  # fmt: skip
def test_chunks_neighbours_and_the_cache_change_no_bit(
    whole, max_tokens, num_threads, num_blocks, others, cached
) -> None:
    """With a part of the prompt in the cache, beside others, in blocks that are taken away now and then."""
    answers = Answers("native", max_tokens=max_tokens, num_threads=num_threads, num_blocks=num_blocks, max_rows=4)
    if cached:
        answers.run(asking("before", PROMPT[:cached], max_tokens=1))
    beside = [asking(f"o{i}", OTHER[i:], max_tokens=20) for i in range(others)]
    answers.run(*beside, asking("a", PROMPT, 3), asking("again", PROMPT, 3, max_tokens=1))
    assert joined_scores(answers.events["a"]) == whole
    assert joined_scores(answers.events["again"]) == whole


def test_what_an_engine_scored_the_next_one_does_not(whole) -> None:
    """It takes that part of the prompt from its cache, and goes on."""
    answers = Answers("native", max_tokens=64)
    answers.run(asking("before", PROMPT, max_tokens=1))
    rest = Request(
        id="a", prompt_ids=PROMPT, prompt_logprobs=3, num_scored=100, params=SamplingParams(seed=0, max_tokens=1)
    )
    answers.run(rest)
    pieces = answers.events["a"][:-1]
    assert [piece.start for piece in pieces] == [101]
    assert (pieces[0].logprobs, pieces[0].tops) == (whole[0][100:], whole[1][100:])
    assert answers.events["a"][-1].times.num_cached_tokens == 96


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scored_prompt_is_hit_by_others_and_takes_no_hits(backend: str) -> None:
    answers = Answers(backend, max_tokens=64)
    answers.run(asking("a", PROMPT, 0, max_tokens=1))
    answers.run(asking("b", PROMPT, max_tokens=1), asking("c", PROMPT, 0, max_tokens=1))
    cached = [answers.events[name][-1].times.num_cached_tokens for name in "abc"]
    assert cached == [0, 144, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_bad_words_never_come(backend: str, data: st.DataObject, temperature: float, seed: int) -> None:
    """Cut out of what comes without them."""
    answers = Answers(backend)
    answers.run(asking("free", PROMPT[:5], max_tokens=24, seed=seed, temperature=temperature))
    free = [event.token_id for event in answers.tokens("free")]
    cuts = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 3)), min_size=1, max_size=5))
    words = tuple(tuple(free[start : start + length]) for start, length in cuts)
    answers.run(asking("ruled", PROMPT[:5], max_tokens=24, seed=seed, temperature=temperature, bad_words_ids=words))
    got = [event.token_id for event in answers.tokens("ruled")]
    assert len(got) == 24
    assert not any(ends_with(got[:end], list(word)) for word in words for end in range(1, 25))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 4), count=st.integers(2, 3), min_tokens=st.integers(0, 12))
def test_an_answer_ends_at_its_first_repetition(
    backend: str, seed: int, size: int, count: int, min_tokens: int
) -> None:
    watched = RepetitionDetection(max_pattern_size=size, min_count=count)
    common = {"max_tokens": 40, "seed": seed, "allowed_token_ids": (3, 8)}
    answers = Answers(backend)
    answers.run(
        asking("free", [1, 2], **common),
        asking("ruled", [1, 2], min_tokens=min_tokens, repetition_detection=watched, **common),
    )
    free = [event.token_id for event in answers.tokens("free")]
    end = next((n for n in range(max(1, min_tokens), 41) if repeats(free[:n], watched)), None)
    ruled = answers.tokens("ruled")
    assert [event.token_id for event in ruled] == free[:end]
    assert ruled[-1].finish_reason == ("length" if end is None else "repetition")


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_of_given_ids_are_those_of_the_whole_distribution(backend: str) -> None:
    """Beside rows with alternatives and scored ones, so that each must find its own."""
    ids = (19, 0, 7, 19)
    answers = Answers(backend)
    answers.run(
        asking("plain", PROMPT[:9], max_tokens=8, logprobs=20),
        asking("scored", OTHER, 2, max_tokens=3),
        asking("others", PROMPT[:4], max_tokens=8, logprob_token_ids=(1,)),
        asking("wanted", PROMPT[:9], max_tokens=8, logprob_token_ids=ids),
    )
    for plain, wanted, other in zip(*(answers.tokens(name) for name in ("plain", "wanted", "others")), strict=True):
        assert (plain.token_id, plain.logprob) == (wanted.token_id, wanted.logprob)
        assert plain.top is not None
        assert wanted.top == [(i, dict(plain.top)[i]) for i in ids]
        assert other.top is not None and [i for i, _ in other.top] == [1]
