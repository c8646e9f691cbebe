"""Quality: the perplexity of a model over a text.

Owns the method: the text's tokens are cut into windows, and of each window the second half is scored, each token given those
before it in the window (the method of llama.cpp's perplexity tool, so figures compare). Knows nothing of backends or
tokenizers: it is handed an engine and token ids. Perplexity = exp(mean negative logprob of the scored tokens).
"""

import math
from collections.abc import Callable, Iterator

import msgspec

from jilju.engine.loop import Engine
from jilju.engine.request import PromptScored, Request, RequestFailed, SamplingParams
from jilju.errors import InvalidValue


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    num_text_tokens: int
    window: int  # tokens of a window
    num_windows: int
    num_scored: int
    perplexity: float
    running: list[float]  # perplexity after each window


def windows(token_ids: list[int], window: int, bos_id: int | None) -> Iterator[list[int]]:
    """Whole windows of the text; a model that starts with BOS gets it in the place of each window's first token."""
    for start in range(0, len(token_ids) - window + 1, window):
        part = token_ids[start : start + window]
        yield [bos_id, *part[1:]] if bos_id is not None else part


def measure_quality(
    engine: Engine,
    token_ids: list[int],
    *,
    window: int = 512,
    bos_id: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Quality:
    """Score `token_ids`. Raises InvalidValue if they do not fill one window."""
    parts = list(windows(token_ids, window, bos_id))
    if not parts:
        raise InvalidValue(
            f"the text has {len(token_ids)} tokens; at least {window} are needed for one window: give a longer text or a smaller --window"
        )
    total, num_scored, running = 0.0, 0, []
    for index, part in enumerate(parts):
        logprobs = score(engine, f"window-{index}", part)
        # logprobs[i] belongs to token i + 1; the second half starts at the token after the middle
        scored = logprobs[window // 2 :]
        total -= math.fsum(scored)
        num_scored += len(scored)
        running.append(math.exp(total / num_scored))
        progress(index + 1, len(parts), "windows")
    return Quality(
        num_text_tokens=len(token_ids),
        window=window,
        num_windows=len(parts),
        num_scored=num_scored,
        perplexity=running[-1],
        running=running,
    )


def score(engine: Engine, request_id: str, token_ids: list[int]) -> list[float]:
    """Logprobs of token_ids[1:], each given those before it."""
    engine.submit(
        Request(id=request_id, prompt_ids=token_ids, params=SamplingParams(max_tokens=0, seed=0), prompt_logprobs=0)
    )
    logprobs: list[float] = []
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, PromptScored):
                logprobs += event.logprobs
            elif isinstance(event, RequestFailed):
                raise InvalidValue(f"scoring failed: {event.message}")
    return logprobs
