"""Sequence: one growing run of tokens, and what the engine remembers of its request.

Owns one counter that chases another: `num_computed` (tokens whose keys and values lie in the blocks) chases `num_tokens`.
Prefill, a chunk, a cache hit, decode and restart after preemption are one case. Knows nothing of steps, pools or clocks:
the scheduler changes it, packing reads it.

    tokens   [ prompt ................ | output ......... ]
             0          num_computed   num_prompt_tokens   num_tokens
    blocks   [=====][=====][===  ]      cover [0, num_computed), one block_id each
"""

import numpy as np

from jilju.engine.matcher import Grammar
from jilju.engine.request import CacheMiss, Request, RequestTimes, SamplingParams
from jilju.engine.rules import BadWords, Repetition

MAX_PREEMPTIONS = 4  # after so many a sequence is let in only when its whole length is sure to fit, and then stays in


class TokenCounts:
    """The ids that the penalties touch, each once, and how often each is in the output; a token costs O(1)."""

    __slots__ = ("_counts", "_ids", "_index", "_num")

    def __init__(self, capacity: int):
        self._ids = np.empty(capacity, np.int32)
        self._counts = np.zeros(capacity, np.int32)
        self._index: dict[int, int] = {}  # of an id
        self._num = 0

    def add_prompt(self, token_ids: np.ndarray) -> None:
        """Once, before any output."""
        distinct = np.unique(token_ids)
        self._num = len(distinct)
        self._ids[: self._num] = distinct
        self._index = dict(zip(distinct.tolist(), range(self._num), strict=True))

    def add(self, token_id: int) -> None:
        """One more token of the output."""
        index = self._index.setdefault(token_id, self._num)
        if index == self._num:
            self._ids[index] = token_id
            self._num += 1
        self._counts[index] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._num]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: self._num]


