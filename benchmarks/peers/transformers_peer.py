"""transformers on CPU torch in float32 as a peer: runs under the environment of `make oracle`.

The model has the sizes that the file tells, and weights drawn at random: in float32 no speed depends on their values. A decode step
is one call with the rows' tokens on top of a cache that is cropped again afterwards, so that the context stays the same.
"""

from pathlib import Path

import torch
import transformers
from protocol import repeated, serve
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


class Transformers:
    def __init__(self, model: str, num_threads: int, max_rows: int, max_context: int):
        torch.set_num_threads(num_threads)
        path = Path(model)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        self._ids = torch.randint(config.get_text_config().vocab_size, (max_rows, max_context + 1), generator=generator)
        self._cache, self._filled = DynamicCache(), (0, 0)  # (rows, tokens)
        self.note = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"

    @torch.inference_mode()
    def prefill(self, tokens: int, seconds: float) -> float:
        return repeated(
            lambda: self._model(self._ids[:1, :tokens], logits_to_keep=1, use_cache=True).logits.argmax(), seconds
        )

    @torch.inference_mode()
    def decode(self, rows: int, context: int, seconds: float) -> float:
        if self._filled != (rows, context):
            self._cache = DynamicCache()
            for start in range(0, context, 128):  # in parts: its attention holds all scores at once
                part = self._ids[:rows, start : min(start + 128, context)]
                self._model(part, past_key_values=self._cache, logits_to_keep=1)
            self._filled = (rows, context)

        def step() -> None:
            newest = self._ids[:rows, context : context + 1]
            self._model(newest, past_key_values=self._cache).logits.argmax(dim=-1)
            if context == 0:
                self._cache = DynamicCache()
            else:
                self._cache.crop(-1)

        return repeated(step, seconds)


if __name__ == "__main__":
    serve(Transformers)
