"""Grammars: what is refused before anything is compiled, and that what is compiled holds answers to all that it says."""

import json
import random
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jilju.errors import GrammarTooComplex, InvalidGrammar
from jilju.text.gguf_tokenizer import load_token_table
from jilju.text.grammar import MAX_CHOICES, MAX_GRAMMAR_BYTES, GrammarSource, to_llguidance
from jilju.text.matcher import GrammarMatcher
from jilju.text.matcher import GrammarSource as Matchers
from jilju.text.trial import try_out
from tests.serve.schemas import SCHEMAS, violation
from tests.text.conftest import make_metadata

TABLE = load_token_table(make_metadata(), file="tiny.gguf")
VOCAB = len(TABLE.tokens)
MATCHERS = Matchers(TABLE, VOCAB)
BYTE_IDS = {token[0]: id_ for id_, token in reversed([*enumerate(TABLE.tokens)]) if len(token) == 1}
CLOSING = frozenset(BYTE_IDS[byte] for byte in b'"}]')
PLAIN = frozenset(BYTE_IDS[byte] for byte in range(0x21, 0x7F) if byte != 0x5C)
NUM_WALKS, MAX_STEPS = 4, 600


def schema_source(schema: object) -> GrammarSource:
    return GrammarSource("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def matcher_of(source: GrammarSource) -> GrammarMatcher:
    grammar = to_llguidance(source)
    try_out(grammar, MATCHERS, VOCAB)
    return MATCHERS.make(grammar)


def takes(source: GrammarSource, text: str) -> bool:
    """Whether the text is a whole answer."""
    matcher = matcher_of(source)
    return all(matcher.take(BYTE_IDS[byte]) for byte in text.encode()) and matcher.is_accepting


def allowed(matcher: GrammarMatcher) -> list[int]:
    mask = np.zeros(-(-VOCAB // 32), np.uint32)
    matcher.fill(mask)
    assert not matcher.error, matcher.error
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(source: GrammarSource, choice: random.Random) -> str | None:
    """A random answer through the masks, of closing brackets and the source's own letters for the most part; None if it came to
    no end."""
    matcher, answer = matcher_of(source), b""
    own = {BYTE_IDS[byte] for byte in source.text.encode()} & PLAIN
    for _ in range(MAX_STEPS):
        ids = set(allowed(matcher))
        if matcher.is_accepting and (not ids or choice.random() < 0.7):
            return answer.decode()
        assert ids, f"a dead end after {answer!r}"
        wishes = (CLOSING if choice.random() < 0.5 else own, own if choice.random() < 0.5 else PLAIN, ids)
        id_ = choice.choice(sorted(next(wish & ids for wish in wishes if wish & ids)))
        assert matcher.take(id_), matcher.error
        answer += TABLE.tokens[id_]
    return None


@pytest.mark.parametrize(("name", "schema"), SCHEMAS, ids=[name for name, _ in SCHEMAS])
def test_an_answer_held_to_a_schema_satisfies_it(name, schema):
    choice = random.Random(name)
    answers = [walk(schema_source(schema), choice) for _ in range(NUM_WALKS)]
    assert any(answer is not None for answer in answers), "no walk came to an end"
    for answer in answers:
        if answer is not None:
            assert (broken := violation(schema, answer)) is None, f"{answer}: {broken}"


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "integer"}},
        "é\n": {"const": None},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "form", [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"ensure_ascii": False}]
)
@pytest.mark.parametrize("value", [{"name": "Ada", "tags": [1, 2]}, {"name": "", "tags": []}, {"name": 'a"\\/\n\té'}])
def test_json_may_be_written_in_the_ways_that_are_common(form, value):
    text = json.dumps(value, **({"ensure_ascii": False} | form))
    assert takes(schema_source(PERSON), text), text
    assert takes(GrammarSource("json_object"), text), text


