"""The whole backend: logits beside the reference's, the same bits whatever is in the step, and steps that run ahead."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends.cuda.executor import CudaExecutor
from jilju.engine.request import Request, SamplingParams
from jilju.plan import Batch, Rope, StepResult, WeightDtype
from tests.cuda.models import GEMMA, LIMITS, LLAMA, QWEN, answers, engine_of, loaded, reference
from tests.model.batches import BatchRow, Logit, chunks_of, make_batch, run
from tests.native.plans import Shape, decoder

SHAPES = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA}
SCALED = replace(LLAMA, has_factors=True)
PROMPT = np.random.default_rng(1).integers(0, 60, 70).tolist()
OTHERS = np.random.default_rng(2).integers(0, 60, 70).tolist()
BLOCKS, OTHER_BLOCKS = [11, 5, 32, 7, 20, 9], list(range(21, 31))
# Of logprobs, by the rounding of what is kept in the half type: some 12 values a layer and token are rounded to it, each by half
# an epsilon at most of a number that is of the size of the logits' own; they add up as a walk does, and those of scores, which
# reach about 4 here, are stretched by going through exp.
STRETCH = 3
EPSILON = {"bf16": 2.0**-8, "f16": 2.0**-11, "fp8": 2.0**-4}


def scores(executor: object, parts: list[tuple[int, int]], num_top: int = 20) -> StepResult:
    """Logprobs of the prompt's tokens and of alternatives to each, part after part; those of the last part."""
    for start, count in parts:
        logits = [
            Logit(i, target=PROMPT[(start + i + 1) % 70], position=start + i + 1, num_top=num_top) for i in range(count)
        ]
        result = run(executor, make_batch([BatchRow(PROMPT[start : start + count], start, BLOCKS)], logits))  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("dtype", ["bf16", "f16", "fp8"])
@pytest.mark.parametrize("name", SHAPES)
def test_logprobs_are_the_reference_s(name: str, dtype: WeightDtype, device: str) -> None:
    shape = SHAPES[name]
    want = scores(reference(shape), [(0, 24)])
    got = scores(loaded(shape, device, dtype, runs_ahead=False), [(0, 24)])
    size = np.abs(want.top_logprobs).max()
    bound = STRETCH * EPSILON[dtype] / 2 * np.sqrt(12 * shape.num_layers) * size
    worst = int(np.argmax(np.abs(got.logprobs - want.logprobs)))
    assert np.abs(got.logprobs - want.logprobs).max() <= bound, (
        f"token {worst}: {got.logprobs[worst]}, reference {want.logprobs[worst]}, bound {bound}"
    )
    error = np.sqrt(np.mean((got.logprobs - want.logprobs) ** 2))
    assert error < np.std(want.logprobs) / 2, "of fp8 the bound alone would let a model pass that says the same to all"
    assert got.finite.all()


def test_rotary_factors_are_the_reference_s(device: str) -> None:
    """Of one layer of two, in tables of its own."""
    plan, weights = decoder(SCALED)
    executor = loaded(SCALED, device, runs_ahead=False)
    assert executor._weights.num_bytes == executor.weight_bytes(plan)
    (name,) = executor._weights.rope_factors
    factors = weights[name].data.view(np.float32)
    half = SCALED.head_dim // 2
    for index, scale in enumerate((factors.astype(np.float64), np.ones(half))):
        angles = np.arange(LIMITS.max_context)[:, None] / SCALED.theta ** (np.arange(half) / half) / scale
        for part, want in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            got = executor._buffers[f"{part} {index}"].cpu().numpy()
            assert abs(got - want).max() <= 2.0**-23, part
    want, plain = scores(reference(SCALED), [(0, 24)]), scores(reference(LLAMA), [(0, 24)])
    got = scores(executor, [(0, 24)])
    bound = STRETCH * EPSILON["bf16"] / 2 * np.sqrt(12 * SCALED.num_layers) * np.abs(want.top_logprobs).max()
    assert np.abs(got.logprobs - want.logprobs).max() <= bound < np.abs(plain.logprobs - want.logprobs).max()


def test_dummy_weights_take_the_factors_that_are_given(device: str) -> None:
    plan, weights = decoder(SCALED)
    executor = CudaExecutor(device=device)
    with pytest.raises(AssertionError, match="would be made up"):
        executor.load_dummy(plan, LIMITS)
    name = next(op.factors.name for op in plan.ops if isinstance(op, Rope) and op.factors is not None)
    executor.load_dummy(plan, LIMITS, given={name: weights[name]})
    given = torch.from_numpy(weights[name].data.view(np.float32).copy())
    assert torch.equal(executor._weights.rope_factors[name].cpu(), given)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_fast_steps_of_each_size_say_what_invariant_ones_do(dtype: WeightDtype, device: str) -> None:
    """By the library's product, by tiles, token by token, and captured. Errors are told beside how much logprobs vary."""
    fast, slow = (loaded(LLAMA, device, dtype, fast=fast, runs_ahead=False) for fast in (True, False))
    spread = np.std(scores(slow, [(0, 66)]).logprobs)
    for start, count in [(0, 66), (0, 24), (24, 2), (26, 1)]:
        want = scores(slow, [(start, count)])
        for _ in range(3 if count == 1 and device == "cuda" else 1):
            error = scores(fast, [(start, count)]).logprobs - want.logprobs
            most = 0.5 if dtype == "fp8" and count > 64 else 0.1  # the library takes activations in fp8 too
            assert np.sqrt(np.mean(error**2)) <= most * spread, f"{count} tokens"


