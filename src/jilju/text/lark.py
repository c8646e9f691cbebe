"""Lark grammars of callers, looked at before anything compiles them.

Owns the bounds on size, nesting and repetition, the schemas that stand inside a grammar, and the refusal of rules that never come
to an end or start with themselves. Whatever else the compiler does not know it refuses itself. Knows nothing of tokens.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.regex import check_regex

MAX_DEPTH = 128
MAX_TOKENS = 65_536
MAX_REPEAT = 20_000

TOKEN = re.compile(
    r"""
      (?P<space>[ \t\r\f\n]+|\\\r?\n|//[^\n]*|\#[^\n]*)
    | (?P<text>"(?:[^"\\\n]|\\.)*"i?)
    | (?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*)
    | (?P<directive>%[a-z_]+)
    | (?P<name>[?!]?[A-Za-z_][A-Za-z0-9_-]*)
    | (?P<number>-?[0-9]+(?:\.[0-9]+)?)
    | (?P<special><[^<>\s]+>)
    | (?P<mark>->|\.\.|::|[()\[\]{}|*+?~:,.=&@$!-])
    """,
    re.VERBOSE,
)
PAIRS = {"(": ")", "[": "]", "{": "}"}
UNKEPT = frozenset({"temperature", "capture"})  # attributes that say nothing of the text


class Token(NamedTuple):
    kind: str
    text: str
    line: int


@dataclass(slots=True)
class Rule:
    """A rule or a group: its alternatives, each a list of items."""

    name: str
    line: int
    choices: "list[list[Item]]" = field(default_factory=lambda: [[]])


@dataclass(slots=True)
class Item:
    """What is repeated `low` times or more. Without a rule it is something that takes at least a character."""

    rule: str | None
    low: int = 1
    high: int | None = 1


def check_lark(text: str, translate_schema: Callable[[str], Any]) -> str:
    """The grammar with its %json schemas translated. Raises InvalidGrammar or GrammarTooComplex with the line."""
    written: list[str] = []
    tokens: list[Token] = []
    for token in _tokens(text, translate_schema, written):
        tokens.append(token)
        if len(tokens) > MAX_TOKENS:
            raise GrammarTooComplex(f"the grammar has more than {MAX_TOKENS} parts; make it smaller")
    if not tokens:
        raise InvalidGrammar("the grammar is empty; write at least start: …")
    rules = _Reader(tokens).rules()
    if "start" not in rules:
        raise InvalidGrammar("the grammar has no rule named start, where an answer would begin")
    _refuse_endless(rules)
    _refuse_left_recursion(rules)
    return "".join(written)


def _tokens(text: str, translate_schema: Callable[[str], Any], written: list[str]) -> Iterator[Token]:
    at, line, depth = 0, 1, 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise InvalidGrammar(f"line {line} of the grammar cannot be read from {text[at : at + 40]!r} on")
        kind, piece = str(found.lastgroup), found[0]
        at = found.end()
        written.append(piece)
        if kind == "directive" and piece == "%json":
            schema, at = _schema(text, at, line)
            written.append(" " + msgspec.json.encode(translate_schema(schema)).decode() + " ")
            yield Token("schema", "", line)
            line += schema.count("\n")
            continue
        if kind == "directive" and piece not in ("%ignore", "%import"):
            raise InvalidGrammar(f"line {line} of the grammar has {piece[:40]}; allowed: %ignore, %import and %json")
        if kind == "regex":
            check_regex(piece[1 : piece.rindex("/")], f"the regex on line {line} of the grammar")
        if kind == "mark" and piece in "([{":
            depth += 1
            if depth > MAX_DEPTH:
                raise GrammarTooComplex(f"line {line} of the grammar nests more than {MAX_DEPTH} deep")
        if kind == "mark" and piece in ")]}":
            depth -= 1
        if kind != "space":
            yield Token(kind, piece, line)
        line += piece.count("\n")


def _schema(text: str, at: int, line: int) -> tuple[str, int]:
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        _, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        raise InvalidGrammar(f"%json on line {line} of the grammar is followed by no JSON") from None
    return text[at:end], end


# ---- rules -----------------------------------------------------------------------------------------------------------

EMPTY = "()"  # name of what takes no character; no rule can have it


class _Reader:
    """Tokens to rules, as far as their repetition and recursion need it."""

    def __init__(self, tokens: list[Token]):
        self._tokens = tokens
        self._at = 0
        self._rules = {EMPTY: Rule(EMPTY, 0)}
        self._num_groups = 0

    def rules(self) -> dict[str, Rule]:
        while self._at < len(self._tokens):
            rule = self._head()
            self._body(rule)
            if is_rule(rule.name):
                self._rules[rule.name] = rule
        return self._rules

    def _head(self) -> Rule:
        token = self._tokens[self._at]
        if token.kind == "directive":
            self._at += 1
            return Rule(token.text, token.line)
        colon = self._colon(self._at)
        if colon is None:
            raise InvalidGrammar(
                f"line {token.line} of the grammar begins no rule with {token.text[:40]!r}; write name: …"
            )
        for attribute in self._tokens[self._at + 1 : colon]:
            if attribute.text in UNKEPT:
                raise InvalidGrammar(
                    f"{attribute.text} on line {attribute.line} of the grammar is not supported; leave it out"
                )
        self._at = colon + 1
        return Rule(token.text.lstrip("?!"), token.line)

    def _colon(self, at: int) -> int | None:
        """Where the colon of a definition stands that begins here: behind the name, and attributes if there are any."""
        if self._tokens[at].kind != "name":
            return None
        end = at + 1
        if self._text(end) == "[":
            while end < len(self._tokens) and self._text(end) != "]":
                end += 1
            end += 1
        return end if self._text(end) == ":" else None

    def _text(self, at: int) -> str:
        return self._tokens[at].text if at < len(self._tokens) and self._tokens[at].kind != "text" else ""

    def _body(self, rule: Rule) -> None:
        open_ = [(rule, "")]  # and the groups in it, each with what closes it
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if len(open_) == 1 and (token.kind == "directive" or self._colon(self._at) is not None):
                return
            self._at += 1
            inside, closing = open_[-1]
            items = inside.choices[-1]
            if token.kind == "name" and self._text(self._at - 2) == "->":
                continue  # the name of an alternative
            if token.kind != "mark":
                items.append(self._item(token))
                continue
            match token.text:
                case "|":
                    inside.choices.append([])
                case "(" | "[":
                    self._num_groups += 1
                    group = self._rules[f"({self._num_groups})"] = Rule(f"({self._num_groups})", token.line)
                    items.append(Item(group.name, low=1 if token.text == "(" else 0))
                    open_.append((group, PAIRS[token.text]))
                case ")" | "]":
                    if token.text != closing:
                        raise InvalidGrammar(f"line {token.line} of the grammar has a {token.text} that closes nothing")
                    open_.pop()
                case "?" | "*" | "+" | "~" | "{" if items:
                    self._repeat(items[-1], token)
        if len(open_) > 1:
            raise InvalidGrammar(f"the group that opens on line {open_[-1][0].line} of the grammar is not closed")

    def _item(self, token: Token) -> Item:
        if token.kind == "name" and is_rule(name := token.text.lstrip("?!")):
            return Item(name)
        return Item(EMPTY if token.text in ('""', '""i') else None)

    def _repeat(self, item: Item, token: Token) -> None:
        numbers: list[str] = []
        if token.text == "~":
            while self._at < len(self._tokens) and (
                self._tokens[self._at].kind == "number" or self._text(self._at) == ".."
            ):
                numbers.append(self._text(self._at))
                self._at += 1
        elif token.text == "{":
            while self._text(self._at) != "}":
                if self._at == len(self._tokens) or not re.fullmatch(r"\d+|,", self._text(self._at)):
                    raise InvalidGrammar(
                        f"line {token.line} of the grammar has a {{ without a count; write {{2}} or {{2,5}}"
                    )
                numbers.append(self._text(self._at))
                self._at += 1
            self._at += 1
        counts = [int(number[:9]) for number in numbers if number.isdigit()]
        if any(count > MAX_REPEAT for count in counts):
            raise GrammarTooComplex(
                f"line {token.line} of the grammar repeats more than {MAX_REPEAT} times; lower its count"
            )
        if token.text in "?*" or numbers[:1] == [","] or counts[:1] == [0]:
            item.low = 0
        if token.text in "*+" or numbers[-1:] == [","]:
            item.high = None


def is_rule(name: str) -> bool:
    """Not a terminal, whose name is of capital letters: those are regexes in another dress."""
    return name.lstrip("_")[:1].islower()


def _refuse_endless(rules: dict[str, Rule]) -> None:
    can_end = _fixpoint(
        rules, lambda item, known: item.low == 0 or item.rule is None or item.rule not in rules or item.rule in known
    )
    for rule in rules.values():
        if rule.name not in can_end:
            raise InvalidGrammar(f"the rule {_shown(rule)} never comes to an end: it always needs itself again")


def _refuse_left_recursion(rules: dict[str, Rule]) -> None:
    """Also what repeats nothing without end."""
    empty = _fixpoint(rules, lambda item, known: item.low == 0 or item.rule in known)
    first: dict[str, list[str]] = {}
    for rule in rules.values():
        leading = first[rule.name] = []
        for items in rule.choices:
            is_leading = True
            for item in items:
                if item.high is None and item.rule in empty:
                    raise InvalidGrammar(
                        f"the rule {_shown(rule)} repeats without end what may be empty; repeat what takes a character"
                    )
                if is_leading and item.rule in rules:
                    leading.append(item.rule)
                is_leading = is_leading and (item.low == 0 or item.rule in empty)
    done: set[str] = set()
    for start in rules:
        open_ = {start: iter(first[start])} if start not in done else {}
        while open_:
            name, rest = next(reversed(open_.items()))
            following = next(rest, None)
            if following is None:
                done.add(name)
                del open_[name]
            elif following in open_:
                raise InvalidGrammar(
                    f"the rule {_shown(rules[following])} begins with itself; repeat with * or +, or put it last"
                )
            elif following not in done:
                open_[following] = iter(first[following])


def _fixpoint(rules: dict[str, Rule], holds: Callable[[Item, set[str]], bool]) -> set[str]:
    """Rules with a choice of which every item holds, the least set of them."""
    known: set[str] = set()
    order = list(reversed(rules.values()))
    is_changed = True
    while is_changed:
        is_changed = False
        for rule in order:
            if rule.name not in known and any(all(holds(item, known) for item in items) for items in rule.choices):
                known.add(rule.name)
                is_changed = True
        order.reverse()
    return known


def _shown(rule: Rule) -> str:
    return f"on line {rule.line} of the grammar" if rule.name.startswith("(") else f"{rule.name[:80]!r} of the grammar"
