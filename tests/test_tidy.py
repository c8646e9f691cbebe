"""Tidy: the three rules of the house that a machine checks: import direction, module docstrings, no mutable module state."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "jilju"

LEAVES = {"errors", "clock", "config", "formats"}
PLAN = LEAVES | {"plan"}
# Who may import whom, by the first name under `jilju`. Siblings of one line never import each other.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "clock": set(),
    "config": {"errors"},
    "formats": {"errors"},
    "plan": LEAVES,
    "text": PLAN,
    "model": PLAN,
    "engine": PLAN,
    "backends": PLAN,
    "serve": PLAN | {"text", "engine"},
    "bench": PLAN | {"text", "engine"},
    "view": set(),
    "assemble": PLAN | {"text", "model", "engine", "backends", "serve", "bench", "view"},
    "llm": PLAN | {"text", "engine", "assemble"},
    "cli": PLAN | {"text", "model", "engine", "serve", "bench", "assemble", "llm"},
    "__init__": {"llm", "engine"},
    "__main__": {"cli"},
}
HEAVY = {"torch", "triton", "transformers", "pydantic"}

MODULES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(tree: ast.Module, path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in the file, wherever it stands."""
    package = ("jilju", *path.relative_to(SOURCE).parts[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = base + (node.module or "")
            found += [
                (node.lineno, f"{module}.{alias.name}" if module in ("jilju", "jilju.") else module)
                for alias in node.names
            ]
    return found


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Set | ast.ListComp | ast.SetComp):
        return True
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in {"list", "set", "deque", "defaultdict", "bytearray"}
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_module_is_tidy(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path}: open the module with what it owns and what it knows nothing of"

    part = part_of(path)
    assert part in MAY_IMPORT, f"{path}: a new part of jilju needs its line in MAY_IMPORT"
    for line, module in imports_of(tree, path):
        names = module.split(".")
        assert names[0] not in HEAVY or part == "backends", f"{path}:{line}: {names[0]} is imported outside of backends"
        if names[0] == "jilju" and len(names) > 1:
            target = names[1]
            allowed = MAY_IMPORT[part] | {part, "__version__"}
            assert target in allowed, f"{path}:{line}: {part} imports {target}; it may import {sorted(allowed)}"

    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        names = [t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)]
        if value is not None and is_mutable(value) and names != ["__all__"]:
            raise AssertionError(
                f"{path}:{node.lineno}: {names} is mutable module state; pass it as an argument or make it a tuple"
            )
    globals_ = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Global)]
    assert not globals_, f"{path}:{globals_}: `global` writes module state"


def test_no_part_is_left_over():
    parts = {part_of(p) for p in MODULES}
    assert parts <= set(MAY_IMPORT), parts - set(MAY_IMPORT)
