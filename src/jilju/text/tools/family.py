"""Families: which models write calls in the same way, and what that way is.

A family knows how its calls are read, held by a grammar and told to the model; the chat template that comes with a model shows
which family is the model's. Knows nothing of requests, tokens or the template's language.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jilju.errors import InvalidValue
from jilju.text.message import MessageParser, PlainText
from jilju.text.reasoning import ReasoningParser, ReasoningStyle
from jilju.text.tools import prompt
from jilju.text.tools.grammar import Rules, add_start, numbered, quoted
from jilju.text.tools.parsers import BareParser, MistralParser, TaggedParser
from jilju.text.tools.spec import ToolSpec

Messages = Sequence[Mapping[str, Any]]

READS_TOOLS = re.compile(r"\{%-?[^%]*\b(?:if|in|not|and|or)\s+tools\b|\{\{-?\s*tools\b")  # the variable, not the word
FENCE = "/```(json)?/"  # what begins a code block, in a grammar


class ToolFamily:
    """What the server sees of every family."""

    name: str
    # Texts of control tokens that the parser must see, though control tokens are left out of answers.
    shown_specials: tuple[str, ...]
    # The template is given `template_tools(tools)`; otherwise `messages_for_template` tells of them.
    reads_tools: bool = True
    # False: the template takes one call a message, so the grammar lets the model make no more.
    parallel: bool = True

    def parser(self, tools: Sequence[ToolSpec]) -> MessageParser:
        """A parser of one answer. Names outside `tools` are text."""
        raise NotImplementedError

    def grammar(
        self,
        tools: Sequence[ToolSpec],
        *,
        choice: str,
        parallel: bool = True,
        reasoning: ReasoningStyle | None = None,
        special_ids: Mapping[str, int] | None = None,
    ) -> str:
        """Lark text. `choice`: "auto" is free text in which every call that begins is held to its format and schema,
        "required" calls and nothing else, a tool's name calls of that tool. Without `parallel` there is at most one call.
        Thoughts may come before, in the given style. `special_ids` are the tokenizer's `special_texts`."""
        chosen = tools if choice in ("auto", "required") else [tool for tool in tools if tool.name == choice]
        if not chosen:
            names = ", ".join(tool.name for tool in tools)
            raise InvalidValue(f"tool_choice is {choice!r:.80}; given tools: {names:.400}", param="tool_choice")
        rules = Rules(special_ids or {})
        self._add_rules(rules, chosen, parallel and self.parallel)
        must_call = choice != "auto"
        add_start(rules, "calls" if must_call else "answer", must_end=must_call, reasoning=reasoning)
        return rules.text()

    def _add_rules(self, rules: Rules, tools: Sequence[ToolSpec], parallel: bool) -> None:
        """Rules `calls`, and `answer` in which they are held among other text."""
        raise NotImplementedError

    def messages_for_template(self, messages: Messages, tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        """The messages {role, content, tool_calls: [{id, type, function: {name, arguments: dict}}], tool_call_id, name} as
        this model's template takes them."""
        return [dict(message) for message in messages]


class Hermes(ToolFamily):
    """<tool_call>{"name": …, "arguments": {…}}</tool_call>, on three lines: Hermes, Qwen2.5, Qwen3. An object or a code block
    of them as the whole answer is a call, too: small models forget the tags."""

    name = "hermes"
    open, close = "<tool_call>", "</tool_call>"
    shown_specials = (open, close)

    def parser(self, tools: Sequence[ToolSpec]) -> MessageParser:
        return TaggedParser(tools, self.open, self.close)

    def _add_rules(self, rules: Rules, tools: Sequence[ToolSpec], parallel: bool) -> None:
        rules.objects(tools, "arguments")
        rules.marker("open", self.open)
        rules.marker("close", self.close)
        rules.add("body", r'"\n" object "\n" close')
        rules.add("calls", r'open body ("\n" open body)*' if parallel else "open body")
        add_first_objects(rules, tools, "arguments", fence=FENCE)
        rules.text_to("to_open", self.open, before="TEXT")
        rules.text_to("to_next", self.open)
        more, others = (r'("\n" object)*', "(to_next body)* ANY") if parallel else ("", "")
        rules.add("answer", f"first {more}", rf'fenced {more} "\n```"', f"to_open body {others}", "TEXT")


class Generic(Hermes):
    """The same calls for models whose template knows no tools: a system message tells of them."""

    name = "generic"
    reads_tools = False

    def __init__(self, *, system_role: bool = True):
        self.system_role = system_role

    def messages_for_template(self, messages: Messages, tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        return prompt.plain_messages(messages, tools, prompt.TAGGED, system_role=self.system_role)


class Llama(ToolFamily):
    """{"name": …, "parameters": {…}} as the whole answer, or after a control token: Llama 3."""

    name = "llama"
    marker = "<|python_tag|>"
    shown_specials = (marker,)

    def __init__(self, *, parallel: bool):
        self.parallel = parallel

    def parser(self, tools: Sequence[ToolSpec]) -> MessageParser:
        return BareParser(tools, self.marker)

    def _add_rules(self, rules: Rules, tools: Sequence[ToolSpec], parallel: bool) -> None:
        more = r'("; " object | ";" object | "\n" object)*' if parallel else ""
        rules.objects(tools, "parameters")
        rules.marker("tag", self.marker)
        rules.add("calls", f"object {more}", f"tag object {more}")
        add_first_objects(rules, tools, "parameters")
        rules.text_to("to_tag", self.marker, before="TEXT")
        rules.add("answer", f"first {more}", f"to_tag object {more}", "TEXT")


class Gemma(ToolFamily):
    """A code block of {"name": …, "parameters": {…}}, one a line: Gemma, whose template knows no tools. An object or another
    block as the whole answer is a call, too."""

    name = "gemma"
    fence = "```tool_code"
    shown_specials = ()
    reads_tools = False

    def __init__(self, *, system_role: bool = True):
        self.system_role = system_role

    def parser(self, tools: Sequence[ToolSpec]) -> MessageParser:
        return BareParser(tools, self.fence, fences=True)

    def _add_rules(self, rules: Rules, tools: Sequence[ToolSpec], parallel: bool) -> None:
        more = r'("\n" object)*' if parallel else ""
        rules.objects(tools, "parameters")
        rules.add("body", rf'"\n" object {more} "\n```"')
        rules.add("calls", f"{quoted(self.fence)} body")
        add_first_objects(rules, tools, "parameters", fence=FENCE)
        rules.text_to("to_fence", self.fence, before="TEXT")
        rules.add("answer", f"first {more}", rf'fenced {more} "\n```"', "to_fence body", "TEXT")

    def messages_for_template(self, messages: Messages, tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        return prompt.plain_messages(messages, tools, prompt.FENCED, system_role=self.system_role)


class Mistral(ToolFamily):
    """[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]: Mistral until 2024."""

    name = "mistral"
    marker, shown_specials = "[TOOL_CALLS]", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def parser(self, tools: Sequence[ToolSpec]) -> MessageParser:
        return MistralParser(tools)

    def _add_rules(self, rules: Rules, tools: Sequence[ToolSpec], parallel: bool) -> None:
        rules.objects(tools, "arguments")
        rules.marker("mark", self.marker)
        rules.text_to("to_mark", self.marker)
        rules.add("row", '"[" object (", " object)* "]"' if parallel else '"[" object "]"')
        rules.add("calls", '(mark | mark " ") row')
        rules.add("answer", '(to_mark | to_mark " ") row', "ANY")

    def messages_for_template(self, messages: Messages, tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        return prompt.with_short_call_ids(messages)


class NamedMistral(Mistral):
    """[TOOL_CALLS]name[ARGS]{…} once a call, in some models with [CALL_ID]… after the name: Mistral since 2025."""

    def _add_rules(self, rules: Rules, tools: Sequence[ToolSpec], parallel: bool) -> None:
        rules.arguments(tools)
        rules.marker("mark", self.marker)
        rules.marker("args", "[ARGS]")
        rules.marker("call_id", "[CALL_ID]")
        rules.text_to("to_mark", self.marker)
        rules.add("ID", "/[A-Za-z0-9]{9}/")
        for index, tool in enumerate(tools):
            rules.add(f"call_{index}", f"{quoted(tool.name)} (call_id ID)? args arguments_{index}")
        rules.add("call", *numbered("call", tools))
        more = "(mark call)*" if parallel else ""
        rules.add("calls", f"mark call {more}")
        rules.add("answer", f"to_mark call {more}", "ANY")


def add_first_objects(rules: Rules, tools: Sequence[ToolSpec], key: str, fence: str = "") -> None:
    """Rule `first`: an object that begins an answer, and `fenced` inside a code block. `TEXT` is any text that does not begin
    as one does, so that text and calls part at the name's closing quote."""
    name = 'SPACE "{" SPACE "\\"name\\"" SPACE ":" SPACE'
    names = " | ".join(quoted(f'"{tool.name}"') for tool in tools)
    fences = f"({fence} SPACE)? " if fence else ""
    rules.add("TEXT", f"ANY & ~(SPACE {fences}{name} ({names}) ANY)")
    for rule, before in [("first", "SPACE "), ("fenced", f"SPACE {fence} SPACE ")][: 2 if fence else 1]:
        for index, tool in enumerate(tools):
            rest = quoted(f'"{tool.name}", "{key}": ')
            rules.add(f"{rule.upper()}_{index}", f"{before}{name} {rest}")
            rules.add(f"{rule}_{index}", f'{rule.upper()}_{index} arguments_{index} "}}"')
        rules.add(rule, *numbered(rule, tools))


def family_of(template_source: str) -> ToolFamily:
    """The family whose markup the template writes; without tools in the template or with unknown markup one that is told of
    tools in plain words."""
    if READS_TOOLS.search(template_source):
        if "[TOOL_CALLS]" in template_source:
            return NamedMistral() if "[ARGS]" in template_source else Mistral()
        if "<tool_call>" in template_source and '"arguments' in template_source:  # others write XML between such tags
            return Hermes()
        if '"parameters' in template_source and ("<|python_tag|>" in template_source or "ipython" in template_source):
            return Llama(parallel="single tool-calls" not in template_source)
    system_role = takes_system_role(template_source)
    if "<start_of_turn>" in template_source:
        return Gemma(system_role=system_role)
    return Generic(system_role=system_role)


def takes_system_role(template_source: str) -> bool:
    """A template that refuses messages takes it only if it knows it, and does not say that it refuses it."""
    if "raise_exception" not in template_source:
        return True
    return "system" in template_source and "System role not supported" not in template_source


def make_parser(
    family: ToolFamily, tools: Sequence[ToolSpec], reasoning: ReasoningStyle | None = None
) -> MessageParser:
    """Thoughts, then text and calls. Without tools what follows the thoughts is plain text."""
    rest = family.parser(tools) if tools else PlainText()
    return ReasoningParser(reasoning, rest) if reasoning else rest
