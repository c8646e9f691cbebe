"""The key file: several named keys, each with what it is good for.

Owns the file's form (TOML), who may read it, and the sum of all keys that are set. A refusal says what is wrong and where,
and never shows a secret. Knows nothing of calls.
"""

import os
import stat
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from jilju.config import ALL_SCOPES, KEY_NAME, ApiKey, ServeConfig, check_distinct, check_secret
from jilju.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_KEYS = 1024  # each is compared with what a call shows
MAX_QUOTA = 10**12

Quota = Annotated[int, Meta(ge=1, le=MAX_QUOTA)]


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[key]]`."""

    name: str
    key: str
    scopes: Annotated[list[str], Meta(min_length=1)] | None = None  # None: all
    tokens_per_minute: Quota | None = None
    tokens_per_day: Quota | None = None
    min_priority: Annotated[int, Meta(ge=-100, le=100)] | None = None


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Annotated[list[KeyEntry], Meta(min_length=1, max_length=MAX_KEYS)]


def keys_of(config: ServeConfig) -> tuple[ApiKey, ...]:
    """The keys of flags and file together. Raises ConfigError."""
    if config.api_key_file is None:
        return config.api_key
    keys = (*config.api_key, *read_key_file(Path(config.api_key_file)))
    check_distinct(keys, f"{config.api_key_file} and --api-key" if config.api_key else config.api_key_file)
    return keys


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys in their order. Raises ConfigError."""
    try:
        text = _read(path).decode()
        entries = msgspec.convert(tomllib.loads(text), KeyFile).key
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; allowed: a TOML file of [[key]] tables") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except msgspec.ValidationError as error:  # says where and what is allowed, and shows no value
        what, _, where = str(error).partition(" - at ")
        fields = f"; a [[key]] takes {', '.join(KeyEntry.__struct_fields__)}" if what.startswith("Object") else ""
        raise ConfigError(f"{path}: {where.strip('`').removeprefix('$.') or 'the file'}: {what}{fields}") from None
    return tuple(_key_of(entry, f"{path}: key[{index}]") for index, entry in enumerate(entries))


def _read(path: Path) -> bytes:
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is no regular file; allowed: a TOML file of [[key]] tables")
        others = 0o037 if status.st_uid == 0 else 0o077  # a file of root's may be read by a group
        if status.st_mode & others:
            raise ConfigError(
                f"{path} has mode {stat.S_IMODE(status.st_mode):o}, so that other users can read or change its secrets; "
                f"close it: chmod 600 {path}"
            )
        if status.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {status.st_size} bytes; allowed: at most {MAX_FILE_BYTES}")
        return file.read(MAX_FILE_BYTES)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe has no writer yet, perhaps never


def _key_of(entry: KeyEntry, where: str) -> ApiKey:
    if not KEY_NAME.fullmatch(entry.name):
        raise ConfigError(f"{where}: name is {entry.name[:200]!r}; allowed: 1 to 64 of A-Z a-z 0-9 _ . -")
    for scope in entry.scopes or ():
        if scope not in ALL_SCOPES:
            raise ConfigError(f"{where}: a scope is {scope[:200]!r}; allowed: {', '.join(sorted(ALL_SCOPES))}")
    key = ApiKey(
        name=entry.name,
        secret=entry.key,
        scopes=ALL_SCOPES if entry.scopes is None else ALL_SCOPES.intersection(entry.scopes),
        tokens_per_minute=entry.tokens_per_minute,
        tokens_per_day=entry.tokens_per_day,
        min_priority=entry.min_priority,
    )
    check_secret(key, where)
    return key
