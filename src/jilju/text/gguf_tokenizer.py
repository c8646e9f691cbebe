"""The tokenizer that a GGUF file describes, byte-level BPE or SPM (`tokenizer.ggml.model` = gpt2 or llama).

Owns the checks of the file's tables, and what of them is bos, eos and the end of a turn. The measure is llama.cpp's tokenizer
on the same file: the same ids for the same text, where docs/decisions/0004-tokenizer-differences.md says nothing else. What is
not known here is refused, never guessed. Knows nothing of chats or engines.
"""

import re
from collections.abc import Mapping
from itertools import chain
from math import isfinite
from typing import Any

from jilju.errors import ModelFileError
from jilju.text import byte_level, spm
from jilju.text.byte_level import PRE_TOKENIZERS, ByteLevelScheme
from jilju.text.spm import SpmScheme
from jilju.text.tokenizer import Tokenizer, TokenTable
from jilju.text.vocabulary import BYTE, NORMAL, USER_DEFINED, VocabularyTokenizer, end_ids, ids_of, table_of

# The largest vocabulary in use has about 262,000 tokens and 514,000 merges; four times that is no honest file.
MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 21
MAX_TOKEN_CHARS = 4096

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def load_token_table(metadata: Mapping[str, Any], *, file: str) -> TokenTable:
    """As the file's tokenizer has it, without what it takes to read text: of `metadata` the merges and scores may be missing."""
    fields = _Fields(metadata, file)
    bytes_of_normal = byte_level.bytes_of if fields.text("tokenizer.ggml.model") == "gpt2" else spm.bytes_of
    tokens, vocab = fields.tokens()
    types = fields.token_types(tokens)
    return table_of(tokens, types, bytes_of_normal, _end_ids(fields, vocab, types))


def load_tokenizer(metadata: Mapping[str, Any], *, file: str) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata. `file` names it in errors: ModelFileError for every table that lies."""
    fields = _Fields(metadata, file)
    try:
        match fields.text("tokenizer.ggml.model"):
            case "gpt2":
                return _byte_level(fields)
            case "llama":
                return _spm(fields)
            case other:
                raise ModelFileError(
                    file, "tokenizer.ggml.model", other, "gpt2 (byte-level BPE) or llama (SPM), the kinds read so far"
                )
    except RecursionError:
        raise ModelFileError(
            file, "tokenizer.ggml.tokens", "special tokens that nest in one another", "distinct special tokens"
        ) from None


def _byte_level(fields: "_Fields") -> Tokenizer:
    pre_name = fields.text("tokenizer.ggml.pre")
    if pre_name not in PRE_TOKENIZERS:
        raise fields.refusal("tokenizer.ggml.pre", pre_name, f"one of {', '.join(sorted(PRE_TOKENIZERS))}")
    if fields.flag("tokenizer.ggml.add_space_prefix", False):
        raise fields.refusal("tokenizer.ggml.add_space_prefix", True, "false for byte-level BPE")
    pre = PRE_TOKENIZERS[pre_name]
    tokens, vocab = fields.tokens()
    types = fields.token_types(tokens)
    return VocabularyTokenizer(
        ByteLevelScheme(vocab, fields.merges(vocab), pre),
        tokens,
        types,
        bos_id=fields.token_id("tokenizer.ggml.bos_token_id", len(tokens)),
        eos_ids=_end_ids(fields, vocab, types),
        add_bos=fields.flag("tokenizer.ggml.add_bos_token", pre.add_bos),
        add_eos=fields.flag("tokenizer.ggml.add_eos_token", False),
    )


def _spm(fields: "_Fields") -> Tokenizer:
    """Defaults are those of sentencepiece's Llama models, which files of that kind leave out."""
    fields.only("tokenizer.ggml.pre", "default")  # patterns are for byte-level BPE
    fields.only("tokenizer.ggml.remove_extra_whitespaces", False)  # nor is any other normalization done
    fields.only("tokenizer.ggml.precompiled_charsmap", [])
    tokens, vocab = fields.tokens()
    types = fields.token_types(tokens)
    adds_space = fields.flag("tokenizer.ggml.add_space_prefix", True)
    add_bos = fields.flag("tokenizer.ggml.add_bos_token", True)
    bos_id = fields.token_id("tokenizer.ggml.bos_token_id", len(tokens))
    if add_bos and bos_id is None:
        raise fields.refusal("tokenizer.ggml.bos_token_id", "missing", "an id, as bos is to be added")
    # Special texts are no result of merging: text never becomes a control token by itself.
    made = ids_of(types, NORMAL, USER_DEFINED)
    scheme = SpmScheme(tokens, vocab, fields.scores(len(tokens)), made, fields.byte_ids(vocab, types), adds_space)
    return VocabularyTokenizer(
        scheme,
        tokens,
        types,
        bos_id=bos_id,
        eos_ids=_end_ids(fields, vocab, types),
        add_bos=add_bos,
        add_eos=fields.flag("tokenizer.ggml.add_eos_token", False),
        adds_space=adds_space,
    )


