"""The tokenizer of a model folder: tokenizer.json through the `tokenizers` library, with what the files beside it say.

Owns the checks of these files, and what of them is bos, eos and the end of a turn. The measure is the library on the same
file: the same ids for the same text. Kinds of tokenizer whose tokens are no bytes are refused. Knows nothing of chats or engines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import pre_tokenizers

from jilju.errors import ModelFileError
from jilju.formats.json_file import read_bytes, read_object
from jilju.text import byte_level, spm
from jilju.text.tokenizer import Tokenizer, TokenTable
from jilju.text.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, VocabularyTokenizer, end_ids, table_of

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MAX_TOKENIZER_BYTES = 128 * 1024 * 1024  # four times Gemma's, the largest in use
MAX_TOKENS = 1 << 20
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    type: str | None = None
    byte_fallback: bool = False
    merges: msgspec.Raw = msgspec.Raw(b"[]")  # half a million lists, which are seldom wanted


class _TokenizerJson(msgspec.Struct):
    """What is read of a tokenizer.json beside the library."""

    model: _Model
    added_tokens: list[_AddedToken] = []
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


class LibraryScheme:
    """Plain text to ids by the library; `first` reads what begins a text, `others` what follows a control token."""

    def __init__(self, first: LibraryTokenizer, others: LibraryTokenizer, bytes_of_normal: Callable[[str], bytes]):
        self._first, self._others = first, others
        self.token_bytes = bytes_of_normal

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [_ids(self._others if index else self._first, text) for index, text in enumerate(texts)]


def _ids(library: LibraryTokenizer, text: str) -> list[int]:
    # one by one: the library would put threads of its own to a batch, beside those of the engine
    ids: list[int] = library.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []
    return ids


class _Described(NamedTuple):
    """A folder's tokens by id, as its files describe them."""

    tokens: list[str]
    types: list[int]
    bytes_of_normal: Callable[[str], bytes]
    adds_space: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool


def load_folder_table(folder: Path, vocab_size: int) -> TokenTable:
    """As the folder's tokenizer has it, without what it takes to read text. Raises ModelFileError."""
    described = _described(folder, vocab_size, _read(folder)[1])
    return table_of(described.tokens, described.types, described.bytes_of_normal, described.eos_ids)


def load_folder_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder, whose model has `vocab_size` ids. Raises ModelFileError."""
    raw, parsed = _read(folder)
    described = _described(folder, vocab_size, parsed)
    first = _library(folder, raw)
    _check_control_tokens(folder, parsed, first)
    others = first
    if any(part.get("prepend_scheme") == "first" for part in _parts(parsed.pre_tokenizer)):
        others = _library(folder, raw)
        if not isinstance(others.pre_tokenizer, pre_tokenizers.Metaspace):
            raise _refusal(folder, "pre_tokenizer", "a Metaspace 'first' among others", "one alone")
        others.pre_tokenizer.prepend_scheme = "never"
    return VocabularyTokenizer(
        LibraryScheme(first, others, described.bytes_of_normal),
        described.tokens,
        described.types,
        bos_id=described.bos_id,
        eos_ids=described.eos_ids,
        add_bos=described.add_bos,
        add_eos=described.add_eos,
        adds_space=described.adds_space,
    )


def special_text(config: Mapping[str, Any], key: str, *, file: str) -> str | None:
    """The text of a special token that tokenizer_config.json names, as a text or as an added token. Raises ModelFileError."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelFileError(file, key, value, "a token's text")
    return value


def _read(folder: Path) -> tuple[bytes, _TokenizerJson]:
    raw = read_bytes(folder / TOKENIZER, MAX_TOKENIZER_BYTES)
    if raw is None:
        if (folder / "tokenizer.model").exists():
            given = "missing; tokenizer.model, which is there, is not read"
            allowed = f"{TOKENIZER}: transformers writes it with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            raise ModelFileError(str(folder), TOKENIZER, given, allowed)
        raise ModelFileError(str(folder), TOKENIZER, "missing", "a tokenizer of the `tokenizers` library")
    try:
        parsed = msgspec.json.decode(raw, type=_TokenizerJson)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(folder, "text", str(error), "a tokenizer of the `tokenizers` library") from None
    return raw, parsed


