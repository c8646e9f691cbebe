"""Grammars of calls, run by llguidance over bytes: they allow every answer a family writes and no call outside its schema, and
parsers read in every allowed answer what the grammar meant."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from jilju.errors import InvalidValue
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.grammar import GrammarSource, to_llguidance
from jilju.text.reasoning import ReasoningStyle
from jilju.text.tools import ToolSpec, make_parser
from jilju.text.tools.family import Llama
from tests.text.tool_answers import FORMATS, INVALID, TOOLS, VALID, calls_of, parse, text_of

NUM_WALKS = 40
MAX_STEPS = 600
CONTROL = (
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)
THINKS = ReasoningStyle("<think>", "</think>")
INSIDE = ReasoningStyle("<think>", "</think>", starts_inside=True)
each_format = pytest.mark.parametrize("name", FORMATS)


class ByteTokens:
    """A token a byte, one that ends the text, and control tokens."""

    eos_token_id, bos_token_id, unk_token_id = 256, None, None
    tokens = tuple(bytes([byte]) for byte in range(256)) + tuple(b"\xff" + t.encode() for t in ("<eos>", *CONTROL))
    special_token_ids = tuple(range(256, 257 + len(CONTROL)))

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(ByteTokens()), eos_token=[256], slices=[])
SPECIAL_IDS = {text: 257 + index for index, text in enumerate(CONTROL)}


def ids_of(answer, special_ids):
    """Control tokens where they are some, bytes otherwise."""
    ids, at = [], 0
    while at < len(answer):
        mark = next((text for text in special_ids if answer.startswith(text, at)), None)
        ids += [special_ids[mark]] if mark else list(answer[at].encode())
        at += len(mark or " ")
    return ids


def matcher_of(grammar):
    matcher = LLMatcher(TOKENIZER, to_llguidance(GrammarSource("lark", grammar)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def allows(grammar, answer, special_ids=None):
    """Whether this can be a whole answer."""
    matcher = matcher_of(grammar)
    ids = ids_of(answer, special_ids or {})
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("special_ids", [{}, SPECIAL_IDS], ids=["texts", "control tokens"])
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
@each_format
def test_valid_calls_are_allowed_and_invalid_ones_are_not(name, choice, special_ids):
    family, write = FORMATS[name].family, FORMATS[name].write
    for tool in TOOLS:
        grammar = family.grammar(TOOLS, choice=tool.name if choice == "named" else choice, special_ids=special_ids)
        for arguments in VALID[tool.name]:
            assert allows(grammar, write([(tool.name, arguments)]), special_ids)
        for arguments in INVALID[tool.name]:
            assert not allows(grammar, write([(tool.name, arguments)]), special_ids)


@each_format
def test_the_choice_says_which_calls_there_are(name):
    family, write = FORMATS[name].family, FORMATS[name].write
    one, other = ("get", {"a": 1}), ("get_weather", {"city": "Seoul"})
    auto, required, named = (family.grammar(TOOLS, choice=choice) for choice in ("auto", "required", "get"))
    assert allows(auto, "") and allows(auto, "No call.")
    assert not allows(required, "") and not allows(required, "No call.")
    assert allows(named, write([one])) and not allows(named, write([other]))
    for grammar in (auto, required):
        assert allows(grammar, write([one, other, one]))
    assert not allows(required, write([("other", {})]))
    assert allows(auto, write([("other", {})])) == (name == "llama")  # where it is an answer in JSON
    for choice in ("auto", "required"):
        single = family.grammar(TOOLS, choice=choice, parallel=False)
        assert allows(single, write([other])) and not allows(single, write([one, other]))


def test_a_template_of_one_call_a_message_gets_one():
    grammar = Llama(parallel=False).grammar(TOOLS, choice="auto", parallel=True)
    write = FORMATS["llama"].write
    assert allows(grammar, write([("get", {})])) and not allows(grammar, write([("get", {}), ("get", {})]))


def test_a_choice_that_is_no_tool_is_refused():
    with pytest.raises(InvalidValue, match="get_weather"):
        FORMATS["hermes"].family.grammar(TOOLS, choice="other")


# Pieces that come near to beginning a call, and some that do.
NEAR = (
    *("<tool_cal", "l>", "<", "[TOOL_", "CALLS]", "```", "```json", "tool_code", "{", '{"name": "', '"', '{"name": "get_w', "eather"),
    *("{ \"name\"", ':"get"', '"name"', "Alice", "}", " ", "\n", "<|python", "_tag|>", "가", ": ", "get", '{"name": "gets"}'),
)  # fmt: skip


@each_format
@settings(deadline=None)
@given(st.lists(st.sampled_from(NEAR), max_size=12))
def test_free_text_is_anything_but_a_call_wrongly_begun(name, pieces):
    text = "".join(pieces)
    grammar = FORMATS[name].family.grammar(TOOLS, choice="auto")
    assert allows(grammar, text) == (FORMATS[name].begins.search(text) is None)


@pytest.mark.parametrize("special_ids", [{}, SPECIAL_IDS], ids=["texts", "control tokens"])
@each_format
def test_thoughts_come_first(name, special_ids):
    family, write = FORMATS[name].family, FORMATS[name].write
    call = write([("get", {"a": 1})])
    thoughts = "\n" + call[: len(call) // 2] + " hm\n"
    for style, begin in ((THINKS, "<think>"), (INSIDE, "")):
        auto, required = (
            family.grammar(TOOLS, choice=choice, reasoning=style, special_ids=special_ids)
            for choice in ("auto", "required")
        )
        plain = {text: id_ for text, id_ in special_ids.items() if "think" in text}  # the rest is text in thoughts
        assert allows(auto, begin + thoughts, plain) and not allows(required, begin + thoughts, plain)
        assert allows(auto, f"{begin}{thoughts}</think>\n\n{call}", plain)
        assert allows(required, f"{begin}{thoughts}</think>\n\n{call}", plain)
        assert allows(auto, f"{begin}hm</think>So.", special_ids)
        assert not allows(required, f"{begin}hm</think>So.", special_ids)
        assert not allows(auto, f"{begin}hm</think>" + write([("get_weather", {})]), special_ids)
        assert allows(required, call, special_ids) == (style is THINKS)
    assert not allows(family.grammar(TOOLS, choice="required"), f"<think>hm</think>{call}")


def is_valid(name, arguments):
    """The schemas of TOOLS, written down a second time."""
    if name == "get":
        return isinstance(arguments, dict)
    if name == "set.alarm-2":
        return isinstance(arguments, dict) and type(arguments.get("at")) in (int, float)
    return (
        isinstance(arguments.get("city"), str)
        and type(arguments.get("days", 1)) is int
        and arguments.get("unit", "c") in ("c", "f")
        and arguments.keys() <= {"city", "days", "unit"}
    )


def walk(matcher, rng, scripts):
    """An answer that the grammar allows, drawn from pieces of the scripts where they go on as it wants; None if it never ends.
    The texts of control tokens stand for themselves."""
    answer = bytearray()
    script = rng.choice([b"", rng.choice(scripts)])
    for _ in range(MAX_STEPS):
        if matcher.is_stopped() or (matcher.is_accepting() and rng.random() < 0.01):
            return answer.decode(errors="ignore")
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if not script:
            whole = rng.choice(scripts)
            start = rng.randrange(len(whole)) if rng.random() < 0.7 else 0
            script = whole[start : start + rng.randrange(1, 100)]
        control = [id_ for id_ in SPECIAL_IDS.values() if mask[id_]]
        if control and rng.random() < 0.5:
            id_ = rng.choice(control)
            answer += ByteTokens.tokens[id_][1:]
        elif mask[script[0]]:
            id_, script = script[0], script[1:]
            answer.append(id_)
        else:
            script = b""
            allowed = [id_ for id_ in b'"}]{:, \n0a`<[/>' if mask[id_]] or np.flatnonzero(mask[:128]).tolist()
            if not allowed:  # inside a character
                allowed = np.flatnonzero(mask[:256]).tolist()
            id_ = rng.choice(allowed)
            answer.append(id_)
        assert matcher.consume_token(id_), matcher.get_error()
    return None


@pytest.mark.parametrize("special_ids", [{}, SPECIAL_IDS], ids=["texts", "control tokens"])
@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
@each_format
def test_every_allowed_answer_is_read_as_it_was_meant(name, choice, special_ids):
    family, write = FORMATS[name].family, FORMATS[name].write
    rng = random.Random(5)
    calls = [(tool, arguments) for tool, valid in VALID.items() for arguments in valid]
    scripts = [write([call, rng.choice(calls)]).encode() for call in calls]
    scripts += [b"So then: {} ```json <think>", '{"name": "get_weather", "x": "가'.encode(), b"</think>\n\n"]
    num_answers = num_calls = 0
    for number in range(NUM_WALKS):
        style = [None, THINKS, INSIDE][number % 3]
        parallel = number % 2 == 0
        grammar = family.grammar(TOOLS, choice=choice, parallel=parallel, reasoning=style, special_ids=special_ids)
        shown = family.shown_specials + (style.shown_specials if style else ())
        assert {text for text, id_ in SPECIAL_IDS.items() if f"<[{id_}]>" in grammar} <= set(shown)
        answer = walk(matcher_of(grammar), rng, scripts)
        if answer is None:
            continue
        parts = parse(make_parser(family, TOOLS, style), answer)
        found = calls_of(parts)
        assert all(is_valid(tool, json.loads(arguments)) for tool, arguments in found), (answer, parts)
        assert parallel or len(found) <= 1, (answer, parts)
        if choice == "auto":
            assert not FORMATS[name].begins.search(text_of(parts).lstrip()), (answer, parts)
        else:
            assert found and not text_of(parts), (answer, parts)
            assert choice == "required" or {tool for tool, _ in found} == {choice}
        num_answers += 1
        num_calls += len(found)
    assert num_answers >= NUM_WALKS // 4 and num_calls >= NUM_WALKS // 8, (num_answers, num_calls)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({}, '{"a": [1, {"b": null}]}', "[]"),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1, "b": 2}', '{"a": "x"}'),
        ({"type": "object", "additionalProperties": False}, "{}", '{"a": 1}'),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object", "required": ["a"]}}}, '{"a": 1}', "{}"),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"b": 1}', "1"),
        ({"x-guidance": {"whitespace_flexible": True}}, '{"a": 1, "b": 2}', '{"a":  1}'),
    ],
)
def test_schemas_are_held_to_as_they_are(schema, valid, invalid):
    grammar = FORMATS["hermes"].family.grammar([ToolSpec("f", parameters=schema)], choice="required")
    answer = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    assert allows(grammar, answer.format(valid)) and not allows(grammar, answer.format(invalid))


def test_a_real_vocabulary_can_write_the_calls(smollm2):
    """Tokens of many bytes, some across the edges of markers and JSON."""
    tokenizer = load_tokenizer(smollm2, file="smollm2.gguf")

    class Tokens:
        eos_token_id, bos_token_id, unk_token_id = tokenizer.eos_ids[0], tokenizer.bos_id, None
        special_token_ids = sorted(tokenizer.special_ids)
        tokens = tuple(
            b"\xff" * (id_ in tokenizer.special_ids) + tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)
        )

        def __call__(self, text):
            return tokenizer.encode(text if isinstance(text, str) else text.decode())

    words = LLTokenizer(TokenizerWrapper(Tokens()), eos_token=list(tokenizer.eos_ids))
    for format_ in FORMATS.values():
        grammar = format_.family.grammar(TOOLS, choice="auto", special_ids=tokenizer.special_texts)
        calls = [("get_weather", {"city": "서울", "days": 3}), ("get", {"a": [1, 2]})]
        matcher = LLMatcher(words, to_llguidance(GrammarSource("lark", grammar)), log_level=0)
        answer = ("Let me look.\n" if format_.takes_text_around else "") + format_.write(calls)
        ids = tokenizer.encode(answer)
        assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), (answer, matcher.get_error())
        assert not matcher.is_error()
