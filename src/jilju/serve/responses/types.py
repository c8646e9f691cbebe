"""The answer of /v1/responses as types: what its renderer builds, and what the OpenAPI description says of it.

Owns names and kinds of the response's fields and of its items. Knows nothing of how they are filled.
"""

from typing import Any, Literal, NotRequired, TypedDict

from jilju.serve.answer import CacheUsage
from jilju.serve.answer_types import TokenLogprob
from jilju.serve.responses.fields import FlatNamedTool, FlatTool, ReasoningFields, TextFormat
from jilju.serve.timings import Timings

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputTextPart(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]  # there are none
    logprobs: list[TokenLogprob]


class ReasoningTextPart(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputTextPart]


class OutputReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    summary: list[Any]  # none is made
    content: list[ReasoningTextPart]
    encrypted_content: NotRequired[str]


class OutputCall(TypedDict):
    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str  # the text of a JSON object; cut off where the answer was


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseError(TypedDict):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    jilju_cache: NotRequired[CacheUsage]


class TextSettings(TypedDict):
    format: TextFormat
    verbosity: Literal["medium"]


class ResponseSettings(TypedDict):
    """As the call had them, or as they hold where it said nothing."""

    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningFields
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: TextSettings
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool
    tools: list[FlatTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    timings: NotRequired[Timings | None]


class ResponseAnswer(ResponseSettings):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[Any]  # of OutputItem
    model: str
    usage: ResponseUsage | None
