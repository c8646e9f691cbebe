"""Steps and figures of a model: the batches that are run, and the arithmetic from times to shares."""

import numpy as np
import pytest

from jilju.assemble.bench import load_stepped, make_probes
from jilju.assemble.engine import open_model
from jilju.backends.reference import ReferenceExecutor
from jilju.bench.batches import Sampling
from jilju.bench.model import SAMPLED, Load, OpLedger, Subject, linear_work, measure_model, step_bytes
from jilju.bench.peers import Peer
from jilju.bench.report import model_groups, model_tables
from jilju.bench.steps import Part, Steps, decode_shape, prefill_shape
from jilju.errors import ConfigError, StartupError
from jilju.model.weights import load_weights
from jilju.plan import Attention, Linear
from tests.bench.fakes import CountingExecutor, KnownProbes, idle_guard, limits, peer_command
from tests.bench.test_quality import GOLDEN


@pytest.fixture(scope="module")
def model():
    return open_model(str(GOLDEN / "llama-tied.gguf"))


def counting_steps(model, max_rows, max_context):
    return (executor := CountingExecutor()), Steps(executor, model.plan, limits(max_rows, max_context))


def test_a_prompt_goes_through_in_steps_of_the_limits_size_and_is_sampled_once(model):
    executor, steps = counting_steps(model, 2, 64)
    steps.prefill(60)
    assert [(b.starts.tolist(), b.counts.tolist(), b.num_logits) for b in executor.batches] == [
        ([0], [24], 0), ([24], [24], 0), ([48], [12], 1)
    ]  # fmt: skip
    assert executor.batches[-1].logit_tokens.tolist() == [11] and executor.batches[-1].positions.tolist() == [60]


def test_a_decode_step_stays_at_its_context_and_its_rows_share_no_block(model):
    executor, steps = counting_steps(model, 4, 64)
    steps.decode(3, 40, seconds=0)
    *filling, step = executor.batches
    assert [(b.starts.tolist(), b.counts.tolist()) for b in filling] == [([0], [24]), ([24], [16])] * 3
    assert (step.starts.tolist(), step.counts.tolist(), step.num_logits) == ([40] * 3, [1] * 3, 3)
    assert len(np.unique(step.block_tables)) == step.block_tables.size == 3 * 4
    steps.decode(3, 40, seconds=0)
    assert len(executor.batches) == len(filling) + 2, "what is filled stays filled"
    steps.decode(1, 50, seconds=0)
    assert [b.starts.tolist() for b in executor.batches[-2:]] == [[40], [50]], "and is only added to"


class Recording(ReferenceExecutor):
    def __init__(self):
        super().__init__()
        self.chosen = []

    def wait(self):
        result = super().wait()
        self.chosen += result.token_ids.tolist()
        return result


def test_steps_run_on_a_backend_as_they_are(model):
    """The definition of the ops takes the batches, and what is chosen does not depend on how a prompt was cut."""
    chosen = []
    for max_tokens in (24, 7):
        bounds, executor = limits(2, 64, max_tokens), Recording()
        executor.load(model.plan, load_weights(model.checkpoint, model.plan), bounds)
        steps = Steps(executor, model.plan, bounds)
        steps.prefill(60)
        steps.decode(2, 30, seconds=0)
        chosen.append(executor.chosen)
    assert chosen[0] == chosen[1] and len(chosen[0]) == 3


@pytest.mark.parametrize("shape", [prefill_shape(50), decode_shape(3, 20)])
def test_work_by_family_is_that_of_the_linear_ops(model, shape):
    flops = sum(op.flops(shape) for op in model.plan.ops if isinstance(op, Linear))
    assert sum(linear_work(model.plan, shape, KnownProbes()).values()) * 1e9 == pytest.approx(flops)


def test_bytes_of_a_step_are_packed_weights_and_keys_and_values(model):
    plan, shape = model.plan, decode_shape(3, 20)
    weights = sum(2 * part.num_bytes for op in plan.ops if isinstance(op, Linear) for part in op.parts)
    kv = sum(op.bytes(shape, 2) for op in plan.ops if isinstance(op, Attention))
    assert step_bytes(plan, shape, 2, KnownProbes()) == weights + kv
    keys_of_three_rows = 3 * 21 * plan.kv.elements_per_token * 2
    assert keys_of_three_rows < kv < 1.5 * keys_of_three_rows, "beside activations, which are few"


def test_a_ledger_counts_only_what_runs_within_it(model):
    executor, steps = counting_steps(model, 1, 64)
    steps.prefill(24)
    with (ledger := OpLedger(executor)):
        steps.prefill(24)
    steps.prefill(24)
    assert ledger.shares() == {"linear": 0.9, "sample": 0.1, "other": 0.0}


