"""Sampling buffers: words on their way to the device and back, in memory that is used again.

A buffer belongs to whoever took it until he is gone, however many are under way. Then it is last in line; work on the device is
in the stream's order, so only the host must see to it that a copy is over. Knows nothing of what the words mean.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.int32]


class Buffer:
    """int32 words on the host, pinned if the device is a GPU, and as many on the device."""

    def __init__(self, device_words: torch.Tensor):
        is_gpu = device_words.is_cuda
        self.device = device_words
        self._host = torch.empty(len(device_words), dtype=torch.int32, pin_memory=is_gpu)
        self.host: Words = self._host.numpy()
        self._copied = torch.cuda.Event() if is_gpu else None

    def upload(self, num_words: int) -> None:
        """The first words, without waiting."""
        self.device[:num_words].copy_(self._host[:num_words], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def download(self, num_words: int) -> None:
        self._host[:num_words].copy_(self.device[:num_words], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def is_copied(self) -> bool:
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


B = TypeVar("B", bound=Buffer)


class Lease(Generic[B]):
    """A buffer, until nobody holds this."""

    def __init__(self, buffer: B, line: deque[B]):
        self.buffer, self._line = buffer, line

    def __del__(self) -> None:
        self._line.append(self.buffer)


class UploadBuffers:
    """Of any size: too small a buffer makes way for a larger one. There come to be as many as are under way at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._line = deque[Buffer]()

    def take(self, num_words: int) -> Lease[Buffer]:
        """Of so many words at least; the host may write to it."""
        buffer = None
        if self._line and self._line[0].is_copied():
            buffer = self._line.popleft()
        if buffer is None or len(buffer.host) < num_words:
            size = 1 << max(num_words - 1, 1023).bit_length()
            buffer = Buffer(torch.empty(size, dtype=torch.int32, device=self._device))
        return Lease(buffer, self._line)


class ResultBuffers(Generic[B]):
    """Of one kind, to which only the device writes; more are made when those that there are do not suffice."""

    def __init__(self, made: list[B], make: Callable[[], B]):
        self._line, self._make = deque(made), make

    def take(self) -> Lease[B]:
        return Lease(self._line.popleft() if self._line else self._make(), self._line)
