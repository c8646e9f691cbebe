"""The sampler: a batch's logit rows to the device, ids and logprobs back, and the kernels between, without waiting.

Which kernels run follows from the batch's arrays on the host, never from logits. Knows nothing of models or steps;
`plan.ops.Sample` says what is computed, `kernels/sampling*.py` compute it.
"""

from typing import Any

import numpy as np
import torch
import triton

from jilju.backends.cuda import sampling_inputs, sampling_memory
from jilju.backends.cuda.kernels import sampling as rows
from jilju.backends.cuda.kernels import sampling_draw as draw
from jilju.backends.cuda.kernels import sampling_filters as filters
from jilju.backends.cuda.kernels import sampling_keys as fields
from jilju.backends.cuda.kernels import sampling_select as select
from jilju.backends.cuda.kernels import sampling_top as top
from jilju.backends.cuda.sampling_buffers import ResultBuffers, UploadBuffers
from jilju.backends.cuda.sampling_inputs import SampleInputs
from jilju.backends.cuda.sampling_results import Download, ResultBuffer, SampleOutputs
from jilju.plan import Batch
from jilju.plan.batch import MAX_TOP

NUM_WARPS = 8  # of a program that reads a chunk
SELECT_WARPS = 16  # of a program that selects in a list: sixteen ids for each of 512 threads, in registers
SHORT_LIST = 1024
SELECT_BLOCK = 2048  # ids of a whole row that are bisected over at once