class Sequence:
    __slots__ = (
        "_banned", "_banned_early", "arrival_ns", "bad_words", "bias_ids", "biases", "block_ids", "block_keys", "counts", "end_ids", "first_token_ns", "grammar", "id", "is_running",
        "last_token_ns", "mask", "max_computed", "miss", "num_bypassed", "num_cached", "num_computed", "num_hit_blocks", "num_preemptions", "num_probation_steps",
        "num_prompt_tokens", "num_scored", "num_steps", "num_submitted_tokens", "num_tokens", "number", "prefix_ids", "priority", "queued_ns", "refused_room", "refused_step", "repetition", "request",
        "scheduled_ns", "stalled_ns", "tag", "tenant", "tokens", "wanted_ids",
    )  # fmt: skip

    def __init__(self, number: int, request: Request, queued_ns: int):
        params = request.params
        self.number = number  # order of arrival, unique within the engine
        self.id = request.id
        self.request = request
        self.tenant = request.tenant
        self.priority = request.priority
        self.arrival_ns = request.arrival_ns or queued_ns
        self.tag = -1  # its place in the queue of its priority, given when it first waits
        self.end_ids = frozenset(request.end_ids)

        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_tokens = self.num_prompt_tokens + len(request.output_ids)
        self.num_submitted_tokens = self.num_tokens
        self.tokens = np.empty(max(self.num_prompt_tokens + params.max_tokens, self.num_tokens), np.int32)
        self.tokens[: self.num_prompt_tokens] = request.prompt_ids
        self.tokens[self.num_prompt_tokens : self.num_tokens] = request.output_ids

        self.counts = _counts(request, self.tokens)
        self.bias_ids = np.array(list(params.logit_bias), np.int32)
        self.biases = np.array(list(params.logit_bias.values()), np.float32)
        self.wanted_ids = np.array(params.logprob_token_ids or (), np.int32)
        self.bad_words = BadWords(params.bad_words_ids) if params.bad_words_ids else None
        always = self.bad_words.always if self.bad_words is not None else set[int]()
        self._banned = np.array(sorted(always), np.int32)
        self._banned_early = np.array(sorted(always | self.end_ids), np.int32)  # until there are min_tokens
        self.repetition: Repetition | None = None
        if params.repetition_detection is not None:
            self.repetition = Repetition(params.repetition_detection, self.output)
        self.mask = _mask(params)  # uint32 words, a bit an id that may be sampled; None: any may
        self.grammar: Grammar | None = None  # there before it is first in a step, if its request has one

        self.num_computed = 0
        self.max_computed = self.num_tokens - 1 if request.output_ids else 0  # below it, computing is computing again
        self.block_ids: list[int] = []
        self.num_hit_blocks = 0  # leading ones that others computed
        self.block_keys: list[bytes] = []  # chained hashes of the leading full blocks, as far as they were needed
        self.prefix_ids: list[int] = []  # entries of the prefix index with the content of its leading full blocks
        # Prompt tokens 1, 2, ... whose logprob was sent, or is not asked for. An engine that made a token has sent them all.
        is_scored = request.prompt_logprobs is None or bool(request.output_ids)
        self.num_scored = self.num_scores if is_scored else request.num_scored

        self.queued_ns = queued_ns
        self.scheduled_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0
        self.stalled_ns = 0
        self.num_steps = 0
        self.num_cached = 0
        self.miss: CacheMiss | None = None  # why it was no more, once it has been let in
        self.num_preemptions = 0
        self.num_bypassed = 0  # times that one behind it in the queue had its turn first
        self.refused_room = -1  # blocks that were to be had when it last did not fit; -1: it was not tried
        self.refused_step = 0
        self.num_probation_steps = request.num_probation_steps
        self.is_running = False

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
        return self.num_scores if self.is_scoring else 0

    @property
    def num_scores(self) -> int:
        """Prompt tokens that have others before them."""
        return self.num_prompt_tokens - 1

    @property
    def is_scoring(self) -> bool:
        return self.num_scored < self.num_scores

    @property
    def output(self) -> np.ndarray:
        return self.tokens[self.num_prompt_tokens : self.num_tokens]

    @property
    def banned_ids(self) -> np.ndarray:
        banned = self._banned_early if self.num_output < self.request.params.min_tokens else self._banned
        more = self.bad_words.after(self.output) if self.bad_words is not None else None
        return np.union1d(banned, np.array(list(more), np.int32)) if more else banned

    @property
    def repeats_itself(self) -> bool:
        """It ends with as many repetitions of a pattern as it is to end at."""
        if self.repetition is None or self.num_output < self.request.params.min_tokens:
            return False
        return self.repetition.is_found

    @property
    def is_protected(self) -> bool:
        return self.num_preemptions >= MAX_PREEMPTIONS

    def append(self, token_id: int) -> None:
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        if self.counts is not None:
            self.counts.add(token_id)
        if self.repetition is not None:
            self.repetition.add(self.output)

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
            miss=self.miss,
        )


def _counts(request: Request, tokens: np.ndarray) -> TokenCounts | None:
    """Repetition is over prompt and output, presence and frequency are over the output alone."""
    params = request.params
    if params.repetition_penalty == 1 and params.presence_penalty == 0 and params.frequency_penalty == 0:
        return None
    counts = TokenCounts(len(tokens))
    if params.repetition_penalty != 1:
        counts.add_prompt(tokens[: len(request.prompt_ids)])
    for token_id in request.output_ids:
        counts.add(token_id)
    return counts


def _mask(params: SamplingParams) -> np.ndarray | None:
    if params.allowed_token_ids is None:
        return None
    ids = np.array(params.allowed_token_ids, np.int64)
    bits = np.zeros((ids.max() // 32 + 1) * 32, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def max_slots(request: Request) -> int:
    """Slots a request can come to need: the last token that it makes is never computed."""
    return len(request.prompt_ids) + max(request.params.max_tokens, 1) - 1
