"""POST /tokenize and /detokenize: the tokenizer and the template alone, no inference.

Owns the two routes' fields and answers. Knows nothing of the engine.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from jilju.errors import ConflictingParameters, MissingParameter
from jilju.serve.answer import token_text
from jilju.serve.answer_types import Detokenized, Tokenized
from jilju.serve.body import read_fields
from jilju.serve.chat.messages import MAX_MESSAGES, Message, check_messages, take_messages, template_messages
from jilju.serve.chat.prompt import OFF_LOOP_CHARS, check_variables, encode_chat_prompt, template_of
from jilju.serve.chat.tools import Tools, take_tools, tool_specs
from jilju.serve.context import ServerContext
from jilju.serve.door.gate import ignored_of
from jilju.serve.fields import Rules, convert, take_fields
from jilju.serve.health import json_response
from jilju.serve.openai_completions import check_ids
from jilju.serve.sampling import TokenId, check_model
from jilju.serve.server import Server
from jilju.text.template import RenderOptions


class TokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Tools = []
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool | None = None  # prompt: true; messages: false
    return_token_strs: bool = False


class DetokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[TokenId]
    return_token_strs: bool = False


TOKENIZE = Rules.of(TokenizeFields)
DETOKENIZE = Rules.of(DetokenizeFields)


async def tokenize(server: Server, request: Request) -> Response:
    context = server.context
    fields = await read_fields(request, context.limits, partial(_parse, ignored=ignored_of(request.scope)))
    check_model(fields.model, context)
    if fields.messages is not None:
        ids = await _chat_ids(fields, fields.messages, context)
    elif fields.prompt is not None:
        add = fields.add_special_tokens is not False
        if len(fields.prompt) > OFF_LOOP_CHARS:
            ids = await asyncio.to_thread(context.tokenizer.encode, fields.prompt, add_special_tokens=add)
        else:
            ids = context.tokenizer.encode(fields.prompt, add_special_tokens=add)
    else:
        raise MissingParameter("prompt is missing; give prompt or messages", param="prompt")

    def answered() -> Response:
        token_bytes, is_asked = context.tokenizer.token_bytes, fields.return_token_strs
        strings = [token_text(token_bytes(token_id)) for token_id in ids] if is_asked else None
        max_model_len = context.context_tokens()
        return json_response(Tokenized(count=len(ids), max_model_len=max_model_len, tokens=ids, token_strs=strings))

    return await asyncio.to_thread(answered) if len(ids) > OFF_LOOP_CHARS else answered()


def _parse(body: Mapping[str, Any], ignored: list[str] | None) -> TokenizeFields:
    taken: dict[str, Any] = take_fields(body, TOKENIZE, ignored=ignored)
    if isinstance(taken.get("messages"), list):
        taken["messages"] = take_messages(taken["messages"], ignored)
    if isinstance(taken.get("tools"), list):
        taken["tools"] = take_tools(taken["tools"], ignored)
    fields = convert(taken, TokenizeFields)
    if fields.prompt is not None and fields.messages is not None:
        raise ConflictingParameters("prompt and messages are both given; give one of them", param="prompt")
    if fields.add_generation_prompt and fields.continue_final_message:
        raise ConflictingParameters(
            "add_generation_prompt and continue_final_message are both true; give one of them",
            param="continue_final_message",
        )
    if fields.messages is None:
        of_chat = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        if (name := next((name for name in of_chat if getattr(fields, name)), None)) is not None:
            raise ConflictingParameters(f"{name} is given without messages; a prompt has none of it", param=name)
    else:
        check_messages(fields.messages)
    return fields


async def _chat_ids(fields: TokenizeFields, messages: list[Message], context: ServerContext) -> list[int]:
    template = template_of(context)
    check_variables(fields.chat_template_kwargs, template)
    options: RenderOptions = {"variables": fields.chat_template_kwargs}
    if fields.continue_final_message:
        options["continue_final_message"] = True
    elif fields.add_generation_prompt is not None:
        options["add_generation_prompt"] = fields.add_generation_prompt
    prompt = await encode_chat_prompt(
        template_messages(messages),
        tool_specs(fields.tools),
        context,
        options,
        add_special_tokens=bool(fields.add_special_tokens),
    )
    return prompt.ids


async def detokenize(server: Server, request: Request) -> Response:
    context = server.context
    ignored = ignored_of(request.scope)

    def taken(body: dict[str, Any]) -> DetokenizeFields:
        fields = convert(take_fields(body, DETOKENIZE, ignored=ignored), DetokenizeFields)
        check_model(fields.model, context)
        check_ids(fields.tokens, context.tokenizer.vocab_size, "tokens")
        return fields

    fields = await read_fields(request, context.limits, taken)
    tokens, tokenizer = fields.tokens, context.tokenizer

    def answered() -> Response:
        found = Detokenized(prompt=tokenizer.decode(tokens, skip_special_tokens=False))
        if fields.return_token_strs:
            found["token_strs"] = [token_text(tokenizer.token_bytes(token_id)) for token_id in tokens]
            found["special_ids"] = sorted(tokenizer.special_ids.intersection(tokens))
        return json_response(found)

    return await asyncio.to_thread(answered) if len(tokens) > OFF_LOOP_CHARS else answered()
