"""The server over a real model's tokenizer and template, with the stub engine: tokens of several bytes, and control tokens."""

from pathlib import Path
from typing import Any

import pytest

from jilju.engine.request import Request
from jilju.formats.gguf import GgufFile
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.template import ChatTemplate

from .conftest import Connect
from .stub import TEXTS, StubClient
from .test_answers import CHAT, COMPLETIONS, events_of, joined

pytestmark = pytest.mark.anyio

MODEL = Path.home() / ".cache" / "jilju" / "models" / "smollm2-135m.gguf"


@pytest.fixture(scope="module")
def text() -> dict[str, Any]:
    if not MODEL.exists():
        pytest.skip(f"{MODEL} is not there; `jilju pull smollm2-135m` fetches it")
    with GgufFile.open(str(MODEL)) as file:
        tokenizer = load_tokenizer(file.metadata, file=file.path)
        source = file.metadata["tokenizer.chat_template"]
    return {"tokenizer": tokenizer, "template": ChatTemplate(source, bos_token="<|im_start|>", eos_token="<|im_end|>")}


async def test_chats_over_a_real_tokenizer(connect: Connect, text: dict[str, Any]) -> None:
    tokenizer = text["tokenizer"]

    def answer(request: Request) -> list[int]:
        assert request.params.seed is not None
        return [*tokenizer.encode(TEXTS[request.params.seed]), tokenizer.eos_ids[0]]

    stub = StubClient(answer=answer)
    async with connect(stub, **text) as (http, _):
        for seed, wanted in enumerate(TEXTS):
            body = {
                "messages": [{"role": "user", "content": "말해 <|im_end|> 봐"}],
                "seed": seed,
                "return_token_ids": True,
            }
            whole = (await http.post(CHAT, json=body)).json()
            streamed = joined(events_of(await http.post(CHAT, json=body | {"stream": True}))[:-1])
            assert whole["choices"][0]["message"]["content"] == streamed["text"] == wanted
            assert whole["choices"][0]["token_ids"] == streamed["token_ids"] == answer(stub.requests[-1])
            assert "�" not in streamed["text"]
        prompt = stub.requests[0].prompt_ids
        assert (
            prompt.count(tokenizer.special_texts["<|im_end|>"])
            == tokenizer.decode(prompt, skip_special_tokens=False).count("<|im_end|>") - 1
        ), "the user's own is text"
        ids = (await http.post("/tokenize", json={"prompt": TEXTS[0]})).json()["tokens"]
        assert (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"] == TEXTS[0]
        tokens = (await http.post("/tokenize", json={"messages": body["messages"]})).json()["tokens"]
        assert tokens == prompt


async def test_a_stop_string_across_real_tokens(connect: Connect, text: dict[str, Any]) -> None:
    tokenizer = text["tokenizer"]
    stub = StubClient(answer=lambda request: tokenizer.encode(TEXTS[0]))
    async with connect(stub, **text) as (http, _):
        data = (await http.post(COMPLETIONS, json={"prompt": "x", "stop": "도는 서", "max_tokens": 60})).json()
    assert data["choices"][0]["text"] == "대한민국의 수"
    assert data["choices"][0]["stop_reason"] == "도는 서"
