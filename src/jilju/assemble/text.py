"""What reads and writes text, put together from a model file: tokenizer, chat template, sampling defaults.

Used by the server and by the class LLM. Knows nothing of engines.
"""

import msgspec

from jilju.assemble.engine import ModelFile
from jilju.engine.request import SamplingParams
from jilju.model.sources import SamplingDefaults
from jilju.text.gguf_tokenizer import load_tokenizer
from jilju.text.template import ChatTemplate, load_template
from jilju.text.tokenizer import Tokenizer


class ModelText(msgspec.Struct, frozen=True):
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the file has none, as base models do
    defaults: SamplingDefaults | None  # of the model table; None for a file by path

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
    """Raises ModelFileError if the file's tokenizer or template cannot be used."""
    tokenizer = load_tokenizer(model.gguf.metadata, file=model.path)
    template = load_template(model.gguf.metadata, tokenizer.token_bytes, file=model.path)
    return ModelText(tokenizer, template, model.entry.defaults if model.entry else None)
