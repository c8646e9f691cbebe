"""Documents against code: tables of fields, errors and flags hold every name that the code has, and no other; links, commands
and make targets exist.
"""

import re
from pathlib import Path

import msgspec
import pytest

from jilju.cli import commands
from jilju.config import SERVE_OPTIONS, ServeConfig
from jilju.errors import JiljuError, StartupError
from jilju.formats.ggml import GgmlType
from jilju.model.sources import MODELS
from jilju.model.spec import FAMILIES
from jilju.serve.chat.api import CHAT
from jilju.serve.chat.messages import MESSAGE, PART
from jilju.serve.openai_completions import COMPLETION
from jilju.serve.sampling import STREAM_OPTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def section(name: str, heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    text = (DOCS / name).read_text(encoding="utf-8")
    assert f"\n{heading}\n" in text, f"{name} has no heading {heading}"
    level = heading.split()[0]
    return re.split(rf"\n#{{1,{len(level)}}} ", text.partition(f"\n{heading}\n")[2])[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, without the heads."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    rulers = {index for index, cells in enumerate(lines) if set("".join(cells)) == {"-"}}
    return [cells for index, cells in enumerate(lines) if not {index, index + 1} & rulers]


def names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def test_used_fields():
    used = {"chat": set(), "completions": set()}
    for cell in (row[0] for row in rows(section("api.md", "### Used"))):
        if "(T)" not in cell:
            used["chat"] |= names(cell)
        if "(C)" not in cell:
            used["completions"] |= names(cell)
    assert used["chat"] == CHAT.fields
    assert used["completions"] == COMPLETION.fields


def test_fields_without_effect():
    cells = [row[0] for row in rows(section("api.md", "### No effect"))]
    on_messages = [cell for cell in cells if "on messages, parts and tools" in cell]
    assert set().union(*map(names, on_messages)) == set(MESSAGE.no_ops) == set(PART.no_ops)
    others = set().union(*(names(cell) for cell in cells if cell not in on_messages))
    assert others == set(CHAT.no_ops) == set(COMPLETION.no_ops)


def test_refused_fields():
    refused = {row[0]: names(row[1]) for row in rows(section("api.md", "### Refused"))}
    assert refused["both"] | refused["chat"] == set(CHAT.later)
    assert refused["both"] | refused["completions"] == set(COMPLETION.later)
    assert refused["messages"] == set(MESSAGE.later)
    assert refused["stream_options"] == set(STREAM_OPTIONS.later)


def test_error_codes():
    def tree(cls: type[JiljuError]) -> set[tuple[int, str]]:
        own = set() if issubclass(cls, StartupError) else {(cls.status, cls.code)}
        return own.union(*(tree(child) for child in cls.__subclasses__()))

    told = set()
    for row in rows(section("api.md", "## Errors")):
        statuses, codes = re.findall(r"\d+", row[0]), re.findall(r"`(\w+)`", row[1])
        pairs = zip(statuses, codes, strict=True) if len(statuses) > 1 else ((statuses[0], code) for code in codes)
        told |= {(int(status), code) for status, code in pairs}
    assert told == tree(JiljuError)


def test_flags_of_serve():
    """Each row: the flag, its variable, its default, and the help text of `jilju serve --help`."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(ServeConfig)}
    told = rows(section("operations.md", "## Settings"))
    assert len(told) == len(SERVE_OPTIONS)
    for row, option in zip(told, SERVE_OPTIONS, strict=True):
        default = defaults[option.name]
        shown = {None: "auto", (): "none", False: "off"}.get(default, str(default))
        if option.kind == "size":
            shown = f"{default >> 20} MiB"
        if option.kind in ("file", "number"):
            shown = "none"
        if option.name == "served_model_name":
            shown = "the model's own"
        assert row[:3] == [f"`{option.flag}`", f"`{option.variable}`", shown], row
        assert row[3] == option.help, row


DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_are_there(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)(?=[`\n ])", code_of(document))) <= targets


def test_commands_are_there():
    told = {command for document in DOCUMENTS for command in re.findall(r"\bjilju ([a-z]+)\b", code_of(document))}
    assert told >= {"serve", "chat", "generate", "tokenize", "pull", "models", "bench"}
    assert told <= set(commands.commands) | {"import"}, "`from jilju import`"


def test_decisions_are_numbered_in_their_order():
    files = sorted((DOCS / "decisions").glob("*.md"))
    assert [path.name[:4] for path in files] == [f"{number:04}" for number in range(1, len(files) + 1)]
    for path in files:
        assert path.read_text(encoding="utf-8").startswith(f"# {path.name[:4]} "), path.name


def test_models_and_number_formats_are_told():
    readme, changelog = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))
    for entry in MODELS.values():
        assert f"{entry.num_bytes / 1e6:.0f} MB" in readme
        assert entry.name in readme and entry.name in changelog
    row = next(line for line in readme.splitlines() if line.startswith("| models |"))
    for name in (*GgmlType.__members__, *FAMILIES):
        assert re.search(rf"\b{name}\b", row) and re.search(rf"\b{name}\b", changelog), name


def code_of(document: Path) -> str:
    """What stands in backquotes and code blocks."""
    text = document.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)) + "\n"