class _Fields:
    """Metadata read strictly: present, of the right type, in range, or a ModelFileError."""

    def __init__(self, metadata: Mapping[str, Any], file: str):
        self._metadata = metadata
        self._file = file

    def refusal(self, key: str, given: object, allowed: str) -> ModelFileError:
        return ModelFileError(self._file, key, given, allowed)

    def only(self, key: str, value: object) -> None:
        """Refuse anything but `value`, or nothing."""
        given = self._metadata.get(key, value)
        if given != value or type(given) is not type(value):
            raise self.refusal(key, _shown(given), f"{value!r}, or nothing, for this kind of tokenizer")

    def text(self, key: str) -> str:
        value = self._metadata.get(key)
        if not isinstance(value, str):
            raise ModelFileError(self._file, key, _shown(value), "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise ModelFileError(self._file, key, _shown(value), "true or false")
        return value

    def token_id(self, key: str, num_tokens: int) -> int | None:
        if key not in self._metadata:
            return None
        value = self._metadata[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_tokens:
            raise ModelFileError(self._file, key, _shown(value), f"an id from 0 to {num_tokens - 1}")
        return value

    def tokens(self) -> tuple[list[str], dict[str, int]]:
        key = "tokenizer.ggml.tokens"
        tokens = self._array(key, str, MAX_TOKENS)
        vocab = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(vocab) != len(tokens):
            id_ = next(id_ for id_, token in enumerate(tokens) if vocab[token] != id_)
            raise ModelFileError(
                self._file, f"{key}[{id_}]", repr(tokens[id_]), f"every token once; id {vocab[tokens[id_]]} has it too"
            )
        lengths = list(map(len, tokens))
        if not lengths or min(lengths) == 0 or max(lengths) > MAX_TOKEN_CHARS:
            worst = next((id_ for id_, n in enumerate(lengths) if not 0 < n <= MAX_TOKEN_CHARS), 0)
            given = f"{lengths[worst]} characters" if lengths else "no token at all"
            raise ModelFileError(self._file, f"{key}[{worst}]", given, f"1 to {MAX_TOKEN_CHARS} characters")
        return tokens, vocab

    def token_types(self, tokens: list[str]) -> list[int]:
        key = "tokenizer.ggml.token_type"
        types = self._array(key, int, MAX_TOKENS)
        if len(types) != len(tokens):
            raise ModelFileError(self._file, key, f"{len(types)} entries", f"one for each of the {len(tokens)} tokens")
        for type_ in set(types):
            if not NORMAL <= type_ <= BYTE:
                raise ModelFileError(self._file, f"{key}[{types.index(type_)}]", type_, f"{NORMAL} to {BYTE}")
        for id_ in ids_of(types, BYTE):
            if not _BYTE_TOKEN.fullmatch(tokens[id_]):
                raise ModelFileError(
                    self._file, f"tokenizer.ggml.tokens[{id_}]", repr(tokens[id_]), "<0x00> to <0xFF> for a byte token"
                )
        return types

    def scores(self, num_tokens: int) -> list[float]:
        key = "tokenizer.ggml.scores"
        scores = self._array(key, float, MAX_TOKENS)
        if len(scores) != num_tokens:
            raise self.refusal(key, f"{len(scores)} entries", f"one for each of the {num_tokens} tokens")
        if not all(map(isfinite, scores)):
            index = next(index for index, score in enumerate(scores) if not isfinite(score))
            raise self.refusal(f"{key}[{index}]", scores[index], "a finite number")
        return scores

    def byte_ids(self, vocab: Mapping[str, int], types: list[int]) -> list[int]:
        """The ids of the tokens <0x00> to <0xFF>."""
        ids = [vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        missing = [byte for byte, id_ in enumerate(ids) if id_ < 0 or types[id_] != BYTE]
        if missing:
            given = f"without the byte token <0x{missing[0]:02X}>"
            raise self.refusal("tokenizer.ggml.tokens", given, "a token for every byte, of type 6")
        return ids

    def merges(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        key = "tokenizer.ggml.merges"
        merges = self._array(key, str, MAX_MERGES)
        pairs: list[tuple[str, ...]] = [tuple(merge.split(" ")) for merge in merges]
        is_token = vocab.__contains__  # 150,000 merges at start-up: the checks run without a Python frame an entry
        sound = (
            len(set(merges)) == len(merges)
            and set(map(len, pairs)) <= {2}
            and all(map(is_token, chain.from_iterable(pairs)))
            and all(map(is_token, map("".join, pairs)))
        )
        if not sound:
            self._refuse_merges(key, merges, vocab)
        return pairs  # type: ignore[return-value]  # every pair has two parts

    def _refuse_merges(self, key: str, merges: list[str], vocab: dict[str, int]) -> None:
        seen: set[str] = set()
        for rank, merge in enumerate(merges):
            parts = merge.split(" ")
            unknown = [part for part in (*parts, "".join(parts)) if part not in vocab]
            if len(parts) != 2:
                allowed = "two tokens with one space between them"
            elif unknown:
                allowed = f"tokens of the vocabulary; {unknown[0]!r} is none"
            elif merge in seen:
                allowed = "every merge once"
            else:
                seen.add(merge)
                continue
            raise ModelFileError(self._file, f"{key}[{rank}]", repr(merge), allowed)
        raise AssertionError("merges were refused without a reason")

    def _array(self, key: str, kind: type, max_length: int) -> list[Any]:
        value = self._metadata.get(key)
        if not isinstance(value, list):
            raise ModelFileError(self._file, key, _shown(value), f"an array of {kind.__name__}")
        if len(value) > max_length:
            raise ModelFileError(self._file, key, f"{len(value)} entries", f"at most {max_length}")
        if set(map(type, value)) - {kind}:
            index = next(index for index, entry in enumerate(value) if type(entry) is not kind)
            raise ModelFileError(self._file, f"{key}[{index}]", _shown(value[index]), f"{kind.__name__}")
        return value


def _end_ids(fields: _Fields, vocab: Mapping[str, int], types: list[int]) -> tuple[int, ...]:
    """The file's eos, eot and eom, then those that their texts tell."""
    named = [fields.token_id(f"tokenizer.ggml.{name}_token_id", len(types)) for name in ("eos", "eot", "eom")]
    return end_ids(named, vocab, types)


def _shown(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {repr(value)[:60]}"
