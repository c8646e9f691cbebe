"""The routes of the OpenAPI description: what each takes and answers.

Owns one entry for every route of the app. Knows nothing of schemas or of what a route does.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jilju.account.frame import Frame
from jilju.serve.answer_types import (
    Alive,
    Cancelled,
    ChatCompletion,
    Detokenized,
    Health,
    ModelEntry,
    ModelList,
    Readiness,
    Rendered,
    TextCompletion,
    Tokenized,
    Version,
)
from jilju.serve.chat.api import ChatFields
from jilju.serve.embeddings import EmbeddingFields
from jilju.serve.messages.types import CountedTokens, MessageAnswer
from jilju.serve.openai_completions import CompletionFields
from jilju.serve.openapi.schemas import COUNT_BODY, MESSAGES_BODY
from jilju.serve.responses.fields import ResponseFields
from jilju.serve.responses.types import ResponseAnswer
from jilju.serve.runs.types import Run, RunList, StepOps
from jilju.serve.tokenize import DetokenizeFields, TokenizeFields

Kind = Literal["generates", "reads", "ends", "looks"]

CHUNKS = (
    "events `data: {chunk}` of the object %s, one a token; the first has the role, where there is one. With "
    "`stream_options.include_usage` a last chunk without choices has usage and timings. Then `data: [DONE]`. A stream that fails "
    'ends with `data: {"error": ...}` instead. `: wait` is a comment, after 15 s of silence.'
)
RESPONSE_EVENTS = (
    'events `event: TYPE` and `data: {"type": TYPE, "sequence_number": ..., ...}`: response.created, response.in_progress; for each '
    "item response.output_item.added, its parts and deltas, response.output_item.done; at last response.completed or "
    "response.incomplete with the whole response, or response.failed. `: wait` is a comment, after 15 s of silence."
)
MESSAGE_EVENTS = (
    'events `event: TYPE` and `data: {"type": TYPE, ...}`: message_start; for each block content_block_start, content_block_delta, '
    "content_block_stop; message_delta with stop reason and usage, message_stop. A stream that fails ends with error instead. "
    "ping comes after 15 s of silence."
)


class Query(NamedTuple):
    """A parameter that may be left out."""

    name: str
    text: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Described:
    """One route. `body` is a type, or Composed. `answer` is a type, or the media type of a text; None: it only refuses.

    `kind`: it generates; reads a body and no more; ends a call; looks at something.
    """

    method: str
    path: str
    kind: Kind
    summary: str
    body: Any = None
    answer: Any = None
    events: str = ""  # of a stream; "": it has none
    no_key: bool = False
    also_503: bool = False  # then the answer says what is not so
    also_304: bool = False  # for who has the file already
    query: tuple[Query, ...] = ()
    errors: tuple[int, ...] = ()  # besides those of its kind


ROUTES: tuple[Described, ...] = (
    Described(
        "post", "/v1/chat/completions", "generates", "Answer a conversation",
        ChatFields, ChatCompletion, CHUNKS % "chat.completion.chunk",
    ),
    Described(
        "post", "/v1/completions", "generates", "Continue texts",
        CompletionFields, TextCompletion, CHUNKS % "text_completion",
    ),
    Described(
        "post", "/v1/responses", "generates", "Answer a conversation, in OpenAI's newer shape",
        ResponseFields, ResponseAnswer, RESPONSE_EVENTS,
    ),
    Described(
        "post", "/v1/messages", "generates", "Answer a conversation, in Anthropic's shape",
        MESSAGES_BODY, MessageAnswer, MESSAGE_EVENTS,
    ),
    Described("post", "/v1/messages/count_tokens", "reads", "Tokens of a message's input", COUNT_BODY, CountedTokens),
    Described("post", "/v1/embeddings", "reads", "Refused: no model that can be served makes embeddings", EmbeddingFields),
    Described("post", "/v1/requests/{id}/cancel", "ends", "End a call, by its id or its caller's label", None, Cancelled),
    Described("get", "/v1/models", "looks", "The model that is served, its limits and defaults", None, ModelList),
    Described("get", "/v1/models/{model}", "looks", "One model", None, ModelEntry),
    Described("post", "/v1/chat/completions/render", "reads", "The prompt of a chat, nothing run", ChatFields, Rendered),
    Described(
        "post", "/v1/completions/render", "reads", "The prompts of a completion, nothing run",
        CompletionFields, list[Rendered],
    ),
    Described("post", "/tokenize", "reads", "Tokens of a text or a conversation", TokenizeFields, Tokenized),
    Described("post", "/detokenize", "reads", "Text of tokens", DetokenizeFields, Detokenized),
    Described("get", "/livez", "looks", "Whether the server answers at all", None, Alive, no_key=True),
    Described("get", "/readyz", "looks", "Whether new calls are taken", None, Readiness, also_503=True),
    Described("get", "/health", "looks", "Whether work goes on", None, Health, also_503=True),
    Described("get", "/metrics", "looks", "Metrics for Prometheus", None, "text/plain"),
    Described("get", "/version", "looks", "The version", None, Version),
    Described("get", "/openapi.json", "looks", "This description", None, dict[str, Any]),
    Described("get", "/v1/jilju/runs", "looks", "The newest runs of the key", None, RunList),
    Described("get", "/v1/jilju/runs/{id}", "looks", "One run: its tokens, steps and ledger", None, Run),
    Described("get", "/v1/jilju/steps/{serial}", "looks", "The ops of one step", None, StepOps),
    Described(
        "get", "/v1/jilju/events", "looks", "The engine live: `data: {frame}`, the first of the last seconds, then one a second with the "
        "steps and marks that are new; without an end", None, "text/event-stream",
        query=(Query("seconds", "how far back the first frame goes", {"type": "integer", "minimum": 1, "maximum": 3600, "default": 60}),),
        errors=(503,),
    ),
    Described(
        "get", "/v1/jilju/window", "looks", "The engine in a stretch of the past", None, Frame,
        query=(
            Query("seconds", "how long it is", {"type": "integer", "minimum": 1, "maximum": 3600, "default": 60}),
            Query("end_ms", "where it ends, on the log's own clock, from first_ms to now; left out: now", {"type": "number"}),
        ),
    ),
    Described(
        "get", "/v1/jilju/trace", "looks", "A run, or the last seconds, as a trace that Perfetto opens", None, dict[str, Any],
        query=(
            Query("run", "id of a run; not with seconds", {"type": "string"}),
            Query("seconds", "how far back it goes", {"type": "integer", "minimum": 1, "maximum": 600, "default": 30}),
        ),
        errors=(404,),
    ),
    Described("get", "/", "looks", "The chat page", None, "text/html", also_304=True),
    Described("get", "/engine", "looks", "The page of the engine", None, "text/html", also_304=True),
    Described("get", "/runs", "looks", "The page of the newest runs", None, "text/html", also_304=True),
    Described("get", "/runs/{id}", "looks", "The page of one run", None, "text/html", also_304=True),
    Described("get", "/view/{path}", "looks", "Files of the pages", None, "*/*", also_304=True),
)  # fmt: skip
