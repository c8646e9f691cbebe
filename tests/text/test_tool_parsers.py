"""Answers with calls: what a family writes is read back, in any pieces, and no other text is lost or makes a parser raise."""

import json
import random
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jilju.text.message import Part
from jilju.text.reader import MAX_HELD_CHARS, Marker, Reader
from jilju.text.reasoning import ReasoningStyle
from jilju.text.tools import ToolSpec, make_parser
from jilju.text.tools.call_parser import MAX_DEPTH
from tests.text.tool_answers import FORMATS, SPACE, TOOLS, calls_of, parse, tagged, text_of

NUM_RANDOM_ANSWERS = 10_000
THINKS = ReasoningStyle("<think>", "</think>")

json_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | json_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_texts, inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(json_texts, json_values, max_size=4)
names = st.from_regex(r"\A[A-Za-z0-9_.-]{1,16}\Z")
some_calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=4)
# How different models write the same JSON.
ways_to_write = st.sampled_from(
    [
        json.dumps,
        lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        lambda value: json.dumps(value, ensure_ascii=False, indent=2),
    ]
)
places = st.lists(st.integers(0, 300), max_size=8)
each_format = pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS.keys())

# Letters of 가나다 stand in no markup, so each must turn up in a part: a key that is passed over could only be one of these.
FRAGMENTS = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "```tool_code",
        "```json",
    ),
    *(
        "```",
        "`",
        "<",
        "</",
        "<think>",
        "</think>",
        "[",
        "]",
        "{",
        "}",
        "\n",
        " ",
        ";",
        ", ",
        "get",
        "\\",
        "-1.5e3",
        "nul",
    ),
    *(
        '{"name": "get", ',
        '"name": "get"',
        '"name": "other"',
        '"arguments": ',
        '"parameters": ',
        '{"a": "',
        '"}',
        "}}",
        "}]",
    ),
    *('{"name": "get", "arguments": {"b": "', '{"arguments": {}, "name": "get_weather"}', "[{", "가", "나", "다"),
)
WORDS = "가나다"
fragment_lists = st.lists(st.sampled_from(FRAGMENTS), max_size=20)


@each_format
@given(some_calls, ways_to_write, places, st.text(max_size=20), st.text(max_size=20))
def test_a_family_reads_back_what_it_writes(format_, calls, dumps, places, before, after):
    answer = format_.write(calls, dumps)
    if not format_.takes_text_around:
        before = after = ""
    if any(format_.begins.search(text) for text in (before, after, before + "```")) or after.lstrip(SPACE)[:1] in "{;[":
        before = after = ""
    tools = [ToolSpec(name) for name, _ in calls]
    parts = parse(format_.family.parser(tools), before + answer + after, places)
    assert calls_of(parts) == [(name, dumps(value)) for name, value in calls]
    assert text_of(parts) == before.rstrip(SPACE) + after.lstrip(SPACE)


@each_format
@given(fragment_lists, places)
@example(["<tool_call>", " ", "<tool_call>", '{"name": "get", ', '"arguments": ', "{", "}}"], [3, 12, 13])
@example(["`", "```tool_code", '{"name": "get", ', '"parameters": ', "{", "}}", "`"], [1, 2, 5])
@example(["</think>", "<", "<think>", "가", "<", "</think>", "\n"], [1])
def test_pieces_do_not_matter(format_, fragments, places):
    answer = "".join(fragments)
    for style in (None, THINKS, ReasoningStyle("<think>", "</think>", starts_inside=True)):
        whole = parse(make_parser(format_.family, TOOLS, style), answer)
        assert parse(make_parser(format_.family, TOOLS, style), answer, places) == whole
        assert parse(make_parser(format_.family, TOOLS, style), answer, range(len(answer))) == whole


@each_format
def test_random_answers_lose_no_text(format_):
    rng = random.Random(7)
    halves = format_.write([("get", {"a": "X"})]).split("X")
    fragments = [*FRAGMENTS, *(halves * 6)]
    for _ in range(NUM_RANDOM_ANSWERS):
        answer = "".join(rng.choices(fragments, k=rng.randrange(16)))
        parts = parse(make_parser(format_.family, TOOLS, rng.choice([None, THINKS])), answer, [rng.randrange(60)])
        given_out = Counter(char for _, _, text in parts for char in text if char in WORDS)
        assert given_out == Counter(char for char in answer if char in WORDS), (answer, parts)
        if not calls_of(parts) and all(kind == "text" for kind, _, _ in parts) and "think" not in answer:
            assert text_of(parts) == answer


