"""Structured output on the real engine: what ends by `stop` is of the form, streamed or whole, alone or not, across a death."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.schemas import SCHEMAS, violation
from tests.system.answers import Answer, ask
from tests.system.conftest import needs_smollm2
from tests.system.prompts import CHAT_PROMPTS

pytestmark = needs_smollm2
NUM_SCHEMAS = 40
NUM_ALONE = 8
MAX_TOKENS = 64
GREEDY = {"temperature": 0}
NUM_KILLS = 2

OTHER_FORMS = {  # and what their answers match, once they stop; the first ones must
    "regex": ({"regex": "(Mon|Tues|Sun)day, [0-9]{1,2} (May|June) [12][0-9]{3}"}, r"(Mon|Tues|Sun)day, \d{1,2} (May|June) [12]\d{3}"),
    "choice": ({"choice": ["yes", "no", "yes, but not now"]}, "yes|no|yes, but not now"),
    "choice of other scripts": ({"choice": ["서울", "부산", "👍🏽 네"]}, "서울|부산|👍🏽 네"),
    "Lark": ({"grammar": 'start: NUMBER (" + " NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/'}, r"[1-9]\d{0,2}( \+ [1-9]\d{0,2}){1,3}"),
    "regex without an end": ({"regex": "[a-z]+( [a-z]+){2,5}[.!?]"}, "[a-z]+( [a-z]+){2,5}[.!?]"),
    "Lark with recursion": ({"grammar": 'start: list\nlist: "(" (list | /[ab]/){0,3} ")"'}, r"[()ab]+"),
}  # fmt: skip
NUM_FINITE = 4


def body_of(index: int) -> dict:
    """A question and a schema for its answer; every other one is sampled."""
    schema = SAMPLE[index][1]
    how = GREEDY if index % 2 else {"temperature": 1.0, "seed": index, "top_p": 0.98}
    return {
        "messages": [{"role": "user", "content": CHAT_PROMPTS[index % len(CHAT_PROMPTS)]}],
        "max_tokens": MAX_TOKENS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        **how,
    }


SAMPLE = [SCHEMAS[number * len(SCHEMAS) // NUM_SCHEMAS] for number in range(NUM_SCHEMAS)]
BODIES = [body_of(index) for index in range(NUM_SCHEMAS)]


def ask_all(url: str, bodies: list[dict], *, stream: bool, at_once: int = 8) -> list[Answer]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda body: ask(url, body, stream=stream), bodies))


@pytest.fixture(scope="module")
def answers(smollm2_server):
    """To every schema of the sample, whole, among seven neighbours."""
    return ask_all(smollm2_server.url, BODIES, stream=False)


def test_answers_that_stop_are_valid(answers):
    ended = [(name, schema, a) for (name, schema), a in zip(SAMPLE, answers, strict=True) if a.finish_reason == "stop"]
    assert len(ended) >= NUM_SCHEMAS // 2
    assert {a.finish_reason for a in answers} <= {"stop", "length"}
    wrong = {name: (a.content, broken) for name, schema, a in ended if (broken := violation(schema, a.content))}
    assert not wrong


def test_a_streamed_answer_is_the_whole_one(smollm2_server, answers):
    assert ask_all(smollm2_server.url, BODIES, stream=True) == answers


def test_an_answer_alone_is_the_same(smollm2_server, answers):
    chosen = range(0, NUM_SCHEMAS, NUM_SCHEMAS // NUM_ALONE)
    alone = ask_all(smollm2_server.url, [BODIES[index] for index in chosen], stream=False, at_once=1)
    assert alone == [answers[index] for index in chosen]


@pytest.mark.parametrize("how", [GREEDY, {"temperature": 1.2, "seed": 5}], ids=["greedy", "sampled"])
def test_other_forms_are_kept_to(smollm2_server, how):
    bodies = [
        {"messages": [{"role": "user", "content": "Answer."}], "max_tokens": MAX_TOKENS, "structured_outputs": form, **how}
        for form, _ in OTHER_FORMS.values()
    ]  # fmt: skip
    answers = ask_all(smollm2_server.url, bodies, stream=True)
    assert answers == ask_all(smollm2_server.url, bodies, stream=False)
    assert [answer.finish_reason for answer in answers[:NUM_FINITE]] == ["stop"] * NUM_FINITE
    for (name, (_, pattern)), answer in zip(OTHER_FORMS.items(), answers, strict=True):
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.content), (name, answer.content)
            assert answer.content.count("(") == answer.content.count(")")


def test_streams_go_on_in_their_form_when_the_engine_dies(smollm2_server):
    """Lists of a hundred tokens and more, so that every kill comes in the middle of some."""
    item = {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "maximum": 99}},
    }
    item |= {"required": ["word", "n"], "additionalProperties": False}
    schema = {"type": "array", "items": item, "minItems": 6, "maxItems": 8}
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}
    bodies = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": 400, "response_format": form, "temperature": 0.7, "seed": seed}
        for seed, prompt in enumerate(CHAT_PROMPTS[:8])
    ]  # fmt: skip
    undisturbed = ask_all(smollm2_server.url, bodies, stream=True)
    assert sum(answer.finish_reason == "stop" for answer in undisturbed) >= 4
    for answer in undisturbed:
        assert answer.finish_reason == "length" or violation(schema, answer.content) is None
    restarts = smollm2_server.metric("jilju_engine_restarts_total")
    disturbed: list[list[Answer]] = []
    thread = threading.Thread(target=lambda: disturbed.append(ask_all(smollm2_server.url, bodies, stream=True)))
    thread.start()
    for _ in range(NUM_KILLS):
        tokens = smollm2_server.metric("jilju_generation_tokens_total")
        while smollm2_server.metric("jilju_generation_tokens_total") < tokens + 150:
            assert thread.is_alive(), "the streams ended too soon for a kill among them"
            time.sleep(0.02)
        smollm2_server.kill_engine()
    thread.join()
    assert disturbed == [undisturbed]
    assert smollm2_server.metric("jilju_engine_restarts_total") >= restarts + NUM_KILLS
    smollm2_server.wait_idle()
    assert smollm2_server.metric("jilju_ledger_imbalance") == 0
