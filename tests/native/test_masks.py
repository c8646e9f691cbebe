"""Masks that are filled while the step runs: the backends sample when they are there, and not before."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from jilju.plan import Batch, batch
from tests.model.batches import BatchRow, Logit, make_batch, run
from tests.native.plans import Shape, decoder, loaded

VOCAB, NUM_LOGITS = 70, 40  # more logit rows than one tile has
PROMPT = [(7 * i + 3) % VOCAB for i in range(300)]  # more tokens than one tile has


def masked_batch() -> Batch:
    rng = np.random.default_rng(0)
    logits = []
    for i in range(NUM_LOGITS):
        bits = rng.random(96) < 0.2
        bits[i] = True
        mask = np.packbits(bits, bitorder="little").view(np.uint32)
        logits.append(Logit(7 * i, position=i, seed=i, temperature=1.0, mask=mask if i % 4 else None))
    return make_batch([BatchRow(PROMPT, 0, list(range(20)))], logits)


def unfilled(whole: Batch) -> Batch:
    return replace(whole, masks=np.zeros_like(whole.masks), masks_ready=np.zeros(1, np.int32))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_sample_waits_for_its_masks(backend: str) -> None:
    executor = loaded(*decoder(Shape(vocab=VOCAB)), backend)
    whole = masked_batch()
    expected = run(executor, whole)
    assert expected.finite.all()
    late = unfilled(whole)

    def fill() -> None:
        time.sleep(0.05)  # most often the model's part is over by then
        late.masks[:] = whole.masks
        late.masks_ready[0] = 1

    thread = threading.Thread(target=fill)
    thread.start()
    executor.launch(late)
    result = executor.wait()
    thread.join()
    np.testing.assert_array_equal(result.token_ids, expected.token_ids)
    np.testing.assert_array_equal(result.logprobs, expected.logprobs)
    assert result.finite.all()


def test_masks_that_stay_empty_end_their_rows_alone() -> None:
    executor = loaded(*decoder(Shape(vocab=VOCAB)))
    whole = masked_batch()
    empty = replace(unfilled(whole), masks_ready=np.ones(1, np.int32))
    assert run(executor, empty).finite.tolist() == [row < 0 for row in whole.mask_rows]


def test_masks_that_nobody_fills_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MASKS_WAIT_S", 0.01)
    executor = loaded(*decoder(Shape(vocab=VOCAB)), "reference")
    with pytest.raises(TimeoutError, match="not filled"):
        run(executor, unfilled(masked_batch()))
