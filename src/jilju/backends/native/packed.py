"""Packed weights: made once a model file, kept in the cache folder, mapped by every later start.

Owns the packed file: its header, its checks, how it is made and how many are kept. A file is used only if it is whole, bit
for bit what was written, and made from this very model file for this very layout; any other is made anew. It is mapped, its
pages being shared by all processes that do so, or read into huge pages of the process's own, from which kernels read faster.
Where there is no folder, or no room in it, the weights are packed into memory. Knows nothing of what packed bytes mean: packing
and sums are the kernels'.

    file     header (4096 bytes, the rest zeros) | data        little-endian
    header   magic[8] | version u32 | header bytes u32 | layout[32] | model file's SHA-256[32] | data bytes u64 | data sum u64 |
             model file's name[256] | ... | at byte 4088: sum of the 4088 bytes before it, u64
"""

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jilju.backends.native.file_sum import LIST_NAME, FileStamp, check_unchanged, file_sum
from jilju.backends.native.kernels import import_kernels
from jilju.backends.native.private_folder import PrivateFolder

logger = logging.getLogger(__name__)

MAGIC = b"jiljuPW\n"
HEADER_VERSION = 1
HEADER_BYTES = 4096  # a page, so that the data begins with one
PIECE_BYTES = 1 << 20  # summed by one thread at a time
READ_BYTES = 8 << 20  # read by one thread at a time: whole huge pages
SUFFIX = ".packed"
MAX_FILES = 4  # packed files that are kept, those used last

_HEADER = struct.Struct("<8sII32s32sQQ256s")
_SUM = struct.Struct("<Q")
_SUM_OFFSET = HEADER_BYTES - _SUM.size

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is going on
Pack = Callable[[int, np.ndarray], None]  # weight id, uint8 [num_bytes] to fill; called by several threads at once


def no_progress(done_bytes: int, total_bytes: int, text: str) -> None:
    """For callers without anyone to tell."""


class PackedEntry(NamedTuple):
    weight_id: int
    offset: int
    num_bytes: int


