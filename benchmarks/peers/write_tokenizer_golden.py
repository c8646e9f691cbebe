"""Writes what llama.cpp's tokenizer makes of the corpus: tests/golden/tokenizer/<model>.json, one file a model.

Runs under an environment that has llama-cpp-python, on the named models in jilju's cache (`jilju pull` puts them there). For every
line of corpus.json the ids with special tokens as text and as tokens, and the ids that end a generation. The vocabulary of
smollm2-135m, with two numbers in it, is also read under each pre-tokenizer that jilju knows; one that cuts as an earlier one
did names that one.
"""

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "tokenizer"
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")
PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "smollm")
PRE_TOKENIZERS += ("starcoder", "refact", "command-r")
# Tokens and merges of smollm2-135m that nothing else is built from, as numbers of the same length: its own vocabulary has
# single digits only, and patterns that cut numbers differently would not show.
RESPELLED = {"np": "23", "n p": "2 3", "Lif": "123", "L if": "1 23"}
STRING = 8  # GGUF's number of a string value


def load(path: Path) -> Llama:
    return Llama(str(path), vocab_only=True, verbose=False)


def tokenize(llm: Llama, lines: list[str], *, special: bool) -> list[list[int]]:
    return [llm.tokenize(line.encode(), add_bos=False, special=special) for line in lines]


def end_ids(llm: Llama) -> list[int]:
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    return [id_ for id_ in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, id_)]


def string(text: str) -> bytes:
    """As it lies in the file."""
    return struct.pack("<Q", len(text)) + text.encode()


def pair(key: str, value: str) -> bytes:
    return string(key) + struct.pack("<I", STRING) + string(value)


def with_pre(path: Path, metadata: dict[str, str], pre: str, to: Path) -> None:
    """A copy of the file's header under another `pre`. The model's name gives or takes the difference in length, so nothing
    moves; the weights are left out (a hole of the same size), as nobody reads them."""
    old_pre, name = metadata["tokenizer.ggml.pre"], metadata["general.name"]
    room = len(name) + len(old_pre) - len(pre)
    with path.open("rb") as file:
        header = file.read(16 << 20)
    swaps = {pair("tokenizer.ggml.pre", old_pre): pair("tokenizer.ggml.pre", pre)}
    swaps[pair("general.name", name)] = pair("general.name", "x" * room)
    for old, new in {**swaps, **{string(old): string(new) for old, new in RESPELLED.items()}}.items():
        assert header.count(old) == 1, f"{path}: {old!r} is there {header.count(old)} times"
        header = header.replace(old, new)
    with to.open("wb") as file:
        file.write(header)
        file.truncate(path.stat().st_size)


def renderings(llm: Llama, chats: list[list[dict[str, str]]]) -> list[str]:
    """The model's own template, by llama-cpp-python's renderer."""
    template = Jinja2ChatFormatter(
        template=llm.metadata["tokenizer.chat_template"],
        bos_token=llm._model.token_get_text(llm.token_bos()),
        eos_token=llm._model.token_get_text(llm.token_eos()),
    )
    return [template(messages=chat).prompt for chat in chats]


def main(models: dict[str, Path]) -> None:
    lines = json.loads((GOLDEN / "corpus.json").read_text())
    chats = json.loads((GOLDEN / "chats.json").read_text())
    for name, path in models.items():
        llm = load(path)
        prompts = renderings(llm, chats)
        golden = {
            "peer": f"llama-cpp-python {llama_cpp.__version__}",
            "end_ids": end_ids(llm),
            "prompts": prompts,
            "prompt_ids": tokenize(llm, prompts, special=True),
            "ids": tokenize(llm, lines, special=False),
            "special_ids": tokenize(llm, lines, special=True),
        }
        if name == "smollm2-135m":
            golden["respelled"], golden["pre"] = RESPELLED, {}
            scratch = Path(tempfile.mkdtemp())
            for pre in PRE_TOKENIZERS:
                with_pre(path, llm.metadata, pre, scratch / f"{pre}.gguf")
                ids = tokenize(load(scratch / f"{pre}.gguf"), lines, special=False)
                same = [known for known, known_ids in golden["pre"].items() if known_ids == ids]
                golden["pre"][pre] = same[0] if same else ids
            shutil.rmtree(scratch)
        # one line a list of ids: a change shows as the lines it touches
        text = json.dumps(golden, separators=(",", ":")).replace("],[", "],\n[").replace(',"', ',\n"')
        assert json.loads(text) == golden, f"{name}: the line breaks changed the text"
        (GOLDEN / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(lines)} lines, {len(chats)} chats")


def cache() -> Path:
    """Where `jilju pull` puts models: model/sources.py has the rule, and cannot be imported here."""
    if os.environ.get("JILJU_CACHE"):
        return Path(os.environ["JILJU_CACHE"]).expanduser() / "models"
    base = Path(os.environ["XDG_CACHE_HOME"]) if os.environ.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    return base / "jilju" / "models"


if __name__ == "__main__":
    main({name: cache() / f"{name}.gguf" for name in MODELS})