def test_shares_follow_from_rates(model, tmp_path):
    """Every figure is recomputed from the rate it stands beside."""
    executor, steps = counting_steps(model, 2, 64)
    peer = Peer("known", peer_command(tmp_path))
    subject = Subject("tiny", model.plan, executor, 2, steps, num_threads=2)
    loads, told = [Load("prefill", 1, 50), Load("decode", 2, 20)], []
    try:
        report = measure_model(
            subject, loads, KnownProbes(), [peer], guard=idle_guard(), num_rounds=2, progress=lambda *done: told.append(done)
        )  # fmt: skip
    finally:
        peer.close()
    assert told == [
        (1, 4, "prefill 50"),
        (2, 4, "prefill 50"),
        (3, 4, "decode 2 x 1 at 20"),
        (4, 4, "decode 2 x 1 at 20"),
    ]
    for load, figure in zip(loads, report.figures, strict=True):
        num_bytes = step_bytes(model.plan, load.shape, 2, KnownProbes())
        passes = figure.tokens_per_s / load.shape.num_tokens  # a second
        best_s = sum(
            gop / {"A": 20, "B": 80}[f] for f, gop in linear_work(model.plan, load.shape, KnownProbes()).items()
        )
        assert figure.gb_s == pytest.approx(num_bytes * passes / 1e9)
        assert figure.bandwidth_gb_s == pytest.approx(200 + num_bytes / 2**20)
        assert figure.bandwidth_share == pytest.approx(figure.gb_s / figure.bandwidth_gb_s)
        assert figure.gop_s == pytest.approx(model.plan.flops(load.shape) * passes / 1e9)
        assert figure.cap_tokens_per_s == pytest.approx(load.shape.num_tokens / best_s)
        assert figure.cap_share == pytest.approx(figure.tokens_per_s / figure.cap_tokens_per_s)
        assert figure.linear_share == pytest.approx(figure.cap_share / 0.9), "linear ops have nine tenths of the time"
        assert figure.peers["known"].tokens_per_s == pytest.approx(100 if load.kind == "prefill" else 21)
    assert [f.sampling_share for f in report.figures] == [None, pytest.approx(0.1)]
    speed, times, peers = model_tables(report)
    assert [table.row_count for table in (speed, times, peers)] == [2, 2, 2]
    assert [group.label for group in model_groups(report)] == ["prefill 50", "decode 2 x 1 at 20"]


def test_sampling_is_measured_with_every_filter_on(model):
    executor, steps = counting_steps(model, 2, 64)
    measure_model(Subject("tiny", model.plan, executor, 2, steps, 1), [Load("decode", 2, 0)], KnownProbes(), [],
                  guard=idle_guard(), num_rounds=1)  # fmt: skip
    last = executor.batches[-1]
    assert (
        (last.temperatures > 0).all()
        and (last.top_ks > 0).all()
        and (last.top_ps < 1).all()
        and (last.min_ps > 0).all()
    )
    assert (executor.batches[0].temperatures == 0).all(), "speed itself is measured greedily"


def test_a_peer_that_cannot_read_the_file_is_a_note(model, tmp_path):
    executor, steps = counting_steps(model, 1, 64)
    peer = Peer("picky", peer_command(tmp_path, runs=[]))
    try:
        report = measure_model(Subject("tiny", model.plan, executor, 2, steps, 1), [Load("prefill", 1, 50)], KnownProbes(),
                               [peer], guard=idle_guard(), num_rounds=1)  # fmt: skip
    finally:
        peer.close()
    assert report.figures[0].peers == {} and report.peer_notes == {"picky": "a peer of known pace"}
    assert list(model_tables(report)[2].columns[2].cells) == ["-"]


def test_a_peer_that_does_not_start_is_an_error_with_its_command(tmp_path):
    (script := tmp_path / "broken.py").write_text("raise SystemExit(3)")
    with pytest.raises(StartupError, match=r"known ended with exit status 3; run it by hand .*broken\.py"):
        Peer("known", ["python3", str(script)])


def test_a_model_as_the_command_loads_it_runs_every_load(model):
    stepped = load_stepped(model, 2, 64, 1)
    with (ledger := OpLedger(stepped.executor)):
        assert stepped.steps.prefill(60) > 0 and stepped.steps.decode(2, 30, 0.0, SAMPLED) > 0
    assert sum(ledger.shares().values()) == pytest.approx(1) and ledger.shares()["linear"] > 0
    assert set(make_probes().weight_bytes(stepped.plan)) == set(stepped.plan.weights)


def test_more_than_the_model_holds_is_refused(model):
    with pytest.raises(ConfigError, match=f"at most {model.spec.max_context} tokens, 100000"):
        load_stepped(model, 1, 100000, 1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        SAMPLED,
        Sampling(0.7, presence_penalty=1.0, num_penalized=20, num_biases=5, allowed_share=0.3, num_top=3),
    ],
)
def test_steps_with_lists_and_masks_are_sound_to_a_backend(model, sampling):
    stepped = load_stepped(model, 3, 64, 1)
    result = stepped.steps.run([Part(row, 0, 5) for row in range(3)], 3, sampling)
    assert result.finite.all()
    batch = stepped.steps.batch([Part(row, 0, 5) for row in range(3)], 3, sampling)
    for ids, length in ((batch.penalty_ids, sampling.num_penalized), (batch.bias_ids, sampling.num_biases)):
        assert all(len(set(row)) == length for row in ids.reshape(3, -1).tolist())
    if sampling.allowed_share is not None:
        allowed = np.unpackbits(batch.masks.view(np.uint8), axis=1, bitorder="little")[:, : model.plan.vocab_size]
        assert allowed[range(3), result.token_ids].all() and 0.2 < allowed.mean() < 0.4
