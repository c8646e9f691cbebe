"""Check what a user's installation holds: every file of the package, its size, nothing heavy. Run by its own Python."""

import importlib.util
import site
import sys
from pathlib import Path

LIMIT_MB = 150
ABSENT = ("torch", "transformers", "pydantic", "triton")
SOURCE = Path(__file__).parents[1] / "src" / "jilju"
TOOLS = ("pip", "setuptools", "_distutils_hack", "pkg_resources")  # come with the environment, not with jilju


def main() -> int:
    folder = Path(site.getsitepackages()[0])
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        package = path.relative_to(folder).parts[0]
        if path.is_file() and not path.is_symlink() and path.suffix != ".pyc" and not package.startswith(TOOLS):
            sizes[package] = sizes.get(package, 0) + path.stat().st_size
    total_mb = sum(sizes.values()) / 1e6
    for package, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        print(f"{size / 1e6:8.1f} MB  {package}")
    print(f"{total_mb:8.1f} MB  in all, bytecode left out; allowed: {LIMIT_MB} MB")
    lacking = package_files(SOURCE) ^ package_files(folder / "jilju")
    print(
        f"files of the package: {len(package_files(SOURCE))}"
        + (f"; DIFFERENT: {', '.join(sorted(lacking))}" if lacking else "")
    )
    present = [name for name in ABSENT if importlib.util.find_spec(name)]
    print(
        f"absent: {', '.join(n for n in ABSENT if n not in present)}"
        + (f"; PRESENT: {', '.join(present)}" if present else "")
    )
    return int(total_mb > LIMIT_MB or bool(present or lacking))


def package_files(folder: Path) -> set[str]:
    """Modules, the pages' files, py.typed: all but bytecode and what was compiled."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in files if path.suffix != ".so"}


if __name__ == "__main__":
    sys.exit(main())
