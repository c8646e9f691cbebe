"""The divergence between two engines: the estimate against whole distributions that are known, and through a backend."""

import math

import numpy as np
import pytest

from jilju.assemble.engine import open_model
from jilju.backends.reference import ReferenceExecutor, log_softmax
from jilju.bench.divergence import Drawn, ExecutorScores, compare, divergence
from jilju.model.weights import load_weights
from tests.bench.fakes import limits
from tests.bench.test_quality import GOLDEN

VOCAB = 50


class KnownScorer:
    """At every place the same distribution, whatever came before."""

    def __init__(self, logits: np.ndarray):
        self.log_p = log_softmax(logits.astype(np.float32))

    def logprobs(self, token_ids, targets):
        return [[float(self.log_p[t]) for t in place] for place in targets]

    def draw(self, token_ids, following, num_draws, seed):
        drawn = np.random.default_rng(seed).choice(VOCAB, (len(following), num_draws), p=np.exp(self.log_p))
        ids = [[id_, *row] for id_, row in zip(following, drawn.tolist(), strict=True)]
        return Drawn(ids, self.logprobs(token_ids, ids))


@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_the_estimate_is_that_of_the_whole_distributions(noise):
    rng = np.random.default_rng(3)
    logits = 2 * rng.standard_normal(VOCAB)
    p, q = KnownScorer(logits), KnownScorer(logits + noise * rng.standard_normal(VOCAB))
    exact = float((np.exp(p.log_p) * (p.log_p - q.log_p)).sum())
    reference, other = compare(p, {"q": q}, [[0] * 200] * 20, draws=2)
    assert reference.kl is None and reference.kl_error is None
    assert other.kl_error < 0.1 * exact, "4000 draws tell it to within a tenth"
    assert other.kl == pytest.approx(exact, abs=5 * other.kl_error)
    assert other.perplexity == pytest.approx(math.exp(-q.log_p[0]))


def test_only_places_after_the_middle_count():
    class Recording(KnownScorer):
        def draw(self, token_ids, following, num_draws, seed):
            assert (token_ids, following) == ([1, 2, 3, 4, 5, 6, 7], [6, 7, 8])
            return super().draw(token_ids, following, num_draws, seed)

    scorer = Recording(np.arange(VOCAB) / 5)
    reference, other = compare(scorer, {"same": scorer}, [[1, 2, 3, 4, 5, 6, 7, 8]], draws=1)
    assert reference.perplexity == other.perplexity == pytest.approx(math.exp(-scorer.log_p[[6, 7, 8]].mean()))
    assert other.kl == 0.0


def test_a_divergence_is_never_negative():
    assert divergence([]) == (None, None)
    mean, error = divergence([0.1, -0.1, 0.0])
    assert mean > 0 and error > 0


def test_scores_and_draws_of_a_backend_are_those_of_its_logits():
    """The golden logits are those of transformers; scoring runs in steps of 24 tokens."""
    model = open_model(str(GOLDEN / "llama-tied.gguf"))
    executor, bounds = ReferenceExecutor(), limits(1, 64)
    executor.load(model.plan, load_weights(model.checkpoint, model.plan), bounds)
    with np.load(GOLDEN / "llama-tied.npz") as stored:
        ids, logits = stored["token_ids"].tolist(), stored["logits"]
    scores = ExecutorScores(executor, model.plan, bounds)
    drawn = scores.draw(ids, ids[20:], num_draws=2, seed=7)
    assert [place[0] for place in drawn.ids] == ids[20:]
    first, second = ([place[k] for place in drawn.ids] for k in (1, 2))
    assert first != second == [place[1] for place in scores.draw(ids, ids[20:], num_draws=1, seed=8).ids]
    for row, place, told in zip(logits[20:], drawn.ids, drawn.logprobs, strict=True):
        assert told == pytest.approx(log_softmax(row)[place], abs=1e-4)
    assert scores.logprobs(ids, drawn.ids) == [pytest.approx(place, abs=1e-4) for place in drawn.logprobs]
