"""Row B46 of the bad inputs: a form of the answer, stop strings, min_tokens and several choices in one call, among neighbours and over
an engine's death: every answer keeps to all of them, and is the one that the call gets alone."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from .conftest import needs_smollm2

pytestmark = needs_smollm2

MIN_TOKENS = 24
BEGINNING = re.compile(r"([a-z]{3,8} )*[a-z]{0,8}\.?")  # of what the form allows
BODY = {
    "prompt": "Once upon a time there was a river, and in it",
    "structured_outputs": {"regex": r"([a-z]{3,8} ){30,60}\."},
    "stop": ["and", "the", "an", "e "],
    "min_tokens": MIN_TOKENS,
    "max_tokens": 120,
    "n": 3,
    "temperature": 1,
    "seed": 11,
}


def choices_of(url: str, body: dict) -> list[tuple[str, str, str | None]]:
    """Text, finish reason and stop reason of each choice, put together from a stream."""
    texts: dict[int, str] = {}
    ends: dict[int, tuple[str, str | None]] = {}
    with httpx.stream("POST", url + "/v1/completions", json=body | {"stream": True}, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (part,) = json.loads(line[6:])["choices"]
                texts[part["index"]] = texts.get(part["index"], "") + part["text"]
                if part["finish_reason"] is not None:
                    ends[part["index"]] = (part["finish_reason"], part["stop_reason"])
    return [(texts[index], *ends[index]) for index in sorted(texts)]


def test_b46_a_form_with_stops_and_choices(smollm2_server):
    alone = choices_of(smollm2_server.url, BODY)
    assert len(alone) == 3 and len({text for text, *_ in alone}) == 3
    for text, finish_reason, stop_reason in alone:
        assert BEGINNING.fullmatch(text), text
        assert finish_reason == "stop" and stop_reason in BODY["stop"]
        assert len(text) >= MIN_TOKENS, "a token is a letter at least"
    with ThreadPoolExecutor(6) as pool:
        others = [BODY | {"seed": seed} for seed in range(3)]
        found = list(pool.map(lambda body: choices_of(smollm2_server.url, body), [BODY, *others, BODY, *others]))
    assert found[0] == found[4] == alone
    assert found[1:4] == found[5:]
    whole = httpx.post(smollm2_server.url + "/v1/completions", json=BODY, timeout=120).json()["choices"]
    assert [(choice["text"], choice["finish_reason"], choice["stop_reason"]) for choice in whole] == alone


def test_b46_over_an_engines_death(smollm2_server):
    body = BODY | {"stop": ["zzz", "qqq"], "min_tokens": 100, "max_tokens": 200}  # long enough for a kill within
    alone = choices_of(smollm2_server.url, body)
    restarts = smollm2_server.metric("jilju_engine_restarts_total")
    disturbed: list[list[tuple[str, str, str | None]]] = []
    thread = threading.Thread(target=lambda: disturbed.append(choices_of(smollm2_server.url, body)))
    tokens = smollm2_server.metric("jilju_generation_tokens_total")
    thread.start()
    while smollm2_server.metric("jilju_generation_tokens_total") < tokens + 60:
        assert thread.is_alive(), "the stream ended too soon for a kill within"
        time.sleep(0.005)
    smollm2_server.kill_engine()
    thread.join()
    assert disturbed == [alone]
    assert smollm2_server.metric("jilju_engine_restarts_total") == restarts + 1
