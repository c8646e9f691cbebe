"""The tokenizer of a model folder against the `tokenizers` library on the same file, and against the GGUF tokenizer of the same
vocabulary; what the files beside it say; every file that lies is refused.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from jilju.errors import ModelFileError
from jilju.text.byte_level import PRE_TOKENIZERS
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.hf_tokenizer import load_folder_table, load_folder_tokenizer
from jilju.text.matcher import GrammarSource
from jilju.text.template import encode_chat
from jilju.text.text_files import open_text_files
from jilju.text.tokenizer import Tokenizer
from tests.text.conftest import CHATML

VOCAB_SIZE = 700  # of the model: above all that are trained here
BOS, EOS, TURN, TOOL = "<s>", "</s>", "<|im_end|>", "<tool>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("gpt2", "llama3", "qwen", "llama2", "metaspace-first", "metaspace-always", "gemma")


class Made(NamedTuple):
    kind: str
    folder: Path
    tokenizer: Tokenizer
    library: LibraryTokenizer

    def library_ids(self, text: str, *, parse_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        self.library.encode_special_tokens = not parse_special
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids


def byte_level(corpus: list[str], pattern: str, **model: Any) -> LibraryTokenizer:
    made = LibraryTokenizer(models.BPE(**model))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, TURN)])
    made.add_tokens([AddedToken(TOOL, normalized=False)])
    return made


def by_merging(corpus: list[str], kind: str) -> LibraryTokenizer:
    """As sentencepiece's models are converted: bytes for what no token has, spaces as U+2581."""
    trained = LibraryTokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+"), "isolated")
    trained.train_from_iterator(
        [line for line in corpus if TURN not in line and BOS not in line],
        trainers.BpeTrainer(vocab_size=650, special_tokens=["<unk>", BOS, EOS, TURN, *BYTES], limit_alphabet=200, show_progress=False),
    )  # fmt: skip
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = LibraryTokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    match kind:
        case "llama2":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            steps.append(decoders.Strip(" ", 1, 0))
        case "gemma":
            made.normalizer = normalizers.Replace(" ", "▁")
        case _:
            made.pre_tokenizer = pre_tokenizers.Metaspace(
                "▁", prepend_scheme=kind.removeprefix("metaspace-"), split=False
            )
            steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", BOS, EOS, TURN)])
    made.add_tokens([AddedToken(TOOL, normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return made


def make(kind: str, corpus: list[str]) -> LibraryTokenizer:
    match kind:
        case "gpt2":
            return byte_level(corpus, PRE_TOKENIZERS["gpt-2"].patterns[0])
        case "llama3":
            made = byte_level(corpus, PRE_TOKENIZERS["llama3"].patterns[0], ignore_merges=True)
            template = processors.TemplateProcessing(
                single=f"{BOS} $A {EOS}",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(text, made.token_to_id(text)) for text in (BOS, EOS)],
            )
            made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
            return made
        case "qwen":
            made = byte_level(corpus, PRE_TOKENIZERS["qwen2"].patterns[0])
            made.normalizer = normalizers.NFC()
            made.post_processor = processors.ByteLevel(trim_offsets=False)
            return made
    return by_merging(corpus, kind)


def write(folder: Path, made: LibraryTokenizer, *, edit: Any = lambda parsed: None, **files: Any) -> Path:
    """`edit` changes tokenizer.json; `files` are others by their name without .json."""
    folder.mkdir(exist_ok=True)
    parsed = json.loads(made.to_str())
    edit(parsed)
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session", params=KINDS)
def made(request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Made:
    library = make(request.param, corpus)
    folder = write(
        tmp_path_factory.mktemp(request.param) / "model",
        library,
        tokenizer_config={"bos_token": BOS, "eos_token": {"__type": "AddedToken", "content": EOS}},
    )
    return Made(request.param, folder, load_folder_tokenizer(folder, VOCAB_SIZE), library)


@pytest.fixture(scope="session")
def small(corpus: list[str]) -> LibraryTokenizer:
    return make("gpt2", corpus)


# ---- beside the library


MIXED = [
    f"a{BOS}b",
    f"{BOS} x{EOS}{EOS}y ",
    f"{TURN}\n대한{TOOL}민국 {TURN}",
    f"  {TOOL} {BOS}",
    "",
    " ",
    "\n\n  a",
    "🇰🇷é\u0301",
]


def test_same_ids_as_the_library(made: Made, corpus: list[str]) -> None:
    for text in corpus + MIXED:
        for parse_special in (False, True):
            got = made.tokenizer.encode(text, parse_special=parse_special)
            assert got == made.library_ids(text, parse_special=parse_special), (text, parse_special)
        got = made.tokenizer.encode(text, add_special_tokens=True, parse_special=True)
        assert got == made.library_ids(text, parse_special=True, add_special_tokens=True), text


def test_same_text_as_the_library(made: Made, corpus: list[str]) -> None:
    for text in corpus + MIXED:
        ids = made.library_ids(text, parse_special=True, add_special_tokens=True)
        for skip in (False, True):
            want = made.library.decode(ids, skip_special_tokens=skip)
            assert made.tokenizer.decode(ids, skip_special_tokens=skip) == want, text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=30) | st.text(alphabet="a b1'\n\t.가▁<s>/|im_end", max_size=40))
def test_any_text_comes_back(made: Made, text: str) -> None:
    ids = made.tokenizer.encode(text)
    assert not set(ids) & (made.tokenizer.special_ids - {0}), "text of control tokens stays text"
    if made.kind == "qwen":
        text = normalizers.NFC().normalize_str(text)
    if "▁" in text and made.kind not in ("gpt2", "llama3", "qwen"):
        text = text.replace("▁", " ")  # which these cannot tell apart
    got = b"".join(map(made.tokenizer.token_bytes, ids)).decode()
    assert got == text or (made.kind.startswith(("llama2", "metaspace")) and got == " " + text)


def test_bos_and_eos_as_the_post_processor_puts_them(made: Made) -> None:
    has_bos = made.kind not in ("gpt2", "qwen")
    assert (made.tokenizer.add_bos, made.tokenizer.bos_id) == (has_bos, made.library.token_to_id(BOS))
    assert made.tokenizer.eos_ids == (made.library.token_to_id(EOS), made.library.token_to_id(TURN))
    assert set(made.tokenizer.special_texts) == {BOS, EOS, TURN} | (
        {"<unk>"} if "<unk>" in made.library.get_vocab() else set()
    )


def test_ids_that_no_token_has_stand_for_nothing(made: Made) -> None:
    num_tokens = made.library.get_vocab_size(with_added_tokens=True)
    assert made.tokenizer.vocab_size == VOCAB_SIZE > num_tokens
    assert {made.tokenizer.token_bytes(id_) for id_ in range(num_tokens, VOCAB_SIZE)} == {b""}
    assert made.tokenizer.token_text(num_tokens) == f"[unused {num_tokens}]"
    assert made.tokenizer.token_bytes(num_tokens - 1) != b""


def test_the_table_is_the_tokenizers(made: Made) -> None:
    table = load_folder_table(made.folder, VOCAB_SIZE)
    assert table.tokens == [made.tokenizer.token_bytes(id_) for id_ in range(VOCAB_SIZE)]
    assert (table.special_ids, table.eos_ids) == (made.tokenizer.special_ids, made.tokenizer.eos_ids)


def test_a_conversation_has_the_ids_of_its_text(made: Made) -> None:
    """What a template writes between control tokens begins no text: no space is put before it where the library puts none."""
    source = f"{{% for m in messages %}}{TURN}{{{{ m['content'] }}}}{EOS}{{% endfor %}}{TURN}o\nk"
    template = open_text_files(str(made.folder), VOCAB_SIZE).template(made.tokenizer.token_bytes, source)
    assert template is not None
    for text in ("hello", " hello", "나는 오늘\n", "\n"):
        ids = encode_chat(template, made.tokenizer, [{"role": "user", "content": text}])
        assert ids == made.library_ids(f"{TURN}{text}{EOS}{TURN}o\nk", parse_special=True)


def test_answers_can_be_held_to_a_grammar(made: Made) -> None:
    source = GrammarSource(load_folder_table(made.folder, VOCAB_SIZE), VOCAB_SIZE)
    mask = np.zeros(-(-VOCAB_SIZE // 32), np.uint32)
    from llguidance import LLMatcher

    matcher = source.make(LLMatcher.grammar_from_regex("(hello|학교)"))
    for id_ in made.tokenizer.encode("학교", after_special=True):
        if made.tokenizer.token_bytes(id_).startswith(b" "):
            pytest.skip(f"{made.kind} puts a space before every text")
        matcher.fill(mask)
        assert mask[id_ // 32] >> id_ % 32 & 1
        assert matcher.take(id_)
    assert matcher.is_accepting
    source.close()


# ---- beside the GGUF tokenizer


def test_the_same_vocabulary_in_a_gguf_file(smollm2: dict[str, Any], corpus: list[str], tmp_path: Path) -> None:
    tokens, types = smollm2["tokenizer.ggml.tokens"], smollm2["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in smollm2["tokenizer.ggml.merges"]]
    made = LibraryTokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == 3]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    eos = tokens[smollm2["tokenizer.ggml.eos_token_id"]]
    folder = write(tmp_path / "smollm2", made, tokenizer_config={"eos_token": eos, "bos_token": control[1]})
    ours, other = load_folder_tokenizer(folder, len(tokens)), load_tokenizer(smollm2, file="smollm2.gguf")
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))[:4]]
    for text in [*corpus, *code, "👩‍👩‍👧‍👦 🇰🇷 ☺️", "<|im_start|>user\nhi<|im_end|>"]:
        for parse_special in (False, True):
            ids = ours.encode(text, parse_special=parse_special)
            assert ids == other.encode(text, parse_special=parse_special)
            assert ours.decode(ids) == other.decode(ids)
    assert [ours.token_bytes(id_) for id_ in range(len(tokens))] == [
        other.token_bytes(id_) for id_ in range(len(tokens))
    ]
    assert (ours.vocab_size, ours.special_texts) == (other.vocab_size, other.special_texts)
    assert ours.eos_ids[0] == other.eos_ids[0] and set(ours.eos_ids) == set(other.eos_ids)


# ---- the files beside it


def test_ids_that_end_an_answer(small: LibraryTokenizer, tmp_path: Path) -> None:
    eos, turn = small.token_to_id(EOS), small.token_to_id(TURN)

    def eos_ids(**files: Any) -> tuple[int, ...]:
        folder = write(tmp_path / "model", small, **files)
        return load_folder_tokenizer(folder, VOCAB_SIZE).eos_ids

    by_text = (turn, eos)  # in the order of the known texts
    assert eos_ids() == by_text
    assert eos_ids(config={"eos_token_id": 7}) == (7, *by_text)
    assert eos_ids(generation_config={"eos_token_id": [eos, 9]}) == (eos, 9, 7, turn)
    assert eos_ids(generation_config={}, config={}, tokenizer_config={"eos_token": "a"})[0] == small.token_to_id("a")


@pytest.mark.parametrize(("flag", "adds"), [(None, False), (False, False), (True, True)])
def test_flags_of_the_config_win(small: LibraryTokenizer, flag: bool | None, adds: bool, tmp_path: Path) -> None:
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": flag, "add_eos_token": flag}
    tokenizer = load_folder_tokenizer(write(tmp_path / "model", small, tokenizer_config=config), VOCAB_SIZE)
    plain = tokenizer.encode("a")
    around = [small.token_to_id(BOS), *plain, small.token_to_id(EOS)]
    assert tokenizer.encode("a", add_special_tokens=True) == (around if adds else plain)


def test_chat_templates(small: LibraryTokenizer, tmp_path: Path) -> None:
    config: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS}
    folder = write(tmp_path / "model", small, tokenizer_config=config)
    files = open_text_files(str(folder), VOCAB_SIZE)
    token_bytes = files.tokenizer().token_bytes

    def rendered() -> str | None:
        template = files.template(token_bytes)
        return template and template.render([{"role": "user", "content": "hi"}])

    def with_template(template: Any) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))

    assert rendered() is None
    with_template(CHATML)
    assert rendered() == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with_template(
        [{"name": "rag", "template": "r"}, {"name": "default", "template": "{{ bos_token }}d{{ eos_token }}"}]
    )
    assert rendered() == f"{BOS}d{EOS}"
    (folder / "chat_template.jinja").write_text("of the file {{ messages[0].content }}")
    assert rendered() == "of the file hi"
    own = files.template(token_bytes, "given")
    assert own is not None and own.render([{"role": "user", "content": ""}]) == "given"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: text is .*valid UTF-8"):
        rendered()
    (folder / "chat_template.jinja").unlink()
    for template, told in (
        ([{"name": "rag", "template": "r"}], "one named 'default'"),
        (5, "a text"),
        ("{% if", "jinja2"),
    ):
        with_template(template)
        with pytest.raises(ModelFileError, match=told):
            rendered()