class Sampler:
    """Samples up to `max_logits` rows a call. One thread calls, on one stream."""

    def __init__(
        self,
        vocab_size: int,
        max_logits: int,
        device: torch.device | str,
        chunk: int = sampling_memory.CHUNK,
        list_capacity: int = sampling_memory.LIST_CAPACITY,
    ):
        assert vocab_size <= fields.MAX_VOCAB, f"{vocab_size} ids; at most {fields.MAX_VOCAB}"
        self._vocab_size, self._max_logits, self._chunk = vocab_size, max_logits, chunk
        self._list_capacity = list_capacity
        self._device = torch.device(device)
        self._num_chunks = -(-vocab_size // chunk)
        self._padded_chunks = triton.next_power_of_2(self._num_chunks)
        self._by_chunk: dict[str, Any] = {"CHUNK": chunk, "num_warps": NUM_WARPS}
        self._spaces = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            for name, (shape, dtype) in sampling_memory.workspaces(vocab_size, max_logits, chunk, list_capacity).items()
        }
        self._uploads, self._mask_uploads = UploadBuffers(self._device), UploadBuffers(self._device)
        made = [ResultBuffer(words, max_logits) for words in self._spaces["results"]]
        self._results = ResultBuffers(made, lambda: ResultBuffer(torch.empty_like(made[0].device), max_logits))

    @staticmethod
    def workspace_bytes(vocab_size: int, max_logits: int) -> int:
        return sampling_memory.workspace_bytes(vocab_size, max_logits)

    def warm_up(self) -> None:
        """Compiles every kernel, so that no step has to wait for it: a row that takes them all."""
        record = np.zeros(fields.RECORD_WORDS, np.int32)
        record[[fields.KIND.value, fields.TOP_K.value, fields.NUM_TOP.value]] = fields.FILTERED.value, 1, 1
        record[fields.MASK_ROW.value] = -1
        record.view(np.float32)[[fields.TEMPERATURE.value, fields.TOP_P.value, fields.REPETITION.value]] = 1, 0.5, 1
        words = self._uploads.take(len(record))
        words.buffer.host[: len(record)] = record
        words.buffer.upload(len(record))
        inputs = SampleInputs(1, 0, True, True, True, True, False, words)
        self.sample(torch.zeros((1, self._vocab_size), device=self._device), inputs)

    # Copies.

    def upload(self, batch: Batch) -> SampleInputs:
        """All but masks that are still being filled."""
        assert batch.num_logits <= self._max_logits, f"{batch.num_logits} logit rows; at most {self._max_logits}"
        inputs = sampling_inputs.upload(batch, self._uploads)
        if inputs.has_masks and batch.masks_ready[0]:
            self.upload_masks(inputs, batch)
        return inputs

    def upload_masks(self, inputs: SampleInputs, batch: Batch) -> None:
        """Waits until they are filled. Nothing to do if there are none, or they went with the rest."""
        if inputs.has_masks and inputs.masks is None:
            batch.wait_for_masks()
            inputs.masks = sampling_inputs.upload_masks(batch, self._mask_uploads)

    def begin_download(self, outputs: SampleOutputs) -> Download:
        return Download(outputs)

    # Kernels.

    def sample(self, logits: torch.Tensor, inputs: SampleInputs) -> SampleOutputs:
        """logits float32 [num_logits, vocab], left as they are"""
        num_logits = inputs.num_logits
        assert logits.shape == (num_logits, self._vocab_size) and logits.stride(1) == 1, f"logits {logits.shape}"
        assert inputs.masks is not None or not inputs.has_masks, "masks were not uploaded"
        outputs = SampleOutputs(num_logits, inputs.num_wanted, inputs.has_top, self._results.take())
        if not num_logits:
            return outputs
        results, words, spaces, chunks = (
            outputs.lease.buffer,
            inputs.words.buffer.device,
            self._spaces,
            self._num_chunks,
        )
        stride = logits.stride(0)
        rows.scan_kernel[chunks, num_logits](
            logits, stride, spaces["keys"], spaces["sums"], spaces["lows"], spaces["work"], self._vocab_size, chunks,
            int(inputs.is_changed), **self._by_chunk,
        )  # fmt: skip
        source, source_stride = logits, stride
        if inputs.is_changed:
            source, source_stride = spaces["work"], self._vocab_size
            self._change(words, inputs)
        rows.settle_kernel[num_logits,](
            words, logits, stride, spaces["keys"], spaces["sums"], spaces["changed_keys"], spaces["lows"],
            spaces["stats"], spaces["thresholds"],
            results.token_ids, results.logprobs, results.finite, results.wanted_logprobs, chunks,
            int(inputs.is_changed), int(inputs.is_filtered),
            CHUNKS=self._padded_chunks, NUM_BINS=sampling_memory.NUM_BINS, WANTED_BLOCK=rows.MAX_WANTED_BLOCK, num_warps=1,
        )  # fmt: skip
        if inputs.is_filtered:
            self._filter(words, logits, source, source_stride, results)
        if inputs.is_drawn:
            shared = (spaces["stats"], spaces["thresholds"], results.finite, spaces["chunk_masses"])
            draw.weigh_kernel[chunks, num_logits](
                words, source, source_stride, *shared, self._vocab_size, chunks, **self._by_chunk
            )
            draw.pick_kernel[num_logits,](
                words, logits, stride, source, source_stride, *shared, results.token_ids, results.logprobs,
                self._vocab_size, chunks, CHUNKS=self._padded_chunks, **self._by_chunk,
            )  # fmt: skip
        if inputs.has_top:
            self._top(words, logits, results)
        return outputs

    def _change(self, words: torch.Tensor, inputs: SampleInputs) -> None:
        """The copy of the logits, by the rows' lists and masks; of its chunks the largest keys."""
        spaces = self._spaces
        rows.change_kernel[inputs.num_logits,](
            words, spaces["work"], self._vocab_size,
            BLOCK=rows.LIST_BLOCK, num_warps=4, enable_fp_fusion=False,  # each operation rounds by itself
        )  # fmt: skip
        masks = words if inputs.masks is None else inputs.masks.buffer.device
        rows.scan_changed_kernel[self._num_chunks, inputs.num_logits](
            words, spaces["work"], masks, spaces["changed_keys"], spaces["lows"], self._vocab_size,
            -(-self._vocab_size // 32), self._num_chunks, **self._by_chunk,
        )  # fmt: skip

    def _filter(
        self, words: torch.Tensor, logits: torch.Tensor, source: torch.Tensor, stride: int, results: ResultBuffer
    ) -> None:
        """Rows with top-k or top-p: their ids, or thresholds to draw by."""
        spaces, chunks, num_rows = self._spaces, self._num_chunks, len(logits)
        bins: dict[str, Any] = {"NUM_BINS": sampling_memory.NUM_BINS}
        given = (words, source, stride, spaces["stats"], results.finite)
        filters.count_kernel[chunks, num_rows](
            *given, spaces["bin_counts"], self._vocab_size, chunks, **bins, **self._by_chunk
        )
        filters.locate_kernel[num_rows,](
            words, spaces["stats"], results.finite, spaces["bin_counts"], spaces["spots"], spaces["places"], chunks,
            CHUNKS=self._padded_chunks, CAPACITY=self._list_capacity, num_warps=4, **bins,
        )  # fmt: skip
        filters.list_kernel[chunks, num_rows](
            *given, spaces["spots"], spaces["places"], spaces["lists"], spaces["above"], self._vocab_size, chunks,
            CAPACITY=self._list_capacity, **bins, **self._by_chunk,
        )  # fmt: skip
        select.select_kernel[num_rows,](
            words, logits, logits.stride(0), source, stride, spaces["stats"], results.finite, spaces["spots"],
            spaces["lists"], spaces["above"], spaces["thresholds"], results.token_ids, results.logprobs, self._vocab_size, chunks,
            CHUNKS=self._padded_chunks, CAPACITY=self._list_capacity, SHORT=min(SHORT_LIST, self._list_capacity),
            BLOCK=SELECT_BLOCK, num_warps=SELECT_WARPS, **bins,
        )  # fmt: skip

    def _top(self, words: torch.Tensor, logits: torch.Tensor, results: ResultBuffer) -> None:
        spaces, chunks = self._spaces, self._num_chunks
        top.top_of_chunk_kernel[chunks, len(logits)](
            words, logits, logits.stride(0), spaces["keys"], spaces["top_keys"], self._vocab_size, chunks,
            TOP=sampling_memory.TOP, CHUNKS=self._padded_chunks, **self._by_chunk,
        )  # fmt: skip
        top.merge_top_kernel[len(logits),](
            words, spaces["stats"], spaces["top_keys"], results.top_ids, results.top_logprobs, chunks, MAX_TOP=MAX_TOP,
            TOP=sampling_memory.TOP, KEYS=triton.next_power_of_2(chunks * sampling_memory.TOP), num_warps=4,
        )  # fmt: skip
