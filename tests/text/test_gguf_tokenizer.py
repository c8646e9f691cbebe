"""The tokenizer on a small vocabulary: what ids, bytes and special tokens are, and every table that lies is refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jilju.errors import InvalidValue, ModelFileError
from jilju.text.byte_level import LONG, PRE_TOKENIZERS
from jilju.text.gguf_tokenizer import MAX_MERGES, MAX_TOKENS, load_tokenizer
from jilju.text.specials import longest_of

PREFIX = "tokenizer.ggml."


def texts(tokenizer, ids):
    return [tokenizer.token_text(id_) for id_ in ids]


def test_merges_make_words(tiny):
    assert texts(tiny, tiny.encode("hello world")) == ["hello", " w", "o", "r", "l", "d"]
    assert [tiny.token_bytes(id_) for id_ in tiny.encode("대")] == ["대".encode()]
    assert texts(tiny, tiny.encode("1234")) == ["1", "2", "3", "4"], "this pre-tokenizer takes digits one by one"


@given(st.text(), st.booleans())
def test_any_text_comes_back(tiny, text, parse_special):
    ids = tiny.encode(text, parse_special=parse_special)
    assert tiny.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@given(text=st.text(alphabet="a b1'\n\t.가\u00a0s", max_size=30))
def test_no_pre_tokenizer_loses_text(tokenizers_by_pre, pre, text):
    tokenizer = tokenizers_by_pre[pre]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@given(text=st.text("aZéß가漢あ 1²½Ⅷ'’s_-(.\n\r\t\u00a0\u0301\u0e01日\x1f", max_size=40) | st.text(max_size=40))
@example(text="don't I'LL we'Re 'sa a's1 x²3 é\n\n  y.\n z")
def test_long_texts_have_the_ids_of_the_whole(tokenizers_by_pre, pre, text):
    scheme = tokenizers_by_pre[pre]._scheme
    assert scheme._ids_of_long(text) == scheme._ids(text)


def test_words_that_return_in_a_long_text(tiny):
    words = "hello world, hello\n  12345 wörld 대 " * 4000
    assert len(words) > LONG
    assert tiny.encode(words) == tiny._scheme._ids(words)
    assert tiny.decode(tiny.encode(words)) == words


def test_text_of_control_tokens_is_text_unless_it_is_to_be_parsed(tiny):
    text = "a<|im_end|>b<unk>"
    assert not set(tiny.encode(text)) & tiny.special_ids
    end, unknown = tiny.special_texts["<|im_end|>"], tiny.special_texts["<unk>"]
    assert [id_ for id_ in tiny.encode(text, parse_special=True) if id_ in tiny.special_ids] == [end, unknown]
    assert tiny.decode(tiny.encode(text, parse_special=True)) == "ab"


def test_user_defined_tokens_are_found_in_any_text(tiny):
    (id_,) = tiny.encode("<tool>")
    assert id_ not in tiny.special_ids and tiny.token_bytes(id_) == b"<tool>"


def test_bos_only_where_asked_and_wanted(tiny, metadata):
    assert tiny.encode("he", add_special_tokens=True)[0] == tiny.bos_id
    assert tiny.bos_id not in tiny.encode("he")
    metadata[PREFIX + "add_bos_token"] = False
    metadata[PREFIX + "add_eos_token"] = True
    other = load_tokenizer(metadata, file="f")
    assert other.encode("he", add_special_tokens=True) == [*other.encode("he"), other.eos_ids[0]]


def test_end_ids_are_the_files_eos_and_known_end_texts(tiny):
    assert texts(tiny, tiny.eos_ids) == ["<|im_end|>", "<|endoftext|>"]


def test_an_end_text_that_is_an_ordinary_token_ends_nothing(metadata):
    metadata[PREFIX + "tokens"].append("</s>")
    metadata[PREFIX + "token_type"].append(1)
    tokenizer = load_tokenizer(metadata, file="f")
    assert tokenizer.vocab_size - 1 not in (*tokenizer.eos_ids, *tokenizer.special_ids)


def test_bytes_of_each_token_type(tiny, metadata):
    by_text = {text: id_ for id_, text in enumerate(metadata[PREFIX + "tokens"])}
    assert [tiny.token_bytes(id_) for id_ in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tiny.token_bytes(by_text["<0x0A>"]) == b"\n"
    assert tiny.token_bytes(by_text["[PAD0]"]) == b"" and tiny.token_text(by_text["[PAD0]"]) == "[PAD0]"
    assert tiny.token_bytes(by_text["<|im_end|>"]) == b"<|im_end|>"
    assert tiny.token_text(by_text["ëĮ"]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tiny, bad):
    with pytest.raises(InvalidValue, match=f"token id {bad} .* allowed: 0 to {tiny.vocab_size - 1}"):
        tiny.decode([bad])


def test_a_lone_surrogate_is_refused(tiny):
    with pytest.raises(InvalidValue, match=r"U\+D800, at character 3"):
        tiny.encode("abc\ud800")


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("model", "t5", "model"),
        ("model", None, "model"),
        ("pre", "made-up", "pre"),
        ("pre", 7, "pre"),
        ("add_space_prefix", True, "add_space_prefix"),
        ("add_bos_token", 1, "add_bos_token"),
        ("bos_token_id", -1, "bos_token_id"),
        ("bos_token_id", True, "bos_token_id"),
        ("eos_token_id", 10**6, "eos_token_id"),
        ("eot_token_id", 1.0, "eot_token_id"),
        ("tokens", None, "tokens"),
        ("tokens", "abc", "tokens"),
        ("tokens", [], r"tokens\[0\]"),
        ("tokens", lambda t: [*t[:3], 5, *t[4:]], r"tokens\[3\]"),
        ("tokens", lambda t: [*t[:3], t[2], *t[4:]], r"tokens\[2\]"),
        ("tokens", lambda t: [*t[:3], "", *t[4:]], r"tokens\[3\]"),
        ("tokens", lambda t: [*t[:3], "x" * 5000, *t[4:]], r"tokens\[3\]"),
        ("tokens", lambda t: t + t[:1] * MAX_TOKENS, "tokens"),
        ("tokens", lambda t: [*t, "extra"], "token_type"),
        ("tokens", lambda t: ["<0x-1>" if x == "<0x0A>" else x for x in t], r"tokens\[\d+\]"),
        ("tokens", lambda t: ["<0xGG>" if x == "<0x0A>" else x for x in t], r"tokens\[\d+\]"),
        ("token_type", None, "token_type"),
        ("token_type", lambda t: t[:-1], "token_type"),
        ("token_type", lambda t: [0, *t[1:]], r"token_type\[0\]"),
        ("token_type", lambda t: [*t[:-1], 7], r"token_type\[\d+\]"),
        ("token_type", lambda t: [2**63, *t[1:]], r"token_type\[0\]"),
        ("merges", None, "merges"),
        ("merges", lambda m: ["he", *m], r"merges\[0\]"),
        ("merges", lambda m: [*m, "a b c"], r"merges\[\d+\]"),
        ("merges", lambda m: [*m, "zz h"], r"merges\[\d+\]"),
        ("merges", lambda m: [*m, "h z"], r"merges\[\d+\]"),
        ("merges", lambda m: [*m, " h"], r"merges\[\d+\]"),
        ("merges", lambda m: [*m, m[0]], r"merges\[\d+\]"),
        ("merges", lambda m: m * MAX_MERGES, "merges"),
    ],
)
def test_a_table_that_lies_is_refused_by_name(metadata, key, value, field):
    metadata[PREFIX + key] = value(metadata[PREFIX + key]) if callable(value) else value
    with pytest.raises(ModelFileError, match=rf"^lying\.gguf: tokenizer\.ggml\.{field} is ") as caught:
        load_tokenizer(metadata, file="lying.gguf")
    assert len(str(caught.value)) < 600


def test_special_tokens_nested_without_end_are_refused(metadata):
    nested = ["<" + "z" * length for length in range(1, 3000)]
    metadata[PREFIX + "tokens"] += nested
    metadata[PREFIX + "token_type"] += [3] * len(nested)
    with pytest.raises(ModelFileError, match="nest in one another"):
        load_tokenizer(metadata, file="f")


@given(st.sets(st.text(alphabet="ab<|", min_size=1, max_size=4), min_size=1), st.text(alphabet="ab<|"))
def test_the_longest_special_text_at_the_first_place_is_found(specials, text):
    places = [(at, -len(s), s) for s in specials for at in range(len(text)) if text.startswith(s, at)]
    found = longest_of(specials).search(text)
    assert (found and (found.start(), found.group())) == (min(places)[::2] if places else None)
