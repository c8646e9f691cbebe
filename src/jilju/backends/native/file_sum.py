"""File sums: the SHA-256 of a model file, computed once and remembered for as long as the file stays as it is.

Owns the list of remembered sums, a file of a private folder. A sum stands for a file by device, inode, size and both times
of change; the kernel sets the second of them with every write and nobody else can. Knows nothing of what sums are for.
"""

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Annotated, Self

import msgspec

from jilju.backends.native.private_folder import PrivateFolder

logger = logging.getLogger(__name__)

LIST_NAME = "sums.json"
MAX_LIST_BYTES = 1 << 16
MAX_SUMS = 64
# The kernel's clock ticks every 1 to 10 ms, and a file server's may differ from ours: a file changed twice within a tick
# shows one time. So a sum is remembered only of a file that has been left alone for a while.
SETTLED_NS = 2 * 10**9


class FileStamp(msgspec.Struct, frozen=True):
    device: int
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    stamp: FileStamp
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class FileChanged(OSError):
    """A file is not what it was when its stamp was taken."""


def file_sum(path: Path, stamp: FileStamp, folder: PrivateFolder) -> str:
    """SHA-256 of the file, in hex. Raises FileChanged if its stamp is another by now, OSError if it cannot be read."""
    with path.open("rb") as file:
        _check_stamp(os.fstat(file.fileno()), path, stamp)
        known = _read_list(folder)
        for entry in known:
            if entry.stamp == stamp:
                return entry.sha256
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _check_stamp(os.fstat(file.fileno()), path, stamp)
        if time.time_ns() - max(stamp.mtime_ns, stamp.ctime_ns) > SETTLED_NS:
            others = [e for e in known if (e.stamp.device, e.stamp.inode) != (stamp.device, stamp.inode)]
            _write_list(folder, [_Known(stamp, sha256), *others][:MAX_SUMS])
    return sha256


def check_unchanged(path: Path, stamp: FileStamp) -> None:
    _check_stamp(path.stat(), path, stamp)


def _check_stamp(status: os.stat_result, path: Path, stamp: FileStamp) -> None:
    if FileStamp.of(status) != stamp:
        raise FileChanged(f"{path} was changed after it was opened")


def _read_list(folder: PrivateFolder) -> list[_Known]:
    try:
        with folder.reading(LIST_NAME) as descriptor:
            return msgspec.json.decode(os.read(descriptor, MAX_LIST_BYTES), type=list[_Known])
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        logger.warning("%s is not usable and is replaced: %s", folder.path / LIST_NAME, error)
        return []


def _write_list(folder: PrivateFolder, known: list[_Known]) -> None:
    """Two processes that write at once: the last one's list stands, the other's sum is computed again some time."""
    try:
        with folder.writing(LIST_NAME) as descriptor:
            data = msgspec.json.encode(known)
            assert len(data) <= MAX_LIST_BYTES, f"{len(known)} sums take {len(data)} bytes"
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
    except OSError as error:
        logger.warning("the sum of the model file is not remembered: %s", error)
