"""The engine's process is killed at random moments; every stream goes on as if nothing had happened."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec

from tests.system.conftest import needs_smollm2
from tests.system.prompts import CHAT_PROMPTS

pytestmark = needs_smollm2
NUM_KILLS = 20


def stream_ids(url: str, prompt: str, seed: int) -> list[tuple[str, float]]:
    """(token, logprob) of every token of a streamed chat answer, which must end with [DONE]."""
    body = {
        "messages": [{"role": "user", "content": prompt}], "stream": True, "seed": seed, "temperature": 0.8, "max_tokens": 160,
        "ignore_eos": True, "logprobs": True, "top_logprobs": 0,
    }  # fmt: skip
    tokens, done = [], False
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=300) as answer:
        if answer.status_code == 503:  # a new call while the engine restarts is told when to come again, and does
            assert msgspec.json.decode(answer.read())["error"]["code"] == "not_ready"
            time.sleep(float(answer.headers["retry-after-ms"]) / 1000)
            return stream_ids(url, prompt, seed)
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = msgspec.json.decode(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    tokens += [
                        (str(t["bytes"]), t["logprob"]) for t in ((choice["logprobs"] or {}).get("content") or [])
                    ]
    assert done, "the stream ended without [DONE]"
    return tokens


def test_streams_survive_the_engine(smollm2_server):
    url = smollm2_server.url
    work = [(url, prompt, seed) for seed, prompt in enumerate(CHAT_PROMPTS[:8])]
    with ThreadPoolExecutor(8) as pool:
        undisturbed = list(pool.map(lambda w: stream_ids(*w), work))
    restarts = smollm2_server.metric("jilju_engine_restarts_total")

    rng, kills, finished = random.Random(7), 0, threading.Event()

    def kill() -> None:
        nonlocal kills
        smollm2_server.kill_engine()
        kills += 1

    def killer():
        """Random moments of loading, prefill and decode. Every other time the engine may first bring a token: one that dies
        six times in a row without a step is given up, and so is a call that is alone in three kills, by design."""
        is_doubled = False
        while not finished.is_set() and kills < NUM_KILLS:
            while httpx.get(url + "/readyz").status_code != 200:
                time.sleep(0.02)
            tokens = smollm2_server.metric("jilju_generation_tokens_total")
            while (
                (kills % 2 or is_doubled)
                and smollm2_server.metric("jilju_generation_tokens_total") == tokens
                and not finished.is_set()
            ):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.0))
            kill()
            is_doubled = kills % 5 == 4
            if is_doubled:
                dead = smollm2_server.engine_pid()
                while smollm2_server.engine_pid() in (None, dead):
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.3))
                kill()

    thread = threading.Thread(target=killer)
    disturbed: list = []
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        while thread.is_alive():  # rounds of the same eight streams until the kills are done
            disturbed.append(list(pool.map(lambda w: stream_ids(*w), work)))
    finished.set()
    thread.join()
    assert kills == NUM_KILLS
    for answers in disturbed:
        assert answers == undisturbed
    assert all(len(tokens) == 160 for tokens in undisturbed)
    assert smollm2_server.metric("jilju_engine_restarts_total") >= restarts + 1
    smollm2_server.wait_idle()
    assert smollm2_server.metric("jilju_ledger_imbalance") == 0
