"""The packed cache as users meet it: where it is, what is in it, and how it is emptied.

Owns the folder's default. Knows nothing of what packed weights are; that is the native backend's.
"""

from pathlib import Path

from jilju.backends.native import PackedFile, clear_packed, list_packed
from jilju.config import OFF, ServeConfig
from jilju.errors import ConfigError
from jilju.model.sources import cache_dir


def packed_folder(config: ServeConfig) -> Path | None:
    """Where packed weights are kept; None if they are not."""
    if config.packed_cache == OFF:
        return None
    return cache_dir() / "packed" if config.packed_cache is None else Path(config.packed_cache)


def kept_files(folder: Path) -> list[PackedFile]:
    """The one used last first. Raises ConfigError for a folder that cannot be used."""
    try:
        return list_packed(folder)
    except OSError as error:
        raise _unusable(folder, error) from error


def remove_kept(folder: Path) -> int:
    """Bytes that were removed; processes that use them keep them. Raises ConfigError for a folder that cannot be used."""
    try:
        return clear_packed(folder)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the packed cache {folder} cannot be used: {error}; --packed-cache names another folder")
