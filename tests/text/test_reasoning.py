"""Thoughts: found in templates, taken off the beginning of an answer, nothing of either lost."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jilju.text.message import Part, PlainText
from jilju.text.reader import MAX_HELD_CHARS
from jilju.text.reasoning import ReasoningParser, ReasoningStyle, reasoning_of
from jilju.text.template import ChatTemplate
from tests.text.tool_answers import parse

MODEL_THINKS = ReasoningStyle("<think>", "</think>")
STARTS_INSIDE = ReasoningStyle("<think>", "</think>", starts_inside=True)

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
SWITCHED = TURNS + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ALWAYS = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
NAMED_SWITCH = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + TURNS + "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "style"),
    [
        (SWITCHED, ReasoningStyle("<think>", "</think>", switch="enable_thinking")),
        (ALWAYS, STARTS_INSIDE),
        (NAMED_SWITCH, ReasoningStyle("<think>", "</think>", switch="thinking")),
        (TURNS + "{% if add_generation_prompt %}assistant:{% endif %}", MODEL_THINKS),
        ("{{ '[THINK]' }}{% if add_generation_prompt %}{% endif %}", ReasoningStyle("[THINK]", "[/THINK]")),
        ("{% for m in messages %}I was thinking of {{ m.content }}{% endfor %}", None),
    ],
)
def test_a_template_shows_how_its_model_thinks(source, style):
    assert reasoning_of(source) == style


@pytest.mark.parametrize(
    ("source", "variables", "starts_inside"),
    [
        (SWITCHED, {}, False),
        (SWITCHED, {"enable_thinking": False}, False),
        (ALWAYS, {}, True),
        (NAMED_SWITCH, {}, False),
        (NAMED_SWITCH, {"thinking": True}, True),
    ],
)
def test_a_prompt_shows_whether_the_answer_starts_inside(source, variables, starts_inside):
    prompt = ChatTemplate(source).render([{"role": "user", "content": "Why?"}], variables=variables)
    style = reasoning_of(source)
    assert style is not None and style.after(prompt).starts_inside == starts_inside
    assert style.after(prompt).switch == style.switch


@pytest.mark.parametrize(
    ("style", "answer", "reasoning", "text"),
    [
        (MODEL_THINKS, "<think>\nOne.\n\nTwo.\n</think>\n\nSo.", "One.\n\nTwo.", "So."),
        (MODEL_THINKS, "\n<think>Hm</think>So.", "Hm", "So."),
        (MODEL_THINKS, "<think>\n\n</think>\n\nSo.", "", "So."),
        (MODEL_THINKS, "<think></think>    code", "", "    code"),
        (MODEL_THINKS, " So. <think>Hm</think>", "", " So. <think>Hm</think>"),
        (MODEL_THINKS, "<think>Hm <think> </think> a </think> b", "Hm <think> ", " a </think> b"),
        (MODEL_THINKS, "<think>Hm </thi", "Hm </thi", ""),
        (MODEL_THINKS, "<thin", "", "<thin"),
        (MODEL_THINKS, "<thinking>", "", "<thinking>"),
        (MODEL_THINKS, "", "", ""),
        (STARTS_INSIDE, "One.\n</think>\n\nSo.", "One.", "So."),
        (STARTS_INSIDE, "<think>\nOne.\n</think>\n\nSo.", "One.", "So."),
        (STARTS_INSIDE, "</think>So.", "", "So."),
        (STARTS_INSIDE, "\n</think>So.", "", "So."),
        (STARTS_INSIDE, "<</think>So.", "<", "So."),
        (STARTS_INSIDE, "<</think", "<</think", ""),
        (STARTS_INSIDE, "never said", "never said", ""),
    ],
)
def test_thoughts_are_taken_off(style, answer, reasoning, text):
    expected = [(kind, 0, part) for kind, part in (("reasoning", reasoning), ("text", text)) if part]
    for places in ((), range(len(answer))):
        assert parse(ReasoningParser(style, PlainText()), answer, places) == expected


def test_thoughts_leave_as_they_come():
    parser = ReasoningParser(MODEL_THINKS, PlainText())
    assert parser.push("<thi") == []
    assert parser.push("nk>\nIt is") == [Part("reasoning", "It is")]
    assert parser.push(" so.\n</") == [Part("reasoning", " so.")]
    assert parser.push("think>\n") == []
    assert parser.push("\nYes") == [Part("text", "Yes")]
    assert parser.push("\n") == [Part("text", "\n")]
    assert parser.finish() == []


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "한글"]), max_size=12),
    st.booleans(),
    st.lists(st.integers(0, 60), max_size=6),
)
@example(["<", "</think>", "a"], True, [1, 2, 9])
def test_pieces_do_not_matter_and_no_text_is_lost(fragments, starts_inside, places):
    answer = "".join(fragments)
    style = STARTS_INSIDE if starts_inside else MODEL_THINKS
    whole = parse(ReasoningParser(style, PlainText()), answer)
    assert parse(ReasoningParser(style, PlainText()), answer, places) == whole
    # By definition: an opening marker at the beginning, a closing one where it first stands, new lines around them.
    begun = answer.lstrip("\n" if starts_inside else "\n ")
    opened = begun.removeprefix("<think>")
    if starts_inside or opened != begun:
        thoughts, close, rest = opened.lstrip("\n").partition("</think>")
        expected = (thoughts.rstrip("\n") if close else thoughts, rest.lstrip("\n"))
    else:
        expected = ("", answer)
    kinds = {kind: text for kind, _, text in whole}
    assert (kinds.get("reasoning", ""), kinds.get("text", "")) == expected


def test_long_white_space_before_an_answer_is_text():
    answer = " " * (MAX_HELD_CHARS + 1) + "<think>a</think>"
    assert parse(ReasoningParser(MODEL_THINKS, PlainText()), answer) == [("text", 0, answer)]
