"""The sampler: a batch's logit rows to the device, ids and logprobs back, and the kernels between, without waiting.

Which kernels run follows from the batch's arrays on the host, never from logits. Knows nothing of models or steps;
`plan.ops.Sample` says what is computed, `kernels/sampling*.py` compute it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from jilju.backends.cuda import sampling_memory
from jilju.backends.cuda.kernels import sampling as rows
from jilju.backends.cuda.kernels import sampling_draw as draw
from jilju.backends.cuda.kernels import sampling_filters as filters
from jilju.backends.cuda.kernels import sampling_keys as fields
from jilju.backends.cuda.kernels import sampling_top as top
from jilju.plan import Batch, Sample, StepResult
from jilju.plan.batch import MAX_TOP

Words = npt.NDArray[np.int32]

NUM_WARPS = 8  # of a program that reads a chunk
SELECT_BLOCK = 2048  # ids that are bisected over at once: eight for each of 256 threads


@dataclass(slots=True)
class SampleInputs:
    """What the logit rows of a batch ask for: on the host which kernels it takes, on the device the rest."""

    num_logits: int
    num_wanted: int
    has_top: bool  # some row reports alternatives
    is_changed: bool  # some row that is sampled has a list of ids or a mask
    is_drawn: bool  # some row is sampled by chance
    is_filtered: bool  # ... by top-k or top-p
    has_masks: bool
    words: torch.Tensor  # int32: a record a row, then the lists
    masks: torch.Tensor | None = None  # int32 [num_masks, words of a mask]; None: not there yet, or not needed


@dataclass(frozen=True, slots=True)
class SampleOutputs:
    """On the device, each a part of `words`, from a multiple of 16 bytes on. A row that is not finite has token id 0."""

    words: torch.Tensor  # int32
    sizes: tuple[int, ...]  # words of the parts, in the order in which they lie and stand here
    token_ids: torch.Tensor  # int32 [num_logits]
    logprobs: torch.Tensor  # float32 [num_logits]
    finite: torch.Tensor  # int32 [num_logits]
    wanted_logprobs: torch.Tensor  # float32 [num_wanted]
    top_ids: torch.Tensor  # int32 [num_logits, MAX_TOP]; [0, MAX_TOP] if no row reports any
    top_logprobs: torch.Tensor  # float32 [num_logits, MAX_TOP]


def _host_words(num_words: int, device: torch.device) -> torch.Tensor:
    """int32, pinned if the device is a GPU; torch gives such memory out again only when the copies that it saw are done."""
    return torch.empty(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")


class Download:
    """Results on their way to the host."""

    def __init__(self, outputs: SampleOutputs):
        self._outputs = outputs
        self._host = _host_words(len(outputs.words), outputs.words.device)
        self._host.copy_(outputs.words, non_blocking=True)
        self._done = torch.cuda.Event() if outputs.words.is_cuda else None
        if self._done is not None:
            self._done.record()

    @property
    def token_ids(self) -> torch.Tensor:
        """int32 [num_logits], on the device"""
        return self._outputs.token_ids

    def result(self) -> StepResult:
        """Waits for the copy."""
        if self._done is not None:
            self._done.synchronize()
        words: Words = self._host.numpy()
        parts, place = list[Words](), 0
        for size in self._outputs.sizes:
            parts.append(words[place : place + size])
            place += _padded(size)
        token_ids, logprobs, finite, wanted, top_ids, top_logprobs = parts
        shape = (len(token_ids), MAX_TOP)
        if not len(top_ids):
            top_ids, top_logprobs = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        return StepResult(
            token_ids=token_ids,
            logprobs=logprobs.view(np.float32),
            top_ids=top_ids.reshape(shape),
            top_logprobs=top_logprobs.view(np.float32).reshape(shape),
            wanted_logprobs=wanted.view(np.float32),
            finite=finite != 0,
        )


def _padded(num_words: int) -> int:
    """Parts begin where kernels expect them to: what they are compiled for must not change with the number of rows."""
    return -(-num_words // 4) * 4


def _pairs(ids: Words, values: np.ndarray) -> Words:
    return np.stack([ids, values.view(np.int32)], axis=1).reshape(-1)


def _records(batch: Batch, kinds: Words) -> list[Words]:
    """The words that are uploaded: a record a row, then its lists."""
    num_logits = batch.num_logits
    records = np.zeros((num_logits, fields.RECORD_WORDS), np.int32)
    parts = [records.reshape(-1)]
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
        (fields.MASK_ROW, np.where(batch.targets < 0, batch.mask_rows, np.int32(-1))),
    ):
        records[:, field.value] = column.view(np.int32)
    for field, wide in ((fields.SEED, batch.seeds), (fields.POSITION, batch.positions)):
        records[:, field.value : field.value + 2] = wide.view(np.int32).reshape(num_logits, 2)
    place = records.size
    for field, starts, words, width in (
        (fields.PENALTIES, batch.penalty_starts, _pairs(batch.penalty_ids, batch.penalty_counts), 2),
        (fields.BIASES, batch.bias_starts, _pairs(batch.bias_ids, batch.biases), 2),
        (fields.BANNED, batch.banned_starts, batch.banned_ids, 1),
        (fields.WANTED, batch.wanted_starts, batch.wanted_ids, 1),
    ):
        records[:, field.value] = place + width * starts[:-1]
        records[:, field.value + 1] = place + width * starts[1:]
        place += len(words)
        parts.append(words)
    records[:, fields.WANTED.value + 2] = batch.wanted_starts[:-1]
    return parts


class Sampler:
    """Samples up to `max_logits` rows a call. One thread calls, on one stream."""

    def __init__(
        self, vocab_size: int, max_logits: int, device: torch.device | str, chunk: int = sampling_memory.CHUNK
    ):
        assert vocab_size <= fields.MAX_VOCAB, f"{vocab_size} ids; at most {fields.MAX_VOCAB}"
        self._vocab_size, self._max_logits, self._chunk = vocab_size, max_logits, chunk
        self._device = torch.device(device)
        self._num_chunks = -(-vocab_size // chunk)
        self._spaces = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            for name, (shape, dtype) in sampling_memory.workspaces(vocab_size, max_logits, chunk).items()
        }

    @staticmethod
    def workspace_bytes(vocab_size: int, max_logits: int) -> int:
        return sampling_memory.workspace_bytes(vocab_size, max_logits)

    def warm_up(self) -> None:
        """Compiles every kernel, so that no step has to wait for it: a row that takes them all."""
        record = np.zeros(fields.RECORD_WORDS, np.int32)
        record[[fields.KIND.value, fields.TOP_K.value, fields.NUM_TOP.value]] = fields.FILTERED.value, 1, 1
        record[fields.MASK_ROW.value] = -1
        record.view(np.float32)[[fields.TEMPERATURE.value, fields.TOP_P.value, fields.REPETITION.value]] = 1, 0.5, 1
        inputs = SampleInputs(1, 0, True, True, True, True, False, self._put([record]))
        self.sample(torch.zeros((1, self._vocab_size), device=self._device), inputs)

    # Copies.

    def upload(self, batch: Batch) -> SampleInputs:
        """All but masks that are still being filled."""
        assert batch.num_logits <= self._max_logits, f"{batch.num_logits} logit rows; at most {self._max_logits}"
        sampled = batch.targets < 0
        drawn = sampled & (batch.temperatures.astype(np.float64) >= Sample.MAX_GREEDY_TEMPERATURE)
        filtered = drawn & ((batch.top_ks > 0) | (batch.top_ps < 1))
        kinds = sampled.astype(np.int32) + drawn + filtered  # each kind is one more than what it is a case of
        has_masks = bool((sampled & (batch.mask_rows >= 0)).any())
        num_listed = sum(
            starts[1:] - starts[:-1] for starts in (batch.penalty_starts, batch.bias_starts, batch.banned_starts)
        )
        inputs = SampleInputs(
            num_logits=batch.num_logits,
            num_wanted=len(batch.wanted_ids),
            has_top=bool((batch.num_top > 0).any()),
            is_changed=has_masks or bool((sampled & (num_listed > 0)).any()),
            is_drawn=bool(drawn.any()),
            is_filtered=bool(filtered.any()),
            has_masks=has_masks,
            words=self._put(_records(batch, kinds)),
        )
        if has_masks and batch.masks_ready[0]:
            self.upload_masks(inputs, batch)
        return inputs

    def upload_masks(self, inputs: SampleInputs, batch: Batch) -> None:
        """Waits until they are filled. Nothing to do if there are none, or they went with the rest."""
        if inputs.has_masks and inputs.masks is None:
            batch.wait_for_masks()
            inputs.masks = self._put([batch.masks.view(np.int32).reshape(-1)]).view(batch.masks.shape)

    def begin_download(self, outputs: SampleOutputs) -> Download:
        return Download(outputs)

    def _put(self, parts: list[Words]) -> torch.Tensor:
        num_words = sum(len(part) for part in parts)
        host = _host_words(num_words, self._device)
        np.concatenate(parts, out=host.numpy())
        return host.to(self._device, non_blocking=True)

    # Kernels.

    def sample(self, logits: torch.Tensor, inputs: SampleInputs) -> SampleOutputs:
        """logits float32 [num_logits, vocab], left as they are"""
        num_logits = inputs.num_logits
        assert logits.shape == (num_logits, self._vocab_size) and logits.stride(1) == 1, f"logits {logits.shape}"
        assert inputs.masks is not None or not inputs.has_masks, "masks were not uploaded"
        outputs = self._outputs(inputs)
        if not num_logits:
            return outputs
        spaces, chunks = self._spaces, self._num_chunks
        grid, padded_chunks = (chunks, num_logits), triton.next_power_of_2(chunks)
        by_chunk: dict[str, Any] = {"CHUNK": self._chunk, "num_warps": NUM_WARPS}
        rows.scan_kernel[grid](
            logits, logits.stride(0), spaces["keys"], spaces["sums"], spaces["lows"], spaces["work"], self._vocab_size, chunks,
            int(inputs.is_changed), **by_chunk,
        )  # fmt: skip
        source = logits
        if inputs.is_changed:
            source = spaces["work"]
            self._change(inputs, grid, by_chunk)
        rows.settle_kernel[(num_logits,)](
            inputs.words, logits, logits.stride(0), spaces["keys"], spaces["sums"], spaces["changed_keys"], spaces["lows"],
            spaces["stats"], spaces["bin_counts"], spaces["bin_masses"], spaces["list_counts"], spaces["thresholds"],
            outputs.token_ids, outputs.logprobs, outputs.finite, outputs.wanted_logprobs, chunks,
            int(inputs.is_changed), int(inputs.is_filtered),
            CHUNKS=padded_chunks, NUM_BINS=sampling_memory.NUM_BINS, WANTED_BLOCK=rows.MAX_WANTED_BLOCK, num_warps=1,
        )  # fmt: skip
        if inputs.is_filtered:
            self._filter(inputs, source, outputs, grid, by_chunk)
        if inputs.is_drawn:
            shared = (spaces["stats"], spaces["thresholds"], outputs.finite, spaces["chunk_masses"])
            draw.weigh_kernel[grid](
                inputs.words, source, source.stride(0), *shared, self._vocab_size, chunks, **by_chunk
            )
            draw.pick_kernel[(num_logits,)](
                inputs.words, logits, logits.stride(0), source, source.stride(0), *shared, outputs.token_ids, outputs.logprobs,
                self._vocab_size, chunks, CHUNKS=padded_chunks, **by_chunk,
            )  # fmt: skip
        if inputs.has_top:
            self._top(inputs, logits, outputs, grid, by_chunk)
        return outputs

    def _change(self, inputs: SampleInputs, grid: tuple[int, int], by_chunk: dict[str, Any]) -> None:
        """The copy of the logits, by the rows' lists and masks; of its chunks the largest keys."""
        spaces = self._spaces
        rows.change_kernel[(inputs.num_logits,)](
            inputs.words, spaces["work"], self._vocab_size,
            BLOCK=rows.LIST_BLOCK, num_warps=4, enable_fp_fusion=False,  # each operation rounds by itself
        )  # fmt: skip
        masks = inputs.words if inputs.masks is None else inputs.masks
        rows.scan_changed_kernel[grid](
            inputs.words, spaces["work"], masks, spaces["changed_keys"], spaces["lows"], self._vocab_size,
            -(-self._vocab_size // 32), self._num_chunks, **by_chunk,
        )  # fmt: skip

    def _filter(
        self,
        inputs: SampleInputs,
        source: torch.Tensor,
        outputs: SampleOutputs,
        grid: tuple[int, int],
        by_chunk: dict[str, Any],
    ) -> None:
        """The thresholds of rows with top-k or top-p."""
        spaces, num_bins, vocab = self._spaces, sampling_memory.NUM_BINS, self._vocab_size
        capacity, num_rows = sampling_memory.LIST_CAPACITY, (inputs.num_logits,)
        bins = (spaces["bin_counts"], spaces["bin_masses"])
        given = (inputs.words, source, source.stride(0), spaces["stats"], outputs.finite)
        filters.count_kernel[grid](*given, *bins, vocab, NUM_BINS=num_bins, **by_chunk)
        filters.locate_kernel[num_rows](
            inputs.words, outputs.finite, *bins, spaces["spots"], NUM_BINS=num_bins, num_warps=4
        )
        lists = (spaces["spots"], spaces["lists"], spaces["list_counts"])
        filters.list_kernel[grid](*given, *lists, vocab, CAPACITY=capacity, NUM_BINS=num_bins, **by_chunk)
        filters.select_kernel[num_rows](
            *given,
            *bins,
            *lists,
            spaces["thresholds"],
            vocab,
            CAPACITY=capacity,
            NUM_BINS=num_bins,
            BLOCK=SELECT_BLOCK,
            num_warps=NUM_WARPS,
        )

    def _top(
        self,
        inputs: SampleInputs,
        logits: torch.Tensor,
        outputs: SampleOutputs,
        grid: tuple[int, int],
        by_chunk: dict[str, Any],
    ) -> None:
        spaces, chunks = self._spaces, self._num_chunks
        top.top_of_chunk_kernel[grid](
            inputs.words, logits, logits.stride(0), spaces["keys"], spaces["top_keys"], self._vocab_size, chunks,
            TOP=sampling_memory.TOP, CHUNKS=triton.next_power_of_2(chunks), **by_chunk,
        )  # fmt: skip
        top.merge_top_kernel[(inputs.num_logits,)](
            inputs.words, spaces["stats"], spaces["top_keys"], outputs.top_ids, outputs.top_logprobs, chunks, MAX_TOP=MAX_TOP,
            TOP=sampling_memory.TOP, KEYS=triton.next_power_of_2(chunks * sampling_memory.TOP), num_warps=4,
        )  # fmt: skip

    def _outputs(self, inputs: SampleInputs) -> SampleOutputs:
        num_logits, num_wanted = inputs.num_logits, inputs.num_wanted
        num_top = num_logits * MAX_TOP if inputs.has_top else 0
        sizes = (num_logits, num_logits, num_logits, num_wanted, num_top, num_top)
        words = torch.empty(sum(map(_padded, sizes)), dtype=torch.int32, device=self._device)
        parts = (part[:size] for part, size in zip(words.split([_padded(size) for size in sizes]), sizes, strict=True))
        token_ids, logprobs, finite, wanted, top_ids, top_logprobs = parts
        shape = (-1, MAX_TOP)
        return SampleOutputs(
            words=words,
            sizes=sizes,
            token_ids=token_ids,
            logprobs=logprobs.view(torch.float32),
            finite=finite,
            wanted_logprobs=wanted.view(torch.float32),
            top_ids=top_ids.view(shape),
            top_logprobs=top_logprobs.view(torch.float32).view(shape),
        )
