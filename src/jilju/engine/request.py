"""Requests and what comes of them: the plain data that crosses between server and engine.

Owns the types of the link's two directions. A request is what the server accepted; every accepted request gets exactly one
terminal event. Knows nothing of text, HTTP, blocks or kernels. One request is one sequence here; the server makes several
requests of a call with several prompts.
"""

from typing import Literal

import msgspec

from jilju.errors import InvalidValue, NoAllowedToken
from jilju.plan.batch import MAX_BIASES, MAX_TOP, MAX_WANTED

FinishReason = Literal["stop", "length", "repetition"]

# field, lowest, highest; max_tokens -1 is the Python API's "to the end of the context"
PARAM_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0, 2), ("top_k", 0, (1 << 31) - 1), ("top_p", 0, 1), ("min_p", 0, 1), ("repetition_penalty", 0, 2),
    ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
    ("seed", -(1 << 63), (1 << 63) - 1), ("max_tokens", -1, 1 << 31), ("min_tokens", 0, 1 << 31), ("logprobs", 0, 20),
)  # fmt: skip


MAX_BIAS = 100
MAX_PRIORITY = 100
MAX_BAD_WORDS = 256
MAX_BAD_WORD_IDS = 256  # of one
MAX_PATTERN = 256  # tokens of a repeated pattern


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True):
    """An answer ends when its last tokens are one pattern, `min_count` times in a row."""

    max_pattern_size: int  # tokens of the pattern, up to 256
    min_pattern_size: int = 1
    min_count: int  # >= 2

    def check(self) -> None:
        sizes = (self.min_pattern_size, self.max_pattern_size)
        if not all(type(number) is int for number in (*sizes, self.min_count)):
            self._refuse("takes whole numbers")
        if not 1 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN:
            self._refuse(f"has patterns of {sizes[0]} to {sizes[1]} tokens; allowed: 1 to {MAX_PATTERN}, in this order")
        if not 2 <= self.min_count <= 1 << 31:
            self._refuse(f"has min_count {self.min_count}; allowed: 2 to {1 << 31}")

    @staticmethod
    def _refuse(what: str) -> None:
        raise InvalidValue(f"repetition_detection {what}", param="repetition_detection")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to end. The order of the changes and filters is that of plan.ops.Sample."""

    temperature: float = 1.0  # 0..2; below 1e-4 greedy
    top_k: int = 0  # 0 off
    top_p: float = 1.0  # (0, 1]; 1 off
    min_p: float = 0.0  # 0..1; 0 off
    repetition_penalty: float = 1.0  # (0, 2]; 1 off; over prompt and output
    presence_penalty: float = 0.0  # -2..2; 0 off; once for each token of the output
    frequency_penalty: float = 0.0  # -2..2; 0 off; as often as a token is in the output
    logit_bias: dict[int, float] = {}  # up to 1024 ids; -100..100 each, added to the logit
    allowed_token_ids: tuple[int, ...] | None = None  # None: any; else only these are sampled
    seed: int | None = None  # int64; None: drawn when the request is accepted
    max_tokens: int = 16  # >= 0; 0: no token, finish "length"
    min_tokens: int = 0  # until then end ids are banned and stop strings not matched
    stop: tuple[str, ...] = ()  # matched on the text, outside the engine
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k most probable, 0..20
    logprob_token_ids: tuple[int, ...] | None = (
        None  # of the chosen token and of these instead, in this order; up to 128
    )
    bad_words_ids: tuple[
        tuple[int, ...], ...
    ] = ()  # none of these comes whole in the answer; up to 256 of up to 256 ids
    repetition_detection: RepetitionDetection | None = None  # not before min_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or self.logprob_token_ids is not None

    def check(self) -> None:
        """Raise InvalidValue naming the first field of a wrong type or out of its range. NaN is out of every range."""
        self._check_types()
        for name, low, high in PARAM_RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidValue(f"{name} is {value!r}; allowed: {low} to {high}", param=name)
        for name in ("top_p", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise InvalidValue(f"{name} is {getattr(self, name)!r}; allowed: above 0", param=name)
        if 0 <= self.max_tokens < self.min_tokens:
            raise InvalidValue(
                f"min_tokens is {self.min_tokens}, max_tokens {self.max_tokens}; allowed: min_tokens up to max_tokens",
                param="min_tokens",
            )
        if len(self.stop) > 16 or any(not 1 <= len(s) <= 256 for s in self.stop):
            raise InvalidValue("stop: allowed are up to 16 strings of 1 to 256 characters", param="stop")
        if len(self.stop_token_ids) > 64:
            raise InvalidValue(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; allowed: 64", param="stop_token_ids"
            )
        if self.logprob_token_ids is not None and len(self.logprob_token_ids) > MAX_WANTED:
            raise InvalidValue(
                f"logprob_token_ids has {len(self.logprob_token_ids)} ids; allowed: {MAX_WANTED}",
                param="logprob_token_ids",
            )
        if self.repetition_detection is not None:
            if not isinstance(self.repetition_detection, RepetitionDetection):
                raise InvalidValue("repetition_detection: make a RepetitionDetection", param="repetition_detection")
            self.repetition_detection.check()
        self._check_changes()

    def _check_changes(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidValue(f"logit_bias has {len(self.logit_bias)} ids; allowed: {MAX_BIASES}", param="logit_bias")
        for token_id, bias in self.logit_bias.items():
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise InvalidValue(
                    f"logit_bias of {token_id} is {bias!r}; allowed: -{MAX_BIAS} to {MAX_BIAS}", param="logit_bias"
                )
        if len(self.bad_words_ids) > MAX_BAD_WORDS:
            raise InvalidValue(
                f"bad_words_ids has {len(self.bad_words_ids)} sequences; allowed: {MAX_BAD_WORDS}",
                param="bad_words_ids",
            )
        wrong = next((len(word) for word in self.bad_words_ids if not 1 <= len(word) <= MAX_BAD_WORD_IDS), None)
        if wrong is not None:
            raise InvalidValue(
                f"bad_words_ids has a sequence of {wrong} ids; allowed: 1 to {MAX_BAD_WORD_IDS}", param="bad_words_ids"
            )

    def check_ids(self, vocab_size: int) -> None:
        """Raise InvalidValue for an id that is not in the vocabulary, and for a top_k that it has not."""
        named = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logprob_token_ids": self.logprob_token_ids or (),
            "bad_words_ids": set().union(*self.bad_words_ids),
        }
        for name, ids in named.items():
            wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
            if wrong is not None:
                raise InvalidValue(f"{name} has {wrong}; allowed: 0 to {vocab_size - 1}", param=name)
        if self.top_k > vocab_size:
            raise InvalidValue(f"top_k is {self.top_k}; allowed: 1 to {vocab_size}, or 0 for off", param="top_k")

    def _check_types(self) -> None:
        """Structs are not checked when Python makes them."""
        for name, value in msgspec.structs.asdict(self).items():
            try:
                msgspec.convert({name: value}, SamplingParams)
            except msgspec.ValidationError as error:
                raise InvalidValue(
                    f"{name} is {value!r:.200}: {str(error).partition(' - at')[0]}", param=name
                ) from None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. Everything that decides its tokens is in here, fixed before the engine sees it."""

    id: str
    prompt_ids: list[int]  # >= 1
    params: SamplingParams  # seed is set
    end_ids: tuple[int, ...] = ()  # ids that end it: EOS (unless ignore_eos) and stop_token_ids
    grammar: str = ""  # that the answer is held to, as the engine's source of matchers reads it; "": none
    output_ids: list[int] = []  # tokens that an earlier engine made; the next is index len(output_ids)
    salt: bytes = b""  # prefix-cache hits only among equal salts
    prompt_logprobs: int | None = (
        None  # k: also of each prompt token given those before it, and of the k most probable, 0..20
    )
    num_scored: int = 0  # of them, from the first on: those that an earlier engine reported
    tenant: str = ""  # whose share of the engine it takes: the name of an API key
    priority: int = 0  # -100..100, lower runs first
    arrival_ns: int = 0  # accepted by the server; waiting counts from here. 0: when the engine gets it
    deadline_ns: int = 0  # of the monotonic clock; not complete by then, it fails. 0: none
    queue_deadline_ns: int = 0  # not in a step by then, it fails. 0: none
    number: int = 0  # what the log calls it, from whoever keeps that: unique there, over all engines
    sibling_of: str = ""  # id of a request of the same call and prompt (n > 1), whose prompt's blocks it waits for
    # It was in the step of a crash: it runs alone until its tokens so far are computed again, in so many steps from there on.
    num_probation_steps: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    def check(self) -> None:
        """Raise InvalidValue, or NoAllowedToken if there is no token that the first of the answer could be."""
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_TOP:
            raise InvalidValue(
                f"prompt_logprobs is {self.prompt_logprobs}; allowed: 0 to {MAX_TOP}", param="prompt_logprobs"
            )
        allowed = self.params.allowed_token_ids
        banned = {word[0] for word in self.params.bad_words_ids if len(word) == 1}
        banned.update(self.end_ids if self.params.min_tokens else ())
        if allowed is not None and all(token_id in banned for token_id in allowed):
            which = "that is no bad word and does not end the answer before min_tokens" if allowed else "at all"
            raise NoAllowedToken(
                f"allowed_token_ids has no id {which}, so no token can be made; name at least one, or leave it out",
                param="allowed_token_ids",
            )


