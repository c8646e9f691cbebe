"""scripts/preflight: what a machine lacks is said in one line, before anything is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PREFLIGHT = Path(__file__).parents[1] / "scripts" / "preflight"
OLD_PYTHON = '[ "$1" = --version ] && echo "Python 3.10.12" && exit 0\nexit 1'
THIS_PYTHON = f'exec "{sys.executable}" "$@"'
OLD_COMPILER = '[ "$1" = --version ] && echo "g++ (GCC) 8.5.0" && exit 0\nexit 1'


def run(folder: Path, programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """The script where only these programs are found, given as lines of shell, and the few tools that it uses."""
    for name in ("sh", "uname", "head", "grep"):
        if name not in programs:
            (folder / name).symlink_to(shutil.which(name) or name)
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "CXX")}
    environment |= {"PATH": str(folder), **variables}
    shell = shutil.which("sh") or "sh"
    return subprocess.run([shell, str(PREFLIGHT)], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("programs", "variables", "words"),
    [
        ({"uname": "echo Darwin"}, {}, ["Linux", "Darwin"]),
        ({"uname": '[ "$1" = -s ] && echo Linux || echo riscv64'}, {}, ["x86-64", "AArch64", "riscv64"]),
        ({}, {}, ["Python 3.11", "not there", "PYTHON="]),
        ({"python3": OLD_PYTHON}, {}, ["Python 3.11", "Python 3.10.12", "PYTHON="]),
        ({"python3": THIS_PYTHON, "old": OLD_PYTHON}, {"PYTHON": "old"}, ["Python 3.11", "PYTHON=old", "3.10.12"]),
        ({"python3": THIS_PYTHON}, {}, ["C++20", "apt-get install g++"]),
        ({"python3": OLD_PYTHON, "python3.12": THIS_PYTHON}, {}, ["C++20"]),
        ({"python3": THIS_PYTHON, "c++": OLD_COMPILER}, {}, ["C++20", "GCC 11", "g++ (GCC) 8.5.0"]),
    ],
)
def test_a_lack_is_one_line(tmp_path, programs, variables, words):
    done = run(tmp_path, programs, **variables)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jilju: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""


def test_the_python_to_use_is_printed(tmp_path):
    done = run(tmp_path, {"python3": OLD_PYTHON, "python3.12": THIS_PYTHON, "c++": "exit 0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "python3.12")
