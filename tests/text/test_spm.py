"""SPM on small vocabularies: the ids are those of the definition, any text comes back, and every table that lies is refused.
tests/text/test_tokenizer_golden.py compares with llama.cpp."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.errors import ModelFileError
from jilju.text.detokenizer import Detokenizer
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.spm import SHORT

PREFIX = "tokenizer.ggml."
MARKED = {"<unk>": 2, "<s>": 3, "<end_of_turn>": 3, "[PAD]": 5, "\n\n": 4, "  ": 4, "<b>": 4}
ALPHABET = "ab▁대"


def make(normal, **changes):
    """Metadata: `normal` maps tokens to scores."""
    tokens = [*MARKED, *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [*MARKED.values(), *[6] * 256, *[1] * len(normal)],
        "scores": [0.0] * (len(tokens) - len(normal)) + list(normal.values()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
        **changes,
    }
    return {PREFIX + key: value for key, value in fields.items() if value is not None}


NORMAL = {
    token: -float(score) for score, token in enumerate(["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc", "abc", "▁▁"])
}
BYTE_0 = len(MARKED)


def load(normal=NORMAL, **changes):
    return load_tokenizer(make(normal, **changes), file="tiny.gguf")


def texts(tokenizer, ids):
    return [tokenizer.token_text(id_) for id_ in ids]


def merged_by_definition(text, scores):
    """The joined pair with the highest score first, the leftmost of equals, until no pair is a token."""
    parts = list(text.replace(" ", "▁"))
    while pairs := [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


tokens = st.text(ALPHABET, min_size=1, max_size=5)
vocabularies = st.dictionaries(tokens, st.sampled_from([0.0, -1.0, -2.0, -3.5, -1000.0]), max_size=25)
written = st.text("ab 대c", max_size=3 * SHORT)


@settings(deadline=None)
@given(vocabularies, written.filter(lambda text: "  " not in text))
def test_ids_are_those_of_the_definition(normal, text):
    want = []
    for part in merged_by_definition(text, normal):
        want += [part] if part in normal else [f"<0x{byte:02X}>" for byte in part.encode()]
    metadata = make(normal)
    got = load_tokenizer(metadata, file="f").encode(text)
    assert [metadata[PREFIX + "tokens"][id_] for id_ in got] == want


@settings(deadline=None)
@given(vocabularies, st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])), st.booleans())
def test_any_text_comes_back(normal, text, adds_space):
    tokenizer = load({"▁": -5.0, **normal}, add_space_prefix=adds_space)
    marks = text.count("\n\n") + text.count("  ") + text.count("<b>")
    ids = tokenizer.encode(text)
    assert not set(ids) & tokenizer.special_ids
    if not (adds_space and marks):  # with a prefix, what follows a marked token gets a space as well
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("piece", ["a", "ab", "abc", "ba"])
def test_a_long_text_without_a_place_to_cut(piece):
    """Of a length at which looking through all pairs for each merge would take minutes."""
    scores = {"a" * 2**power: -float(power) for power in range(6)} | {"b": -9.0, "c": -9.0, "ab": -7.0, "bcab": -8.0}
    tokenizer = load(scores)
    num = 200_000
    ids = tokenizer.encode(piece * num)
    assert tokenizer.decode(ids) == piece * num
    want = {"a": ["a" * 32] * (num // 32), "ab": ["ab"] * num, "ba": ["b", *["ab"] * (num - 1), "a"]}
    if piece in want:
        assert texts(tokenizer, ids) == want[piece]
    else:
        few = texts(tokenizer, tokenizer.encode(piece * 10))  # short enough for the other way
        assert texts(tokenizer, ids)[: len(few) - 4] == few[:-4]


def test_what_no_token_spells_is_bytes():
    tokenizer = load()
    assert tokenizer.encode("é") == [BYTE_0 + 0xC3, BYTE_0 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("é")) == "é"
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(id_) for id_ in tokenizer.encode("é")] == ["", "é"]


def test_a_space_in_front_where_the_file_wants_it():
    """Also where it says nothing, and after each special token; `decode` takes the first one off again."""
    for given_, pieces in ((False, ["ab"]), (True, [" ab"]), (None, [" ab"])):
        tokenizer = load(add_space_prefix=given_)
        assert texts(tokenizer, tokenizer.encode("ab")) == pieces
        assert tokenizer.decode(tokenizer.encode("ab", add_special_tokens=True)) == "ab"
    assert texts(tokenizer, tokenizer.encode("ab<b>ab")) == [" ab", "<b>", " ab"]
    assert texts(tokenizer, tokenizer.encode("<s>ab", parse_special=True)) == ["<s>", " ab"]
    assert tokenizer.encode("") == []


def test_user_defined_tokens_are_found_first_and_control_tokens_only_where_parsed():
    tokenizer = load({**NORMAL, **dict.fromkeys(["<", ">", "s", "<s", "s>"], -20.0)})
    assert texts(tokenizer, tokenizer.encode("a\n\n<b>a")) == ["a", "\n\n", "<b>", "a"]
    assert texts(tokenizer, tokenizer.encode("   a")) == ["  ", " a"]
    assert texts(tokenizer, tokenizer.encode("<s>")) == ["<s", ">"], "merging does not make a control token"
    assert texts(tokenizer, tokenizer.encode("a<s>", parse_special=True)) == ["a", "<s>"]


def test_unused_and_byte_tokens_are_no_result_of_merging():
    normal = {
        **NORMAL,
        **dict.fromkeys(["[", "]", "PAD", "[PAD", "P", "A", "D", "PA", "<0x41", "<", "0", "x", "4", "1", ">"], -30.0),
    }
    normal |= dict.fromkeys(["<0", "<0x", "<0x4"], -30.0)
    tokenizer = load(normal)
    assert texts(tokenizer, tokenizer.encode("[PAD]")) == ["[PAD", "]"]
    assert texts(tokenizer, tokenizer.encode("<0x41>")) == ["<0x41", ">"]
    assert tokenizer.token_bytes(3) == b"" and tokenizer.token_bytes(BYTE_0 + 0x41) == b"A"


def test_bos_and_eos_as_the_file_says():
    """bos where it says nothing, as models of this kind do."""
    assert load().encode("a", add_special_tokens=True)[0] == 1
    assert 1 not in load(add_bos_token=False).encode("a", add_special_tokens=True)
    assert load(add_eos_token=True).encode("a", add_special_tokens=True)[-1] == 2
    assert load(eos_token_id=1).eos_ids == (1, 2), "<end_of_turn> ends a turn by its text"
    assert load(eot_token_id=0).eos_ids == (2, 0)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("scores", None, "scores"),
        ("scores", lambda s: s[:-1], "scores"),
        ("scores", lambda s: [*s[:-1], float("nan")], r"scores\[\d+\]"),
        ("scores", lambda s: [*s[:-1], float("inf")], r"scores\[\d+\]"),
        ("scores", lambda s: [*s[:-1], 1], r"scores\[\d+\]"),
        ("token_type", lambda t: [1 if type_ == 6 else type_ for type_ in t], "tokens"),
        ("tokens", lambda t: ["bytes" if text == "<0x7F>" else text for text in t], r"tokens\[\d+\]"),
        ("tokens", lambda t: [*t[:-1], t[0]], r"tokens\[0\]"),
        ("bos_token_id", None, "bos_token_id"),
        ("pre", "qwen2", "pre"),
        ("add_space_prefix", 1, "add_space_prefix"),
        ("remove_extra_whitespaces", True, "remove_extra_whitespaces"),
        ("remove_extra_whitespaces", 0, "remove_extra_whitespaces"),
        ("precompiled_charsmap", [1, 2, 3], "precompiled_charsmap"),
    ],
)
def test_a_table_that_lies_is_refused_by_name(key, value, field):
    metadata = make(NORMAL)
    changed = value(metadata[PREFIX + key]) if callable(value) else value
    metadata = {k: v for k, v in {**metadata, PREFIX + key: changed}.items() if v is not None}
    with pytest.raises(ModelFileError, match=rf"^lying\.gguf: tokenizer\.ggml\.{field} is "):
        load_tokenizer(metadata, file="lying.gguf")


def test_a_vocabulary_without_a_byte_is_refused():
    metadata = make(NORMAL)
    at = metadata[PREFIX + "tokens"].index("<0x7F>")
    metadata[PREFIX + "tokens"][at], metadata[PREFIX + "token_type"][at] = "DEL", 1
    with pytest.raises(ModelFileError, match="without the byte token <0x7F>"):
        load_tokenizer(metadata, file="f")