def bits(result: StepResult, rows: slice = slice(None)) -> bytes:
    fields = (result.token_ids, result.logprobs, result.top_ids, result.top_logprobs, result.finite)
    return b"".join(field[rows].tobytes() for field in fields)


def sampled(token: int, position: int) -> Logit:
    return Logit(token, position=position, seed=position + 7, temperature=0.8, top_k=15, top_p=0.95, num_top=20)


@pytest.mark.parametrize(("name", "kv_dtype"), [("llama", "bf16"), ("gemma", "bf16"), ("llama", "fp8")])
def test_the_same_bits_in_chunks_and_among_neighbours(name: str, kv_dtype: str, device: str) -> None:
    executor = loaded(SHAPES[name], device, kv_dtype=kv_dtype, runs_ahead=False)
    batch = make_batch([BatchRow(PROMPT[:50], 0, BLOCKS)], [sampled(49, 50)])
    want = bits(run(executor, batch))
    for sizes in [[17, 32], [49]] if device == "cpu" else [[17, 32], [49], [16, 16, 16, 1], [1] * 49]:
        for start, count in chunks_of(50, sizes):
            rows = [BatchRow(OTHERS[:20], 0, OTHER_BLOCKS[:2]), BatchRow(PROMPT[start : start + count], start, BLOCKS)]
            rows.append(BatchRow(OTHERS[:1], 0, OTHER_BLOCKS[3:4]))
            ends = np.cumsum([len(row.token_ids) for row in rows]) - 1
            result = run(executor, make_batch(rows, [sampled(int(end), start + count) for end in ends]))
        assert bits(result, slice(1, 2)) == want, sizes


def decode_batch(rows: list[tuple[int, int, list[int]]], **changes: object) -> Batch:
    """Rows (token id, position, blocks) of one token each."""
    return make_batch(
        [BatchRow([token], position, blocks) for token, position, blocks in rows],
        [sampled(i, position + 1)._replace(**changes) for i, (_, position, _) in enumerate(rows)],
    )


def test_a_decode_step_has_the_bits_of_a_prompt_s_last_token(device: str) -> None:
    executor = loaded(LLAMA, device, runs_ahead=False)
    want = bits(run(executor, make_batch([BatchRow(PROMPT[:50], 0, BLOCKS)], [sampled(49, 50)])))
    run(
        executor,
        make_batch(
            [BatchRow(PROMPT[:49], 0, BLOCKS), BatchRow(OTHERS[:30], 0, OTHER_BLOCKS)],
            [sampled(48, 49), sampled(78, 30)],
        ),
    )
    for _ in range(1 if device == "cpu" else 3):  # kernel by kernel, captured, replayed
        batch = decode_batch([(PROMPT[49], 49, BLOCKS), (OTHERS[30], 30, OTHER_BLOCKS)])
        assert bits(run(executor, batch), slice(0, 1)) == want
        assert bits(run(executor, decode_batch([(PROMPT[49], 49, BLOCKS)]))) == want


def requests_of(seed: int, num_requests: int, most: int) -> list[Request]:
    """Of up to so many tokens each."""
    rng = np.random.default_rng(seed)
    requests = []
    for index in range(num_requests):
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 0.9])), seed=int(rng.integers(0, 2**40)), logprobs=0,
            max_tokens=int(rng.integers(2, most)), repetition_penalty=float(rng.choice([1.0, 1.0, 1.0, 1.2])),
        )  # fmt: skip
        prompt = rng.integers(0, 60, rng.integers(1, 40)).tolist()
        requests.append(Request(id=f"r{index}", prompt_ids=prompt, params=params, end_ids=(3,)))
    return requests


@pytest.mark.parametrize(("shape", "seed"), [(LLAMA, 0), (QWEN, 1)])
def test_answers_are_those_of_each_request_alone(shape: Shape, seed: int, device: str) -> None:
    """Beside others, with aborts and preemptions, in steps that ran ahead and in steps that did not."""
    shape = replace(shape, num_layers=1) if device == "cpu" else shape
    requests = requests_of(seed, *((4, 9) if device == "cpu" else (30, 60)))
    rng = np.random.default_rng(seed)
    aborted = {"r1": 1, "r2": 3, "r5": 9}
    num_blocks = 7 if device == "cpu" else 16
    executor = loaded(shape, device, num_blocks=num_blocks, max_context=112)
    got = answers(engine_of(shape, executor, num_blocks=num_blocks, max_context=112), requests, aborted, rng)
    assert executor.num_rows_ahead > 0, "nothing ran ahead: the test would show nothing"
    alone = loaded(shape, device, runs_ahead=False)
    for request in requests[: 2 if device == "cpu" else None]:
        want = answers(engine_of(shape, alone), [request], {}, rng)[request.id]
        if request.id in aborted:
            assert got[request.id] == want[: len(got[request.id])] and got[request.id], request.id
        else:
            assert got[request.id] == want, request.id