MissReason = Literal["none", "never_seen", "diverged", "evicted", "block_tail", "salt"]


class CacheMiss(msgspec.Struct, frozen=True, kw_only=True):
    """Why the prefix cache had no more of a request than it had, as far as it can tell.

    none: it had all but the newest tokens, which are always computed. never_seen: nothing like it was here. diverged: an earlier
    text of the tenant goes on with another token at `position`. evicted: it was here. block_tail: an earlier text of the tenant ends
    within the block, or this one does, and only whole blocks are kept. salt: it is here, under another salt of the tenant.
    """

    reason: MissReason
    position: int | None = None  # of the first token that was not found; None: all were
    earlier_id: int | None = None  # the token that the earlier text has there


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time in the engine went; ns of the monotonic clock, sent with its terminal event.

    queued <= scheduled <= first_token <= last_token; 0 where it did not get that far. queue = scheduled - queued, and so on.
    """

    queued_ns: int  # in the engine's inbox
    scheduled_ns: int = 0  # begin of the first step with a row of it
    first_token_ns: int = 0  # commit of its first token (of this engine)
    last_token_ns: int = 0
    stalled_ns: int = 0  # within decode: share of steps spent on others' prefill tokens, by token count
    resume_ns: int = 0  # within decode: from deaths of the engine to the next token; measured by the supervisor
    num_steps: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    num_preemptions: int = 0
    miss: CacheMiss | None = None  # why they were no more; None: it was in no step


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="token"):
    """One token of a request. `index` counts from 0 over the whole answer, resumes included."""

    request_id: str
    index: int
    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None  # most probable first; or logprob_token_ids in their order
    finish_reason: FinishReason | None = None  # set on the last token
    times: RequestTimes | None = None  # so far; set with finish_reason, and at index 0


class PromptScored(msgspec.Struct, frozen=True, kw_only=True, tag="scored"):
    """Logprobs of prompt_ids[start : start + len(logprobs)], as a step brings them: piece after piece from index 1 to the
    prompt's end, all of them before the first token. A prompt of one token has none."""

    request_id: str
    start: int
    logprobs: list[float]  # >= 1
    tops: list[list[tuple[int, float]]] | None = None  # a place each, most probable first; None if none were asked for


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The other terminal event: `code` is that of an error class (nan_logits, internal, kv_capacity_exceeded, ...)."""

    request_id: str
    code: str
    message: str


class RequestAborted(msgspec.Struct, frozen=True, kw_only=True, tag="aborted"):
    """Terminal event of a request that was aborted: its blocks are free, num_tokens were made and not all delivered."""

    request_id: str
    num_tokens: int
    times: RequestTimes


class RequestEnded(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Terminal event of a request that ends without a token: max_tokens 0, after its prompt's logprobs if it asked; or a
    grammar whose answer is whole, with no token left that could follow or end it."""

    request_id: str
    finish_reason: FinishReason
    times: RequestTimes


EngineEvent = TokenEvent | PromptScored | RequestFailed | RequestAborted | RequestEnded
TERMINAL_TYPES = (RequestFailed, RequestAborted, RequestEnded)


def is_terminal(event: EngineEvent) -> bool:
    return isinstance(event, TERMINAL_TYPES) or (isinstance(event, TokenEvent) and event.finish_reason is not None)
