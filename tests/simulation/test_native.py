"""Scripts on the native backend: whatever happens around a request, its bits are those that it gets alone."""

from dataclasses import replace

import numpy as np
import pytest

from jilju.assemble.native_simulation import NativeBackend, PacedExecutor, file_model, small_models
from jilju.bench.batches import LogitRows, Sampling, batch_of
from jilju.clock import VirtualClock
from jilju.plan import Limits
from jilju.simulation import play
from jilju.simulation.draw import NATIVE_VOCAB, draw_large, draw_native
from jilju.simulation.runs import Total
from tests.system.conftest import needs_smollm2

NUM_SEEDS = 60  # three models, one and two threads, both types of the cache: each of the twelve five times


@pytest.fixture(scope="module")
def models():
    return small_models()


def test_every_bit_is_as_alone(models):
    total, backend, num_killed = Total(), NativeBackend(models), 0
    num_tokens = num_requests = 0
    for seed in range(NUM_SEEDS):
        outcome = play(draw_native(seed), backend)
        assert not outcome.failure, f"seed {seed}: {outcome.failure}\n{outcome.details}"
        total.add(outcome)
        num_killed += outcome.tally.num_deaths > 0
        num_tokens += outcome.tally.num_compared_tokens
        num_requests += outcome.tally.num_compared_requests
    assert num_tokens > 15_000 and num_requests > 900
    assert 3 * num_killed > NUM_SEEDS, "in a third of the seeds the engine dies"
    tally = total.tally
    assert tally.num_preemptions > 50 and tally.num_cached_tokens > 10_000 and tally.num_step_faults > 15
    assert tally.ends["client_cancelled"] > 50


@needs_smollm2
def test_every_bit_of_a_real_model_is_as_alone(tmp_path):
    model = file_model("smollm2-135m", tmp_path)
    outcome = play(draw_large(4, model.plan.vocab_size), NativeBackend([model]))
    assert not outcome.failure, f"{outcome.failure}\n{outcome.details}"
    assert outcome.tally.num_deaths and outcome.tally.num_cached_tokens and outcome.tally.num_compared_tokens > 30


def test_threads_change_nothing_at_all(models):
    """Neither what clients see nor what the engine decides, nor when."""
    for seed in range(4):
        one, two = (play(draw_native(seed), NativeBackend(models, num_threads=n)) for n in (1, 2))
        assert one.digest == two.digest, f"seed {seed}"
        assert not one.failure and not two.failure


class Spoiled(NativeBackend):
    """Engines on executors that are wrong, but for those that compute requests alone."""

    def __init__(self, models, spoil_batch=None, spoil_result=None):
        super().__init__(models)
        self.spoil_batch, self.spoil_result = spoil_batch, spoil_result

    def engine(self, script, clock, wrap):
        return super().engine(script, clock, lambda inner: wrap(SpoiledExecutor(inner, self)))


class SpoiledExecutor:
    def __init__(self, inner, spoiled):
        self.inner, self.spoiled = inner, spoiled

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def launch(self, batch):
        self.batch = batch
        self.inner.launch(self.spoiled.spoil_batch(batch) if self.spoiled.spoil_batch else batch)

    def wait(self):
        result = self.inner.wait()
        return self.spoiled.spoil_result(self.batch, result) if self.spoiled.spoil_result else result


def last_bit_beside_a_neighbour(batch, result):
    if batch.num_rows == 1:
        return result
    return replace(result, logprobs=np.nextafter(result.logprobs, np.float32(-100)))


def last_bit_of_an_alternative(batch, result):
    tops = result.top_logprobs.copy()
    tops[:, :1] = np.nextafter(tops[:, :1], np.float32(-100))
    return replace(result, top_logprobs=tops)


def first_block_of_a_neighbour(batch):
    """From the second block on: the first then holds another's keys and values."""
    tables = batch.block_tables.copy()
    deep = (batch.starts >= 32) & (tables.shape[1] > 1)
    tables[deep, 0] = tables[0, 0]
    return replace(batch, block_tables=tables)


def noise_by_place_in_the_batch(batch):
    return replace(batch, positions=batch.positions + np.arange(len(batch.positions)))


@pytest.mark.parametrize(
    ("spoil", "law"),
    [
        ({"spoil_result": last_bit_beside_a_neighbour}, "I20 logprobs"),
        ({"spoil_result": last_bit_of_an_alternative}, "I20 alternatives"),
        ({"spoil_batch": first_block_of_a_neighbour}, "I20"),
        ({"spoil_batch": noise_by_place_in_the_batch}, "I20 tokens"),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else "",
)
def test_a_wrong_bit_is_seen(models, spoil, law):
    backend = Spoiled(models, **spoil)
    outcomes = (play(draw_native(seed), backend) for seed in range(20))
    failure = next((outcome.failure for outcome in outcomes if outcome.failure), "nothing was seen")
    assert failure.startswith(law), failure


@pytest.mark.parametrize("max_tokens", [1, 8, 64])
def test_what_is_poisoned_cannot_be_read(models, max_tokens):
    """The next token after a full block follows from its keys and values, until they are overwritten."""
    limits = Limits(num_blocks=4, block_size=16, max_rows=4, max_tokens=max_tokens, max_context=64, num_threads=1)
    executor = PacedExecutor(models[0].load(limits), NATIVE_VOCAB, limits, VirtualClock(), lambda shape: 1)

    def logprob(start: int) -> float:
        table = np.array([[2, 3]], np.int32)
        logits = LogitRows(tokens=[0], positions=[start + 1], targets=[7], seeds=[0])
        executor.launch(batch_of(np.array([start]), [start], [1], table, logits, Sampling(), NATIVE_VOCAB))
        return executor.wait().logprobs[0]

    for position in range(16):
        logprob(position)
    known = logprob(16)
    executor.poison([0, 1])
    assert logprob(16) == known, "other blocks are left alone"
    executor.poison([1, 2])
    assert logprob(16) != known


def test_scripts_are_made_for_a_model():
    for seed in range(200):
        script = draw_native(seed)
        assert script.settings.block_size % 16 == 0 and script.settings.vocab_size == NATIVE_VOCAB
        for request in script.requests:
            assert not request.fault and max(request.prompt_ids) < NATIVE_VOCAB