def test_a_token_that_ran_ahead_of_its_block_is_moved_to_it(device: str) -> None:
    """Rows cross into new blocks while they run ahead: each such token is computed in a spare block first."""
    shape = replace(LLAMA, num_layers=1)
    params = SamplingParams(
        temperature=0.0, seed=0, logprobs=0, max_tokens=6 if device == "cpu" else 40, ignore_eos=True
    )
    requests = [Request(id=f"r{i}", prompt_ids=PROMPT[i : i + 12 + i], params=params) for i in range(3)]
    results = []
    for runs_ahead in (True, False):
        executor = loaded(shape, device, runs_ahead=runs_ahead)
        results.append(answers(engine_of(shape, executor), requests, {}, np.random.default_rng(0)))
        assert (executor.num_rows_moved > 1) == runs_ahead
    assert results[0] == results[1]


def test_a_row_that_ran_ahead_is_taken_behind_more_scores_than_rows(device: str) -> None:
    """Its logit row is then one that no step that runs ahead has."""
    shape, results = replace(LLAMA, num_layers=1), []
    sample = Logit(0, seed=5, temperature=0.8, num_top=3)
    for runs_ahead in (True, False):
        executor = loaded(shape, device, runs_ahead=runs_ahead)
        first = run(executor, make_batch([BatchRow(PROMPT[:16], 0, [3])], [sample._replace(token=15, position=16)]))
        scored = [Logit(i, target=OTHERS[i + 1], position=i + 1) for i in range(executor._limits.max_rows + 4)]
        rows = [BatchRow(OTHERS[:20], 0, [1, 2]), BatchRow(first.token_ids.tolist(), 16, [3, 4])]
        results.append(run(executor, make_batch(rows, [*scored, sample._replace(token=20, position=17)])))
        assert executor.num_rows_ahead == executor.num_rows_moved == runs_ahead
    assert bits(results[0], slice(-1, None)) == bits(results[1], slice(-1, None))


def test_more_logit_rows_than_there_is_room_for_come_in_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly the same, for the interpreter multiplies seven rows in another order than 24."""
    shape = replace(LLAMA, num_layers=1)
    scored = [Logit(i, target=PROMPT[i + 1], position=i + 1, num_top=i % 3, wanted_ids=range(i % 4)) for i in range(23)]
    batch = make_batch([BatchRow(PROMPT[:24], 0, BLOCKS)], [*scored, Logit(23, position=24, wanted_ids=[7])])
    whole = run(loaded(shape, device), batch)
    monkeypatch.setattr("jilju.backends.cuda.executor.MAX_LOGITS", 7)
    parts = run(loaded(shape, device), batch)
    for name in ("token_ids", "top_ids", "finite"):
        assert (getattr(parts, name) == getattr(whole, name)).all(), name
    for name in ("logprobs", "top_logprobs", "wanted_logprobs"):
        assert np.abs(getattr(parts, name) - getattr(whole, name)).max() < 1e-4, name


def test_a_step_is_waited_for_if_it_has_no_results(device: str) -> None:
    """Or its time would be counted as the next one's."""
    if device == "cpu":
        pytest.skip("needs a GPU, which computes while the host goes on")
    executor = loaded(LLAMA, device)
    torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second: before the step, on its stream
    executor.launch(make_batch([BatchRow(PROMPT[:20], 0, BLOCKS)]))
    assert not torch.cuda.current_stream().query()
    executor.wait()
    assert torch.cuda.current_stream().query()


def test_a_batch_that_is_not_sound_is_refused_before_it_is_queued(device: str) -> None:
    executor = loaded(LLAMA, device)
    good = make_batch([BatchRow(PROMPT[:20], 0, BLOCKS)], [Logit(19)])
    for batch, what in [
        (make_batch([BatchRow(PROMPT[:20], 0, BLOCKS[:1])], [Logit(19)]), "cover"),
        (make_batch([BatchRow(PROMPT[:20], 0, [40, 1])], [Logit(19)]), "below 40"),
        (make_batch([BatchRow(PROMPT[:2], 255, list(range(17)))], [Logit(1)]), "context"),
        (make_batch([BatchRow(PROMPT[:70], 0, BLOCKS), BatchRow(OTHERS[:70], 0, OTHER_BLOCKS)], [Logit(69)]), "tokens"),
    ]:
        with pytest.raises(ValueError, match=what):
            executor.launch(batch)
    assert run(executor, good).finite.all()
