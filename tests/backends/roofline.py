"""What the tests of the roofline backend share: batches made by hand, and the engine's requests as the oracle takes them."""

from collections.abc import Sequence

import numpy as np

from jilju.backends.roofline import Alone, AloneRequest, RooflineExecutor, alone, tiny_plan
from jilju.clock import VirtualClock
from jilju.engine.request import Request
from jilju.plan import Batch, Limits
from jilju.plan.cost import TWO_CORE_CPU

VOCAB = 40


def make_limits(
    num_blocks: int = 64, block_size: int = 4, max_rows: int = 8, max_tokens: int = 64, max_context: int = 256
) -> Limits:
    return Limits(num_blocks, block_size, max_rows, max_tokens, max_context, num_threads=1)


def make_executor(limits: Limits, vocab_size: int = VOCAB) -> RooflineExecutor:
    return RooflineExecutor(VirtualClock(), tiny_plan(vocab_size), TWO_CORE_CPU, limits)


def make_batch(rows: Sequence[tuple[Sequence[int], int, Sequence[int]]], **columns: object) -> Batch:
    """Rows of (token ids, start, block table); the last token of each is sampled from, unless `columns` say otherwise."""
    counts = np.array([len(tokens) for tokens, _, _ in rows], np.int32)
    tables = np.full((len(rows), max(len(table) for _, _, table in rows)), -1, np.int32)
    for line, (_, _, table) in zip(tables, rows, strict=True):
        line[: len(table)] = table
    n = len(columns.get("logit_tokens", counts))  # type: ignore[arg-type]
    values = {
        "logit_tokens": np.cumsum(counts) - 1,
        "targets": [-1] * n,
        "positions": [start + len(tokens) for tokens, start, _ in rows] if n == len(rows) else [0] * n,
        "seeds": [7] * n,
        "temperatures": [1.0] * n,
        "top_ks": [0] * n,
        "top_ps": [1.0] * n,
        "min_ps": [0.0] * n,
        "num_top": [0] * n,
        "repetition_penalties": [1.0] * n,
        "presence_penalties": [0.0] * n,
        "frequency_penalties": [0.0] * n,
        "penalty_starts": [0] * (n + 1),
        "penalty_ids": [],
        "penalty_counts": [],
        "bias_starts": [0] * (n + 1),
        "bias_ids": [],
        "biases": [],
        "banned_starts": [0] * (n + 1),
        "banned_ids": [],
        "wanted_starts": [0] * (n + 1),
        "wanted_ids": [],
        "mask_rows": [-1] * n,
        "masks": np.zeros((0, 2)),
    } | columns
    floats = {
        "temperatures", "top_ps", "min_ps", "repetition_penalties", "presence_penalties", "frequency_penalties", "biases",
    }  # fmt: skip
    others = {"positions": np.int64, "seeds": np.uint64, "masks": np.uint32}
    return Batch(
        token_ids=np.concatenate([np.array(tokens, np.int32) for tokens, _, _ in rows]),
        starts=np.array([start for _, start, _ in rows], np.int32),
        counts=counts,
        block_tables=tables,
        **{k: np.array(v, np.float32 if k in floats else others.get(k, np.int32)) for k, v in values.items()},
    )


def alone_of(request: Request, vocab_size: int) -> Alone:
    params, watched = request.params, request.params.repetition_detection
    repetition = None
    if watched is not None:
        repetition = (watched.min_pattern_size, watched.max_pattern_size, watched.min_count)
    return alone(
        AloneRequest(
            prompt_ids=request.prompt_ids,
            vocab_size=vocab_size,
            seed=params.seed,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            min_tokens=params.min_tokens,
            end_ids=request.end_ids,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            num_top=params.logprobs or 0,
            logprob_token_ids=params.logprob_token_ids,
            bad_words_ids=params.bad_words_ids,
            repetition=repetition,
            prompt_logprobs=request.prompt_logprobs,
        )
    )
