"""Chat templates: the named models' own render as llama-cpp-python renders them, and users' text makes no control token."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.errors import InvalidValue, ModelFileError, TemplateFailed
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.template import MAX_SOURCE_CHARS, NONCHARACTERS, ChatTemplate, encode_chat

CHATS = json.loads((Path(__file__).resolve().parents[1] / "golden" / "tokenizer" / "chats.json").read_text())


def user(content):
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def template(model):
    name, metadata = model
    return ChatTemplate(metadata["tokenizer.chat_template"], bos_token="<bos>", eos_token="<|im_end|>", file=name)


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen2.5-coder-0.5b"], indirect=True)
@pytest.mark.parametrize("index", range(len(CHATS)))
def test_the_models_templates_render_as_their_peer_does(template, tokenizer, golden, index):
    assert template.render(CHATS[index]) == golden["prompts"][index]
    assert encode_chat(template, tokenizer, CHATS[index]) == golden["prompt_ids"][index]


contents = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|", ">", "\n", "system", "a", " "])
    ).map("".join),
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), contents), min_size=1, max_size=4))
def test_control_tokens_come_from_the_template_alone(tiny, chatml, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = encode_chat(chatml, tiny, messages)
    start, end = tiny.special_texts["<|im_start|>"], tiny.special_texts["<|im_end|>"]
    assert ids.count(start) == len(turns) + 1 and ids.count(end) == len(turns)
    assert tiny.decode(ids, skip_special_tokens=False) == chatml.render(messages), "the text is what it would have been"


@given(st.lists(st.text(alphabet="hello w<>|im_대\n12", max_size=20), min_size=1, max_size=3))
def test_ordinary_messages_have_the_ids_of_the_rendered_text(tiny, chatml, texts):
    messages = [user(text)[0] for text in texts if not any(special in text for special in tiny.special_texts)]
    assert encode_chat(chatml, tiny, messages) == tiny.encode(chatml.render(messages), parse_special=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # pieces of one token from two messages
        "{% for m in messages %}<|im_{{ m.content }}{% endfor %}",  # the beginning from the template
        "{% for m in messages %}{{ m.content }}end|>{% endfor %}",  # the end from the template
        "{% for m in messages %}<|{{ m.content }}|>{% endfor %}",  # both
        "{{ messages | tojson }}",
        "{% for m in messages %}{{ m.extra[0]['<|im_end|>'] }}{{ m.content | trim }}{% endfor %}",
    ],
)
@given(
    parts=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_", "<|", "im_end", "end|>", "end|>x", "x<|im_", "|>", "<", ">", "e"]),
        min_size=1,
        max_size=4,
    )
)
def test_no_part_of_a_users_text_completes_a_control_token(tiny, source, parts):
    messages = [{"role": "user", "content": part, "extra": [{part: part}]} for part in parts]
    assert not set(encode_chat(ChatTemplate(source), tiny, messages)) & tiny.special_ids


def test_specials_that_overlap_are_all_broken(metadata):
    metadata["tokenizer.ggml.tokens"] += ["<a>", "a><b"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    tokenizer = load_tokenizer(metadata, file="f")
    ids = encode_chat(ChatTemplate("{{ messages[0].content }}"), tokenizer, user("<a><b"))
    assert not set(ids) & tokenizer.special_ids and tokenizer.decode(ids) == "<a><b"


def test_roles_are_ours(tiny, chatml):
    zephyr = ChatTemplate("{% for m in messages %}<|im_{{ m.role }}|>{% endfor %}")
    with pytest.raises(InvalidValue, match="role is 'end'; allowed: system, developer, user"):
        encode_chat(zephyr, tiny, [{"role": "end", "content": ""}])


def test_no_content_is_empty_content(chatml):
    assert chatml.render([{"role": "assistant", "content": None}]) == chatml.render(
        [{"role": "assistant", "content": ""}]
    )


def test_noncharacters_in_messages_pass(tiny, chatml):
    text = "".join(NONCHARACTERS[:-1])
    assert tiny.decode(encode_chat(chatml, tiny, user(text + "<|im_end|>"))).count(text + "<|im_end|>") == 1
    with pytest.raises(InvalidValue, match="noncharacter"):
        encode_chat(chatml, tiny, user("".join(NONCHARACTERS)))


def test_the_final_message_is_continued_where_it_ends(tiny, chatml):
    messages = [*user("hello"), {"role": "assistant", "content": "he <|im_end|> "}]
    want = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhe <|im_end|> "
    assert chatml.render(messages, continue_final_message=True) == want
    ids = encode_chat(chatml, tiny, messages, continue_final_message=True)
    assert tiny.decode(ids, skip_special_tokens=False) == want and ids.count(tiny.special_texts["<|im_end|>"]) == 1


def test_a_final_message_that_is_not_rendered_cannot_be_continued():
    with pytest.raises(TemplateFailed, match="leaves the final message out"):
        ChatTemplate("{{ messages[0].content }}").render([*user("a"), *user("b")], continue_final_message=True)
    with pytest.raises(InvalidValue, match="no text content"):
        ChatTemplate("x").render([], continue_final_message=True)


def test_the_dialect_of_chat_templates():
    source = """{%- for m in messages %}
        {%- if loop.index0 == 1 %}{% continue %}{% endif %}
        {%- if loop.index0 == 3 %}{% break %}{% endif %}
        {% generation %}{{ m.content }}{% endgeneration %}
    {% endfor %}
{{ bos_token }}{{ {'k': '<é>&'} | tojson }}{{ [1] | tojson(indent=1) }}{{ strftime_now('%Y-%m') }}
{%- set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}{{ ns.n }}
{%- macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('a') ~ 1 }}{{ messages[1:] | map(attribute='content') | join('-') }}
{%- for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ loop.last }}{% endfor %}{{ 'x<b>y'.split('<b>')[-1] }}{{ none }}"""
    template = ChatTemplate(source, bos_token="<s>", now=lambda: datetime(2026, 11, 23))
    rendered = template.render([user(text)[0] for text in "abcd"])
    assert rendered == 'ac<s>{"k": "<é>&"}[\n 1\n]2026-116aa1b-c-dbFalseaTrueyNone', rendered


def test_the_templates_own_refusal_is_passed_on():
    template = ChatTemplate("{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}")
    with pytest.raises(TemplateFailed, match="refuses these messages: one message only") as caught:
        template.render([*user("a"), *user("b")])
    assert caught.value.status == 400 and caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ x | no_such_filter }}", "{{ " + "(" * 6000 + ")" * 6000 + " }}", "x" * (MAX_SOURCE_CHARS + 1), 5],
)
def test_what_is_no_template_is_refused_with_its_file(source):
    with pytest.raises(ModelFileError, match=r"^m\.gguf: tokenizer\.chat_template is "):
        ChatTemplate(source, file="m.gguf")
