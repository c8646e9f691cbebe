"""Ten thousand texts, cut into tokens at random: what has left after each token is exactly what can have.

The texts are of what breaks streams: Hangul in both forms, emoji of many code points, marks, scripts from the right, code. The
expected text is found another way than by the code: from the bytes so far, and from the definition of a stop string. Seeded
loops, no hypothesis: here many large cases count, tests/text/test_stream.py has the small laws.
"""

import random
import unicodedata
from itertools import accumulate

import pytest

from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.stream import TextStream
from tests.text.conftest import make_metadata

NUM_TEXTS = 10_000
NUM_REAL = 1_000  # of each named model's tokenizer
NUM_BROKEN = 3_000  # texts with bytes that are none

EMOJI = [
    "👍",
    "👍🏽",
    "👨‍👩‍👧‍👦",
    "🏃‍♀️",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "🇰🇷",
    "1️⃣",
    "👩🏿‍🚀",
    "❤️‍🔥",
    "🫱🏻‍🫲🏾",
]
CODE = [
    "def f(x):\n    return x ** 2\n",
    '{"a": [1, 2.5e-3]}',
    "</div>",
    "if (a && b) {\r\n\t--i;\r\n}",
    "λx→x",
    '`r"\\n"`',
]
RTL = ["שָׁלוֹם", "مَرْحَبًا", "\u202bעברית\u202c", "سلام‌ها"]
CJK = ["東京都", "龍\U00020bb7\U0002a6df", "，。「」", "ｶﾞ", "か\u3099", "葛\U000e0100"]
MARKS = ["e\u0301\u0327", "Z\u0351\u036b\u0343", "ק\u05bc\u05b8", "ni\u0303n\u0303o", "\u0d15\u0d4d\u0d37", "a\u20dd"]
SPACES = ["\n", "\r\n", " ", "   ", "\t", "\u3000", "\u200b", "\n\n"]
LATIN = ["hello", " world", "12345", "3.14159", "naïve", "Straße", "…", "\x00\x07", "END", "STOP"]


def hangul(rng):
    text = "".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(rng.randrange(1, 5)))
    kind = rng.randrange(4)
    if kind == 0:
        return unicodedata.normalize("NFD", text)
    if kind == 1:  # old letters, which no syllable joins
        return chr(rng.randrange(0x1100, 0x1160)) + chr(rng.randrange(0x1161, 0x11A8)) + "\u302e"
    return text


def anything(rng):
    code = rng.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)


def make_text(rng):
    parts = []
    for _ in range(rng.randrange(1, 9)):
        kind = rng.randrange(10)
        if kind < 3:
            parts.append(hangul(rng))
        elif kind < 9:
            parts.append(rng.choice((EMOJI, CODE, RTL, CJK, MARKS, SPACES, LATIN)[rng.randrange(7)]))
        else:
            parts.append(anything(rng))
    return "".join(parts).replace("\u2581", "_")  # SPM writes spaces so


def proper_beginnings():
    """Every byte string that is the unfinished beginning of a character. The last byte of 64 characters in a row runs over
    all its values, so one of them shows what comes before it. Halves of surrogate pairs are known by their last byte only."""
    chars = (chr(code).encode(errors="surrogatepass") for code in range(0x80, 0x110000, 0x40))
    return {char[:size] for char in chars for size in range(1, len(char))}


BEGINNINGS = proper_beginnings()


def text_so_far(data):
    """What these bytes say for sure, whatever comes: all but the unfinished character at their end."""
    end = next((end for end in range(max(0, len(data) - 3), len(data)) if data[end:] in BEGINNINGS), len(data))
    return data[:end].decode(errors="replace")


class Cut:
    """A text cut into arbitrary pieces, as a tokenizer whose tokens they are."""

    special_ids = frozenset()

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, token_id):
        return self.pieces[token_id]


def cut_anywhere(rng, data):
    mean = rng.choice((1, 2, 3, 7))
    pieces, at = [], 0
    while at < len(data):
        size = rng.randrange(1, 2 * mean + 1)
        pieces.append(data[at : at + size])
        at += size
    return pieces


