"""Private folders: files that this user alone can read or write, replaced whole or not at all.

Owns how such a folder is made, checked and written to. It is reached through one descriptor and links are not followed, so
what was checked is what is used. A file is written under a temporary name that its writer holds locked; the kernel lets go
of the lock with the writer's death, which is how files of dead writers are told. Knows nothing of what is in the files.
Whatever is wrong with a folder or a file is an OSError.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

TEMPORARY = ".tmp"


class Entry(NamedTuple):
    name: str
    num_bytes: int
    used_ns: int  # when it was written or last marked as used


class PrivateFolder:
    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self._descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, *, make: bool = True) -> Iterator[Self]:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check_private(os.fstat(descriptor), str(path))
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    def entries(self) -> list[Entry]:
        """Every file under its final name, the one used last first."""
        found = []
        with os.scandir(self._descriptor) as listed:
            for file in listed:
                if file.name.endswith(TEMPORARY) or not file.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    status = file.stat(follow_symlinks=False)
                    found.append(Entry(file.name, status.st_size, status.st_mtime_ns))
        return sorted(found, key=lambda entry: -entry.used_ns)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[int]:
        """A descriptor to read the file; FileNotFoundError if there is none, PermissionError if it is not private."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe that lies there must not block
        descriptor = os.open(name, flags, dir_fd=self._descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PermissionError(errno.EPERM, "not a regular file", str(self.path / name))
            _check_private(status, str(self.path / name))
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[int]:
        """A descriptor to write and read a new file, which replaces `name` when the block ends well and else vanishes."""
        temporary, descriptor = self._new_temporary(name)
        try:
            yield descriptor
            os.fsync(descriptor)
            os.replace(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
            os.fsync(self._descriptor)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._descriptor)
            raise
        finally:
            os.close(descriptor)

    def mark_used(self, name: str) -> None:
        os.utime(name, dir_fd=self._descriptor, follow_symlinks=False)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove_stale(self) -> None:
        """Remove the temporary files of writers that died."""
        with os.scandir(self._descriptor) as listed:
            names = [file.name for file in listed if file.name.endswith(TEMPORARY)]
        for name in names:
            with contextlib.suppress(OSError):  # gone by now, or no file of ours: it is left where it is
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._descriptor)  # fmt: skip
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
                    os.unlink(name, dir_fd=self._descriptor)
                finally:
                    os.close(descriptor)

    def _new_temporary(self, name: str) -> tuple[str, int]:
        while True:
            temporary = f".{name}-{secrets.token_hex(8)}{TEMPORARY}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=self._descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else another process took it for stale before it was locked
                return temporary, descriptor
            os.close(descriptor)


def _check_private(status: os.stat_result, path: str) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"belongs to user {status.st_uid}, not to {os.geteuid()}", path)
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(errno.EPERM, f"others may use it (mode {mode:03o}); allowed: its owner alone", path)
