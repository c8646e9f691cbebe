"""The ring of uploads: what is put arrives as it was, and stays for as long as it may be read, however far the host is ahead."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from jilju.backends.cuda.memory import UPLOAD_ALIGNMENT, UPLOADS
from jilju.backends.cuda.uploads import Uploads

NUM_BYTES = 4096
TYPES = (np.int32, np.int64, np.uint32, np.uint64, np.float32)


def arrays_of(seed):
    rng = np.random.default_rng(seed)
    shapes = [(5,), (3, 7), (0,), (1,), (2, 3)]
    return [rng.integers(0, 100, shape).astype(type_) for shape, type_ in zip(shapes, TYPES, strict=True)]


def test_arrays_arrive_as_they_were(device):
    given = arrays_of(0)
    given[0] = np.arange(10, dtype=np.int32)[::2]  # not in one piece
    for array, tensor in zip(given, Uploads(torch.device(device), NUM_BYTES).put(given), strict=True):
        assert tensor.data_ptr() % UPLOAD_ALIGNMENT == 0 and tensor.shape == array.shape
        assert (tensor.cpu().numpy().view(array.dtype) == array).all()


def test_what_was_put_stays_until_the_ring_is_round(device):
    uploads = Uploads(torch.device(device), NUM_BYTES)
    kept = []
    if device == "cuda":
        torch.cuda._sleep(50_000_000)  # cycles: the host goes round before the first copy begins
    for seed in range(3 * UPLOADS):
        kept.append(uploads.put(arrays_of(seed)))
        if seed >= UPLOADS - 1:  # the oldest, read on the device as late as it may be
            first = seed - UPLOADS + 1
            kept[first] = [tensor.clone() for tensor in kept[first]]
    for seed, tensors in enumerate(kept):
        for array, tensor in zip(arrays_of(seed), tensors, strict=True):
            assert (tensor.cpu().numpy().view(array.dtype) == array).all(), seed


def test_too_much_at_once_is_refused(device):
    with pytest.raises(AssertionError, match="of 4096"):
        Uploads(torch.device(device), NUM_BYTES).put([np.zeros(NUM_BYTES // 4 + 1, np.int32)])
