"""POST /v1/embeddings: the route's fields, checked, for models that make no embeddings.

Owns the fields and their rules. No model that is served declares pooling, so that every call that is well formed is refused by
the name of the model; one that is not is told what is wrong with it first. Knows nothing of the engine.
"""

from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta
from starlette.requests import Request

from jilju.errors import ContextLengthExceeded, EmptyPrompt, InvalidValue, UnsupportedTask
from jilju.serve.body import read_fields
from jilju.serve.context import ServerContext
from jilju.serve.door.gate import ignored_of
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, convert, refuse, take_fields
from jilju.serve.sampling import TokenId, check_model
from jilju.serve.server import Server

MAX_INPUTS = 128
MAX_DIMENSIONS = 1 << 16


class EmbeddingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    input: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=MAX_DIMENSIONS)] | None = None


EMBEDDING = Rules.of(EmbeddingFields, no_ops=MappingProxyType({"user": ANY}))


async def embed(server: Server, request: Request) -> NoReturn:
    context = server.context
    await read_fields(request, context.limits, partial(_check, context, ignored_of(request.scope)))
    raise UnsupportedTask(
        f"the model {shown(context.model_name)} makes no embeddings: it has no pooling; "
        "use a server with a model that was made for them"
    )


def _check(context: ServerContext, ignored: list[str] | None, body: dict[str, Any]) -> None:
    fields = convert(take_fields(body, EMBEDDING, ignored=ignored), EmbeddingFields)
    check_model(fields.model, context)
    for path, value in inputs_of(fields):
        _check_input(path, value, context)


def inputs_of(fields: EmbeddingFields) -> list[tuple[str, str | list[int]]]:
    """Path and value of each input, whichever of the four forms they came in."""
    given = fields.input
    if isinstance(given, str):
        return [("input", given)]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidValue(
            "input mixes kinds; allowed: a string, a list of strings, a list of ids, or a list of lists of ids",
            param="input",
        )
    if kinds == {int}:
        return [("input", [item for item in given if isinstance(item, int)])]
    if len(given) > MAX_INPUTS:
        raise InvalidValue(
            f"input has {len(given)} entries; allowed: 1..{MAX_INPUTS}; send several calls", param="input"
        )
    return [(f"input[{index}]", item) for index, item in enumerate(given) if not isinstance(item, int)]


def _check_input(path: str, value: str | list[int], context: ServerContext) -> None:
    if not value:
        raise EmptyPrompt(f"{path} is empty; send some text", param=path)
    if isinstance(value, str):
        return
    if len(value) > context.context_tokens():
        raise ContextLengthExceeded(
            f"{path} has {len(value)} tokens; the model's context holds {context.context_tokens()}", param=path
        )
    worst = max(value)
    if worst >= context.tokenizer.vocab_size:
        where = f"{path}[{value.index(worst)}]"
        raise refuse(where, worst, f"an id of the vocabulary, 0..{context.tokenizer.vocab_size - 1}")