def _library(folder: Path, raw: bytes) -> LibraryTokenizer:
    try:
        library = LibraryTokenizer.from_buffer(raw)
        library.no_truncation()
        library.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics on some files, which is no Exception
        raise _refusal(folder, "text", str(error), "a tokenizer of the `tokenizers` library") from None
    library.encode_special_tokens = True  # as text: where they are to be read, they are found before
    return library


def _check_control_tokens(folder: Path, parsed: _TokenizerJson, library: LibraryTokenizer) -> None:
    """That plain text cannot become a control token: none is what merging makes, nor a piece that is taken whole."""
    control = [added.content for added in parsed.added_tokens if added.special and added.content in parsed.model.vocab]
    if not control:
        return
    merges = msgspec.json.decode(parsed.model.merges, type=list[Any])  # of "a b" or of ["a", "b"]
    results = {merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in merges}
    for text in control:
        if text in results or parsed.model.vocab[text] in _ids(library, text):
            raise _refusal(
                folder, f"added_tokens, {text[:80]!r}", "made from plain text", "special tokens that are not"
            )


def _described(folder: Path, vocab_size: int, parsed: _TokenizerJson) -> _Described:
    if parsed.model.type not in ("BPE", None):
        raise _refusal(folder, "model.type", parsed.model.type, "BPE")
    decoders = {part.get("type"): part for part in _parts(parsed.decoder)}
    if "ByteLevel" in decoders:
        bytes_of_normal, adds_space = byte_level.bytes_of, False
    elif {"Metaspace", "ByteFallback"} & decoders.keys():
        strip, metaspace = decoders.get("Strip", {}), decoders.get("Metaspace", {})
        has_prefix = (
            metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space") else "never") != "never"
        )
        bytes_of_normal, adds_space = spm.bytes_of, strip.get("start") == 1 or has_prefix
    else:
        shown = ", ".join(map(str, decoders)) or "missing"
        raise _refusal(
            folder, "decoder", shown, "one of ByteLevel, Metaspace, ByteFallback, or a sequence with one of them"
        )
    tokens, types, vocab = _tokens(folder, vocab_size, parsed)
    config_path = folder / TOKENIZER_CONFIG
    config = read_object(config_path) or {}

    def id_of(key: str) -> int | None:
        text = special_text(config, key, file=str(config_path))
        if text is not None and text not in vocab:
            raise ModelFileError(str(config_path), key, repr(text), f"a token of {TOKENIZER}")
        return None if text is None else vocab[text]

    before, after = _added_around(folder, parsed, vocab)
    add_bos, add_eos = (_flag(config, f"add_{name}_token", str(config_path)) for name in ("bos", "eos"))
    bos_id = before if before is not None else id_of("bos_token")
    if add_bos and bos_id is None:
        raise ModelFileError(str(config_path), "bos_token", "missing", "a token, as add_bos_token is set")
    named = [*end_ids_of_configs(folder, vocab_size), id_of("eos_token")]
    if after is not None or add_eos:
        named.insert(0, after if after is not None else id_of("eos_token"))
    return _Described(
        tokens,
        types,
        bytes_of_normal,
        adds_space,
        bos_id=bos_id,
        eos_ids=end_ids(named, vocab, types),
        add_bos=before is not None if add_bos is None else add_bos,
        add_eos=after is not None if add_eos is None else add_eos,
    )


