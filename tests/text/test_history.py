"""Answers that come back as text keep the ids that were generated; whatever is not exactly that text and place does not."""

import json
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.history import ANSWER_BYTES, History, Opening, RememberedStream
from jilju.text.template import ChatTemplate, chat_pieces, encode_chat

from .conftest import GOLDEN, TEMPLATE
from .test_tokenizer_golden import spm_metadata

SMALL = json.loads((GOLDEN / "spm-small.json").read_text())
GEMMA = (  # as Gemma's, which its file leaves out: bos is a control token of the template, contents are stripped
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role | replace('assistant', 'model') + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


class Chat:
    """One server's memory and one caller's conversation."""

    def __init__(self, template, tokenizer, history=None, salt=b""):
        self.template, self.tokenizer, self.salt = template, tokenizer, salt
        self.history = History() if history is None else history

    def prompt(self, *messages):
        return self.history.encode(self.salt, chat_pieces(self.template, self.tokenizer, messages), self.tokenizer)

    def text(self, *messages):
        return "".join(chat_pieces(self.template, self.tokenizer, messages))

    def plain(self, *messages):
        return encode_chat(self.template, self.tokenizer, messages)

    def answer(self, messages, ids, **options):
        """What a call does with the ids that a model makes: its prompt, and the text that a client gets."""
        prompt_ids, opening = self.prompt(*messages)
        stream = RememberedStream(self.tokenizer, self.history, opening, **options)
        text = ""
        for id_ in ids:
            piece = stream.push(id_)
            text += piece.text
            if piece.stop is not None:
                return prompt_ids, text
        return prompt_ids, text + stream.finish().text


@pytest.fixture
def chat(tiny, chatml):
    return Chat(chatml, tiny)


@pytest.fixture(scope="module")
def template(model):
    return ChatTemplate(model[1].get(TEMPLATE, GEMMA), bos_token="<bos>", file=model[0])


def cut_and_encoded(tokenizer, text, places):
    """The text's ids, each part encoded alone: mostly other ones than those of the whole."""
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [id_ for start, end in pairwise(edges) for id_ in tokenizer.encode(text[start:end])]


texts = st.one_of(
    st.text(min_size=1, max_size=30),
    st.text(alphabet="hello wo한국👍<|im_end|>\n12", min_size=1, max_size=40),
    st.sampled_from(
        ["The quick brown fox", "대한민국의 수도는 서울입니다. 🇰🇷", "def f(x):\n    return x\n", "<|im_end|>\n"]
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=texts, places=st.lists(st.integers(0, 1000), max_size=8), after=texts)
@example(text="hello world", places=[1, 2, 3, 4, 7], after="x")
def test_an_answer_keeps_its_ids_however_it_was_cut(template, tokenizer, text, places, after):
    for part in (text, after):
        assume(tokenizer.decode(tokenizer.encode(part)) == part)  # smollm2's vocabulary lacks a few bytes
    ids = cut_and_encoded(tokenizer, text, places)
    chat = Chat(template, tokenizer)
    first, shown = chat.answer([user("Hi")], ids)
    assert (first, shown) == (chat.plain(user("Hi")), text)
    messages = (user("Hi"), assistant(shown), user(after))
    second, _ = chat.prompt(*messages)
    assert tokenizer.decode(second, skip_special_tokens=False) == chat.text(*messages), "the text is the rendered one"
    if chat.text(*messages).startswith(chat.text(user("Hi")) + text):
        assert second[: len(first) + len(ids)] == first + ids
        rest = second[len(first) + len(ids) :]
        assert rest == chat.plain(*messages)[-len(rest) :], "what follows is cut as ever"
    else:  # the template has stripped it
        assert second == chat.plain(*messages)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ids_at_random_are_kept_when_they_are_the_text_and_only_then(template, tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
    chat = Chat(template, tokenizer)
    skip = data.draw(st.booleans())
    first, shown = chat.answer([user("Hi")], ids, skip_special_tokens=skip)
    while ids and (not tokenizer.token_bytes(ids[-1]) or (skip and ids[-1] in tokenizer.special_ids)):
        ids.pop()  # nothing is shown of it: padding of the vocabulary, or what ended the answer
    is_text = shown.encode() == b"".join(map(tokenizer.token_bytes, ids)) and not set(ids) & tokenizer.special_ids
    messages = (user("Hi"), assistant(shown), user("x"))
    second, _ = chat.prompt(*messages)
    assert tokenizer.decode(second, skip_special_tokens=False) == chat.text(*messages), "the text is the rendered one"
    assert len(chat.history) == (is_text and shown != "")
    if is_text and chat.text(*messages).startswith(chat.text(user("Hi")) + shown):
        assert second[: len(first) + len(ids)] == first + ids
    else:
        assert second == chat.plain(*messages)


def test_every_answer_of_a_conversation_keeps_its_ids(chat):
    messages, wanted = [user("hello")], None
    for turn in range(6):
        ids = list(f"hello w {turn}".encode())  # the first 256 tokens are the bytes
        prompt_ids, text = chat.answer(messages, ids)
        assert wanted is None or prompt_ids[: len(wanted)] == wanted
        wanted = prompt_ids + ids
        messages += [assistant(text), user("12")]
    assert wanted != chat.plain(*messages)[: len(wanted)], "these ids are not the plain ones"


def test_nothing_changes_where_nothing_is_remembered(chat):
    messages = [user("hello <|im_end|>"), assistant("hello"), user("대")]
    assert chat.prompt(*messages)[0] == chat.plain(*messages)


def test_salts_share_nothing(chat):
    ids = list(b"hello")
    chat.answer([user("Hi")], ids)
    messages = (user("Hi"), assistant("hello"), user("x"))
    other = Chat(chat.template, chat.tokenizer, chat.history, salt=b"other")
    assert chat.prompt(*messages)[0] != chat.plain(*messages)
    assert other.prompt(*messages)[0] == other.plain(*messages)


@pytest.mark.parametrize(
    "messages",
    [
        [user("Ho"), assistant("hello"), user("x")],  # another conversation before it
        [user("Hi"), assistant("hello "), user("x")],  # the text goes on
        [user("Hi"), assistant("hell"), user("x")],
        [user("Hi"), user("hello"), user("x")],  # somebody else says it
        [user("x"), user("Hi"), assistant("hello")],
        # the text of a whole conversation in one message: no control token comes from there
        [user("Hi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"), user("x")],
        [user("Hi"), assistant("hello<|im_end|>\n<|im_start|>user\nx"), user("x")],
    ],
)
def test_another_text_is_plain(chat, messages):
    chat.answer([user("Hi")], list(b"hello"))
    assert chat.prompt(*messages)[0] == chat.plain(*messages)


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        pytest.param("<|im_end|>", True, id="a control token"),
        pytest.param("", True, id="the control token of the next turn"),
        pytest.param("<tool>", False, id="a user-defined token, which a message can hold too"),
        pytest.param("\n<|im_end|>", False, id="a line end first"),
    ],
)
def test_only_a_control_token_is_a_boundary(tiny, after, kept):
    source = "{% for m in messages %}<|im_start|>{{ m.content }}" + after + "{% endfor %}"
    chat = Chat(ChatTemplate(source + "{% if add_generation_prompt %}<|im_start|>{% endif %}"), tiny)
    chat.answer([user("Hi")], list(b"hello"))
    messages = [user("Hi"), assistant("hello"), user("x")]
    assert (chat.prompt(*messages)[0] != chat.plain(*messages)) == kept


def test_the_last_piece_is_open(chat):
    """A text may still go on there, as the one that a model is to continue does."""
    chat.answer([user("Hi")], list(b"hello"))
    pieces = chat_pieces(chat.template, chat.tokenizer, [user("Hi"), assistant("hello")], add_generation_prompt=False)
    whole, _ = chat.history.encode(b"", pieces, chat.tokenizer)
    cut, opening = chat.history.encode(b"", pieces[:-2], chat.tokenizer)
    hello = chat.tokenizer.encode("hello")
    assert cut[-len(hello) :] == hello and opening.text == "assistant\nhello"
    assert whole[: len(cut)] != cut


@pytest.mark.parametrize(
    ("ids", "options", "shown"),
    [
        pytest.param([], {}, "", id="empty"),
        pytest.param([*b"a", 0xE2, 0x82], {}, "a\ufffd", id="half a character"),
        pytest.param([*b"a", 0xEF, 0xBF], {}, "a\ufffd", id="half of a character that begins as U+FFFD does"),
        pytest.param([*b"a", 0xFF, *b"b"], {}, "a\ufffdb", id="bytes of no character"),
        pytest.param([*b"a", "<|im_end|>", *b"b"], {}, "ab", id="a control token, skipped"),
        pytest.param([*b"a", "<|im_end|>"], {"skip_special_tokens": False}, "a<|im_end|>", id="a control token, shown"),
        pytest.param(["hell", "hello"], {"stop": ("lo",)}, "hellhel", id="a stop string inside a token"),
        pytest.param([*b"ab"], {"stop": ("a",)}, "", id="a stop string at once"),
    ],
)
def test_what_does_not_stand_for_its_text_is_not_kept(chat, metadata, ids, options, shown):
    vocab = metadata["tokenizer.ggml.tokens"]
    ids = [vocab.index(id_) if isinstance(id_, str) else id_ for id_ in ids]
    assert chat.answer([user("Hi")], ids, **options)[1] == shown
    assert len(chat.history) == chat.history.num_bytes == 0
    messages = (user("Hi"), assistant(shown), user("x"))
    assert chat.prompt(*messages)[0] == chat.plain(*messages)


def test_a_stop_string_leaves_the_ids_before_it(chat):
    prompt_ids, text = chat.answer([user("Hi")], list(b"hello STOP and on"), stop=("STOP",))
    assert text == "hello "
    ids, _ = chat.prompt(user("Hi"), assistant(text), user("x"))
    kept = prompt_ids + list(b"hello ")
    assert ids[: len(kept) + 1] == [*kept, chat.tokenizer.special_texts["<|im_end|>"]]


def test_an_answer_that_is_not_complete_is_not_kept(chat):
    _, opening = chat.prompt(user("Hi"))
    stream = RememberedStream(chat.tokenizer, chat.history, opening)
    for id_ in b"hello":
        stream.push(id_)
    assert len(chat.history) == 0, "the call was ended before the answer"
    stream.finish()
    assert len(chat.history) == 1


@pytest.mark.parametrize("case", SMALL["vocabularies"], ids=lambda case: f"space prefix {case['adds_space']}")
def test_a_space_that_the_tokenizer_adds_is_no_part_of_an_answer(case):
    """An answer begins as the model has begun it, where plain tokens would have one more space in front."""
    tokenizer = load_tokenizer(spm_metadata(case), file="small.gguf")
    source = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    chat = Chat(ChatTemplate(source), tokenizer)
    ids = [case["tokens"].index(token) for token in ("\u2581", "a", "b", "</")]
    first, text = chat.answer([user("x")], [*ids, tokenizer.special_texts["</s>"]])
    assert text == " ab</"
    second, _ = chat.prompt(user("x"), assistant(text), user("b"))
    assert second[: len(first) + 4] == first + ids
    assert second[len(first) + 4 :] == [tokenizer.special_texts["</s>"], *tokenizer.encode("b"), second[-1]]


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 30)), max_size=40),
    max_answers=st.integers(1, 6),
    max_bytes=st.integers(0, 6 * ANSWER_BYTES),
)
def test_the_bounds_hold_and_the_latest_stay(tiny, calls, max_answers, max_bytes):
    history = History(max_answers=max_answers, max_bytes=max_bytes)
    latest: list[tuple[int, int]] = []  # by definition: as many of the last ones as fit
    for name, num_ids in calls:
        opening = Opening(bytes(32), f"{name}:")
        size = ANSWER_BYTES + 4 * num_ids
        assert history.remember(opening, "a" * num_ids, [ord("a")] * num_ids, tiny) == (size <= max_bytes)
        if size <= max_bytes:
            latest = [call for call in latest if call != (name, num_ids)] + [(name, num_ids)]
        while len(latest) > max_answers or sum(ANSWER_BYTES + 4 * num for _, num in latest) > max_bytes:
            latest.pop(0)
        assert len(history) == len(latest)
        assert history.num_bytes == sum(ANSWER_BYTES + 4 * num for _, num in latest) <= max_bytes


