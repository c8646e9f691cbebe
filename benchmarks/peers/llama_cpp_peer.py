"""llama.cpp as a peer: runs under an environment that has llama-cpp-python.

The whole prompt goes through in batches of up to 512 tokens, its own default. A decode step is one llama_batch with a token of each
sequence, and the greedy choice of its logits; its tokens are taken out of the cache again, so that the context stays the same.
"""

import ctypes
import random

import llama_cpp as lc
import numpy as np
from protocol import repeated, serve

BATCH = 512


class LlamaCpp:
    def __init__(self, model: str, num_threads: int, max_rows: int, max_context: int):
        lc.llama_backend_init()
        lc.llama_log_set(_quiet, ctypes.c_void_p(0))
        self._model = lc.llama_model_load_from_file(model.encode(), lc.llama_model_default_params())
        if not self._model:
            raise ValueError("cannot read this file")
        params = lc.llama_context_default_params()
        params.n_seq_max, params.n_ctx = max_rows, max_rows * (max_context + 32)
        params.n_batch, params.n_ubatch = max(BATCH, max_rows), BATCH
        params.n_threads = params.n_threads_batch = num_threads
        self._context = lc.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp refuses the context"
        self._memory = lc.llama_get_memory(self._context)
        self._vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        self._batch = lc.llama_batch_init(params.n_batch, 0, 1)
        self._filled = [0] * max_rows
        self._ids = random.Random(1).choices(range(self._vocab_size), k=max_context + 1)
        info = lc.llama_print_system_info().decode()
        sets = [
            part.split(" = ")[0].strip()
            for part in info.rpartition("CPU :")[2].split("|")
            if part.strip().endswith("= 1")
        ]
        self.note = f"llama-cpp-python {lc.__version__}: {' '.join(sets)}"

    def prefill(self, tokens: int, seconds: float) -> float:
        def one_pass() -> None:
            self._forget(0, 0)
            self._fill(0, tokens, is_sampled=True)

        return repeated(one_pass, seconds)

    def decode(self, rows: int, context: int, seconds: float) -> float:
        for row in range(rows):
            self._forget(row, context)
            self._fill(row, context)

        def step() -> None:
            self._decode([(self._ids[context], row, context, True) for row in range(rows)])
            for index in range(rows):
                self._newest(index).argmax()
            for row in range(rows):
                lc.llama_memory_seq_rm(self._memory, row, context, -1)

        return repeated(step, seconds)

    def logprobs(self, token_ids: list[int], targets: list[list[int]]) -> list[list[float]]:
        """Of each target of the last len(targets) places."""
        self._forget(0, 0)
        found: list[list[float]] = []
        first = len(token_ids) - len(targets)
        for start in range(0, len(token_ids), BATCH):
            end = min(len(token_ids), start + BATCH)
            self._decode([(token_ids[place], 0, place, place >= first) for place in range(start, end)])
            for place in range(max(start, first), end):
                logits = self._newest(place - start).astype(np.float64)
                top = logits.max()
                total = top + np.log(np.exp(logits - top).sum())
                found.append((logits[targets[place - first]] - total).tolist())
        self._forget(0, 0)
        return found

    def _forget(self, row: int, start: int) -> None:
        if self._filled[row] > start or start == 0:
            lc.llama_memory_seq_rm(self._memory, row, start, -1)
            self._filled[row] = start

    def _fill(self, row: int, context: int, is_sampled: bool = False) -> None:
        while (start := self._filled[row]) < context:
            end = min(context, start + BATCH)
            self._decode([(self._ids[p], row, p, is_sampled and p == context - 1) for p in range(start, end)])
            self._filled[row] = end
        if is_sampled:
            self._newest(-1).argmax()

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One llama_batch of (id, sequence, position, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (id_, row, position, is_wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = id_, position, 1
            batch.seq_id[i][0], batch.logits[i] = row, is_wanted
        status = lc.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"

    def _newest(self, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(lc.llama_get_logits_ith(self._context, index), shape=(self._vocab_size,))


@lc.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Its log says nothing that a benchmark needs."""


if __name__ == "__main__":
    serve(LlamaCpp)