@pytest.mark.parametrize(
    "text",
    ['{"name":"a"', '{"nam":"a"}', '{"name":1}', '{"name":"a","x":1}', '{"name":"\\u0061"}', ' {"name":"a"}', '{  "name":"a"}',
     '{"name":"a"}\n', '{"name":"a","tags":[1.5]}', '{"name":"a" ,\n\n"tags":[]}', "[]"],
)  # fmt: skip
def test_what_a_schema_does_not_allow_is_not_taken(text):
    assert not takes(schema_source(PERSON), text)


def test_white_space_cannot_go_on_for_ever():
    """A weak model that may write a space would write nothing else."""
    matcher = matcher_of(GrammarSource("json_object"))
    num_spaces = 0
    assert matcher.take(BYTE_IDS[ord("{")])
    while spaces := [id_ for id_ in allowed(matcher) if TABLE.tokens[id_].isspace()]:
        num_spaces += 1
        assert num_spaces <= 100 and matcher.take(spaces[-1])
    assert num_spaces


def test_a_name_cannot_be_written_around_its_schema_with_escapes():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    assert takes(schema_source(schema), '{"a":1,"b":"x"}')
    assert not takes(schema_source(schema), '{"\\u0061":"x"}')


# ---- refused: schemas ------------------------------------------------------------------------------------------------

OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "array", "uniqueItems": True}, ["uniqueItems at #"]),
        ({**OBJECT, "properties": {"a": {"items": {"not": {}}}}}, ["not at #/properties/a/items"]),
        ({"if": {}, "then": {}}, ["if at #"]),
        ({**OBJECT, "dependentRequired": {"a": ["b"]}}, ["dependentRequired at #"]),
        ({**OBJECT, "propertyNames": {"pattern": "^a"}}, ["propertyNames at #"]),
        ({**OBJECT, "unevaluatedProperties": False}, ["unevaluatedProperties at #"]),
        ({"contains": {}}, ["contains at #"]),
        ({"nullable": True}, ["nullable at #"]),
        ({"contentEncoding": "base64"}, ["contentEncoding at #"]),
        ({"$anchor": "a"}, ["$anchor at #"]),
        ({"$dynamicRef": "#a"}, ["$dynamicRef at #"]),
        ({**OBJECT, "properties": {"a/b": {"$id": "x"}}}, ["$id at #/properties/a~1b"]),
        ({"typo": 1}, ["typo at #"]),
        ({"type": "string", "format": "regex"}, ["format at #", "regex", "date-time"]),
        ({"type": "string", "format": "int32"}, ["format at #"]),
        ({"type": "text"}, ["type at #", "text", "string"]),
        ({"minLength": -1}, ["minLength at #"]),
        ({"minLength": True}, ["minLength at #"]),
        ({"maximum": "3"}, ["maximum at #"]),
        ({"exclusiveMinimum": True}, ["exclusiveMinimum at #"]),
        ({"multipleOf": 0}, ["multipleOf at #"]),
        ({"required": "a"}, ["required at #"]),
        ({"properties": []}, ["properties at #"]),
        ({"items": [{}]}, ["#/items"]),
        ({"anyOf": []}, ["anyOf at #"]),
        ({"enum": []}, ["enum at #"]),
        ({"enum": list(range(10_000))}, ["enum at #", "1024"]),
        ({"const": 2**53 + 1}, ["const at #"]),
        ({"const": "\x07"}, ["const at #", "control"]),
        ({"pattern": "^(?=a)"}, ["pattern at #", "looks around"]),
        ({"pattern": r"(a)\1"}, ["pattern at #", "refers back"]),
        ({"patternProperties": {"[[:alpha:]]": {}}}, ["patternProperties at #", "class"]),
        ({"$ref": "https://example.com/schema"}, ["$ref at #", "nothing is fetched"]),
        ({"$ref": "file:///etc/passwd"}, ["$ref at #", "nothing is fetched"]),
        ({"$ref": "other.json#/a"}, ["$ref at #", "nothing is fetched"]),
        ({"$ref": "#anchor"}, ["$ref at #"]),
        ({"$ref": "#/$defs/none"}, ["$ref at #", "no schema stands"]),
        ({"$ref": "#/default", "default": {}}, ["$ref at #", "no schema stands"]),
        ({"$ref": "#"}, ["# refers to itself"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ["#/$defs/a refers to itself"]),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#"}]}, ["# refers to itself"]),
        ({"allOf": [{"allOf": [{"$ref": "#"}]}]}, ["# refers to itself"]),
        ({**OBJECT, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ["# has no value that ends"]),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, ["# has no value that ends"]),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2}, ["# has no value that ends"]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["oneOf at #", "0 and 1"]),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, ["oneOf at #"]),
        ({"oneOf": [{**OBJECT, "properties": {"a": {"const": n}}} for n in (1, 2)]}, ["oneOf at #"]),
        ({**OBJECT, "properties": {"a": {}, "b": {}}, "required": ["a"], "maxProperties": 1}, ["maxProperties at #"]),
        ({**OBJECT, "minProperties": 2}, ["minProperties at #", "up to 1"]),
        ({"type": "integer", "minimum": 5, "maximum": 3}, ["minimum (5)"]),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ["does not compile"]),
        ({"type": "string", "enum": [1, 2]}, ["does not compile"]),
        ({**OBJECT, "properties": {"a": False}, "required": ["a"]}, ["does not compile"]),
        (False, ["does not compile"]),
        ("[]", ["the schema at # is []"]),
        ("{", ["not JSON"]),
        ('{"minimum": 1e400}', ["not JSON"]),
        ('{"const": "\\ud800"}', ["not JSON"]),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(schema, told):
    with pytest.raises(InvalidGrammar) as caught:
        matcher_of(GrammarSource("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))
    assert [part for part in told if part not in caught.value.message] == [], caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "schema",
    [
        '{"allOf":[' * 1000 + "{}" + "]}" * 1000,
        '{"a":' * 100_000,
        '{"items":' * 32 + "{}" + "}" * 32,
        '{"type":"string","pattern":"' + "a" * 5000 + '"}',
        '{"type":"string","pattern":"(a{1000}){1000}"}',
        '{"oneOf":[' + ",".join(f'{{"const":{n}}}' for n in range(300)) + "]}",
        '{"title":"' + "x" * MAX_GRAMMAR_BYTES + '"}',
        '{"type":"string","pattern":"(a|b)*a(a|b){16}","minLength":1000,"maxLength":2000}',
        '{"type":"object","properties":{' + ",".join(f'"p{n}":{{}}' for n in range(900)) + "}}",
    ],
    ids=["allOf", "not a schema", "depth", "long", "counts", "oneOf", "size", "intersection", "properties"],
)
def test_a_schema_without_a_bound_is_too_complex(schema):
    with pytest.raises(GrammarTooComplex):
        matcher_of(GrammarSource("json_schema", schema))


def test_annotations_and_idle_keywords_change_nothing():
    plain = to_llguidance(schema_source({"type": "integer"}))
    annotated = {"type": "integer", "title": "t", "description": "d", "default": 1, "examples": [2], "$comment": "c",
                 "deprecated": True, "readOnly": True, "writeOnly": False, "$schema": "s", "$id": "i", "x-guidance": {"lenient": True},
                 "x-order": 1, "uniqueItems": False, "propertyNames": {"type": "string"}}  # fmt: skip
    assert to_llguidance(schema_source(annotated)) == plain


# ---- regexes, choices, Lark ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        ("(a+)+b", "aaab", "aaa"),
        ("(.*)*", "anything", "a\nb"),
        ("(a|aa)+$", "aaa", "ab"),
        ("^(|.*)$", "", "\n"),
        ("^a|b$", "b", "ab"),
        (r"a/b\/[/]", "a/b//", "a/b"),
        ("a\nb", "a\nb", "ab"),
        ("", "", "a"),
        (r"\[a\](?:b|c){2}", "[a]bc", "[a]b"),
        ("(?P<year>[0-9]{4})-(?i:q)[1-4]", "2024-Q1", "2024-q5"),
    ],
)
def test_a_regex_is_held_to_as_a_whole(regex, good, bad):
    assert takes(GrammarSource("regex", regex), good)
    assert not takes(GrammarSource("regex", regex), bad)


