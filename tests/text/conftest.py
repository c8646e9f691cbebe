"""What the tests of text share: a small vocabulary made here, and the metadata of the named models where they are at hand."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from jilju.formats.gguf import GgufFile
from jilju.model.sources import cache_dir
from jilju.text.byte_level import PRE_TOKENIZERS
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.template import ChatTemplate
from jilju.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizer"
KEYS = ("model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id", "eos_token_id", "eot_token_id")
KEYS += ("add_bos_token", "add_space_prefix")
TEMPLATE = "tokenizer.chat_template"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE, by byte; written down a second time, from the definition by GPT-2."""
    kept = [byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace() and byte != 0xAD]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(shifted)) for byte in range(256)]


def make_metadata() -> dict[str, Any]:
    """Every byte, a few merges, and one token of each other type."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "ë Į", "ëĮ Ģ", "1 2", "12 3"]
    marked = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool>": 4, "[PAD0]": 5, "<0x0A>": 6, "<unk>": 2}
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *marked],
        "tokenizer.ggml.token_type": [1] * len(tokens) + list(marked.values()),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
        "tokenizer.ggml.add_bos_token": True,
        TEMPLATE: CHATML,
    }


@pytest.fixture
def metadata() -> dict[str, Any]:
    return make_metadata()


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    return load_tokenizer(make_metadata(), file="tiny.gguf")


@pytest.fixture(scope="session")
def chatml() -> ChatTemplate:
    return ChatTemplate(CHATML)


@pytest.fixture(scope="session")
def tokenizers_by_pre() -> dict[str, Tokenizer]:
    """The small vocabulary under every pre-tokenizer."""
    return {
        pre: load_tokenizer({**make_metadata(), "tokenizer.ggml.pre": pre}, file=f"{pre}.gguf")
        for pre in PRE_TOKENIZERS
    }


@functools.cache
def _metadata_of(name: str) -> dict[str, Any]:
    with GgufFile.open(cache_dir() / "models" / f"{name}.gguf") as file:
        keys = [TEMPLATE, *(f"tokenizer.ggml.{key}" for key in KEYS)]
        return {key: file.metadata[key] for key in keys if key in file.metadata}


def _named(name: str) -> tuple[str, dict[str, Any]]:
    if not (cache_dir() / "models" / f"{name}.gguf").exists():
        pytest.skip(f"{name} is not in the cache; `jilju pull {name}` fetches it")
    return name, _metadata_of(name)


@pytest.fixture(scope="session", params=["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"])
def model(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A named model and its metadata; skipped by name where the file is not in the cache."""
    return _named(request.param)


@pytest.fixture(scope="session")
def smollm2() -> dict[str, Any]:
    return _named("smollm2-135m")[1]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return json.loads((GOLDEN / "corpus.json").read_text())


@pytest.fixture(scope="session")
def golden(model: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """What llama.cpp made of the corpus with this model; `make peers` writes it."""
    return json.loads((GOLDEN / f"{model[0]}.json").read_text())


@pytest.fixture(scope="session")
def tokenizer(model: tuple[str, dict[str, Any]]) -> Tokenizer:
    return load_tokenizer(model[1], file=f"{model[0]}.gguf")
