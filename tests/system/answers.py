"""Answers of a running server as a client sees them, whole or put together from a stream. Knows nothing of what was asked."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

TIMEOUT_S = 300


class Call(msgspec.Struct):
    """A tool call: the text of its arguments as it came."""

    name: str
    arguments: str = ""
    id: str = ""


class Answer(msgspec.Struct):
    """The first choice. Equal answers are equal in every token, bit of a logprob, character and reason."""

    content: str = ""
    calls: list[Call] = []
    token_ids: list[int] = []
    logprobs: list[float] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def ask(url: str, body: dict[str, Any], *, stream: bool = False) -> Answer:
    """A chat answer, which must come. Ids of calls are minted anew for each request, so they are left out here."""
    body = {"return_token_ids": True, "logprobs": True, **body, "stream": stream}
    answer = _joined(_events(url, body)) if stream else _whole(_post(url, body))
    for call in answer.calls:
        assert call.id.startswith("call_")
        call.id = ""
    return answer


def _whole(choice: dict[str, Any]) -> Answer:
    message = choice["message"]
    calls = [Call(**call["function"], id=call["id"]) for call in message.get("tool_calls", [])]
    return Answer(
        message["content"] or "",
        calls,
        choice["token_ids"],
        _logprobs(choice),
        choice["finish_reason"],
        choice["stop_reason"],
    )


def _joined(events: Iterator[dict[str, Any]]) -> Answer:
    answer = Answer()
    for choice in events:
        assert answer.finish_reason is None, "nothing comes after the last chunk"
        delta = choice["delta"]
        answer.content += delta.get("content") or ""
        for part in delta.get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(answer.calls) and part["type"] == "function"
                answer.calls.append(Call(part["function"]["name"], id=part["id"]))
            else:
                assert set(part["function"]) == {"arguments"}, "only a call's first delta names it"
            answer.calls[part["index"]].arguments += part["function"]["arguments"]
        answer.token_ids += choice["token_ids"]
        answer.logprobs += _logprobs(choice)
        answer.finish_reason, answer.stop_reason = choice["finish_reason"], choice["stop_reason"]
    return answer


def _logprobs(choice: dict[str, Any]) -> list[float]:
    return [token["logprob"] for token in (choice["logprobs"] or {}).get("content") or []]


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    while True:
        answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=TIMEOUT_S)
        if answer.status_code != 503:
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]
        _wait(answer)


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The choices of the chunks, in order; the stream must be complete."""
    while True:
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=TIMEOUT_S) as answer:
            if answer.status_code == 503:
                answer.read()
                _wait(answer)
                continue
            assert answer.status_code == 200, answer.read()
            is_done = False
            for line in _lines(answer):
                if line.startswith(b"data: {"):
                    chunk = msgspec.json.decode(line[6:])
                    assert "error" not in chunk, chunk
                    yield from chunk["choices"]
                is_done = is_done or line == b"data: [DONE]"
            assert is_done, "the stream ended without [DONE]"
            return


def _lines(answer: httpx.Response) -> Iterator[bytes]:
    """Of an event stream, which a line feed ends and nothing else: iter_lines() would cut at U+2028 in a text, too."""
    held = b""
    for piece in answer.iter_bytes():
        *lines, held = (held + piece).split(b"\n")
        yield from lines
    yield held


def _wait(answer: httpx.Response) -> None:
    """A new call while the engine restarts is told when to come again."""
    assert answer.json()["error"]["code"] == "not_ready", answer.text
    time.sleep(float(answer.headers["retry-after-ms"]) / 1000)