@each_format
@given(st.text())
def test_text_without_calls_is_text(format_, text):
    assert text_of(parse(format_.family.parser(TOOLS), text)) == text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<tool_call>", "<tool_call>"),
        ('<tool_call>\n{"name": "get"', '<tool_call>\n{"name": "get"'),
        ('a\n<tool_call>\n{"name": "get", "arguments": ', 'a\n<tool_call>\n{"name": "get", "arguments": '),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": "get"}</tool_call>', None),
        ('<tool_call>{"name": "get", "arguments": "{}"}</tool_call>', None),
        ('<tool_call>{"name": "get", "name": "get", "arguments": {}}</tool_call>', None),
        ('<tool_call>{"arguments": {"a": nul}, "name": "get"}</tool_call>', None),
        ('<tool_call>{"arguments": {"a": "\\x"}, "name": "get"}</tool_call>', None),
        ('<tool_call>{"arguments": {"a": 01}, "name": "get"}</tool_call>', None),
        ('<tool_call>{"arguments": {"a": "\n"}, "name": "get"}</tool_call>', None),
        ('<tool_call>{"arguments": {"a" 1}, "name": "get"}</tool_call>', None),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None),
    ],
)
def test_what_is_no_call_is_text(answer, expected):
    parts = parse(FORMATS["hermes"].family.parser(TOOLS), answer, range(len(answer)))
    assert parts == [("text", 0, expected or answer)]


def test_a_call_is_given_out_when_its_arguments_begin():
    parser = FORMATS["hermes"].family.parser(TOOLS)
    assert parser.push('I look.\n<tool_call>\n{"name": "get", "arguments"') == [Part("text", "I look.")]
    assert parser.push(': {"a"') == [Part("call", "get", 0), Part("arguments", '{"a"', 0)]
    assert parser.push(": [1") == [Part("arguments", ": [1", 0)]
    assert parser.push("]}") == [Part("arguments", "]}", 0)]
    assert parser.push("}\n</tool_call>\n<tool") == []
    assert parser.push('_call>{"arguments": {"b": 2}, ') == []
    assert parser.push('"name": "get_weather"') == [Part("call", "get_weather", 1), Part("arguments", '{"b": 2}', 1)]
    assert parser.push("}") == []
    assert parser.finish() == []


def test_arguments_that_the_text_ends_in_stay_as_they_are():
    parts = parse(FORMATS["hermes"].family.parser(TOOLS), '<tool_call>{"name": "get", "arguments": {"a": "b\\')
    assert parts == [("call", 0, "get"), ("arguments", 0, '{"a": "b\\')]


def test_text_goes_on_where_arguments_break_off():
    parts = parse(FORMATS["hermes"].family.parser(TOOLS), '<tool_call>{"name": "get", "arguments": {"a": ]} b')
    assert parts == [("call", 0, "get"), ("arguments", 0, '{"a": '), ("text", 0, "]} b")]