class PackedLayout:
    """Which weights are packed, and where they lie in one buffer of `num_bytes`.

    `digest` tells layouts apart: it covers the packer's version and the plan, as encoded.
    """

    def __init__(self, version: str, entries: Sequence[tuple[int, int, int]], plan: Sequence[bytes]):
        self.entries = tuple(PackedEntry(*entry) for entry in entries)
        self.num_bytes = max((entry.offset + entry.num_bytes for entry in self.entries), default=0)
        digest = hashlib.sha256()
        for part in (version.encode(), *plan, repr(self.entries).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        self.digest = digest.digest()


class PackedFile(NamedTuple):
    """A file of the cache folder, as shown to users."""

    name: str
    model_file: str  # that it was made from; empty if the header does not say
    num_bytes: int
    used_ns: int


class PackedCache:
    """The packed files in `folder` that belong to the model file `source`, whose `status` was taken when it was opened.

    `huge_pages`: weights are read into memory of huge pages instead of mapped.
    """

    def __init__(self, folder: Path, source: Path, status: os.stat_result, num_threads: int, huge_pages: bool = False):
        self._folder = folder
        self._source = source
        self._stamp = FileStamp.of(status)
        self._num_threads = num_threads
        self._huge_pages = huge_pages
        self._checksum: Callable[[np.ndarray, int], int] = import_kernels().checksum

    def find(self, layout: PackedLayout) -> np.ndarray | None:
        """The packed weights, uint8 [num_bytes], verified; None if there are none that can be used.

        Whoever made them had checked the values of the model file.
        """
        try:
            with PrivateFolder.open(self._folder) as folder:
                return self._find(folder, layout)
        except OSError as error:
            self._warn(error, "packed weights are not looked for")
            return None

    def make(self, layout: PackedLayout, pack: Pack, progress: Progress) -> np.ndarray:
        """Pack into a new file and load it; where that cannot be, into memory. uint8 [num_bytes]

        The caller has checked the values of the model file: who finds the packed ones does not look at them again.
        """
        try:
            with PrivateFolder.open(self._folder) as folder:
                return self._make(folder, layout, pack, progress)
        except ConnectionError:  # of whoever is told the progress
            raise
        except OSError as error:
            self._warn(error, "packed weights are kept in memory and made again at the next start")
        return pack_into_memory(layout, pack, progress, num_threads=self._num_threads)

    def _find(self, folder: PrivateFolder, layout: PackedLayout) -> np.ndarray | None:
        source_sum = file_sum(self._source, self._stamp, folder)
        name = _name_of(layout, source_sum)
        try:
            with folder.reading(name) as descriptor:
                data = self._load_verified(descriptor, layout, source_sum)
        except FileNotFoundError:
            return None
        except _Damaged as damage:
            logger.warning("%s is not used and made anew: %s", folder.path / name, damage)
            return None
        with contextlib.suppress(OSError):  # a folder that can only be read; nothing is removed from it either
            folder.mark_used(name)
        return data

    def _make(self, folder: PrivateFolder, layout: PackedLayout, pack: Pack, progress: Progress) -> np.ndarray:
        folder.remove_stale()
        source_sum = file_sum(self._source, self._stamp, folder)
        with folder.writing(_name_of(layout, source_sum)) as descriptor:
            self._write(descriptor, layout, source_sum, pack, progress)
            check_unchanged(self._source, self._stamp)
            data = self._load(descriptor, layout.num_bytes)
        _keep_few(folder)
        return data

    def _write(self, descriptor: int, layout: PackedLayout, source_sum: str, pack: Pack, progress: Progress) -> None:
        num_bytes = HEADER_BYTES + layout.num_bytes
        # Without room for every page, writing to the mapping would end the process; this says so by an error.
        os.posix_fallocate(descriptor, 0, num_bytes)
        mapping = mmap.mmap(descriptor, num_bytes)
        whole = np.frombuffer(mapping, np.uint8)
        data = whole[HEADER_BYTES:]
        _pack_all(layout, data, pack, progress, self._num_threads)
        _HEADER.pack_into(
            mapping, 0, MAGIC, HEADER_VERSION, HEADER_BYTES, layout.digest, bytes.fromhex(source_sum), layout.num_bytes,
            self._sum(data), os.fsencode(self._source.name)[:255],
        )  # fmt: skip
        _SUM.pack_into(mapping, _SUM_OFFSET, self._checksum(whole[:_SUM_OFFSET], 0))
        mapping.flush()  # an error in writing is told here

    def _load_verified(self, descriptor: int, layout: PackedLayout, source_sum: str) -> np.ndarray:
        found, wanted = os.fstat(descriptor).st_size, HEADER_BYTES + layout.num_bytes
        if found != wanted:
            raise _Damaged(f"it has {found} bytes; {wanted} were written")
        header = os.pread(descriptor, HEADER_BYTES, 0)
        if self._checksum(np.frombuffer(header, np.uint8, _SUM_OFFSET), 0) != _SUM.unpack_from(header, _SUM_OFFSET)[0]:
            raise _Damaged("the header's sum is another")
        magic, version, header_bytes, digest, sha256, num_bytes, data_sum, _ = _HEADER.unpack_from(header)
        if magic != MAGIC:
            raise _Damaged("it is no packed file")
        if (version, header_bytes) != (HEADER_VERSION, HEADER_BYTES):
            raise _Damaged(f"it is of version {version}; this is {HEADER_VERSION}")
        if (digest, sha256.hex(), num_bytes) != (layout.digest, source_sum, layout.num_bytes):
            raise _Damaged("it was made from another model file or for another layout")
        data = self._load(descriptor, layout.num_bytes)
        if self._sum(data) != data_sum:
            raise _Damaged("the data's sum is another")
        return data

    def _load(self, descriptor: int, num_bytes: int) -> np.ndarray:
        """The data of a file whose size has been checked, as kernels read it: mapped, or in huge pages. uint8 [num_bytes]"""
        if not self._huge_pages:
            mapping = mmap.mmap(descriptor, HEADER_BYTES + num_bytes, prot=mmap.PROT_READ)
            return np.frombuffer(mapping, np.uint8, num_bytes, HEADER_BYTES)
        data = _own_memory(num_bytes)

        def read(start: int) -> None:
            end = min(start + READ_BYTES, num_bytes)
            while start < end:
                count = os.preadv(descriptor, [data[start:end].data], HEADER_BYTES + start)
                if count == 0:
                    raise OSError(errno.EIO, f"it ends after {HEADER_BYTES + start} bytes")
                start += count

        with ThreadPoolExecutor(self._num_threads) as threads:
            list(threads.map(read, range(0, num_bytes, READ_BYTES)))
        data.setflags(write=False)
        return data

    def _sum(self, data: np.ndarray) -> int:
        """The sum of the sums of its pieces, each summed from its own place on, so that pieces that change places show."""
        starts = range(0, data.size, PIECE_BYTES)
        with ThreadPoolExecutor(self._num_threads) as threads:
            sums = list(threads.map(lambda start: self._checksum(data[start : start + PIECE_BYTES], start), starts))
        return self._checksum(np.array(sums, "<u8").view(np.uint8), data.size)

    def _warn(self, error: OSError, consequence: str) -> None:
        logger.warning("the cache folder %s cannot be used: %s; %s", self._folder, error, consequence)


class _Damaged(Exception):
    """Of a packed file: what is wrong with it."""


def _own_memory(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes] in huge pages where the system offers them; a page begins it, so entries keep their alignment."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def pack_into_memory(layout: PackedLayout, pack: Pack, progress: Progress, *, num_threads: int) -> np.ndarray:
    if not layout.num_bytes:
        return np.empty(0, np.uint8)
    data = _own_memory(layout.num_bytes)
    _pack_all(layout, data, pack, progress, num_threads)
    return data


def list_packed(path: Path) -> list[PackedFile]:
    """The packed files of a folder, the one used last first. Raises OSError if there is a folder that cannot be used."""
    try:
        with PrivateFolder.open(path, make=False) as folder:
            return [_shown(folder, *entry) for entry in folder.entries() if entry.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return []


def clear_packed(path: Path) -> int:
    """Remove all that this module keeps in a folder; processes that have mapped a file keep it. Returns the bytes freed."""
    try:
        with PrivateFolder.open(path, make=False) as folder:
            folder.remove_stale()
            ours = [e for e in folder.entries() if e.name.endswith(SUFFIX) or e.name == LIST_NAME]
            for entry in ours:
                folder.remove(entry.name)
            return sum(entry.num_bytes for entry in ours)
    except FileNotFoundError:
        return 0


def _shown(folder: PrivateFolder, name: str, num_bytes: int, used_ns: int) -> PackedFile:
    model_file = b""
    with contextlib.suppress(OSError), folder.reading(name) as descriptor:
        head = os.read(descriptor, _HEADER.size)
        if len(head) == _HEADER.size and head.startswith(MAGIC):
            model_file = _HEADER.unpack(head)[-1].rstrip(b"\0")
    return PackedFile(name, os.fsdecode(model_file), num_bytes, used_ns)


def _name_of(layout: PackedLayout, source_sum: str) -> str:
    return f"{source_sum[:16]}-{layout.digest.hex()[:16]}{SUFFIX}"


def _keep_few(folder: PrivateFolder) -> None:
    for entry in [entry for entry in folder.entries() if entry.name.endswith(SUFFIX)][MAX_FILES:]:
        folder.remove(entry.name)


def _pack_all(layout: PackedLayout, data: np.ndarray, pack: Pack, progress: Progress, num_threads: int) -> None:
    """Every weight, largest first, so that no thread is left with a large one at the end."""
    done = 0
    telling = threading.Lock()

    def pack_one(entry: PackedEntry) -> None:
        nonlocal done
        pack(entry.weight_id, data[entry.offset : entry.offset + entry.num_bytes])
        with telling:
            done += entry.num_bytes
            progress(done, total, "packing weights")

    total = sum(entry.num_bytes for entry in layout.entries)
    progress(0, total, "packing weights")
    with ThreadPoolExecutor(num_threads) as threads:
        futures = [threads.submit(pack_one, e) for e in sorted(layout.entries, key=lambda e: -e.num_bytes)]
        try:
            for future in futures:
                future.result()
        except BaseException:  # an interrupt too: what has not begun is not waited for
            threads.shutdown(wait=False, cancel_futures=True)
            raise
