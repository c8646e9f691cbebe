"""Uploads: host arrays on the device by one copy a step, without waiting.

A ring of pinned buffers: one is written again only when the copy out of it is done. Knows nothing of what the arrays are.
"""

from collections.abc import Sequence

import numpy as np
import torch

from jilju.backends.cuda.memory import UPLOAD_ALIGNMENT, UPLOADS

TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.uint64): torch.int64,  # the same bits
    np.dtype(np.uint32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class Uploads:
    """`num_bytes` a copy at most; what was put is on the device until UPLOADS further copies."""

    def __init__(self, device: torch.device, num_bytes: int):
        self._is_gpu = device.type == "cuda"
        self._hosts = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_gpu) for _ in range(UPLOADS)]
        self._devices = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(UPLOADS)]
        self._events = [torch.cuda.Event() if self._is_gpu else None for _ in range(UPLOADS)]
        self._next = 0

    def put(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Each array on the device, in its shape and type; unsigned ones as the signed type of the same bits."""
        index, self._next = self._next, (self._next + 1) % UPLOADS
        host, device, event = self._hosts[index], self._devices[index], self._events[index]
        if event is not None:
            event.synchronize()
        bytes_ = host.numpy()
        offset, spans = 0, list[tuple[int, int]]()
        for array in arrays:
            assert offset + array.nbytes <= len(bytes_), f"{array.nbytes} bytes at {offset} of {len(bytes_)}"
            bytes_[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            spans.append((offset, offset + array.nbytes))
            offset += -(-array.nbytes // UPLOAD_ALIGNMENT) * UPLOAD_ALIGNMENT
        device[:offset].copy_(host[:offset], non_blocking=True)
        if event is not None:
            event.record()
        return [
            device[start:end].view(TORCH_TYPES[array.dtype]).view(array.shape)
            for (start, end), array in zip(spans, arrays, strict=True)
        ]
