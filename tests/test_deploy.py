"""What is given to users to deploy with: wheel, Dockerfile, unit of systemd and their page hold nothing that jilju does not know.

`make install-check` and `make image-check` run them; here is what needs neither a build nor root.
"""

import configparser
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import msgspec
import pytest

from jilju.cli import commands
from jilju.config import SERVE_OPTIONS
from jilju.serve.context import ServeLimits
from tests.system.conftest import Server, needs_smollm2

ROOT = Path(__file__).parents[1]
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
UNIT_TEXT = (ROOT / "deploy" / "jilju.service").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
VARIABLES = {option.variable for option in SERVE_OPTIONS} | {"JILJU_MODEL", "JILJU_CACHE", "JILJU_ISA"}


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.fixture
def image(script):
    dockerfile = script("dockerfile")
    return dockerfile.described(dockerfile.last_stage(DOCKERFILE), "/bin")


@pytest.fixture
def unit():
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT_TEXT)
    return parser["Service"]


def check_command(words: list[str]) -> None:
    """That jilju takes these words: click itself reads them, and nothing runs."""
    name, command, arguments = commands.resolve_command(commands.make_context("jilju", list(words)), list(words))
    command.make_context(name, arguments)


@pytest.mark.parametrize("text", [INSTALL, UNIT_TEXT, DOCKERFILE], ids=["install.md", "jilju.service", "Dockerfile"])
def test_variables_exist(text):
    built_with = set(re.findall(r"option\((\w+)", (ROOT / "CMakeLists.txt").read_text()))
    told = set(re.findall(r"JILJU_[A-Z_]+", text))
    assert told
    assert told <= VARIABLES | built_with


def test_the_image_runs_a_command_that_there_is(image):
    assert image.entry == ["jilju"]
    check_command(image.command)


def test_the_image_is_nobodys_and_stops_well(image):
    uid, gid = map(int, image.user.split(":"))
    assert uid >= 1000 and gid >= 1000
    assert image.stop_signal == "SIGTERM"
    assert image.volumes == [image.environment["JILJU_CACHE"]]
    assert [str(port) for port in image.ports] == [image.environment["JILJU_PORT"]]
    assert f"`{image.volumes[0]}` keeps models" in INSTALL and f"user {uid}," in INSTALL
    assert f":{image.ports[0]} -v jilju:{image.volumes[0]} " in INSTALL


def test_the_context_holds_what_the_image_is_made_from(script):
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*", "what is not named stays out"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"CMakeLists.txt", "native", "pyproject.toml", "src", project["readme"], *project["license-files"]}
    copied = [rest.split()[:-1] for name, rest in script("dockerfile").last_stage(DOCKERFILE) if name == "COPY"]
    assert let_in == needed | {Path(source).parts[0] for sources in copied for source in sources}
    assert all((ROOT / name).exists() for name in let_in)


def test_instructions_are_read(script):
    dockerfile = script("dockerfile")
    text = "FROM a AS b\nRUN one\n# no\nFROM c\nrun two \\\n  # not this\n  three\nENV A=1 B=x:$A\nUSER 5:6\n"
    steps = dockerfile.last_stage(text)
    assert steps == [("RUN", "two three"), ("ENV", "A=1 B=x:$A"), ("USER", "5:6")]
    image = dockerfile.described(steps, "/bin")
    assert image.environment == {"PATH": "/bin", "A": "1", "B": "x:1"} and image.user == "5:6"
    with pytest.raises(script("serving").CheckFailed, match="SHELL"):
        dockerfile.described([("SHELL", "[]")], "/bin")


def test_the_unit_starts_a_command_that_there_is(unit):
    program, *words = shlex.split(unit["ExecStart"])
    assert Path(program).name == "jilju"
    check_command(words)
    folder = str(Path(program).parents[1])
    assert f"python3 -m venv {folder}\n" in INSTALL and f"python3 -m venv {folder} " in UNIT_TEXT
    assert unit["EnvironmentFile"].removeprefix("-") in INSTALL