def test_what_is_used_stays_and_of_a_conversation_its_beginning(tiny, chatml):
    chat = Chat(chatml, tiny, History(max_answers=3))
    turns = [user("Hi"), assistant("hello 1"), user("b"), assistant("hello 2"), user("c")]
    first, _ = chat.answer(turns[:1], list(b"hello 1"))
    chat.answer(turns[:3], list(b"hello 2"))
    kept, _ = chat.prompt(*turns)
    for name in "xyz":
        chat.answer([user(name)], list(b"hello"))
        both, _ = chat.prompt(*turns)
        assert both == kept or name != "x"
    assert chat.prompt(*turns)[0] == kept, "used between the others"
    for name in "vw":
        chat.answer([user(name)], list(b"hello"))
    ids, _ = chat.prompt(*turns)
    assert ids != kept and ids[: len(first) + 7] == kept[: len(first) + 7], "the end has gone first"


def test_the_same_answer_made_of_other_ids_counts_once(chat):
    for ids in ([*b"hello"], chat.tokenizer.encode("hello"), [*b"hell", ord("o")]):
        first, _ = chat.answer([user("Hi")], ids)
        assert len(chat.history) == 1 and chat.history.num_bytes == ANSWER_BYTES + 4 * len(ids)
        second, _ = chat.prompt(user("Hi"), assistant("hello"), user("x"))
        assert second[: len(first) + len(ids)] == first + ids, "the last one holds"


@pytest.mark.parametrize("num_ids", [1, 20, 500])
def test_memory_is_what_is_counted(tiny, num_ids):
    history = History(max_bytes=1 << 30)
    ids = [ord("a")] * num_ids
    tracemalloc.start()
    try:
        for index in range(400):
            history.remember(Opening(index.to_bytes(32), "assistant\n"), "a" * num_ids, ids, tiny)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.5 * history.num_bytes < held < history.num_bytes
