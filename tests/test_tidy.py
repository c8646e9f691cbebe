"""Tidy: the rules of the house that a machine checks: import direction, module docstrings, no mutable module state."""

import ast
import importlib
import importlib.util
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
    "account": PLAN | {"engine"},  # folds over its log
    "serve": PLAN | {"text", "engine", "account"},
    "bench": PLAN | {"text", "engine"},
    "view": set(),
    "simulation": PLAN | {"text", "engine", "serve"},  # whose ledger and drain it runs
    "assemble": PLAN | {"text", "model", "engine", "backends", "account", "serve", "bench", "view", "simulation"},
    "llm": PLAN | {"text", "engine", "assemble"},
    "terminal": {"errors", "model"},
    "cli_bench": PLAN | {"text", "model", "engine", "bench", "assemble", "llm", "terminal"},
    "cli_simulate": {"config", "errors", "simulation", "assemble"},
    "cli_trace": {"errors", "account"},
    "cli_view": {"account", "serve", "view"},
    "cli": PLAN
    | {
        "text",
        "model",
        "engine",
        "serve",
        "assemble",
        "llm",
        "terminal",
        "cli_bench",
        "cli_simulate",
        "cli_trace",
        "cli_view",
    },
    "__init__": {"llm", "engine"},
    "__main__": {"cli"},
}
HEAVY = {"torch", "triton", "transformers", "pydantic"}
OPTIONAL = "opentelemetry"  # imported in one place, which is imported where it is wanted

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
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            found += [(node.lineno, f"{module}.{alias.name}" if module == "jilju" else module) for alias in node.names]
    return found


MUTABLE_TYPES = {
    "list",
    "dict",
    "set",
    "bytearray",
    "deque",
    "defaultdict",
    "OrderedDict",
    "Counter",
    "count",
    "local",
    "ContextVar",
}
CACHES = {"cache", "lru_cache"}  # of a function: module state by another name
WRITERS = {"append", "add", "update", "setdefault", "extend", "insert", "pop", "popitem", "remove", "discard", "clear"}


def last_name(node: ast.expr) -> str:
    """`deque` of deque, collections.deque and deque(...)."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_mutable(value: ast.expr) -> bool:
    """A filled dict is taken for a table; that nobody writes to it is looked at besides."""
    if isinstance(value, ast.List | ast.Set | ast.ListComp | ast.SetComp):
        return True
    if isinstance(value, ast.Dict):
        return not value.keys
    return isinstance(value, ast.Call) and last_name(value) in MUTABLE_TYPES


def module_state(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, what) of everything in a module that can change while it runs."""
    found, names = [], set()
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        targets = [t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)]
        names |= set(targets) if value is not None else set()
        if value is not None and is_mutable(value) and targets != ["__all__"]:
            found.append((node.lineno, f"{targets} is mutable"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append((node.lineno, f"global {', '.join(node.names)}"))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [
                (node.lineno, f"{node.name} keeps results") for d in node.decorator_list if last_name(d) in CACHES
            ]
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and last_name(node.value) in names:
            found.append((node.lineno, f"{ast.unparse(node)} is written"))
        elif isinstance(node, ast.Attribute) and node.attr in WRITERS and last_name(node.value) in names:
            found.append((node.lineno, f"{ast.unparse(node)} writes"))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_module_is_tidy(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path}: open the module with what it owns and what it knows nothing of"

    part = part_of(path)
    assert part in MAY_IMPORT, f"{path}: a new part of jilju needs its line in MAY_IMPORT"
    for line, module in imports_of(tree, path):
        names = module.split(".")
        assert names[0] not in HEAVY or part == "backends", f"{path}:{line}: {names[0]} is imported outside of backends"
        assert names[0] != OPTIONAL or path.parent == SOURCE / "serve" / "otel", (
            f"{path}:{line}: {OPTIONAL} is an extra"
        )
        if names[0] == "jilju" and len(names) > 1:
            target = names[1]
            allowed = MAY_IMPORT[part] | {part, "__version__"}
            assert target in allowed, f"{path}:{line}: {part} imports {target}; it may import {sorted(allowed)}"

    state = module_state(tree)
    assert not state, f"{path}: {state}: mutable module state; pass it as an argument or make it a tuple"


@pytest.mark.parametrize(
    "code",
    [
        "SEEN = []",
        "SEEN: set[str] = set()",
        "SEEN = {}",
        "SEEN: dict[str, int] = dict()",
        "import collections\nSEEN = collections.deque()",
        "NUM = 0\ndef f():\n    global NUM\n    NUM += 1",
        "TABLE = {1: 2}\ndef f():\n    TABLE[3] = 4",
        "TABLE = {1: 2}\ndef f():\n    del TABLE[1]",
        "TABLE = {1: 2}\ndef f():\n    TABLE.update(a=1)",
        "import functools\n@functools.cache\ndef f(): ...",
        "from functools import lru_cache\n@lru_cache(maxsize=8)\ndef f(): ...",
    ],
)
def test_module_state_is_found(code):
    assert module_state(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "TABLE = {1: 2}\ndef f(x):\n    return TABLE[x]",
        "__all__ = ['a']",
        "NAMES = ('a', 'b')",
        "def f():\n    seen = []\n    seen.append(1)",
        "class A:\n    def f(self):\n        self.seen = []",
    ],
)
def test_what_does_not_change_is_no_state(code):
    assert not module_state(ast.parse(code))


@pytest.mark.parametrize(
    ("code", "module"),
    [
        ("import jilju.serve.app", "jilju.serve.app"),
        ("from jilju import serve", "jilju.serve"),
        ("from jilju.serve import app", "jilju.serve"),
        ("from ..serve import app", "jilju.serve"),
        ("from .. import serve", "jilju.serve"),
        ("def f():\n    from jilju.serve.app import create_app", "jilju.serve.app"),
    ],
)
def test_imports_are_found_however_they_are_written(code, module):
    assert module in {found for _, found in imports_of(ast.parse(code), SOURCE / "engine" / "loop.py")}


def test_no_part_is_left_over():
    parts = {part_of(p) for p in MODULES}
    assert parts <= set(MAY_IMPORT), parts - set(MAY_IMPORT)


def has_name(module: str, name: str) -> bool:
    """Whether it may be imported from it. A module that needs a heavy library, where there is none, is read instead of imported."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
    except ModuleNotFoundError as error:
        if error.name not in HEAVY:
            raise
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        return name in top_level_names(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return importlib.util.find_spec(f"{module}.{name}") is not None


def top_level_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        names |= {alias.asname or alias.name for alias in getattr(node, "names", [])}
        names |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    return names


OUTSIDE = [
    path for folder in ("benchmarks", "deploy", "scripts") for path in (SOURCE.parents[1] / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(SOURCE.parents[1])))
def test_what_is_outside_imports_what_there_is(path):
    """Nobody runs all of it in the suite, so a module that has moved would be missed by its users first."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("jilju"):
            continue
        for alias in node.names:
            assert has_name(node.module, alias.name), f"{path}:{node.lineno}: {node.module} has no {alias.name}"
