"""The routes of the OpenAPI description: what each takes and answers.

Owns one entry for every route of the app. Knows nothing of schemas or of what a route does.
"""

from dataclasses import dataclass
from typing import Any, Literal

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
from jilju.serve.embeddings import EmbeddingFields
from jilju.serve.message_types import AnsweredText, AnsweredThinking, AnsweredToolUse, CountedTokens, MessageAnswer
from jilju.serve.openai_chat import ChatFields
from jilju.serve.openai_completions import CompletionFields
from jilju.serve.openapi_schemas import COUNT_BODY, MESSAGES_BODY
from jilju.serve.response_fields import ResponseFields
from jilju.serve.response_types import OutputCall, OutputMessage, OutputReasoning, ResponseAnswer
from jilju.serve.tokenize import DetokenizeFields, TokenizeFields

Kind = Literal["generates", "reads", "looks", "open", "page"]

CHUNKS = (
    "Events `data: {...}`: chunks of `{what}`, one a token, then `data: [DONE]`. With `stream_options.include_usage` a last "
    "chunk without choices has usage and timings. A stream that fails ends with `data: {{\"error\": ...}}` and without `[DONE]`. "
    "`: wait` is a comment after 15 s of silence."
)


@dataclass(frozen=True, slots=True)
class Described:
    """One route. `body` is a type, or Composed; `answer` a type, or the media type of a text; None: there is none.

    `kind`: it generates; reads a body and no more; looks at the server; needs no key.
    """

    method: str
    path: str
    summary: str
    kind: Kind
    body: Any = None
    answer: Any = None
    stream: str = ""  # what its events are; "" where it has none
    also_503: bool = False  # its answer comes with 503 too


ROUTES: tuple[Described, ...] = (
    Described("post", "/v1/chat/completions", "Answer a conversation", "generates", ChatFields, ChatCompletion),
)
