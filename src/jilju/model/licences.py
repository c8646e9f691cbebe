"""Licences: terms that a user accepts before the first use of a model that comes under them.

Owns the table of such terms, and the record of their acceptance: a file each, with the date and how, in a folder that callers
name, so that nobody is asked twice. Knows nothing of models, of where they come from, or of terminals.
"""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from jilju.errors import ConfigError, LicenceNotAccepted

VARIABLE = "JILJU_ACCEPT_LICENCE"
FLAG = "--accept-licence"


class Licence(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # as flag and variable take it
    title: str
    url: str
    summary: str  # in our own words; the terms are what counts


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    licence: str
    title: str
    url: str
    accepted_at: str  # UTC, ISO 8601
    how: str


_LICENCES = (
    Licence(
        name="gemma",
        title="Gemma Terms of Use",
        url="https://ai.google.dev/gemma/terms",
        summary="Google's own terms, not an open-source licence: uses named in its prohibited use policy are forbidden, and who passes "
        "the model on, or offers it to others as a service, binds them to the same restrictions and gives them these terms. Google "
        "claims no rights in what the model writes.",
    ),
)
LICENCES: dict[str, Licence] = {licence.name: licence for licence in _LICENCES}


def acceptance(licence: Licence, folder: Path) -> Acceptance | None:
    """The record in `folder`; None if there is none, or none that can be read: then it is asked for once more."""
    try:
        return msgspec.json.decode(_record(licence, folder).read_bytes(), type=Acceptance)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def accept(name: str, folder: Path, how: str) -> None:
    """Record that the user accepts the terms called `name`. Raises ConfigError for an unknown name."""
    licence = _known(name, how)
    if acceptance(licence, folder) is not None:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = Acceptance(licence=name, title=licence.title, url=licence.url, accepted_at=now, how=how)
    folder.mkdir(parents=True, exist_ok=True)
    path = _record(licence, folder)
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    unfinished.replace(path)


def require(licence: Licence, folder: Path, model: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises LicenceNotAccepted unless a record is there, or JILJU_ACCEPT_LICENCE names the licence, which is recorded."""
    named = [name.strip() for name in environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in named:
        _known(name, VARIABLE)
    if licence.name in named:
        accept(licence.name, folder, VARIABLE)
    if acceptance(licence, folder) is None:
        raise LicenceNotAccepted(
            f"{model} comes under the {licence.title} ({licence.url}), which were not accepted yet on this machine; read them, then "
            f"accept them once with {FLAG} {licence.name} or {VARIABLE}={licence.name}"
        )


def _known(name: str, where: str) -> Licence:
    if name not in LICENCES:
        raise ConfigError(f"{where} is {name!r}; allowed: {', '.join(LICENCES)}")
    return LICENCES[name]


def _record(licence: Licence, folder: Path) -> Path:
    return folder / f"{licence.name}.json"
