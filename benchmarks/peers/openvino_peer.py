"""OpenVINO GenAI as a peer: its continuous batching, its reader of GGUF files; runs under an environment that has it.

Its pipeline takes whole requests: a decode load keeps its requests running from one run to the next, so the context grows by the
steps that are made, 256 at most. Greedy, end of text ignored, no prefix cache.
"""

import random
from typing import Any

import numpy as np
import openvino
import openvino_genai as ov
from protocol import repeated, serve

MAX_GROWTH = 256  # tokens that a request may grow by before its load is set up again
VOCAB_SIZE = 30000  # ids below it are in every vocabulary that is compared here


class OpenVino:
    def __init__(self, model: str, num_threads: int, max_rows: int, max_context: int):
        settings = ov.SchedulerConfig()
        settings.max_num_seqs = max_rows
        settings.max_num_batched_tokens = max(512, max_rows)
        settings.dynamic_split_fuse = True
        settings.enable_prefix_caching = False
        settings.cache_size = 4
        properties = {"INFERENCE_NUM_THREADS": num_threads}
        try:
            self._pipeline = ov.ContinuousBatchingPipeline(model, settings, "CPU", properties)
        except RuntimeError as error:
            raise ValueError(f"does not read this file: {str(error).strip().splitlines()[-1]}") from error
        self._random = random.Random(1)
        self._handles: list[Any] = []
        self._load, self._num_steps, self._next_id = (0, 0), 0, 0
        self.note = f"openvino-genai {ov.__version__.partition('-')[0]}"

    def prefill(self, tokens: int, seconds: float) -> float:
        self._drop()

        def one_pass() -> None:
            handle = self._add(tokens, 1)
            while not handle.can_read():
                self._pipeline.step()

        return repeated(one_pass, seconds)

    def decode(self, rows: int, context: int, seconds: float) -> float:
        if self._load != (rows, context) or self._num_steps > MAX_GROWTH:
            self._drop()
            self._handles = [self._add(max(context, 1), 4 * MAX_GROWTH) for _ in range(rows)]
            while not all(handle.can_read() for handle in self._handles):  # every prompt computed
                self._pipeline.step()
            self._load, self._num_steps = (rows, context), 0

        def step() -> None:
            self._pipeline.step()
            self._num_steps += 1

        return repeated(step, seconds)

    def _add(self, num_tokens: int, num_output: int) -> Any:
        config = ov.GenerationConfig(max_new_tokens=num_output, ignore_eos=True, do_sample=False)
        ids = np.array([self._random.choices(range(VOCAB_SIZE), k=num_tokens)], np.int64)
        self._next_id += 1
        return self._pipeline.add_request(self._next_id, openvino.Tensor(ids), config)

    def _drop(self) -> None:
        for handle in self._handles:
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._handles, self._load = [], (0, 0)


if __name__ == "__main__":
    serve(OpenVino)