class Vocabulary:
    """A tokenizer's tokens by their bytes, so that a text can be cut into them in ways its tokenizer never would."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        ids = [id_ for id_ in range(tokenizer.vocab_size) if id_ not in tokenizer.special_ids]
        self.id_of = {token: id_ for id_ in ids if (token := tokenizer.token_bytes(id_))}
        self.specials = sorted(tokenizer.special_ids)
        self.knows = {token[0] for token in self.id_of if len(token) == 1}  # bytes: some models lack tokens for a few

    def cut(self, rng, data):
        """Ids of `data`: of all tokens that fit next, any; now and then a control token between them, which has no text."""
        ids, at = [], 0
        while at < len(data):
            sizes = [size for size in range(1, 17) if data[at : at + size] in self.id_of and at + size <= len(data)]
            size = rng.choice(sizes)
            ids.append(self.id_of[data[at : at + size]])
            at += size
            if rng.randrange(12) == 0:
                ids.append(rng.choice(self.specials))
        return ids


def make_stops(rng, text):
    """Some that occur in the text, some that nearly do, some that overlap each other."""
    stops = []
    for _ in range(rng.randrange(1, 5)):
        at, size = rng.randrange(len(text)), rng.randrange(1, 12)
        stop = text[at : at + size]
        kind = rng.randrange(4)
        if kind == 0:
            stop += anything(rng)
        elif kind == 1:
            stop = stop[1:] + rng.choice(text)
        elif kind == 2:
            stop = stop + text[:2]
        stops.append(stop or "STOP")
    return tuple(stops)


def first_match(text, stops):
    """(end, start, stop) of the one that ends first, of those the longest; None without one."""
    ends = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(ends, default=None)


def has_left(text, found, beginnings, include_stop):
    """What of the text so far can have left: all but what can still become a stop string."""
    if found is not None:
        return text[: found[0] if include_stop else found[1]]
    longest = min(max(map(len, beginnings), default=0), len(text))
    held = next((size for size in range(longest, 0, -1) if text[-size:] in beginnings), 0)
    return text[: len(text) - held]


def check(tokenizer, ids, data, stops, include_stop):
    """After every token just what can have left has, and in the end all of it; as a whole it is the same."""
    options = {"stop": stops, "include_stop": include_stop}
    stream = TextStream(tokenizer, **options)
    skipped = tokenizer.special_ids
    beginnings = {stop[:size] for stop in stops for size in range(1, len(stop))}
    sizes = [0 if id_ in skipped else len(tokenizer.token_bytes(id_)) for id_ in ids]
    left = ""
    for id_, end in zip(ids, accumulate(sizes), strict=True):
        piece = stream.push(id_)
        left += piece.text
        so_far = text_so_far(data[:end])
        found = first_match(so_far, stops)
        assert left == has_left(so_far, found, beginnings, include_stop)
        assert piece.stop == (None if found is None else found[2])
    left += stream.finish().text
    text = data.decode(errors="replace")
    found = first_match(text, stops)
    assert left == has_left(text, found, (), include_stop)
    whole = TextStream(tokenizer, **options).whole(ids)
    assert (whole.text, whole.stop) == (left, None if found is None else found[2])


def stops_for(rng, text):
    return (make_stops(rng, text), rng.randrange(4) == 0) if rng.randrange(2) else ((), False)


def spm_metadata():
    """Every byte, some characters and some joined ones, as sentencepiece writes them."""
    marked = {"<unk>": 2, "<s>": 3, "</s>": 3, "<pad>": 3}
    joined = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "he",
        "ll",
        "hell",
        "hello",
        "▁w",
        "대",
        "한",
        "대한",
        "👍",
        "é",
        "\n",
        "12",
        "東",
        "東京",
    ]
    tokens = [*marked, *(f"<0x{byte:02X}>" for byte in range(256)), *joined]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*marked.values(), *[6] * 256, *[1] * len(joined)],
        "tokenizer.ggml.scores": [0.0] * (len(marked) + 256) + [-float(rank) for rank, _ in enumerate(joined)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }


@pytest.fixture(scope="module")
def small():
    """One of each scheme."""
    files = {"bytes.gguf": make_metadata(), "spm.gguf": spm_metadata()}
    return [Vocabulary(load_tokenizer(metadata, file=file)) for file, metadata in files.items()]


@pytest.mark.parametrize("part", range(4))
def test_streams_of_ten_thousand_texts(small, part):
    """Each cut into bytes anywhere, and into tokens of a small vocabulary; half of them with stop strings."""
    rng = random.Random(part)
    for number in range(NUM_TEXTS // 4):
        text = make_text(rng)
        data = text.encode()
        stops, include_stop = stops_for(rng, text)
        pieces = cut_anywhere(rng, data)
        check(Cut(pieces), range(len(pieces)), data, stops, include_stop)
        vocabulary = small[number % 2]
        check(vocabulary.tokenizer, vocabulary.cut(rng, data), data, stops, include_stop)


def test_streams_of_bytes_that_are_no_text(small):
    """Bytes go missing, come twice or are others: U+FFFD stands for what no later byte completes, and not before that is sure."""
    rng = random.Random(5)
    for number in range(NUM_BROKEN):
        data = bytearray(make_text(rng).encode())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + 1] = rng.choice(
                (b"", bytes(data[at : at + 1]) * 2, rng.randbytes(1), b"\xed\xa0\x80", b"\xf0")
            )
            data = data or bytearray(b"\xe2")
        broken = bytes(data)
        stops, include_stop = stops_for(rng, broken.decode(errors="replace"))
        if number % 3:
            vocabulary = small[number % 3 - 1]
            check(vocabulary.tokenizer, vocabulary.cut(rng, broken), broken, stops, include_stop)
        else:
            pieces = cut_anywhere(rng, broken)
            check(Cut(pieces), range(len(pieces)), broken, stops, include_stop)


def test_streams_in_tokens_of_real_models(tokenizer):
    """As the model's tokenizer cuts the text, and as it never would."""
    vocabulary, rng = Vocabulary(tokenizer), random.Random(9)
    for number in range(NUM_REAL):
        text = make_text(rng)
        data = text.encode()
        if not vocabulary.knows.issuperset(data):
            continue
        ids = vocabulary.cut(rng, data) if number % 2 else tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(id_) for id_ in ids if id_ not in tokenizer.special_ids) == data
        check(tokenizer, ids, data, *stops_for(rng, text))
