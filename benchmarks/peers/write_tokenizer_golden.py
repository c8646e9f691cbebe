"""Writes what llama.cpp's tokenizer makes of the corpus: tests/golden/tokenizer/<model>.json, one file a model.

Runs under an environment that has llama-cpp-python, on the named models in jilju's cache (`jilju pull` puts them there). For every
line of corpus.json the ids with special tokens as text and as tokens, and the ids that end a generation. The vocabulary of
smollm2-135m, with two numbers in it, is also read under each pre-tokenizer that jilju knows; one that cuts as an earlier one
did names that one. Besides, spm-small.json: small SPM vocabularies made here, with texts that are hard for them.
"""

import json
import os
import random
import shutil
import struct
import tempfile
from pathlib import Path

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "tokenizer"
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m")
PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "smollm")
PRE_TOKENIZERS += ("starcoder", "refact", "command-r")
# Tokens and merges of smollm2-135m that nothing else is built from, as numbers of the same length: its own vocabulary has
# single digits only, and patterns that cut numbers differently would not show.
RESPELLED = {"np": "23", "n p": "2 3", "Lif": "123", "L if": "1 23"}
# GGUF's numbers of value types
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
UNKNOWN, NORMAL, CONTROL, USER_DEFINED, BYTE = 2, 1, 3, 4, 6  # of token types


def load(path: Path) -> Llama:
    return Llama(str(path), vocab_only=True, verbose=False)


def tokenize(llm: Llama, lines: list[str], *, special: bool) -> list[list[int]]:
    return [llm.tokenize(line.encode(), add_bos=False, special=special) for line in lines]


def end_ids(llm: Llama) -> list[int]:
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    return [id_ for id_ in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, id_)]


def string(text: str) -> bytes:
    """As it lies in the file."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, value: str) -> bytes:
    return string(key) + struct.pack("<I", STRING) + string(value)


def array(key: str, kind: int, values: list) -> bytes:
    pack = {INT32: struct.Struct("<i").pack, FLOAT32: struct.Struct("<f").pack, STRING: string}[kind]
    return string(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(map(pack, values))


def small_spm(seed: int) -> dict:
    """A vocabulary of few letters: scores tie, tokens overlap one another and hold spaces, most characters are none."""
    chance, letters = random.Random(seed), "aab\u2581한국"
    marked = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **{f"<0x{byte:02X}>": BYTE for byte in range(256)}}
    marked |= {"  ": USER_DEFINED, "\n": USER_DEFINED, "\n\n": USER_DEFINED, "<b>": USER_DEFINED}
    normal = ["".join(chance.choices(letters, k=chance.randint(1, 6))) for _ in range(90)]
    normal = list(dict.fromkeys([*letters, *"</s>0x", "</", *normal]))
    return {
        "tokens": [*marked, *normal],
        "types": [*marked.values(), *[NORMAL] * len(normal)],
        "scores": [0.0] * len(marked) + [-float(chance.randrange(12)) for _ in normal],
        "adds_space": seed % 2 == 1,
    }


def small_lines() -> list[str]:
    chance = random.Random(0)
    lines = ["".join(chance.choices("aab 한국", k=chance.choice((3, 20, 100)))) for _ in range(60)]
    pieces = ["a", "b", " ", "  ", "<b>", "<s>", "</s>", "\n", "é", "<0x41>", "\u2581", "한", "👍", "\x00"]
    return lines + ["".join(chance.choices(pieces, k=chance.randint(1, 20))) for _ in range(60)]


def write_vocabulary(vocabulary: dict, to: Path) -> None:
    """A GGUF file of the vocabulary alone."""
    pairs = [pair("general.architecture", "llama"), pair("tokenizer.ggml.model", "llama")]
    pairs += [pair("tokenizer.ggml.pre", "default")]
    for key, kind, name in (
        ("tokens", STRING, "tokens"),
        ("scores", FLOAT32, "scores"),
        ("token_type", INT32, "types"),
    ):
        pairs.append(array(f"tokenizer.ggml.{key}", kind, vocabulary[name]))
    for id_, name in enumerate(("unknown", "bos", "eos")):
        pairs.append(string(f"tokenizer.ggml.{name}_token_id") + struct.pack("<II", UINT32, id_))
    pairs.append(string("tokenizer.ggml.add_space_prefix") + struct.pack("<I?", BOOL, vocabulary["adds_space"]))
    to.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs) + bytes(64))


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
    """The model's own template, by llama-cpp-python's renderer; nothing for a model that has none."""
    if "tokenizer.chat_template" not in llm.metadata:
        return []
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
        print(f"{name}: {len(lines)} lines, {len(prompts)} chats")
    write_small_spm()


def write_small_spm() -> None:
    small, lines = [small_spm(seed) for seed in range(4)], small_lines()
    with tempfile.TemporaryDirectory() as scratch:
        for vocabulary in small:
            write_vocabulary(vocabulary, Path(scratch) / "small.gguf")
            llm = load(Path(scratch) / "small.gguf")
            vocabulary["ids"] = tokenize(llm, lines, special=False)
            vocabulary["special_ids"] = tokenize(llm, lines, special=True)
    text = json.dumps({"lines": lines, "vocabularies": small}, separators=(",", ":")).replace("],[", "],\n[")
    (GOLDEN / "spm-small.json").write_text(text + "\n")
    print(f"spm-small: {len(lines)} lines, {len(small)} vocabularies")


def cache() -> Path:
    """Where `jilju pull` puts models: model/sources.py has the rule, and cannot be imported here."""
    if os.environ.get("JILJU_CACHE"):
        return Path(os.environ["JILJU_CACHE"]).expanduser() / "models"
    base = Path(os.environ["XDG_CACHE_HOME"]) if os.environ.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    return base / "jilju" / "models"


if __name__ == "__main__":
    main({name: cache() / f"{name}.gguf" for name in MODELS})