def test_the_unit_leaves_time_to_drain(unit):
    limits = {field.name: field.default for field in msgspec.structs.fields(ServeLimits)}
    assert int(unit["TimeoutStopSec"]) >= limits["drain_s"] + 5
    assert int(unit["LimitNOFILE"]) > limits["connections"]
    assert unit["KillMode"] == "mixed", "the server ends its engine itself"


def test_the_unit_may_write_to_its_cache(unit):
    assert unit["Environment"] == f"JILJU_CACHE=%C/{unit['CacheDirectory']}"
    assert unit["CacheDirectoryMode"] == "0700", "others have no business with packed weights"


def test_the_systems_that_are_told_are_those_of_the_wheels():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    building, scikit = pyproject["tool"]["cibuildwheel"], pyproject["tool"]["scikit-build"]
    (name,) = {value for key, value in building.items() if key.startswith("manylinux")}
    assert f"image {name}" in INSTALL and f"glibc {name.removeprefix('manylinux_').replace('_', '.')}" in INSTALL
    assert scikit["wheel"]["py-api"] == "cp312" and "3.12 and all newer" in INSTALL


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


GOOD = {"jilju/_kernels.so": b"\0GLIBC_2.34\0", "jilju-1.dist-info/licenses/LICENSE": b"text"}


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("jilju-1-cp312-abi3-linux_x86_64.whl", GOOD, "manylinux"),
        ("jilju-1-cp312-abi3-manylinux_2_34_x86_64.whl", {**GOOD, "jilju/_kernels.so": b"\0/tmp/a/b.cpp\0"}, "/tmp/a"),
        ("jilju-1-cp312-abi3-manylinux_2_34_x86_64.whl", {"jilju/_kernels.so": b""}, "LICENSE"),
        ("jilju-1-py3-none-manylinux_2_34_x86_64.whl", {**GOOD, "jilju/more.so": b""}, "more.so"),
    ],
)
def test_a_wheel_that_is_not_for_others_is_found(script, tmp_path, name, files, words):
    with pytest.raises(script("serving").CheckFailed, match=words):
        script("check_wheel").check_contents(make_wheel(tmp_path / name, files))


def test_a_wheel_for_others_passes(script, tmp_path):
    script("check_wheel").check_contents(make_wheel(tmp_path / "jilju-1-cp312-abi3-manylinux_2_34_x86_64.whl", GOOD))


def test_kernels_that_are_missing_are_found(script):
    check_wheel = script("check_wheel")
    told = "generic native-generic\navx512 the instruction set avx512 was asked for, but this CPU lacks it (...)\n"
    assert check_wheel.kernel_sets(told) == ["generic"]
    with pytest.raises(script("serving").CheckFailed, match="avx2"):
        check_wheel.kernel_sets("avx2 the instruction set 'avx2' is unknown here; allowed: generic\n")


def health(port: int | str, key: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JILJU_PORT": str(port), "JILJU_API_KEY": key, **more}
    command = [sys.executable, str(ROOT / "deploy" / "healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@needs_smollm2
def test_health_is_readiness_with_a_key_that_may_look(tmp_path):
    server = Server("smollm2-135m", "--context", "256", "--kv-memory", "64MiB", "--api-key", "me=a-long-secret")
    port = server.url.rpartition(":")[2]
    try:
        ready, strange = health(port, "me=a-long-secret"), health(port, "you=another-secret")
        assert (ready.returncode, strange.returncode) == (0, 1)
        assert '"ready":true' in ready.stdout and "invalid_api_key" in strange.stdout
        keys = tmp_path / "keys.toml"
        keys.touch(mode=0o600)
        keys.write_text('[[key]]\nname = "page"\nkey = "a-third-secret"\nscopes = ["generate"]\n')
        blind = health(port, "", JILJU_API_KEY_FILE=str(keys))
        assert blind.returncode == 0 and "/livez" in blind.stdout
    finally:
        assert server.stop() == 0
    after = health(port, "me=a-long-secret")
    assert after.returncode == 1 and "refused" in after.stdout


def test_health_with_settings_that_are_wrong_is_one_line():
    done = health("eighty", "")
    assert done.returncode == 1 and "JILJU_PORT" in done.stdout and len(done.stdout.splitlines()) == 1
