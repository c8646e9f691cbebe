"""Tools on the real engine: calls that must come do, fit their schemas, and are the same streamed and whole.

With a model whose template knows no tools (smollm2-135m) and one whose template does (qwen2.5-coder-0.5b).
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest

from tests.serve.schemas import BOOLEAN, INTEGER, NUMBER, STRING, obj, violation
from tests.system.answers import Answer, ask
from tests.system.conftest import needs_qwen, needs_smollm2
from tests.system.prompts import CHAT_PROMPTS

PARAMETERS = {
    "get_weather": obj("city", city=STRING | {"maxLength": 20}, unit={"enum": ["celsius", "fahrenheit"]}),
    "add": obj("a b", a=INTEGER | {"minimum": -999, "maximum": 999}, b=INTEGER | {"minimum": -999, "maximum": 999}),
    "book": obj(
        "from to seats", seats=INTEGER | {"minimum": 1, "maximum": 9}, window=BOOLEAN, price=NUMBER | {"minimum": 0, "maximum": 1000},
        **{"from": STRING | {"pattern": "^[A-Z]{3}$"}, "to": STRING | {"pattern": "^[A-Z]{3}$"}},
    ),
    "now": obj(),
}  # fmt: skip
ABOUT = {
    "get_weather": "Weather of a city now.",
    "add": "Sum of two integers.",
    "book": "Book a flight.",
    "now": "The time.",
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": ABOUT[name], "parameters": schema}}
    for name, schema in PARAMETERS.items()
]
ASKED = (
    "How is the weather in Seoul?",
    "What is 17 plus 25?",
    "Book a flight from ICN to JFK for two.",
    "What time is it?",
    "서울 날씨 어때?",
)
MAX_TOKENS = 96
MARKUP = "<tool_call>"  # how calls begin in both families here


@pytest.fixture(
    scope="module",
    params=[pytest.param("smollm2_server", marks=needs_smollm2), pytest.param("qwen_server", marks=needs_qwen)],
)
def url(request):
    return request.getfixturevalue(request.param).url


def body_of(number: int, question: str, **fields) -> dict:
    """Every other one is sampled."""
    how = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
    return {
        "messages": [{"role": "user", "content": question}],
        "tools": TOOLS,
        "max_tokens": MAX_TOKENS,
        **how,
        **fields,
    }


def ask_both_ways(url: str, bodies: list[dict]) -> list[Answer]:
    """The answers, which are the same in streams."""
    with ThreadPoolExecutor(8) as pool:
        whole = pool.map(lambda body: ask(url, body), bodies)
        streamed = pool.map(lambda body: ask(url, body, stream=True), bodies)
        answers = list(whole)
        assert list(streamed) == answers
    return answers


def check_calls(answer: Answer) -> None:
    """Each fits its schema, and no call is left in the text, unless the answer was cut in it."""
    is_cut = answer.finish_reason == "length"
    for call in answer.calls[: -1 if is_cut else None]:
        assert violation(PARAMETERS[call.name], call.arguments) is None, call
    assert is_cut or MARKUP not in answer.content


def test_a_required_call_comes(url):
    bodies = [
        body_of(number, question, tool_choice="required", parallel_tool_calls=False)
        for number, question in enumerate(ASKED)
    ]
    answers = ask_both_ways(url, bodies)
    for answer in answers:
        check_calls(answer)
        assert (answer.content, len(answer.calls)) == ("", 1)
    assert {answer.finish_reason for answer in answers} <= {"tool_calls", "length"}
    assert sum(answer.finish_reason == "tool_calls" for answer in answers) >= len(ASKED) // 2


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_call_comes_once(url, name):
    choice = {"type": "function", "function": {"name": name}}
    for answer in ask_both_ways(url, [body_of(number, q, tool_choice=choice) for number, q in enumerate(ASKED[:2])]):
        check_calls(answer)
        assert ([call.name for call in answer.calls], answer.content) == ([name], "")
        assert answer.finish_reason in ("stop", "length")


def test_several_required_calls_are_all_valid(url):
    question = "What is 1 + 2, and what is 3 + 4, and how is the weather in Paris and in Rome? Use a function for each."
    answers = ask_both_ways(url, [body_of(number, question, tool_choice="required") for number in range(2)])
    for answer in answers:
        check_calls(answer)
        assert answer.calls and answer.finish_reason in ("tool_calls", "length")


@needs_qwen
def test_the_default_model_calls_by_itself(qwen_server):
    answers = ask_both_ways(qwen_server.url, [body_of(1, question) for question in ASKED])
    for answer in answers:
        check_calls(answer)
    assert sum(answer.finish_reason == "tool_calls" for answer in answers) >= 2, answers


def test_a_call_that_the_model_chooses_is_one(url):
    """Whatever it is asked, and at temperatures where it writes nearly anything. Not every model here calls by itself, so half
    of the time the tokens of a call's beginning are made likely."""
    ids = httpx.post(url + "/tokenize", json={"prompt": MARKUP}).json()["tokens"]
    bias = {str(token_id): 40 / len(ids) for token_id in ids}
    questions, temperatures = (*ASKED, *CHAT_PROMPTS[5:]), (0, 0.7, 1, 2)
    bodies = [
        body_of(
            number, question, temperature=temperatures[number % 4], seed=number, max_tokens=40,
            parallel_tool_calls=number % 3 > 0, logit_bias=bias if number % 8 < 4 else None,
        )
        for number, question in enumerate(questions)
    ]  # fmt: skip
    answers = ask_both_ways(url, bodies)
    assert sum(bool(answer.calls) for answer in answers) >= 3
    for body, answer in zip(bodies, answers, strict=True):
        check_calls(answer)
        assert len(answer.calls) <= 1 or body["parallel_tool_calls"]
        assert (answer.finish_reason == "tool_calls") == (bool(answer.calls) and answer.finish_reason != "length")


def test_a_model_that_is_told_to_call_none_calls_none(url):
    bodies = [body_of(number, q, tool_choice="none", max_tokens=16) for number, q in enumerate(ASKED[:3])]
    assert [answer.calls for answer in ask_both_ways(url, bodies)] == [[]] * 3


def test_what_a_call_gave_goes_back_to_the_model(url):
    """A conversation over a call: the model is told what it called and what came of it."""
    first = ask(url, body_of(1, ASKED[1], tool_choice={"type": "function", "function": {"name": "add"}}))
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": first.calls[0].arguments}}
    turn = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4711"},
    ]
    body = body_of(1, ASKED[1], tool_choice="none")
    told = ask(url, body | {"messages": body["messages"] + turn})
    untold = ask(url, body)
    assert told.content != untold.content
    assert msgspec.json.decode(first.calls[0].arguments).keys() == {"a", "b"}
