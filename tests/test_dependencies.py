"""What comes with jilju: licences that may be passed on, nothing heavy in a running server, a core that needs no compiler."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.system.conftest import Server, needs_smollm2

ROOT = Path(__file__).parents[1]
PERMISSIVE = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "BSD", "0BSD", "Apache-2.0", "Zlib", "CC0-1.0", "PSF-2.0"}
ALSO = {"tqdm": {"MPL-2.0"}}  # through huggingface-hub; its MPL files are used as they are, never changed
CLASSIFIERS = {"MIT License": "MIT", "Apache Software License": "Apache-2.0", "BSD License": "BSD"}
HEAVY = {"torch", "transformers", "pydantic", "triton"}


def installed_with_jilju() -> dict[str, metadata.Distribution]:
    """What pyproject names, and what that pulls in, by name."""
    todo = [Requirement(r) for r in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    found: dict[str, metadata.Distribution] = {}
    while todo:
        name = canonicalize_name(todo.pop().name)
        if name not in found:
            found[name] = metadata.distribution(name)
            wanted = [Requirement(text) for text in found[name].requires or []]
            todo += [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def licences(distribution: metadata.Distribution) -> set[str]:
    """SPDX names: of the licence expression, else of the licence field, else of the classifiers."""
    fields = distribution.metadata
    told = fields.get("License-Expression") or fields.get("License") or ""
    names = {word for word in re.split(r"\s+(?:AND|OR)\s+|[()]", told.removesuffix(" License")) if word}
    classifiers = [c.rpartition(" :: ")[2] for c in fields.get_all("Classifier") or [] if c.startswith("License ::")]
    return names or {CLASSIFIERS.get(c, c) for c in classifiers}


INSTALLED = installed_with_jilju()


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_a_licence_may_be_passed_on(name):
    told = licences(INSTALLED[name])
    assert told, f"{name} names no licence"
    allowed = PERMISSIVE | ALSO.get(name, set())
    assert told <= allowed, f"{name}: {sorted(told - allowed)} is on no list; a new dependency needs a decision record"


def test_nothing_heavy_is_required():
    assert not HEAVY & set(INSTALLED)


@needs_smollm2
def test_a_running_server_has_imported_nothing_heavy(monkeypatch):
    """Both processes, from start to a first answer: Python itself lists what each of them imports."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    server = Server("smollm2-135m", "--context", "256", "--kv-memory", "64MiB")
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    try:
        httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).raise_for_status()
    finally:
        server.stop()
    imported = [line.rpartition("|")[2].strip() for line in server.log if line.startswith("import time:")]
    assert imported.count("jilju.engine.loop") == 2, "the server and its engine"
    assert not {name.partition(".")[0] for name in imported} & HEAVY


WITHOUT_EXTENSION = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.endswith("._kernels"):
            raise ImportError(f"no {name}")

sys.meta_path.insert(0, Absent())
from jilju.assemble.engine import EngineOptions, build_engine, make_executor
from jilju.engine.request import Request, SamplingParams
from jilju.errors import PlatformError

options = EngineOptions(path=sys.argv[1], num_blocks=8, max_context=64, max_rows=2, step_tokens=16, num_threads=1, backend="reference")
engine = build_engine(options)
engine.submit(Request(id="a", prompt_ids=[1, 2, 3], params=SamplingParams(temperature=0.0, max_tokens=3, seed=0)))
num_tokens = 0
while engine.has_work():
    num_tokens += len(engine.step())
print(num_tokens)
try:
    make_executor("native")
except PlatformError as error:
    print(error.message)
"""


def test_the_reference_backend_needs_no_extension():
    model = ROOT / "tests" / "golden" / "model" / "llama-tied.gguf"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION, str(model)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    num_tokens, refusal = done.stdout.splitlines()
    assert num_tokens == "3"
    assert "extension is missing" in refusal and "reference backend" in refusal


def test_an_installation_that_lacks_a_file_of_the_pages_is_found(tmp_path, monkeypatch, capsys):
    check_install = runpy.run_path(str(ROOT / "scripts" / "check_install.py"))
    shutil.copytree(ROOT / "src" / "jilju", tmp_path / "jilju", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setitem(check_install["main"].__globals__, "ABSENT", ("no_such_module",))
    assert check_install["main"]() == 0
    (tmp_path / "jilju" / "view" / "chat" / "chat.js").unlink()
    assert check_install["main"]() == 1
    assert "view/chat/chat.js" in capsys.readouterr().out
