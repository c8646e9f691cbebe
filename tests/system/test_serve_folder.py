"""A server on a model folder: completions, a chat held to a choice and the engine's return after a death; and on a config.json alone."""

import json
import time
from pathlib import Path

import httpx
import msgspec
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from jilju.formats.ggml import GgmlType
from tests.model.folders import FOLDER_SPECS, config_of, write_folder
from tests.system.conftest import Server
from tests.text.conftest import CHATML

SPEC = msgspec.structs.replace(FOLDER_SPECS[2], vocab_size=280, max_context=512)
CHOICE = ["네", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_folder(tmp_path_factory.mktemp("models") / "tiny-folder", SPEC, type_=GgmlType.BF16, num_files=2)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = LibraryTokenizer(models.BPE(vocab={letter: id_ for id_, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (path / "chat_template.jinja").write_text(CHATML)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 9}))
    return path


def answer(server: Server) -> str:
    body = {"prompt": "안녕 hi", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    done = httpx.post(server.url + "/v1/completions", json=body, timeout=60).raise_for_status().json()
    assert done["usage"]["prompt_tokens"] == len("안녕 hi".encode())
    return done["choices"][0]["text"]


def test_a_folder_is_served(folder: Path) -> None:
    server = Server(str(folder), "--kv-memory", "16MiB")
    shown = httpx.get(server.url + "/v1/models").json()["data"][0]
    assert shown["id"] == "tiny-folder"
    assert shown["jilju"]["quantization"].startswith("BF16 ")
    assert (shown["jilju"]["defaults"]["temperature"], shown["jilju"]["defaults"]["top_k"]) == (0.5, 9)
    first = answer(server)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "structured_outputs": {"choice": CHOICE}}
    done = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    assert done["choices"][0]["message"]["content"] in CHOICE
    server.kill_engine()
    while server.metric("jilju_engine_restarts_total") != 1 or httpx.get(server.url + "/readyz").status_code != 200:
        time.sleep(0.02)
    assert answer(server) == first
    assert server.stop() == 0


def test_a_config_alone_is_served_with_dummy_weights(tmp_path: Path) -> None:
    config = config_of(SPEC) | {"eos_token_id": 279}
    (tmp_path / "config.json").write_text(json.dumps(config))
    server = Server(str(tmp_path), "--load-format", "dummy", "--kv-memory", "16MiB")
    assert answer(server) == answer(server) != ""
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    refused = httpx.post(server.url + "/v1/chat/completions", json=chat, timeout=60)
    assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
    assert server.stop() == 0