@pytest.mark.parametrize(
    "regex",
    [r"(?<=a)b", r"(?<!a)b", "a(?=b)", "(?!a)b", r"(a)\1", r"(?P<x>a)(?P=x)", r"(?<x>a)\k<x>", "\\", "a\\", "(a", "a)", "[a", "[]a]",
     "[[:alpha:]]", "[a&&b]", "a{,3}", r"\b", "a$b", "*"],
)  # fmt: skip
def test_a_regex_that_no_automaton_follows_is_refused(regex):
    with pytest.raises(InvalidGrammar):
        matcher_of(GrammarSource("regex", regex))


@pytest.mark.parametrize(
    "regex",
    [
        "(" * 30_000,
        "(" * 200,
        "a" * 4097,
        "a{0,1000000}",
        "(a{1000}){1000}",
        "((a{99}){99}){99}",
        "a+{9}" * 400 + "{9999}",
    ],
)
def test_a_regex_without_a_bound_is_too_complex(regex):
    with pytest.raises(GrammarTooComplex):
        matcher_of(GrammarSource("regex", regex))


@given(st.lists(st.text(max_size=6), min_size=1, max_size=8), st.text(max_size=6))
@example(["\x7f", "a"], "\x7fa")
@settings(max_examples=60, deadline=None)
def test_a_choice_takes_its_texts_and_no_other(choices, other):
    source = GrammarSource("choice", json.dumps(choices, ensure_ascii=False))
    matcher = MATCHERS.make(to_llguidance(source))
    assert not matcher.error
    for text in [*choices, other]:
        matcher = MATCHERS.make(to_llguidance(source))
        taken = all(matcher.take(BYTE_IDS[byte]) for byte in text.encode()) and matcher.is_accepting
        assert taken == (text in choices), (text, choices)


def test_choices_are_bounded():
    with pytest.raises(InvalidGrammar, match="at least one"):
        to_llguidance(GrammarSource("choice", "[]"))
    with pytest.raises(GrammarTooComplex, match=str(MAX_CHOICES)):
        to_llguidance(GrammarSource("choice", json.dumps(["a"] * (MAX_CHOICES + 1))))
    assert takes(GrammarSource("choice", json.dumps([f"number {n}" for n in range(MAX_CHOICES)])), "number 1023")


@pytest.mark.parametrize(
    ("lark", "good", "bad"),
    [
        ('start: "a" | "b" "c"', "bc", "c"),
        ('?start: sum\nsum: product ("+" product)*\nproduct: atom ("*" atom)*\natom: N | "(" sum ")"\nN: /[0-9]+/', "1+2*(3+4)", "1+"),
        ('start: "x" tail?\ntail: "y" start', "xyxyx", "xy"),
        ('start: ["-"] DIGIT+ // digits\n# and no more\nDIGIT: "0".."9"', "-12", "--1"),
        ('start: "a"~2..3\n', "aaa", "a"),
        ('start: "a"{2}', "aa", "aaa"),
        ('%import common.INT\nstart: "n=" INT', "n=12", "n="),
        ('start: "é\\n\\"/" /[a-z]+\\/x/i', 'é\n"/AB/X', "é"),
        ('start: "<call>" arguments "</call>"\narguments: %json {"type":"object",\n"required":["a"]}', '<call>{"a": 1}</call>', "<call>{}</call>"),
        ('start: a -> first | b -> second\na: "a"\n  | "c"\nb: "b"', "c", "ab"),
    ],
)  # fmt: skip
def test_a_lark_grammar_is_held_to(lark, good, bad):
    assert takes(GrammarSource("lark", lark), good)
    assert not takes(GrammarSource("lark", lark), bad)


