"""What reads and writes text, put together from a model's files: tokenizer, chat template, sampling defaults.

Used by the server and by the class LLM. Knows nothing of engines.
"""

from pathlib import Path

import msgspec

from jilju.assemble.engine import ModelFile
from jilju.engine.request import SamplingParams
from jilju.model.generation_config import folder_defaults
from jilju.model.sources import SamplingDefaults
from jilju.text.template import ChatTemplate
from jilju.text.text_files import open_text_files
from jilju.text.tokenizer import Tokenizer


class ModelText(msgspec.Struct, frozen=True):
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model has none, as base models do
    defaults: SamplingDefaults | None  # of the model table, or of a folder's generation_config.json

    def default_params(self, max_tokens: int) -> SamplingParams:
        """The model's own sampling defaults; without any, those of the API's contract."""
        if self.defaults is None:
            return SamplingParams(max_tokens=max_tokens)
        d = self.defaults
        return SamplingParams(
            temperature=d.temperature,
            top_p=d.top_p,
            top_k=d.top_k,
            min_p=d.min_p,
            repetition_penalty=d.repetition_penalty,
            max_tokens=max_tokens,
        )

    def end_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """The ids that end a request: the model's end-of-turn ids, unless they are ignored, and the caller's."""
        return (() if params.ignore_eos else self.tokenizer.eos_ids) + params.stop_token_ids


def load_text(model: ModelFile) -> ModelText:
    """Raises ModelFileError if the model's tokenizer or template cannot be used."""
    files = open_text_files(model.path, model.plan.vocab_size, stands_in=model.load_format == "dummy")
    tokenizer = files.tokenizer()
    defaults = model.entry.defaults if model.entry else folder_defaults(Path(model.path))
    return ModelText(tokenizer, files.template(tokenizer.token_bytes), defaults)
