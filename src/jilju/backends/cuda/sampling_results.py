"""Sampling results: where the kernels write ids and logprobs, and their way to the host.

Owns how the parts of a result lie. Knows nothing of kernels or of what the rows asked for, but for which parts they need.
"""

from dataclasses import dataclass

import numpy as np
import torch

from jilju.backends.cuda.sampling_buffers import Buffer, Lease
from jilju.backends.cuda.sampling_memory import result_places
from jilju.plan import StepResult
from jilju.plan.batch import MAX_TOP


class ResultBuffer(Buffer):
    """Of up to `max_logits` rows, on the device part by part. A row that is not finite has token id 0."""

    def __init__(self, device_words: torch.Tensor, max_logits: int):
        super().__init__(device_words)
        *self.places, end = result_places(max_logits)
        assert end == len(device_words), f"{len(device_words)} words for {end}"
        token_ids, logprobs, finite, top_ids, top_logprobs, wanted = (device_words[place:] for place in self.places)
        self.token_ids, self.finite, self.top_ids = token_ids, finite, top_ids  # int32, a row one, one, MAX_TOP
        self.logprobs, self.top_logprobs = logprobs.view(torch.float32), top_logprobs.view(torch.float32)
        self.wanted_logprobs = wanted.view(torch.float32)  # one after another


@dataclass(frozen=True, slots=True)
class SampleOutputs:
    """The results of a call, on the device."""

    num_logits: int
    num_wanted: int
    has_top: bool  # some row reports alternatives
    lease: Lease[ResultBuffer]


class Download:
    """Results on their way to the host."""

    def __init__(self, outputs: SampleOutputs):
        self._outputs, self._buffer = outputs, outputs.lease.buffer
        _, _, _, top_ids, _, wanted = self._buffer.places
        self._buffer.download(
            wanted + outputs.num_wanted if outputs.num_wanted else wanted if outputs.has_top else top_ids
        )

    @property
    def token_ids(self) -> torch.Tensor:
        """int32 [num_logits], on the device; for as long as this is held"""
        return self._buffer.token_ids[: self._outputs.num_logits]

    def result(self) -> StepResult:
        """Waits for the copy."""
        self._buffer.wait()
        rows, words = self._outputs.num_logits, self._buffer.host
        token_ids, logprobs, finite, top_ids, top_logprobs, wanted = self._buffer.places
        if self._outputs.has_top:
            top = [
                words[place : place + rows * MAX_TOP].reshape(rows, MAX_TOP).copy() for place in (top_ids, top_logprobs)
            ]
        else:
            top = [np.full((rows, MAX_TOP), -1, np.int32), np.zeros((rows, MAX_TOP), np.int32)]
        return StepResult(
            token_ids=words[token_ids : token_ids + rows].copy(),
            logprobs=words[logprobs : logprobs + rows].view(np.float32).copy(),
            top_ids=top[0],
            top_logprobs=top[1].view(np.float32),
            wanted_logprobs=words[wanted : wanted + self._outputs.num_wanted].view(np.float32).copy(),
            finite=words[finite : finite + rows] != 0,
        )
