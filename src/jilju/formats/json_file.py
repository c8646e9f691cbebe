"""JSON files of a model folder: one object, read strictly.

Owns the bound on their size and the refusal of what is no such object: a field that stands twice, numbers that JSON does not
know, bytes that are no UTF-8. Knows nothing of what the fields mean.
"""

import json
from pathlib import Path
from typing import Any

from jilju.errors import ModelFileError

MAX_CONFIG_BYTES = 16 * 1024 * 1024  # of a configuration, templates included


def read_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """The object that the file holds; None if there is no such file. Raises ModelFileError."""
    raw = read_bytes(path, max_bytes)
    return None if raw is None else parse_object(raw, file=str(path), field="text")


def read_bytes(path: Path, max_bytes: int) -> bytes | None:
    """None if there is no such file. Raises ModelFileError."""
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise ModelFileError(str(path), "path", "not a regular file", "a readable file")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(str(path), "path", reason, "a readable file") from None
    if len(raw) > max_bytes:
        raise ModelFileError(str(path), "file size", f"above {max_bytes} bytes", f"at most {max_bytes} bytes")
    return raw


def parse_object(raw: bytes, *, file: str, field: str) -> dict[str, Any]:
    """Raises ModelFileError that names the file and the field."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ModelFileError(file, field, "nested too deeply", "one JSON object") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelFileError(file, field, f"no JSON ({error})", "one JSON object") from None
    if not isinstance(value, dict):
        raise ModelFileError(file, field, f"a JSON {type(value).__name__}", "one JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:80]!r} stands there twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
