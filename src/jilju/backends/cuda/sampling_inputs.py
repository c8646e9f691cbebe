"""Sampling inputs: what the logit rows of a batch ask for, as the words that kernels read and as what kernels it takes.

Which kernels run follows from the batch's arrays on the host, never from logits. `kernels/sampling_keys.py` says where in a
row's record each field is.
"""

from dataclasses import dataclass

import numpy as np

from jilju.backends.cuda.kernels import sampling_keys as fields
from jilju.backends.cuda.sampling_buffers import Buffer, Lease, UploadBuffers, Words
from jilju.plan import Batch, Sample

RECORD_WORDS = fields.RECORD_WORDS


@dataclass(slots=True)
class SampleInputs:
    """On the host which kernels it takes, on the device the rest."""

    num_logits: int
    num_wanted: int
    has_top: bool  # some row reports alternatives
    is_changed: bool  # some row that is sampled has a list of ids or a mask
    is_drawn: bool  # some row is sampled by chance
    is_filtered: bool  # ... by top-k or top-p
    has_masks: bool
    words: Lease[Buffer]  # a record a row, then the lists
    masks: Lease[Buffer] | None = None  # one after another; None: not there yet, or not needed


def upload(batch: Batch, buffers: UploadBuffers) -> SampleInputs:
    """All but masks."""
    sampled = batch.targets < 0
    drawn = sampled & (batch.temperatures.astype(np.float64) >= Sample.MAX_GREEDY_TEMPERATURE)
    is_drawn, is_filtered = bool(drawn.any()), False
    kinds = sampled.astype(np.int32)  # each kind is one more than what it is a case of
    if is_drawn:
        filtered = drawn & ((batch.top_ks > 0) | (batch.top_ps < 1))
        is_filtered = bool(filtered.any())
        kinds += drawn
        kinds += filtered
    has_masks = len(batch.masks) > 0 and bool((sampled & (batch.mask_rows >= 0)).any())
    is_changed = has_masks or any(
        len(ids) and bool((sampled & (starts[1:] > starts[:-1])).any())
        for ids, starts in (
            (batch.penalty_ids, batch.penalty_starts),
            (batch.bias_ids, batch.bias_starts),
            (batch.banned_ids, batch.banned_starts),
        )
    )
    parts = (batch.penalty_ids, batch.penalty_counts, batch.bias_ids, batch.biases, batch.banned_ids, batch.wanted_ids)
    num_words = batch.num_logits * RECORD_WORDS + sum(map(len, parts))
    lease = buffers.take(num_words)
    _write(batch, kinds, lease.buffer.host)
    lease.buffer.upload(num_words)
    return SampleInputs(
        num_logits=batch.num_logits,
        num_wanted=len(batch.wanted_ids),
        has_top=bool(batch.num_top.any()),
        is_changed=is_changed,
        is_drawn=is_drawn,
        is_filtered=is_filtered,
        has_masks=has_masks,
        words=lease,
    )


def upload_masks(batch: Batch, buffers: UploadBuffers) -> Lease[Buffer]:
    """Those that are filled."""
    words = batch.masks.view(np.int32).reshape(-1)
    lease = buffers.take(len(words))
    lease.buffer.host[: len(words)] = words
    lease.buffer.upload(len(words))
    return lease


def _write(batch: Batch, kinds: Words, words: Words) -> None:
    """A record a row, then its lists."""
    num_logits = batch.num_logits
    place = num_logits * RECORD_WORDS
    records = words[:place].reshape(num_logits, RECORD_WORDS)
    for field, column in (
        (fields.KIND, kinds),
        (fields.TARGET, batch.targets),
        (fields.NUM_TOP, batch.num_top),
        (fields.TEMPERATURE, batch.temperatures),
        (fields.TOP_K, batch.top_ks),
        (fields.TOP_P, batch.top_ps),
        (fields.MIN_P, batch.min_ps),
        (fields.REPETITION, batch.repetition_penalties),
        (fields.PRESENCE, batch.presence_penalties),
        (fields.FREQUENCY, batch.frequency_penalties),
    ):
        records[:, field.value] = column.view(np.int32)
    for field, wide in ((fields.SEED, batch.seeds), (fields.POSITION, batch.positions)):
        records[:, field.value : field.value + 2] = wide.view(np.int32).reshape(num_logits, 2)
    records[:, fields.MASK_ROW.value] = np.where(batch.targets < 0, batch.mask_rows, np.int32(-1))
    records[:, fields.PENALTIES.value :] = 0
    for field, starts, ids, values in (
        (fields.PENALTIES, batch.penalty_starts, batch.penalty_ids, batch.penalty_counts),
        (fields.BIASES, batch.bias_starts, batch.bias_ids, batch.biases),
        (fields.BANNED, batch.banned_starts, batch.banned_ids, None),
        (fields.WANTED, batch.wanted_starts, batch.wanted_ids, None),
    ):
        num_ids = len(ids)
        if not num_ids:
            continue
        records[:, field.value] = starts[:-1] + place
        records[:, field.value + 1] = starts[1:] + place
        words[place : place + num_ids] = ids
        place += num_ids
        if values is not None:
            records[:, field.value + 2] = num_ids
            words[place : place + num_ids] = values.view(np.int32)
            place += num_ids
    if len(batch.wanted_ids):
        records[:, fields.WANTED.value + 2] = batch.wanted_starts[:-1]
