"""POST /v1/chat/completions/render and /v1/completions/render: what a call would send to the engine, and nothing run.

Owns the two routes' answers: the prompt's exact text and tokens, who wrote which part of it, the sampling as it was
understood, and warnings. Knows nothing of the engine.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jilju.serve.answer_types import Rendered, RenderedMessage
from jilju.serve.auth import cache_salt
from jilju.serve.body import read_json_object
from jilju.serve.chat_messages import template_messages
from jilju.serve.chat_prompt import conversation, template_of
from jilju.serve.context import ServerContext
from jilju.serve.gate import arrival_of, ignored_of
from jilju.serve.generate_route import Api
from jilju.serve.generation import EncodedPrompt
from jilju.serve.health import json_response
from jilju.serve.openai_chat import ChatApi, ChatFields, render_options, tool_calls
from jilju.serve.openai_completions import CompletionApi
from jilju.serve.sampling import GenerationFields, check_model, end_ids, sampling_params
from jilju.serve.server import Server
from jilju.serve.timings import Marks
from jilju.text.spans import Warned, bos_warnings, message_spans, warnings_of
from jilju.text.tokenizer import Tokenizer


async def render_chat(server: Server, request: Request) -> Response:
    """One conversation: one object."""
    api = ChatApi()
    fields, prompts = await _prompts(api, server, request)
    messages, warnings = _chat_parts(fields, prompts[0], server.context)
    rendered = _rendered(api, fields, prompts[0], server.context, warnings)
    rendered["messages"] = messages
    return json_response(rendered)


async def render_completion(server: Server, request: Request) -> Response:
    """A list, one entry a prompt."""
    api, context = CompletionApi(), server.context
    fields, prompts = await _prompts(api, server, request)
    rendered = [
        _rendered(api, fields, prompt, context, _cut(prompt) + bos_warnings(context.tokenizer, prompt.ids))
        for prompt in prompts
    ]
    return json_response(rendered)


async def _prompts(api: Api[Any], server: Server, request: Request) -> tuple[Any, list[EncodedPrompt]]:
    context = server.context
    body = await read_json_object(request, context.limits)
    fields = api.parse(body, ignored_of(request.scope))
    check_model(fields.model, context)
    marks = Marks(received_ns=context.clock.now_ns())
    salt = cache_salt(arrival_of(request.scope).key, fields.cache_salt, is_shared=context.shared_prefix_cache)
    return fields, await api.prompts(fields, context, marks, salt)


def _rendered(
    api: Api[Any], fields: GenerationFields, prompt: EncodedPrompt, context: ServerContext, warnings: list[Warned]
) -> Rendered:
    most = api.max_tokens(fields, len(prompt.ids), context)
    params = sampling_params(
        fields, context, max_tokens=most, logprobs=api.logprobs(fields), seed=0 if fields.seed is None else fields.seed
    )
    grammar = api.grammar(fields, prompt, context)
    sampling = msgspec.to_builtins(params, str_keys=True) | {
        "seed": fields.seed,  # null: one is drawn for each call
        "end_ids": end_ids(params, context.tokenizer.eos_ids),
        "grammar": None if grammar is None else {"kind": grammar.kind, "text": grammar.text},
    }
    text = context.tokenizer.decode(prompt.ids, skip_special_tokens=False)
    rendered: Rendered = {
        "prompt_text": text,
        "token_ids": prompt.ids,
        "count": len(prompt.ids),
        "sampling": sampling,
        "warnings": warnings,
    }
    if fields.return_token_offsets:
        rendered["token_offsets"] = token_offsets(prompt.ids, context.tokenizer)
    return rendered


def _chat_parts(
    fields: ChatFields, prompt: EncodedPrompt, context: ServerContext
) -> tuple[list[RenderedMessage], list[Warned]]:
    """Where each message stands, and what is odd about the whole."""
    template = template_of(context, fields.chat_template)
    specs = tool_calls(fields).specs if fields.tool_choice != "none" else ()
    entries, options = conversation(
        template_messages(fields.messages), specs, render_options(fields, template), template
    )
    text = prompt.text or ""
    spans = message_spans(template, entries, text, **options)
    warnings = _cut(prompt) + warnings_of(template, context.tokenizer, entries, text, prompt.ids, **options)
    messages = [
        RenderedMessage(role=entry["role"], content_span=span) for entry, span in zip(entries, spans, strict=True)
    ]
    return messages, warnings


def _cut(prompt: EncodedPrompt) -> list[Warned]:
    if not prompt.num_truncated:
        return []
    return [Warned(code="truncated", text=f"{prompt.num_truncated} tokens of the prompt are cut off, as asked")]


def token_offsets(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Of each token the characters that it has a part of: [begin, end) in the text of all."""
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    data = b"".join(pieces)
    begun = list(accumulate((byte & 0xC0 != 0x80 for byte in data), initial=0))  # characters begun before each byte
    offsets: list[tuple[int, int]] = []
    position = 0
    for piece in pieces:
        is_inside = bool(piece) and piece[0] & 0xC0 == 0x80 and begun[position] > 0
        offsets.append((begun[position] - is_inside, begun[position + len(piece)]))
        position += len(piece)
    return offsets