@pytest.mark.parametrize(
    ("lark", "told"),
    [
        ("", "empty"),
        ("  # nothing\n", "empty"),
        ('a: "x"', "no rule named start"),
        ('START: "x"', "no rule named start"),
        ("start: foo", "foo"),
        ('start: start "a" | "a"', "'start' of the grammar begins with itself"),
        ('start: a "b"\na: start | "x"', "begins with itself"),
        ('start: b? start "y" | "x"\nb: "b"', "begins with itself"),
        ('start: ("" | "x") start | "y"', "begins with itself"),
        ('start: a*\na: ""', "repeats without end"),
        ('start: ("a"?)+', "repeats without end"),
        ("start: start", "never comes to an end"),
        ('start: "x" start', "never comes to an end"),
        ('start: "x" | a\na: "(" b ")"\nb: a', "never comes to an end"),
        ('root ::= "a"', "begins no rule"),
        ("start: 'a'", "line 1 of the grammar cannot be read"),
        ('start: ("a"', "is not closed"),
        ('start: "a")', "closes nothing"),
        ('start: a\na[temperature=0.5]: "x"', "temperature on line 2"),
        ('start: a\na[capture]: "x"', "capture on line 2"),
        ('start: %regex {"substring_words":"a b"}', "%regex"),
        ('%llguidance {"no_forcing":true}\nstart: "a"', "%llguidance"),
        ('start: %json {"uniqueItems":true}', "uniqueItems at #"),
        ('start: "a"\n\nb: %json {"$ref":"http://x"}', "$ref at #"),
        ("start: %json {", "%json on line 1"),
        ("start: /a(?=b)/", "line 1"),
        ('start: a{b,c}\na: "x"', "line 1"),
        ('start: "a" "\ud800"', "surrogate"),
    ],
)
def test_a_lark_grammar_that_goes_nowhere_is_refused(lark, told):
    with pytest.raises(InvalidGrammar) as caught:
        matcher_of(GrammarSource("lark", lark))
    assert told in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "lark",
    [
        "start: " + "(" * 30_000,
        "start: " + "(" * 100 + '"a"' + ")" * 100,
        "start: " + "|".join(f'"a{n}"' for n in range(100_000)),
        "start: " + " | ".join(["a"] * 40_000) + '\na: "x"',
        'start: "a"{0,1000000}',
        'start: "a"~0..1000000',
        "start: /a{0,1000000}/",
        'start: %json {"title":"' + "x" * 70_000 + '"}',
    ],
    ids=["30000 (", "100 ()", "100k alternatives", "40k rules", "{0,1000000}", "~0..1000000", "regex", "schema"],
)
def test_a_lark_grammar_without_a_bound_is_too_complex(lark):
    with pytest.raises(GrammarTooComplex):
        matcher_of(GrammarSource("lark", lark))


@pytest.mark.parametrize("length", range(8))  # each is tried in steps of its own
def test_a_grammar_that_comes_apart_on_some_ways_only_is_too_complex(length):
    """After an a nothing follows; after a b too much may."""
    rules = "\n".join(f'r{number}: "c" /[a-z]{{1,40}}/ "{number}"' for number in range(2500))
    start = f'start: "a" | "b" ({" | ".join(f"r{number}" for number in range(2500))})'
    with pytest.raises(GrammarTooComplex):
        matcher_of(GrammarSource("lark", f"{start}\n{rules}\n//{'x' * length}"))


@given(st.text(alphabet='start:ab|"()[]{}*+?~ \n/\\%#.,0-', max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_brings_the_reader_of_lark_down(text):
    for lark in (text, "start: " + text):
        with suppress(InvalidGrammar, GrammarTooComplex):
            to_llguidance(GrammarSource("lark", lark))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "type", "properties", "items", "anyOf", "oneOf", "allOf", "$ref", "$defs", "required", "minItems", "const", "enum", "pattern",
        "prefixItems", "minProperties", "exclusiveMinimum", "format", "additionalProperties", "patternProperties",
    ]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_no_json_brings_the_reader_of_schemas_down(value):
    with suppress(InvalidGrammar, GrammarTooComplex):
        to_llguidance(schema_source(value))
