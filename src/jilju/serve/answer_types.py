"""Answers as types: what routes and renderers build, and what the OpenAPI description says of it.

Owns names and kinds of the answers' fields, but for those of /v1/responses and /v1/messages, which have files of their own.
Knows nothing of how they are filled.
"""

from typing import Any, Literal, NotRequired, TypedDict

from jilju.serve.answer import Usage
from jilju.serve.context import SamplingDefaults
from jilju.serve.generation import FinishReason
from jilju.serve.ledger import CallState
from jilju.serve.timings import Timings
from jilju.text.spans import Warned


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ContentLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class AnsweredFunction(TypedDict):
    name: str
    arguments: str  # the text of a JSON object; cut off where the answer was


class AnsweredCall(TypedDict):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[AnsweredCall]]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]


class ChatChoice(TypedDict):
    index: int
    message: AnsweredMessage
    logprobs: ContentLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class PromptLogprob(TypedDict):
    logprob: float
    rank: int | None
    decoded_token: str


PromptPlaces = list[dict[str, PromptLogprob] | None]


class AnswerHead(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"]
    usage: Usage
    timings: NotRequired[Timings]
    prompt_token_ids: NotRequired[list[int | list[int]]]  # of several prompts a list of theirs; so are the next two
    prompt_text: NotRequired[str | list[str]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | PromptPlaces | None]]


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class TextCompletion(AnswerHead):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ErrorObject(TypedDict):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(TypedDict):
    error: ErrorObject


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str
    token_strs: NotRequired[list[str]]
    special_ids: NotRequired[list[int]]  # those of the tokens that are control tokens


class ModelLimits(TypedDict):
    prompts: int
    n: int
    sequences: int
    stop: int
    stop_chars: int
    top_logprobs: int
    queue_requests: int
    queue_tokens: int | None
    max_queue_ms: int
    deadline_ms: int
    token_gap_ms: float | None


class ModelFacts(TypedDict):
    """Null: not known before the engine is ready."""

    limits: ModelLimits
    defaults: SamplingDefaults
    quantization: str | None
    kernel_set: str | None
    deterministic: bool | None
    features: list[str]


class ModelEntry(TypedDict):
    id: str
    object: Literal["model"]
    type: Literal["model"]
    created: int
    created_at: str
    display_name: str
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    max_input_tokens: int
    max_tokens: int
    jilju: ModelFacts


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelEntry]
    has_more: bool
    first_id: str
    last_id: str


class RenderedMessage(TypedDict):
    role: str
    content_span: tuple[int, int] | None  # characters of the prompt; None: its content is not found there as it is


class Rendered(TypedDict):
    prompt_text: str
    token_ids: list[int]
    count: int
    sampling: dict[str, Any]
    warnings: list[Warned]
    token_offsets: NotRequired[list[tuple[int, int]]]
    messages: NotRequired[list[RenderedMessage]]


class Cancelled(TypedDict):
    id: str
    state: CallState
    ids: NotRequired[list[str]]  # of a label: all that were meant


class Alive(TypedDict):
    status: Literal["ok"]


class Readiness(TypedDict):
    ready: bool
    reason: str | None


class HealthChecks(TypedDict):
    steps: bool
    engine: bool
    scheduler: bool
    ledger: bool


class Health(TypedDict):
    status: Literal["ok", "unhealthy"]
    last_step_age_s: float
    running: int
    waiting: int
    checks: HealthChecks


class Version(TypedDict):
    version: str