def _tokens(folder: Path, vocab_size: int, parsed: _TokenizerJson) -> tuple[list[str], list[int], dict[str, int]]:
    """Tokens and types by id, ids by token. Ids of the model that no token has are unused."""
    vocab = dict(parsed.model.vocab)
    largest = min(vocab_size, MAX_TOKENS)
    tokens, types = [""] * largest, [UNUSED] * largest
    for token, id_ in parsed.model.vocab.items():
        if not 0 <= id_ < largest:
            raise _refusal(folder, f"model.vocab[{token[:80]!r}]", id_, f"0 to {largest - 1}, the ids of the model")
        tokens[id_] = token
        types[id_] = BYTE if parsed.model.byte_fallback and token in BYTE_TOKENS else NORMAL
    has_prepend = any(part.get("type") == "Prepend" for part in _parts(parsed.normalizer))
    for added in parsed.added_tokens:
        field = f"added_tokens, {added.content[:80]!r}"
        if not 0 <= added.id < largest:
            raise _refusal(folder, field, f"id {added.id}", f"0 to {largest - 1}, the ids of the model")
        if added.special and (added.lstrip or added.rstrip or added.single_word):
            raise _refusal(folder, field, "special with lstrip, rstrip or single_word", "special tokens without these")
        if added.special and added.normalized and has_prepend:
            raise _refusal(
                folder, field, "special and normalized beside a Prepend", "special tokens with normalized false"
            )
        if not added.content:
            raise _refusal(folder, field, "empty", "a token's text")
        tokens[added.id], vocab[added.content] = added.content, added.id
        if added.special:
            types[added.id] = CONTROL
        elif types[added.id] == UNUSED:
            types[added.id] = NORMAL
    for id_, type_ in enumerate(types):
        if type_ == UNUSED:
            tokens[id_] = f"[unused {id_}]"
    return tokens, types, vocab


def _added_around(folder: Path, parsed: _TokenizerJson, vocab: Mapping[str, int]) -> tuple[int | None, int | None]:
    """The ids that the post-processor puts before and after a text."""
    before: list[str] = []
    after: list[str] = []
    for part in _parts(parsed.post_processor):
        if part.get("type") == "ByteLevel":
            continue
        if part.get("type") != "TemplateProcessing" or not isinstance(part.get("single"), list):
            raise _refusal(folder, "post_processor", part.get("type"), "ByteLevel or TemplateProcessing")
        found = before
        for item in part["single"]:
            match item:
                case {"Sequence": _}:
                    found = after
                case {"SpecialToken": {"id": str(text)}} if text in vocab:
                    found.append(text)
                case _:
                    raise _refusal(folder, "post_processor.single", item, "the text and special tokens around it")
    if max(len(before), len(after)) > 1:
        raise _refusal(folder, "post_processor.single", before + after, "at most one special token before and after")
    return (vocab[before[0]] if before else None), (vocab[after[0]] if after else None)


def end_ids_of_configs(folder: Path, vocab_size: int) -> list[int]:
    """The ids that generation_config.json names as eos, then those of config.json. Raises ModelFileError."""
    ids: list[int] = []
    for name in (GENERATION_CONFIG, CONFIG):
        value = (read_object(folder / name) or {}).get("eos_token_id")
        given = value if isinstance(value, list) else [] if value is None else [value]
        for id_ in given:
            if type(id_) is not int or not 0 <= id_ < vocab_size:
                raise ModelFileError(str(folder / name), "eos_token_id", id_, f"ids from 0 to {vocab_size - 1}")
        ids += given
    return ids


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """A component of a tokenizer, or those of a sequence of some."""
    if isinstance(value, dict):
        inner = next(
            (value[key] for key in ("pretokenizers", "normalizers", "processors", "decoders") if key in value), None
        )
        if value.get("type") != "Sequence" or not isinstance(inner, list):
            yield value
            return
        for part in inner:
            yield from _parts(part)


def _flag(config: Mapping[str, Any], key: str, file: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelFileError(file, key, value, "true or false")
    return value


def _refusal(folder: Path, field: str, given: object, allowed: str) -> ModelFileError:
    return ModelFileError(str(folder / TOKENIZER), field, given, allowed)
