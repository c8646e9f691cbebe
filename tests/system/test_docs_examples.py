"""The documents' curl examples run as they stand, but for the address, and answer what the documents say."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.system.conftest import needs_smollm2

pytestmark = needs_smollm2
ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"


def curl_examples() -> list[str]:
    found = []
    for name in ("docs/api.md", "README.md"):
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL):
            found += [command for command in re.split(r"\n(?=curl )", block.strip()) if command.startswith("curl ")]
    return found


EXAMPLES = curl_examples()


def check_whole(route: str, body: dict, answer: dict) -> None:
    if route.endswith("completions"):
        assert (
            answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
        )
        prompts = body.get("prompt", "")
        assert len(answer["choices"]) == (len(prompts) if isinstance(prompts, list) else 1)
        for choice in answer["choices"]:
            assert choice["finish_reason"] in ("stop", "length")
            assert choice["text"] if "prompt" in body else choice["message"]["content"]
            if body.get("logprobs"):
                assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["top_logprobs"]) > 0
    elif route == "/tokenize":
        assert answer["count"] == len(answer["tokens"]) > 0
        assert (answer["token_strs"] is not None) == body.get("return_token_strs", False)
    elif route == "/detokenize":
        assert answer["prompt"]
    elif route == "/v1/models":
        assert answer["data"][0]["jilju"]["defaults"]["source"]
    else:
        assert route == "/readyz", f"say here what {route} answers"
        assert answer == {"ready": True, "reason": None}


def check_stream(body: dict, text: str) -> None:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    if body.get("stream_options", {}).get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == len(chunks) - 1
        parts = {name: ms for name, ms in last["timings"].items() if name.endswith("_ms")}
        total = parts.pop("total_ms")
        assert sum(ms for name, ms in parts.items() if name not in ("ttft_ms", "tpot_ms")) == pytest.approx(total)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_there_are_examples_of_the_main_routes():
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/metrics"):
        assert any(ADDRESS + route in example for example in EXAMPLES), route


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here: apt-get install curl")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split()[1].removeprefix(ADDRESS))
def test_example(example, smollm2_server):
    words = shlex.split(example.replace(ADDRESS, smollm2_server.url))
    done = subprocess.run(
        [*words, "-s", "-w", "\n%{http_code}"], capture_output=True, text=True, timeout=120, check=True
    )
    text, _, status = done.stdout.rpartition("\n")
    assert status == "200", done.stdout
    route = next(word for word in words if word.startswith(smollm2_server.url)).removeprefix(smollm2_server.url)
    body = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    if route == "/metrics":
        assert "jilju_ready" in text
    elif body.get("stream"):
        check_stream(body, text)
    else:
        check_whole(route, body, json.loads(text))


def test_the_documents_name_every_metric(smollm2_server):
    exposed = set(re.findall(r"^# TYPE (jilju_\w+) ", httpx.get(smollm2_server.url + "/metrics").text, re.MULTILINE))
    section = (ROOT / "docs/observability.md").read_text(encoding="utf-8").partition("\n## Metrics\n")[2]
    assert set(re.findall(r"`(jilju_\w+)`", section)) == exposed
