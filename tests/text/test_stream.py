"""Tokens back to text: joined pieces equal the whole, nothing at or after a stop string leaves, no text is lost."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jilju.errors import InvalidValue
from jilju.text.detokenizer import Detokenizer
from jilju.text.stops import StopMatcher, StopStrings
from jilju.text.stream import Piece, TextStream

NUM_IDS = 272  # of the small vocabulary; the last seven are the marked tokens
ids_lists = st.lists(st.integers(0, NUM_IDS - 1), max_size=40)
short_texts = st.text(alphabet="ab한👍", max_size=40)
stop_sets = st.lists(st.text(alphabet="ab한👍", min_size=1, max_size=5), max_size=6)


def expected_stop(text, stops):
    """By definition: the match that ends first; of those, the longest."""
    ends = [(at + len(stop), at, stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    if not ends:
        return text, None
    _, at, stop = min(ends)
    return text[:at], stop


def cut(text, places):
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(ids_lists, st.booleans())
def test_pieces_join_to_the_whole(tiny, ids, skip):
    detokenizer = Detokenizer(tiny, skip)
    pieces = [detokenizer.push(id_) for id_ in ids] + [detokenizer.finish()]
    assert "".join(pieces) == tiny.decode(ids, skip_special_tokens=skip)


@given(st.text())
@example("👨‍👩‍👧‍👦 대한민국 \u1112\u119e\u11ab")
def test_no_replacement_character_for_what_can_still_complete(tiny, text):
    detokenizer = Detokenizer(tiny)
    ids = list(text.encode())  # the first 256 tokens are the bytes
    shown = ""
    for id_ in ids:
        shown += detokenizer.push(id_)
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


@pytest.mark.parametrize(
    ("data", "shown"),
    [(b"\xff", "\ufffd"), (b"\xe2\x82", ""), (b"\xe2\x82a", "\ufffda"), (b"\xc0\xaf", "\ufffd\ufffd")],
)
def test_bytes_that_cannot_complete_are_replaced_at_once(tiny, data, shown):
    detokenizer = Detokenizer(tiny)
    assert "".join(map(detokenizer.push, data)) == shown


def test_a_character_completes_across_a_skipped_token(tiny):
    detokenizer = Detokenizer(tiny)
    end = tiny.special_texts["<|im_end|>"]
    assert [detokenizer.push(id_) for id_ in (0xE2, 0x82, end, 0xAC)] == ["", "", "", "€"]


@given(short_texts, stop_sets, st.lists(st.integers(0, 40), max_size=6))
@example("aab", ["ab", "aab", "b"], [1, 2])
@example("abab", ["abb", "bab"], [])
def test_the_first_stop_string_is_found_however_the_text_is_cut(text, stops, places):
    matcher = StopMatcher(stops)
    want_text, want_stop = expected_stop(text, stops)
    left = ""
    for part in cut(text, places):
        left += matcher.push(part)
        assert want_text.startswith(left)
    left += matcher.finish()
    assert (left, matcher.matched) == (want_text, want_stop)


@given(short_texts, stop_sets)
def test_only_what_can_become_a_stop_string_is_held(text, stops):
    matcher = StopMatcher(stops)
    seen = left = ""
    for char in text:
        seen += char
        left += matcher.push(char)
        if matcher.matched is not None:
            return
        held = seen[len(left) :]
        beginnings = [seen[at:] for at in range(len(seen)) if any(stop.startswith(seen[at:]) for stop in stops)]
        assert held == max(beginnings, key=len, default="")


def test_nothing_leaves_after_a_stop_string():
    matcher = StopMatcher(["END"])
    assert [matcher.push("a EN"), matcher.push("D b"), matcher.push("END"), matcher.finish()] == ["a ", "", "", ""]
    assert matcher.matched == "END"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidValue, match="at least one character") as caught:
        StopMatcher(["a", ""])
    assert caught.value.param == "stop"


def test_many_long_overlapping_stop_strings_take_few_steps():
    """16 stops of 256 characters over a text that almost matches each: steps are counted, not timed."""
    strings = StopStrings(["a" * (240 + index) + "b" for index in range(16)])
    matcher = StopMatcher(strings)
    steps = 0
    follow = strings.step

    def counted(state, char):
        nonlocal steps
        while state and char not in strings._next[state]:
            steps += 1
            state = strings._fallback[state]
        steps += 1
        return follow(state, char)

    strings.step = counted
    text = ("a" * 239 + "c") * 100
    assert matcher.push(text) == text
    assert steps <= 3 * len(text)


@given(ids_lists, stop_sets.map(tuple), st.integers(0, 5), st.booleans())
def test_a_streamed_answer_is_the_whole_one(tiny, ids, stop, min_tokens, skip):
    options = {"stop": stop, "min_tokens": min_tokens, "skip_special_tokens": skip}
    stream = TextStream(tiny, **options)
    pieces = [stream.push(id_) for id_ in ids] + [stream.finish()]
    joined = Piece("".join(piece.text for piece in pieces), pieces[-1].stop)
    assert joined == TextStream(tiny, **options).whole(ids)
    if not stop:
        assert joined == Piece(tiny.decode(ids, skip_special_tokens=skip))


@given(short_texts, stop_sets.map(tuple), st.integers(0, 30))
def test_stop_strings_count_after_min_tokens_only(tiny, text, stop, min_tokens):
    ids = list(text.encode())
    early = bytes(ids[:min_tokens]).decode(errors="ignore")
    want_text, want_stop = expected_stop(text[len(early) :], stop)
    assert TextStream(tiny, stop=stop, min_tokens=min_tokens).whole(ids) == Piece(early + want_text, want_stop)


def test_one_piece_a_token_and_the_rest_at_the_end(tiny):
    stream = TextStream(tiny, stop=("bc",))
    assert [stream.push(ord(char)).text for char in "abab"] == ["a", "", "ba", ""]
    assert stream.finish() == Piece("b")


def test_a_stop_string_split_over_bytes_and_tokens(tiny):
    stream = TextStream(tiny, stop=("대한",))
    pieces = [stream.push(byte) for byte in "a대한b".encode()]
    assert "".join(piece.text for piece in pieces) == "a" and pieces[-1].stop == "대한"
    assert stream.finish() == Piece("", "대한")
