"""Our tokenizer against llama.cpp's on the same files: the same ids over the corpus. Differences that stay have a record:
docs/decisions/0004-tokenizer-differences.md."""

import json
from pathlib import Path

import pytest

from jilju.text.byte_level import PRE_TOKENIZERS
from jilju.text.gguf_tokenizer import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizer"
SMALL = json.loads((GOLDEN / "spm-small.json").read_text())

# Where llama.cpp makes a control token of one that the file calls otherwise, by its text alone (decision 0004): the one line
# of the corpus that holds it, and whether special tokens are parsed where it shows.
CLOSING = "</s>"
CLOSING_LINE = "<|eot_id|><|begin_of_text|><s></s>[INST]"
CLOSING_SHOWS = {"qwen2.5-coder-0.5b": True, "gemma3-270m": False}  # by the name of the model: parse_special


def spm_metadata(case):
    keys = {"tokens": "tokens", "scores": "scores", "types": "token_type", "adds_space": "add_space_prefix"}
    fixed = {"model": "llama", "pre": "default", "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {f"tokenizer.ggml.{key}": value for key, value in fixed.items()} | {
        f"tokenizer.ggml.{key}": case[name] for name, key in keys.items()
    }


def differences(tokenizer, lines, wanted, **options):
    return [
        (line, [tokenizer.token_text(id_) for id_ in got], [tokenizer.token_text(id_) for id_ in want])
        for line, want in zip(lines, wanted, strict=True)
        if (got := tokenizer.encode(line, **options)) != want
    ]


def test_the_corpus_is_large_and_mixed(corpus):
    assert len(corpus) >= 200 and len(set(corpus)) == len(corpus)
    text = "".join(corpus)
    for sample in (
        "대한민국",
        "\u1112",
        "\u200d",
        "\r\n",
        "\x00",
        "\ue000",
        "<|im_end|>",
        "ש",
        "ไ",
        "ि",
        "\u0301",
        "🇰",
    ):
        assert sample in text, f"no line has {sample!r}"


@pytest.mark.parametrize("parse_special", [False, True])
def test_same_ids_as_llama_cpp(model, tokenizer, corpus, golden, parse_special):
    wanted = golden["special_ids" if parse_special else "ids"]
    different = differences(tokenizer, corpus, wanted, parse_special=parse_special)
    assert [line for line, _, _ in different] == (
        [CLOSING_LINE] if CLOSING_SHOWS.get(model[0]) is parse_special else []
    )
    for line, ours, theirs in different:
        assert "".join(ours) == "".join(theirs) == line and (CLOSING in ours) != (CLOSING in theirs)


def test_the_same_tokens_end_a_generation(model, tokenizer, golden):
    extra = set(golden["end_ids"]) - set(tokenizer.eos_ids)
    assert {tokenizer.token_text(id_) for id_ in extra} == ({CLOSING} if model[0] in CLOSING_SHOWS else set())
    assert set(tokenizer.eos_ids) <= set(golden["end_ids"])


def test_text_comes_back(tokenizer, corpus):
    for line in corpus:
        assert tokenizer.decode(tokenizer.encode(line)) == line


@pytest.mark.parametrize("case", SMALL["vocabularies"], ids=lambda case: f"space prefix {case['adds_space']}")
def test_small_spm_vocabularies_as_llama_cpp_reads_them(case):
    """Made to be hard: scores that tie, tokens that overlap, spaces inside them, characters that are none."""
    tokenizer = load_tokenizer(spm_metadata(case), file="small.gguf")
    for kind, parse_special in (("ids", False), ("special_ids", True)):
        assert differences(tokenizer, SMALL["lines"], case[kind], parse_special=parse_special) == []


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(pre, smollm2, corpus):
    golden = json.loads((GOLDEN / "smollm2-135m.json").read_text())
    metadata = {**smollm2, "tokenizer.ggml.pre": pre}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        metadata[key] = [golden["respelled"].get(text, text) for text in metadata[key]]
    want = golden["pre"][pre]
    want = golden["pre"][want] if isinstance(want, str) else want
    assert differences(load_tokenizer(metadata, file=f"{pre}.gguf"), corpus, want) == []
