"""The OpenAI client against a real server: what streams is what comes whole, usage is exact, many streams finish."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI

from tests.system.conftest import needs_smollm2
from tests.system.prompts import CHAT_PROMPTS

pytestmark = needs_smollm2
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 1234}


@pytest.fixture(scope="module")
def client(smollm2_server):
    return OpenAI(base_url=smollm2_server.url + "/v1", api_key="none", max_retries=0, timeout=300)


def ask(client, prompt, stream, **params):
    """(text, finish reason, usage) of one chat answer."""
    messages = [{"role": "user", "content": prompt}]
    if not stream:
        answer = client.chat.completions.create(model="smollm2-135m", messages=messages, **params)
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    text, reason, usage = "", None, None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model="smollm2-135m", messages=messages, stream=True, stream_options=options, **params
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_stream_equals_whole_answer(client, params):
    def both(prompt):
        return ask(client, prompt, True, max_tokens=32, **params), ask(client, prompt, False, max_tokens=32, **params)

    with ThreadPoolExecutor(8) as pool:
        for prompt, (streamed, whole) in zip(CHAT_PROMPTS, pool.map(both, CHAT_PROMPTS), strict=True):
            assert streamed[:2] == whole[:2], prompt
            assert streamed[0], prompt
            assert "�" not in streamed[0].rstrip("�"), (
                prompt
            )  # at most an answer that was cut in the middle of a character
            assert streamed[2].model_dump(exclude={"prompt_tokens_details"}) == whole[2].model_dump(
                exclude={"prompt_tokens_details"}
            )


def test_usage_is_exact(client, smollm2_server):
    """Prompt tokens as /tokenize counts them, output tokens as many as were asked for, totals as sums."""
    messages = [{"role": "user", "content": CHAT_PROMPTS[5]}]
    body = {"model": "smollm2-135m", "messages": messages}
    counted = httpx.post(smollm2_server.url + "/tokenize", json=body).json()["count"]
    _, reason, usage = ask(
        client, CHAT_PROMPTS[5], True, max_tokens=21, temperature=0.0, extra_body={"ignore_eos": True}
    )
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (counted, 21, counted + 21)
    assert reason == "length"


def test_sixteen_streams_finish(client, smollm2_server):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: ask(client, p, True, max_tokens=24, **GREEDY), CHAT_PROMPTS[:16]))
    assert all(reason in ("stop", "length") for _, reason, _ in answers)
    alone = [ask(client, p, False, max_tokens=24, **GREEDY)[:2] for p in CHAT_PROMPTS[:4]]
    assert [a[:2] for a in answers[:4]] == alone, "an answer among sixteen differs from the same one alone"
    smollm2_server.wait_idle()
    assert smollm2_server.metric("jilju_ledger_imbalance") == 0


def test_completions_take_token_ids(client, smollm2_server):
    ids = httpx.post(smollm2_server.url + "/tokenize", json={"prompt": "The sky is"}).json()["tokens"]
    from_ids = client.completions.create(model="smollm2-135m", prompt=ids, max_tokens=8, temperature=0, logprobs=2)
    from_text = client.completions.create(
        model="smollm2-135m", prompt="The sky is", max_tokens=8, temperature=0, logprobs=2
    )
    assert from_ids.choices[0].text == from_text.choices[0].text
    assert from_ids.choices[0].logprobs == from_text.choices[0].logprobs
    assert len(from_ids.choices[0].logprobs.token_logprobs) == 8


def test_bias_penalties_and_allowed_ids_do_what_they_say(client, smollm2_server):
    def ids(**params):
        extra = {"return_token_ids": True, "ignore_eos": True, **params.pop("extra", {})}
        answer = client.completions.create(
            model="smollm2-135m", prompt="one one one one", max_tokens=12, extra_body=extra, **(GREEDY | params)
        )
        return answer.choices[0].model_extra["token_ids"]

    plain = ids()
    assert len(set(plain)) < 12, "the prompt is meant to make it repeat itself"
    assert set(ids(logit_bias={"28": 100})) == {28}
    assert plain[0] not in ids(logit_bias={str(plain[0]): -100})
    assert set(ids(extra={"allowed_token_ids": [500, 600, 700]}, temperature=1.0, seed=3)) <= {500, 600, 700}
    assert ids(presence_penalty=2.0) != plain and ids(frequency_penalty=2.0) != plain
    assert set(ids(frequency_penalty=-2.0)) <= set(plain), "what was said is said again"
    many = ids(logit_bias={str(i): 100 for i in range(300, 312)}, frequency_penalty=2.0, presence_penalty=2.0)
    assert set(many) <= set(range(300, 312)) and len(set(many)) > 1
    body = {"prompt": "x", "min_tokens": 2, "stop_token_ids": [5], "allowed_token_ids": [5]}
    error = httpx.post(smollm2_server.url + "/v1/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("no_allowed_token", "allowed_token_ids")


def test_a_client_that_leaves_frees_the_engine(client, smollm2_server):
    stream = client.chat.completions.create(
        model="smollm2-135m", messages=[{"role": "user", "content": "Count to ten thousand."}], stream=True, max_tokens=1500,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    smollm2_server.wait_idle(5)
