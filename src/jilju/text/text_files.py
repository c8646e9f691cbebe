"""Text files: what the text of a model is made from, a GGUF file's metadata or the files of a model folder.

Owns what both have in common, and which of the two a path is. Knows nothing of weights, engines or HTTP.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from jilju.errors import ModelFileError
from jilju.formats.gguf import GgufFile
from jilju.formats.json_file import read_bytes, read_object
from jilju.text.gguf_tokenizer import load_token_table, load_tokenizer
from jilju.text.hf_tokenizer import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    load_folder_table,
    load_folder_tokenizer,
    special_text,
)
from jilju.text.stand_in import StandInText
from jilju.text.template import MAX_SOURCE_CHARS, ChatTemplate, load_template
from jilju.text.tokenizer import Tokenizer, TokenTable

TEMPLATE = "chat_template.jinja"


class TextFiles(Protocol):
    """All of it raises ModelFileError."""

    def tokenizer(self) -> Tokenizer: ...

    def token_table(self) -> TokenTable:
        """As of the tokenizer, without what it takes to read text."""
        ...

    def template(self, token_bytes: Callable[[int], bytes], source: str | None = None) -> ChatTemplate | None:
        """The model's own template, or `source` in its place; None where there is none, as in base models."""
        ...


def open_text_files(path: str, vocab_size: int, *, stands_in: bool = False) -> TextFiles:
    """Of a GGUF file or a model folder, whose model has `vocab_size` ids. `stands_in`: a folder may be without a tokenizer."""
    if not Path(path).is_dir():
        return GgufText(GgufFile.open(path).metadata, path)
    if stands_in and not (Path(path) / TOKENIZER).exists():
        return StandInText(Path(path), vocab_size)
    return FolderText(Path(path), vocab_size)


class GgufText:
    def __init__(self, metadata: Mapping[str, Any], file: str):
        self._metadata, self._file = metadata, file

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._metadata, file=self._file)

    def token_table(self) -> TokenTable:
        return load_token_table(self._metadata, file=self._file)

    def template(self, token_bytes: Callable[[int], bytes], source: str | None = None) -> ChatTemplate | None:
        file = self._file if source is None else "the request"
        return load_template(self._metadata, token_bytes, file=file, source=source)


class FolderText:
    def __init__(self, folder: Path, vocab_size: int):
        self._folder, self._vocab_size = folder, vocab_size

    def tokenizer(self) -> Tokenizer:
        return load_folder_tokenizer(self._folder, self._vocab_size)

    def token_table(self) -> TokenTable:
        return load_folder_table(self._folder, self._vocab_size)

    def template(self, token_bytes: Callable[[int], bytes], source: str | None = None) -> ChatTemplate | None:
        config_file = str(self._folder / TOKENIZER_CONFIG)
        config = read_object(self._folder / TOKENIZER_CONFIG) or {}
        file = "the request"
        if source is None:
            raw = read_bytes(self._folder / TEMPLATE, 4 * MAX_SOURCE_CHARS)
            file = config_file if raw is None else str(self._folder / TEMPLATE)
            source = _template_of(config, config_file) if raw is None else _decoded(raw, file)
        if source is None:
            return None
        bos_token, eos_token = (special_text(config, key, file=config_file) or "" for key in ("bos_token", "eos_token"))
        return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token, file=file)


def _template_of(config: Mapping[str, Any], file: str) -> str | None:
    """One text, or several by name, of which that for conversations is called default."""
    given = config.get("chat_template")
    if isinstance(given, list):
        by_name = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        if "default" not in by_name:
            raise ModelFileError(file, "chat_template", f"named {', '.join(map(repr, by_name))}", "one named 'default'")
        given = by_name["default"]
    if given is not None and not isinstance(given, str):
        raise ModelFileError(file, "chat_template", type(given).__name__, "a text, or a list of named ones")
    return given


def _decoded(raw: bytes, file: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(file, "text", error.object[:40], "valid UTF-8") from None
