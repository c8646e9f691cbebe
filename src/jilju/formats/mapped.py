"""A model file mapped into memory, before anything in it is believed.

Owns the refusal of what is no regular file, cannot be read or is too small to hold a head. Knows nothing of formats.
"""

import mmap
import os
import stat
from pathlib import Path

from jilju.errors import ModelFileError


def map_file(path: str, kind: str, head_bytes: int, head: str) -> tuple[mmap.mmap, os.stat_result]:
    """The file's bytes, read-only, and its status. `kind` and `head` are for the refusal of one that is none or has less than
    `head_bytes`. Raises ModelFileError."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ModelFileError(path, "path", "not a regular file", f"a readable {kind} file")
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < head_bytes:
                raise ModelFileError(path, "file size", f"{status.st_size} bytes", head)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), status
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(path, "path", reason, f"a readable {kind} file") from None