@pytest.mark.parametrize(
    ("name", "answer", "calls", "text"),
    [
        ("llama", '<|python_tag|>{"name": "get", "parameters": {}}', [("get", "{}")], ""),
        ("llama", 'Well: <|python_tag|>{"name": "get", "parameters": {}}', [("get", "{}")], "Well:"),
        ("llama", '{"name": "get", "parameters": {}}\n{"name": "get", "parameters": {}};', [("get", "{}")] * 2, ""),
        ("llama", '{"name": "Ada", "age": 36}', [], '{"name": "Ada", "age": 36}'),
        ("llama", '{"\\u006eame": "get", "parameters": {}}', [], '{"\\u006eame": "get", "parameters": {}}'),
        ("llama", '{"name": "\\u0067et", "parameters": {}}', [], '{"name": "\\u0067et", "parameters": {}}'),
        ("llama", '{"parameters": {}, "name": "get"}', [], '{"parameters": {}, "name": "get"}'),
        ("llama", 'So: {"name": "get", "parameters": {}}', [], 'So: {"name": "get", "parameters": {}}'),
        ("gemma", '{"name": "get", "parameters": {}}', [("get", "{}")], ""),
        ("gemma", '\n```json\n{"name": "get", "parameters": {}}\n```\n', [("get", "{}")], ""),
        ("gemma", '```json\n{"name": "x"}\n```', [], '```json\n{"name": "x"}\n```'),
        ("gemma", 'Hm ```json\n{"name": "get", "parameters": {}}\n```', [], None),
        ("mistral", '[TOOL_CALLS][{"name": "get", "arguments": {}, "id": "123456789"}] x', [("get", "{}")], "x"),
        ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {}}, 1]', [("get", "{}")], ", 1]"),
        ("named mistral", "[TOOL_CALLS]get[CALL_ID]a1B2c3D4e[ARGS]{} x", [("get", "{}")], "x"),
        ("named mistral", "[TOOL_CALLS]get{}", [("get", "{}")], ""),
        ("named mistral", "[TOOL_CALLS]other[ARGS]{}", [], "[TOOL_CALLS]other[ARGS]{}"),
        ("hermes", '{"name": "get", "arguments": {}}', [("get", "{}")], ""),
        ("hermes", '```json\n{"name": "get", "arguments": {}}\n```', [("get", "{}")], ""),
        ("hermes", '{"name": "Ada", "arguments": {}}', [], '{"name": "Ada", "arguments": {}}'),
        ("hermes", 'So: {"name": "get", "arguments": {}}', [], 'So: {"name": "get", "arguments": {}}'),
        ("hermes", tagged([("get", {"a": "</tool_call> <tool_call>"})]), [("get", '{"a": "</tool_call> <tool_call>"}')], ""),
        ("hermes", '<tool_call>{"name": "get", "arguments": {}} and <tool_call> on', [("get", "{}")], " and <tool_call> on"),
        ("hermes", '<tool_call>{"name": "get", "arguments": {}} \n<tool_call> on', [("get", "{}")], " \n<tool_call> on"),
    ],
)  # fmt: skip
def test_forms_of_each_family(name, answer, calls, text):
    parts = parse(FORMATS[name].family.parser(TOOLS), answer, range(len(answer)))
    assert calls_of(parts) == calls
    assert text_of(parts) == (answer if text is None else text)


@pytest.mark.parametrize("size", [1, 7, 10 * MAX_HELD_CHARS])
def test_what_is_held_back_has_an_end(size):
    """The call at the end is found: what was given up on is text up to there."""
    long = '<tool_call>{"arguments": {"a": "' + "x" * MAX_HELD_CHARS
    answer = long + '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
    parts = parse(FORMATS["hermes"].family.parser(TOOLS), answer, range(0, len(answer), size))
    assert parts == [("text", 0, long), ("call", 0, "get"), ("arguments", 0, "{}")]


@pytest.mark.parametrize("size", [1, 10 * MAX_HELD_CHARS])
def test_long_white_space_is_given_out(size):
    answer = " " * (MAX_HELD_CHARS + 100) + '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
    parts = parse(FORMATS["hermes"].family.parser(TOOLS), answer, range(0, len(answer), size))
    assert parts == [("text", 0, " " * MAX_HELD_CHARS), ("call", 0, "get"), ("arguments", 0, "{}")]


@pytest.mark.parametrize(("depth", "is_whole"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_arguments_nest_up_to_a_bound(depth, is_whole):
    value = '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
    parts = parse(
        FORMATS["hermes"].family.parser(TOOLS), f'<tool_call>{{"name": "get", "arguments": {value}}}</tool_call>'
    )
    assert (calls_of(parts) == [("get", value)]) == is_whole


class UntilMarker(Reader):
    def __init__(self, marker: str):
        super().__init__()
        self.marker = Marker(marker)

    def _program(self):
        self.found = yield from self._until(self.marker, "text")


@given(st.text("ab ", min_size=1, max_size=6).filter(lambda m: " " not in m), st.text("ab ", max_size=30), places)
def test_a_marker_is_found_where_it_first_stands(marker, text, places):
    reader = UntilMarker(marker)
    shown = text_of(parse(reader, text, places))
    at = text.find(marker)
    assert reader.found == (at >= 0)
    assert shown == (text if at < 0 else text[:at].rstrip(SPACE))
