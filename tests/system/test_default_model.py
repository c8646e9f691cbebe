"""The default model knows the capital of Korea: greedy, and with its own sampling defaults in 18 of 20 seeds."""

import httpx

from tests.system.conftest import needs_qwen

pytestmark = needs_qwen
QUESTION = "대한민국의 수도는 어디인가요?"


def answer(url: str, **params) -> str:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, **params}
    return (
        httpx.post(url + "/v1/chat/completions", json=body, timeout=300)
        .raise_for_status()
        .json()["choices"][0]["message"]["content"]
    )


def test_greedy_answer(qwen_server):
    assert "서울" in answer(qwen_server.url, temperature=0)


def test_eighteen_of_twenty_seeds(qwen_server):
    right = sum("서울" in answer(qwen_server.url, seed=seed) for seed in range(20))
    print(f"{right} of 20 seeds say 서울")
    assert right >= 18
