"""POST /tokenize and /detokenize: the tokenizer and the template alone, no inference.

Owns the two routes' fields and answers. Knows nothing of the engine.
"""

import asyncio
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from jilju.errors import ConflictingParameters, MissingParameter
from jilju.serve.answer import token_text
from jilju.serve.body import read_json_object
from jilju.serve.fields import Rules, convert, take_fields
from jilju.serve.health import json_response
from jilju.serve.openai_chat import MAX_MESSAGES, OFF_LOOP_CHARS, Message, encode_messages, take_messages, text_of
from jilju.serve.openai_completions import check_ids
from jilju.serve.sampling import TokenId, check_model
from jilju.serve.server import Server


class TokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # prompt: true; messages: false
    return_token_strs: bool = False


class DetokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[TokenId]


TOKENIZE = Rules.of(
    TokenizeFields,
    later=MappingProxyType(
        {
            "tools": ([],),
            "add_generation_prompt": (True,),
            "continue_final_message": (False,),
            "chat_template_kwargs": ({},),
        }
    ),
)
DETOKENIZE = Rules.of(DetokenizeFields)


async def tokenize(server: Server, request: Request) -> Response:
    context = server.context
    body = await read_json_object(request, context.limits)
    taken: dict[str, Any] = take_fields(body, TOKENIZE)
    if isinstance(taken.get("messages"), list):
        taken["messages"] = take_messages(taken["messages"])
    fields = convert(taken, TokenizeFields)
    check_model(fields.model, context)
    if fields.prompt is not None and fields.messages is not None:
        raise ConflictingParameters("prompt and messages are both given; give one of them", param="prompt")
    if fields.messages is not None:
        for index, message in enumerate(fields.messages):
            text_of(message, f"messages[{index}]")
        ids, _ = await encode_messages(fields.messages, context, add_special_tokens=bool(fields.add_special_tokens))
    elif fields.prompt is not None:
        add = fields.add_special_tokens is not False
        if len(fields.prompt) > OFF_LOOP_CHARS:
            ids = await asyncio.to_thread(context.tokenizer.encode, fields.prompt, add_special_tokens=add)
        else:
            ids = context.tokenizer.encode(fields.prompt, add_special_tokens=add)
    else:
        raise MissingParameter("prompt is missing; give prompt or messages", param="prompt")
    strings = (
        [token_text(context.tokenizer.token_bytes(token_id)) for token_id in ids] if fields.return_token_strs else None
    )
    return json_response(
        {"count": len(ids), "max_model_len": context.context_tokens(), "tokens": ids, "token_strs": strings}
    )


async def detokenize(server: Server, request: Request) -> Response:
    context = server.context
    body = await read_json_object(request, context.limits)
    fields = convert(take_fields(body, DETOKENIZE), DetokenizeFields)
    check_model(fields.model, context)
    check_ids(fields.tokens, context.tokenizer.vocab_size, "tokens")
    decode = partial(context.tokenizer.decode, fields.tokens, skip_special_tokens=False)
    text = await asyncio.to_thread(decode) if len(fields.tokens) > OFF_LOOP_CHARS else decode()
    return json_response({"prompt": text})
