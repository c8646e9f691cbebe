"""The cost of sampling: figures from an executor whose times are known, and a head without a model that really samples."""

import numpy as np
import pytest

from jilju.assemble.bench import load_stepped_head
from jilju.bench import sampling
from jilju.bench.batches import Sampling
from jilju.bench.report import sampling_table
from jilju.bench.sampling import WAYS, SamplingReport, measure_sampling
from jilju.bench.steps import Part, Steps
from jilju.plan import KvSpec, Plan
from tests.bench.fakes import CountingExecutor, busy_guard, limits


def test_every_way_is_run_so_often_and_its_share_is_what_the_profile_says(monkeypatch):
    monkeypatch.setattr(sampling, "RUN_S", 0.0)
    executor = CountingExecutor()
    steps = Steps(executor, Plan((), (), KvSpec(0, 1, 8), 1000), limits(3, 16))
    costs = measure_sampling(executor, steps, 3, 0, guard=busy_guard(*[0.0] * 100), num_rounds=2)
    assert [cost.way for cost in costs] == [way for way, _ in WAYS]
    assert len(executor.batches) == 3 * len(WAYS), "a run that warms up, and two rounds"
    assert all(batch.num_logits == 3 for batch in executor.batches)
    assert [cost.share for cost in costs] == pytest.approx([0.1] * len(WAYS))
    report = SamplingReport(
        model="m", kernel_set="k", vocab_size=1000, rows=3, num_threads=1, num_rounds=2, costs=costs
    )
    assert sampling_table(report).row_count == len(WAYS)


def test_a_head_alone_samples_as_asked():
    stepped = load_stepped_head(3000, 4, 2)
    parts = [Part(row, 0, 1) for row in range(4)]
    result = stepped.steps.run(parts, 4, Sampling(num_top=20))
    assert result.finite.all() and (result.top_ids >= 0).all()
    assert (result.token_ids == result.top_ids[:, 0]).all()
    assert -10 < result.logprobs.mean() < 0 < np.ptp(result.top_logprobs), "no flat row, and no certain one"
    few = stepped.steps.run(parts, 4, Sampling(temperature=1.0, allowed_share=0.0))
    assert few.token_ids.tolist() == [0] * 4, "the one id that every mask allows"
