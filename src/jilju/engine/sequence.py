"""Sequence: one growing run of tokens, and what the engine remembers of its request.

Owns one counter that chases another: `num_computed` (tokens whose keys and values lie in the blocks) chases `num_tokens`.
Prefill, a chunk, a cache hit, decode and restart after preemption are one case. Knows nothing of steps, pools or clocks:
the scheduler changes it, packing reads it.

    tokens   [ prompt ................ | output ......... ]
             0          num_computed   num_prompt_tokens   num_tokens
    blocks   [=====][=====][===  ]      cover [0, num_computed), one block_id each
"""

import numpy as np

from jilju.engine.request import Request, RequestTimes

MAX_PREEMPTIONS = 4  # after so many a sequence is let in only when its whole length is sure to fit, and then stays in


class Sequence:
    __slots__ = (
        "block_ids", "block_keys", "end_ids", "first_token_ns", "is_running", "last_token_ns", "max_computed", "num_cached",
        "num_computed", "num_preemptions", "num_prompt_tokens", "num_steps", "num_tokens", "number", "prefix_ids", "queued_ns", "request",
        "scheduled_ns", "scores", "stalled_ns", "tokens",
    )  # fmt: skip

    def __init__(self, number: int, request: Request, queued_ns: int):
        params = request.params
        self.number = number  # order of arrival, unique within the engine
        self.request = request
        self.end_ids = frozenset(request.end_ids)

        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_tokens = self.num_prompt_tokens + len(request.output_ids)
        self.tokens = np.empty(max(self.num_prompt_tokens + params.max_tokens, self.num_tokens), np.int32)
        self.tokens[: self.num_prompt_tokens] = request.prompt_ids
        self.tokens[self.num_prompt_tokens : self.num_tokens] = request.output_ids

        self.num_computed = 0
        self.max_computed = self.num_tokens - 1 if request.output_ids else 0  # below it, computing is computing again
        self.block_ids: list[int] = []
        self.block_keys: list[bytes] = []  # chained hashes of the leading full blocks, as far as they were needed
        self.prefix_ids: list[int] = []  # entries of the prefix index with the content of its leading full blocks
        # Logprobs of prompt tokens 1, 2, ... until the last is known; None: none asked for, or sent already. An earlier
        # engine that made a token has sent them.
        self.scores: list[float] | None = [] if request.score_prompt and not request.output_ids else None

        self.queued_ns = queued_ns
        self.scheduled_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0
        self.stalled_ns = 0
        self.num_steps = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self.is_running = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def wants_token(self) -> bool:
        return self.num_output < self.request.params.max_tokens

    @property
    def num_wanted(self) -> int:
        """Where num_computed is going: all tokens if the next is to be sampled, else those that score the prompt's last."""
        if self.wants_token:
            return self.num_tokens
        return self.num_prompt_tokens - 1 if self.scores is not None else 0

    @property
    def is_protected(self) -> bool:
        return self.num_preemptions >= MAX_PREEMPTIONS

    def append(self, token_id: int) -> None:
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def times(self) -> RequestTimes:
        return RequestTimes(
            queued_ns=self.queued_ns,
            scheduled_ns=self.scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
            stalled_ns=self.stalled_ns,
            num_steps=self.num_steps,
            num_cached_tokens=self.num_cached,
            num_preemptions=self.num_preemptions,
        )


def max_slots(request: Request) -> int:
    """Slots a request can come to need: the last token that it makes is never computed."""
    return len(request.prompt_ids) + max(request.params.max_tokens, 1) - 1
