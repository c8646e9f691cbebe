"""Install the wheel of dist/ where there is no compiler, look at what is there, and let it answer.

In a new environment in a temporary folder, with nothing but that environment on PATH: pip takes wheels only, then
check_install.py sums up what lies there, then `jilju serve` runs with the kernels of each instruction set that this CPU has.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from serving import MODEL, CheckFailed, serving

ROOT = Path(__file__).parents[1]
KERNEL_SETS = {"x86_64": ("generic", "avx2", "avx512"), "aarch64": ("generic", "neon")}
COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "cmake", "ninja", "make")
SEARCH_KERNELS = """
import sys
from jilju.backends.native.kernels import import_kernels
kernels = import_kernels()
for name in sys.argv[1:]:
    try:
        print(name, kernels.kernel_set(name))
    except Exception as error:
        print(name, error)
"""


def main() -> int:
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        print(f"dist/ holds {len(wheels)} wheels; `make wheel` leaves one there")
        return 1
    try:
        check_contents(wheels[0])
        with tempfile.TemporaryDirectory(prefix="jilju-wheel-") as folder:
            check_installed(wheels[0], Path(folder))
    except CheckFailed as error:
        print(f"FAILED: {error}")
        return 1
    return 0


def check_contents(wheel: Path) -> None:
    """A tag that other machines accept, a licence, one extension, no path of the machine that built it."""
    tag = wheel.stem.rsplit("-", 1)[1]
    if "manylinux" not in tag:
        raise CheckFailed(f"{wheel.name} is for this machine alone; auditwheel gives it a manylinux tag")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = [name for name in names if name.endswith(".so")]
        if len(modules) != 1 or not any(name.endswith("licenses/LICENSE") for name in names):
            raise CheckFailed(f"{wheel.name} holds {modules or 'no extension'}, or no LICENSE")
        code = archive.read(modules[0])
    paths = re.findall(rb"(?:/tmp|/root|/home|/work|" + re.escape(os.fsencode(ROOT)) + rb")/[\x20-\x7e]+", code)
    if paths:
        raise CheckFailed(f"{modules[0]} names {paths[0].decode()}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {modules[0].rsplit('/')[-1]} {len(code) / 1e6:.1f} MB")


def check_installed(wheel: Path, folder: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not re.match("JILJU_(?!CACHE)|PYTHON", name)}
    environment = kept | {"PATH": str(folder / "venv" / "bin")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise CheckFailed(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
        return done.stdout

    run(sys.executable, "-m", "venv", folder / "venv")
    found = [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    assert not found, f"the new environment has {found}"
    python, jilju = folder / "venv" / "bin" / "python", folder / "venv" / "bin" / "jilju"
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--only-binary", ":all:", wheel)
    print(run(python, ROOT / "scripts" / "check_install.py"), end="")
    print(run(jilju, "--version"), end="")

    usable = kernel_sets(run(python, "-c", SEARCH_KERNELS, *KERNEL_SETS[platform.machine()]))
    answers: dict[str, str] = {}
    for name in usable:
        command = [str(jilju), "serve", MODEL, "--port", "0", "--context", "1024", "--kv-memory", "256MiB"]
        with serving(command, environment | {"JILJU_ISA": name}) as server:
            client = server.wait_ready()
            answers[name] = client.ask("Hello!")
            if b"<!doctype html>" not in client.call("/").lower():
                raise CheckFailed("/ is no page")
        print(f"{name:>8}: started, answered {answers[name]!r}, ended with status 0 after SIGTERM")
    if len({answers[name] for name in usable if name != "generic"}) > 1:
        raise CheckFailed(f"instruction sets differ: {answers}")


def kernel_sets(told: str) -> list[str]:
    """The names whose kernels run here; those that the CPU lacks are in the wheel all the same."""
    usable = []
    for line in told.splitlines():
        name, _, answer = line.partition(" ")
        if answer == f"native-{name}":
            usable.append(name)
        elif "this CPU lacks it" in answer:
            print(f"{name:>8}: inside, not run: {answer}")
        else:
            raise CheckFailed(f"the wheel has no kernels for {name}: {answer}")
    return usable


if __name__ == "__main__":
    sys.exit(main())
