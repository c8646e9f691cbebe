"""Our tokenizer against llama.cpp's on the same files: the same ids over the corpus. Differences that stay have a record:
docs/decisions/0004-tokenizer-differences.md."""

import json
from pathlib import Path

import pytest

from jilju.text.byte_level import PRE_TOKENIZERS
from jilju.text.gguf_tokenizer import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizer"

# Where llama.cpp reads an ordinary token as a control token, by its text alone (decision 0004).
DIFFERENT_SPECIALS = {"qwen2.5-coder-0.5b": {"<|eot_id|><|begin_of_text|><s></s>[INST]": "</s>"}, "smollm2-135m": {}}


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


def test_same_ids_as_llama_cpp(tokenizer, corpus, golden):
    assert differences(tokenizer, corpus, golden["ids"]) == []


def test_same_ids_with_special_tokens(model, tokenizer, corpus, golden):
    different = differences(tokenizer, corpus, golden["special_ids"], parse_special=True)
    known = DIFFERENT_SPECIALS[model[0]]
    assert {line for line, _, _ in different} == set(known)
    for line, ours, theirs in different:
        assert "".join(ours) == "".join(theirs) == line and known[line] in theirs and known[line] not in ours


def test_the_same_tokens_end_a_generation(model, tokenizer, golden):
    extra = set(golden["end_ids"]) - set(tokenizer.eos_ids)
    assert {tokenizer.token_text(id_) for id_ in extra} == set(DIFFERENT_SPECIALS[model[0]].values())
    assert set(tokenizer.eos_ids) <= set(golden["end_ids"])


def test_text_comes_back(tokenizer, corpus):
    for line in corpus:
        assert tokenizer.decode(tokenizer.encode(line)) == line


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(pre, smollm2, corpus):
    golden = json.loads((GOLDEN / "smollm2-135m.json").read_text())
    metadata = {**smollm2, "tokenizer.ggml.pre": pre}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        metadata[key] = [golden["respelled"].get(text, text) for text in metadata[key]]
    want = golden["pre"][pre]
    want = golden["pre"][want] if isinstance(want, str) else want
    assert differences(load_tokenizer(metadata, file=f"{pre}.gguf"), corpus, want) == []