# ---- refusals


def added(text: str, **flags: Any) -> Any:
    def edit(parsed: dict[str, Any]) -> None:
        next(token for token in parsed["added_tokens"] if token["content"] == text).update(flags)

    return edit


def setting(**values: Any) -> Any:
    return lambda parsed: parsed.update(values)


def special_by_merging(parsed: dict[str, Any]) -> None:
    text = "".join(parsed["model"]["merges"][0])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": parsed["model"]["vocab"][text], "content": text, "special": True} | flags
    parsed["added_tokens"].insert(0, token)


TWO_BEFORE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}] * 2 + [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda parsed: parsed["model"].update(type="WordPiece"), "model.type is WordPiece; allowed: BPE"),
        (setting(decoder=None), "decoder is missing; allowed: one of ByteLevel"),
        (setting(decoder={"type": "WordPiece"}), "decoder is WordPiece"),
        (setting(post_processor={"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}), "post_processor is BertProcessing"),
        (setting(post_processor=TWO_BEFORE), "at most one special token before and after"),
        (setting(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "text is "),
        (setting(added_tokens=[{"id": 700, "content": "x"}]), "id 700; allowed: 0 to 699"),
        (setting(added_tokens=[{"id": 1, "content": ""}]), "is empty"),
        (lambda parsed: parsed["model"]["vocab"].update(z9=-1), r"model\.vocab\['z9'\] is -1"),
        (lambda parsed: parsed["model"]["merges"].append(["z9", "z8"]), "text is "),
        (special_by_merging, "is made from plain text"),
        (added(EOS, rstrip=True), "special with lstrip, rstrip or single_word"),
        (
            lambda parsed: (
                added(EOS, normalized=True)(parsed),
                parsed.update(normalizer={"type": "Prepend", "prepend": "▁"}),
            ),
            "special and normalized beside a Prepend",
        ),
        (
            setting(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}],
                }
            ),
            "a Metaspace 'first' among others",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_not_read_is_refused(edit: Any, told: str, small: LibraryTokenizer, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", small, edit=edit)
    with pytest.raises(ModelFileError, match=rf"model/tokenizer\.json: .*{told}"):
        load_folder_tokenizer(folder, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config", {"eos_token_id": 700}, "eos_token_id is 700; allowed: ids from 0 to 699"),
        ("generation_config", {"eos_token_id": [1, "x"]}, "eos_token_id is x"),
        ("generation_config", [], "a JSON list"),
        ("tokenizer_config", {"eos_token": "<none>"}, "eos_token is '<none>'; allowed: a token of tokenizer.json"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token is 5; allowed: a token's text"),
        ("tokenizer_config", {"add_bos_token": 1}, "add_bos_token is 1; allowed: true or false"),
        ("tokenizer_config", {"add_bos_token": True}, "bos_token is missing"),
    ],
)
def test_a_file_beside_it_that_lies_is_refused(
    name: str, content: Any, told: str, small: LibraryTokenizer, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", small, **{name: content})
    with pytest.raises(ModelFileError, match=rf"model/{name}\.json: .*{told}"):
        load_folder_tokenizer(folder, VOCAB_SIZE)


def test_a_folder_without_a_tokenizer_says_what_is_needed(tmp_path: Path) -> None:
    for load in (load_folder_tokenizer, load_folder_table):
        with pytest.raises(ModelFileError, match=r"tokenizer\.json is missing; allowed: a tokenizer of the"):
            load(tmp_path, VOCAB_SIZE)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelFileError, match=r"tokenizer\.model, which is there, is not read; .*save_pretrained"):
        load_folder_tokenizer(tmp_path, VOCAB_SIZE)


def test_random_changes_of_the_file(small: LibraryTokenizer, tmp_path: Path) -> None:
    """Anything but a ModelFileError goes through; the library itself panics on some files."""
    text, chance = json.dumps(json.loads(small.to_str())), random.Random(5)
    head, tail = text.index('"model"'), len(text)
    (tmp_path / "config.json").write_text("{}")
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        raw = bytearray(text.encode())
        for _ in range(chance.randint(1, 3)):
            raw[chance.choice((chance.randrange(head), chance.randrange(tail)))] = chance.randrange(32, 127)
        (tmp_path / "tokenizer.json").write_bytes(raw)
        try:
            load_folder_tokenizer(tmp_path, VOCAB_SIZE).encode("hello 대한 <s>", parse_special=True)
            outcomes[True] += 1
        except ModelFileError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 5, f"both outcomes must be met: {outcomes}"


# ---- the stand-in


def test_the_stand_in_of_dummy_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [300, 2]}))
    files = open_text_files(str(tmp_path), 512, stands_in=True)
    tokenizer = files.tokenizer()
    assert tokenizer.encode("a 가", parse_special=True) == list("a 가".encode())
    assert tokenizer.decode(list("a 가".encode())) == "a 가"
    assert tokenizer.decode([400, 97]) == "<|400|>a" and tokenizer.token_text(300) == "<|300|>"
    assert tokenizer.eos_ids == (300, 2) and tokenizer.special_ids == {300, 2}
    assert tokenizer.decode([97, 300]) == "a" and tokenizer.encode("<|300|>", parse_special=True) == [300]
    assert files.template(tokenizer.token_bytes) is None
    table = files.token_table()
    assert table.tokens == [tokenizer.token_bytes(id_) for id_ in range(512)] and table.eos_ids == (300, 2)
    with pytest.raises(ModelFileError, match="vocab_size is 40; allowed: at least 256"):
        open_text_files(str(tmp_path), 40, stands_in=True)
    with pytest.raises(ModelFileError, match="eos_token_id is 300"):
        open_text_files(str(tmp_path), 256, stands_in=True)


def test_a_tokenizer_that_is_there_is_used_with_dummy_weights_too(small: LibraryTokenizer, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", small)
    tokenizer = open_text_files(str(folder), VOCAB_SIZE, stands_in=True).tokenizer()
    assert tokenizer.encode(EOS, parse_special=True) == [small.token_to_id(EOS)]
