"""Matchers over the bytes of a model's tokens: a mask holds what its grammar takes, and never a control token unasked."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits

from jilju.text import matcher as matcher_module
from jilju.text.gguf_tokenizer import load_token_table, load_tokenizer
from jilju.text.matcher import FREE_NS, MAX_ERROR_CHARS, TOKEN_NS, GrammarMatcher, GrammarSource
from jilju.text.tokenizer import TokenTable
from tests.text.conftest import make_metadata
from tests.text.test_spm import make as spm_metadata

VOCAB = 300  # ids of a mask; the table has fewer
WORDS = -(-VOCAB // 32)


def table_of(metadata) -> TokenTable:
    shed = {key: value for key, value in metadata.items() if not key.endswith((".merges", ".scores"))}
    return load_token_table(shed, file="small.gguf")


TABLES = {"gpt2": table_of(make_metadata()), "llama": table_of(spm_metadata({"▁": -1.0, "▁a": -2.0, "ab": -3.0}))}
SOURCES = {name: GrammarSource(table, VOCAB) for name, table in TABLES.items()}


def ids_of(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def allowed(matcher: GrammarMatcher) -> list[int]:
    mask = np.full(WORDS, 0xFFFFFFFF, np.uint32)
    matcher.fill(mask)
    return ids_of(mask)


def taken(source: GrammarSource, grammar: str, ids: list[int]) -> GrammarMatcher:
    matcher = source.make(grammar)
    assert all(matcher.take(id_) for id_ in ids), matcher.error
    return matcher


@pytest.mark.parametrize("metadata", [make_metadata(), spm_metadata({"▁a": -1.0, "▁": -2.0})], ids=["gpt2", "llama"])
def test_a_table_says_of_each_id_what_the_tokenizer_says(metadata):
    assert_as_the_tokenizer(metadata)


def test_the_tables_of_named_models_say_what_their_tokenizers_say(model):
    assert_as_the_tokenizer(model[1])


def assert_as_the_tokenizer(metadata) -> None:
    table, tokenizer = table_of(metadata), load_tokenizer(metadata, file="small.gguf")
    assert table.tokens == [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
    assert (table.special_ids, table.eos_ids) == (tokenizer.special_ids, tokenizer.eos_ids)


def is_whole(regex: str, text: bytes) -> bool:
    try:
        return re.fullmatch(regex, text.decode()) is not None
    except UnicodeDecodeError:  # in the middle of a character
        return False


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "regex", ["a[bc]{2,4}", "(ab|a )*c", "[^x]{1,6}", "hello|help|heap", "[0-9]{1,3}(\\.[0-9]+)?", "é+"]
)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_every_way_through_the_masks_ends_in_the_grammar(name, regex, seed, data):
    rng, source, table = random.Random(seed), SOURCES[name], TABLES[name]
    grammar = LLMatcher.grammar_from_regex(regex)
    ids: list[int] = []
    matcher = source.make(grammar)
    for _ in range(12):
        choices = allowed(matcher)
        assert not table.special_ids.intersection(choices) and max(choices, default=0) < len(table.tokens)
        assert all(table.tokens[id_] for id_ in choices), "no token without bytes"
        if not choices:
            assert matcher.is_accepting
            break
        other = data.draw(st.sampled_from(choices))
        assert taken(source, grammar, ids).take(other), "each that is allowed is taken"
        ids.append(rng.choice(choices))
        assert matcher.take(ids[-1]), matcher.error
        text = b"".join(table.tokens[id_] for id_ in ids)
        assert not matcher.error
        assert matcher.is_accepting == is_whole(regex, text), text
        if matcher.is_stopped:
            assert matcher.is_accepting
            break


def test_a_mask_allows_what_the_grammar_takes():
    """Where bytes are not forced, whose tokens are chosen for the model, all that fit are there."""
    table, source = TABLES["gpt2"], SOURCES["gpt2"]
    for regex, before in (("[a-z]{1,5}", b""), ("[0-9]+", b"1"), ("(hell|help|hi)o*", b"h")):
        grammar = LLMatcher.grammar_from_regex(regex)
        ids = [table.tokens.index(bytes([byte])) for byte in before]
        choices = allowed(taken(source, grammar, ids))
        for id_, token in enumerate(table.tokens):
            takes = bool(token) and id_ not in table.special_ids and taken(source, grammar, ids).take(id_)
            assert (id_ in choices) == takes, (regex, token)


def test_end_ids_are_in_no_mask_but_where_the_grammar_names_one():
    source, table = SOURCES["gpt2"], TABLES["gpt2"]
    end = table.tokens.index(b"<|im_end|>")
    assert end in table.eos_ids
    a = table.tokens.index(b"a")
    for grammar in ("start: /a*/", 'start: "a"', 'start: "a" | "ab"'):
        matcher = taken(source, grammar, [a])
        assert not set(allowed(matcher)) & set(table.eos_ids) and matcher.is_accepting
    named = taken(source, 'start: "a" <|im_end|> "b"', [a])
    assert allowed(named) == [end]
    other = taken(source, 'start: "a" <|im_start|> "b"', [a])
    assert allowed(other) == [table.tokens.index(b"<|im_start|>")]


def test_what_can_follow_and_what_is_whole():
    source, table = SOURCES["gpt2"], TABLES["gpt2"]
    a, b = table.tokens.index(b"a"), table.tokens.index(b"b")
    matcher = source.make('start: "ab" | "abb"')
    assert (matcher.is_accepting, matcher.is_stopped) == (False, False)
    assert matcher.take(a) and (matcher.is_accepting, matcher.is_stopped) == (False, False)
    assert matcher.take(b) and (matcher.is_accepting, matcher.is_stopped) == (True, False)
    assert matcher.take(b) and (matcher.is_accepting, matcher.is_stopped) == (True, True)
    assert allowed(matcher) == []


def test_filling_changes_nothing():
    source, table = SOURCES["gpt2"], TABLES["gpt2"]
    grammar = LLMatcher.grammar_from_json_schema({"type": "object", "properties": {"hello": {"type": "integer"}}})
    often, once = source.make(grammar), source.make(grammar)
    for byte in b'{"hello": 12':
        masks = [allowed(often) for _ in range(3)]
        assert masks[0] == masks[1] == masks[2] == allowed(once)
        id_ = table.tokens.index(bytes([byte]))
        assert often.take(id_) and once.take(id_)


def test_errors_are_told_in_a_line_and_allow_nothing():
    source = SOURCES["gpt2"]
    a, z = (TABLES["gpt2"].tokens.index(text) for text in (b"a", b"z"))
    strayed = source.make('start: "ab"')
    assert strayed.take(a) and not strayed.take(z)
    for matcher in (strayed, source.make("((("), source.make(""), source.make("{}"), source.make('{"grammars": 3}')):
        assert matcher.error and "\n" not in matcher.error and len(matcher.error) <= MAX_ERROR_CHARS
        assert not matcher.is_accepting and not matcher.is_stopped
        assert allowed(matcher) == [] and not matcher.take(a)


def test_a_grammar_beyond_the_limits_of_the_library_is_an_error(monkeypatch):
    """2 ** 60 states of a deterministic automaton, of which a mask makes some and an answer ever more."""
    monkeypatch.setattr(matcher_module, "parser_limits", lambda: LLParserLimits(max_lexer_states=300))
    table = TABLES["gpt2"]
    matcher = GrammarSource(table, VOCAB).make(LLMatcher.grammar_from_regex("(a|b)*a(a|b){60}"))
    rng, letters = random.Random(0), [table.tokens.index(text) for text in (b"a", b"b")]
    num_taken = 0
    while num_taken < 3000 and matcher.take(rng.choice(letters)):
        allowed(matcher)
        num_taken += 1
    assert 0 < num_taken < 3000 and matcher.error and allowed(matcher) == [] and not matcher.is_accepting


@pytest.mark.parametrize("name", ["fill", "take"])
def test_a_matcher_that_takes_too_much_time_is_an_error(monkeypatch, name):
    now_ns = [0]
    monkeypatch.setattr(matcher_module.time, "thread_time_ns", lambda: now_ns[0])
    source, a = SOURCES["gpt2"], TABLES["gpt2"].tokens.index(b"a")
    matcher = source.make("start: /a*/")
    real = getattr(type(matcher._inner), {"fill": "unsafe_compute_mask_ptr", "take": "consume_token"}[name])
    per_token_ns = TOKEN_NS + FREE_NS // 10

    class Slow:
        def __getattr__(self, attribute):
            return getattr(inner, attribute)

    def slow(*args):
        now_ns[0] += per_token_ns
        return real(inner, *args)

    inner, matcher._inner = matcher._inner, Slow()
    setattr(matcher._inner, real.__name__, slow)
    num_taken = 0
    while num_taken < 100 and not matcher.error:
        assert a in allowed(matcher) or matcher.error
        num_taken += matcher.take(a)
    assert 9 <= num_taken <= 11, "the free time, a tenth of which each token takes beyond its own"
    assert "ambiguous" in matcher.error and allowed(matcher) == [] and not matcher.take(a)
    assert not matcher.is_accepting and not matcher.is_stopped


def test_an_ambiguous_grammar_ends_before_it_is_slow(monkeypatch):
    monkeypatch.setattr(matcher_module, "FREE_NS", 20_000_000)
    monkeypatch.setattr(matcher_module, "TOKEN_NS", 1_000_000)
    a = TABLES["gpt2"].tokens.index(b"a")
    matcher = SOURCES["gpt2"].make('start: start start | "a" | "aa"')
    num_taken = 0
    while num_taken < 2000 and matcher.take(a):
        allowed(matcher)
        num_taken += 1
    assert num_taken < 2000 and "ambiguous" in matcher.error


@pytest.mark.parametrize("num_ids", [266, 272, 288, 289, 5000])
def test_a_mask_may_have_other_ids_than_the_table(num_ids):
    table = TABLES["gpt2"]
    source = GrammarSource(table, num_ids)
    mask = np.full(-(-num_ids // 32), 0xFFFFFFFF, np.uint32)
    source.make(LLMatcher.grammar_from_regex("[a-z]+")).fill(mask)
    letters = {id_ for id_, token in enumerate(table.tokens) if re.fullmatch(rb"[a-z]+", token)}
    assert set(ids_of(mask)) == letters - table.special_ids
    source.close()


def test_a_vocabulary_without_an_end_cannot_be_held_to_a_grammar():
    table = TABLES["gpt2"]
    with pytest.raises(ValueError, match="no token that ends a text"):
        GrammarSource(TokenTable(table.tokens, table.special_ids, ()), VOCAB)


def test_json_of_a_real_vocabulary_parses(smollm2):
    table = load_token_table(smollm2, file="smollm2")
    source, rng = GrammarSource(table, len(table.tokens)), random.Random(1)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
        "required": ["name", "tags"],
    }  # fmt: skip
    for _ in range(10):
        matcher = source.make(LLMatcher.grammar_from_json_schema({**schema, "additionalProperties": False}))
        ids: list[int] = []
        mask = np.zeros(-(-len(table.tokens) // 32), np.uint32)
        while not matcher.is_stopped and len(ids) < 2000:
            matcher.fill(mask)
            spaces = [id_ for id_ in ids_of(mask) if not table.tokens[id_].isspace()]
            ids.append(rng.choice(spaces or ids_of(mask)))
            assert matcher.take(ids[-1]), matcher.error
        value = json.loads(b"".join(table.tokens[id_] for id_ in ids))
        assert len(value["name"]) <= 8 and set(value["tags"]) <= {"a", "b"}
    source.close()
