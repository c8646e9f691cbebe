"""Grammar: the Lark text that holds a model to its family's calls and to the tools' schemas.

Owns how rules, markers and schemas are written. A marker may be a control token, which no text matches: it is held by its id
then, and by its text besides, since a parser sees no difference. Knows nothing of what a family's calls look like, nor of
what of a schema can be held: `text.grammar` translates that, as it does for every grammar.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jilju.text.reasoning import ReasoningStyle
from jilju.text.tools.spec import ToolSpec

ANYTHING = "/(?s:.*)/"


class Rules:
    """A grammar that grows: `ANY` is any text, `SPACE` what parsers skip around markup."""

    def __init__(self, special_ids: Mapping[str, int]):
        self._special_ids = special_ids
        self._lines = [f"ANY: {ANYTHING}", r"SPACE: /[ \t\r\n]*/"]

    def add(self, name: str, *choices: str) -> None:
        self._lines.append(f"{name}: {' | '.join(choices)}")

    def marker(self, name: str, text: str) -> None:
        self.add(name, *self._forms(text))

    def text_to(self, name: str, text: str, before: str = "ANY") -> None:
        """Rule of `before` up to the first such marker and the marker itself. In a choice it is taken as soon as it fits."""
        self._lines.append(f"{name}_text[lazy]: {before} {quoted(text)}")
        self.add(name, f"{name}_text", *(f"{before} {form}" for form in self._forms(text)[1:]))

    def _forms(self, text: str) -> list[str]:
        special_id = self._special_ids.get(text)
        return [quoted(text)] if special_id is None else [quoted(text), f"<[{special_id}]>"]

    def arguments(self, tools: Sequence[ToolSpec]) -> None:
        """Rules `arguments_0`, `arguments_1`, … of each tool's."""
        for index, tool in enumerate(tools):
            self.add(f"arguments_{index}", f"%json {json.dumps(tool.schema, ensure_ascii=False)}")

    def objects(self, tools: Sequence[ToolSpec], key: str) -> None:
        """Rule `object`: {"name": …, "<key>": …} of any of the tools."""
        self.arguments(tools)
        for index, tool in enumerate(tools):
            self.add(f"object_{index}", f"{quoted(opening(tool, key))} arguments_{index} {quoted('}')}")
        self.add("object", *numbered("object", tools))

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def opening(tool: ToolSpec, key: str) -> str:
    return f'{{"name": "{tool.name}", "{key}": '


def numbered(name: str, tools: Iterable[Any]) -> list[str]:
    return [f"{name}_{index}" for index, _ in enumerate(tools)]


def quoted(text: str) -> str:
    return json.dumps(text)


def add_start(rules: Rules, rest: str, *, must_end: bool, reasoning: ReasoningStyle | None) -> None:
    """Rule `start`: thoughts if the model has any, then `rest`. If it must come, thoughts cannot be the whole answer."""
    if reasoning is None:
        rules.add("start", rest)
        return
    rules.text_to("to_close", reasoning.close)
    if reasoning.starts_inside:
        begun, choices = "", []
    else:
        rules.text_to("begun", reasoning.open, before="SPACE")
        begun, choices = "begun ", [rest]
    if must_end:
        rules.add("GAP", r"/\n{0,2}/")
        rules.add("start", *choices, f"{begun}to_close GAP {rest}")
    else:
        rules.add("start", *choices, f"{begun}to_close {rest}", f"{begun}ANY")
