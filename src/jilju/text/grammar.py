"""Grammars: the form that a caller asks an answer to have, as llguidance reads it.

Owns the kinds of sources, their bounds, and the translation of each. What it lets through is still untrusted: it is compiled
in a process that can be killed. Knows nothing of llguidance's own code, of tokens, or of which field a source came from.
"""

import re
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.json_schema import translate_schema
from jilju.text.lark import check_lark
from jilju.text.regex import check_regex

MAX_GRAMMAR_BYTES = 256 << 10
MAX_SCHEMA_BYTES = 64 << 10  # of a schema inside a grammar
MAX_CHOICES = 1024

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

# One space, or a line end and an indent of up to 64: enough for every common way to print JSON, and no room for a model that
# writes white space without end. Escapes are the short ones only: \u0061 would be an `a` that no check of names and patterns sees.
JSON_OPTIONS = MappingProxyType(
    {
        "whitespace_flexible": True,
        "whitespace_pattern": r"(?: |\r?\n[ \t]{0,64})",
        "json_allowed_escapes": 'nrbtf\\"',
        "coerce_one_of": False,
        "lenient": False,
    }
)


class GrammarSource(msgspec.Struct, frozen=True):
    """`text` is a JSON schema, a regex, a Lark grammar, or for `choice` a JSON list of strings. A Lark grammar may hold schemas,
    as `%json {…}`."""

    kind: GrammarKind
    text: str = ""


def to_llguidance(source: GrammarSource) -> str:
    """The grammar's text for llguidance. Raises InvalidGrammar or GrammarTooComplex; the work is bounded by the size alone, but
    for a large schema it takes tens of milliseconds."""
    if (size := len(source.text.encode("utf-8", "surrogatepass"))) > MAX_GRAMMAR_BYTES:
        raise GrammarTooComplex(f"the grammar has {size} bytes; allowed: at most {MAX_GRAMMAR_BYTES}")
    try:
        source.text.encode()
    except UnicodeEncodeError:
        raise InvalidGrammar("the grammar holds half of a surrogate pair, which is no character") from None
    match source.kind:
        case "json_schema":
            return _grammar(json_schema=_with_options(translate_schema(source.text)))
        case "json_object":
            return _grammar(json_schema=_with_options({"type": "object"}))
        case "regex":
            check_regex(source.text, "the regex")
            return _grammar(lark_grammar=f"start: {_lark_regex(source.text)}")
        case "choice":
            return _grammar(lark_grammar=_choice(source.text))
        case "lark":
            return _grammar(lark_grammar=check_lark(source.text, _inner_schema))


def _grammar(**form: Any) -> str:
    return msgspec.json.encode({"grammars": [form]}).decode()


def _with_options(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": dict(JSON_OPTIONS)}


def _inner_schema(text: str) -> dict[str, Any]:
    if (size := len(text.encode())) > MAX_SCHEMA_BYTES:
        raise GrammarTooComplex(f"a schema has {size} bytes; allowed: at most {MAX_SCHEMA_BYTES}")
    return _with_options(translate_schema(text))


def _lark_regex(pattern: str) -> str:
    """Between slashes: those inside are escaped, line ends are written as such."""
    escaped = re.sub(
        r"\\.|/|\n|\r",
        lambda found: {"/": r"\/", "\n": r"\n", "\r": r"\r"}.get(found[0], found[0]),
        pattern,
        flags=re.DOTALL,
    )
    return f"/{escaped or '(?:)'}/"


def _choice(text: str) -> str:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, UnicodeError):
        raise InvalidGrammar("choice is no list of texts") from None
    if not choices:
        raise InvalidGrammar("choice is empty; give at least one text")
    if len(choices) > MAX_CHOICES:
        raise GrammarTooComplex(f"choice has {len(choices)} texts; allowed: at most {MAX_CHOICES}")
    # Lark's texts are JSON's, but for DEL, which Lark takes only escaped
    texts = [
        msgspec.json.encode(choice).decode().replace("\x7f", "\\u007f") for choice in dict.fromkeys(choices) if choice
    ]
    start = ["TEXT"] * bool(texts) + ['""'] * (
        "" in choices
    )  # one terminal: an automaton, where a rule would be tried text by text
    return f"start: {' | '.join(start)}\n" + (f"TEXT: {' | '.join(texts)}\n" if texts else "")
