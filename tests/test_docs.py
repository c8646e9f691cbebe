"""Documents against code: the tables of fields, errors and flags hold every name that the code has, and no other."""

import re
from pathlib import Path

import msgspec

from jilju.config import SERVE_OPTIONS, ServeConfig
from jilju.errors import JiljuError, StartupError
from jilju.serve.openai_chat import CHAT, MESSAGE, PART
from jilju.serve.openai_completions import COMPLETION
from jilju.serve.sampling import STREAM_OPTIONS

DOCS = Path(__file__).parents[1] / "docs"


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
    on_messages = [cell for cell in cells if "on messages and parts" in cell]
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
        if option.name == "served_model_name":
            shown = "the model's own"
        assert row[:3] == [f"`{option.flag}`", f"`{option.variable}`", shown], row
        assert row[3] == option.help, row
