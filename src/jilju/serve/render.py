"""POST /v1/chat/completions/render and /v1/completions/render: what a call would send to the engine, and nothing run.

Owns the two routes' answers: the prompt's exact text and tokens, who wrote which part of it, the sampling as it was
understood, and warnings. Knows nothing of the engine.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jilju.serve.answer_types import Rendered, RenderedMessage
from jilju.serve.api import Api
from jilju.serve.body import read_fields
from jilju.serve.chat.api import ChatApi, ChatFields, render_options
from jilju.serve.chat.messages import template_messages
from jilju.serve.chat.prompt import conversation, template_for
from jilju.serve.context import ServerContext
from jilju.serve.door.auth import cache_salt
from jilju.serve.door.gate import arrival_of, ignored_of
from jilju.serve.generate_route import compiled
from jilju.serve.generation import EncodedPrompt
from jilju.serve.health import json_response
from jilju.serve.openai_completions import CompletionApi
from jilju.serve.sampling import GenerationFields, check_model, end_ids, sampling_params
from jilju.serve.server import Server
from jilju.serve.timings import Marks
from jilju.text.grammar import GrammarSource
from jilju.text.spans import Warned, bos_warnings, message_spans, token_offsets, warnings_of
from jilju.text.template import ChatTemplate


async def render_chat(server: Server, request: Request) -> Response:
    """One conversation: one object."""
    api, context = ChatApi(), server.context
    fields, prompts = await _prompts(api, server, request)
    template = await template_for(context, fields.chat_template)

    def rendered() -> tuple[Rendered, GrammarSource | None]:
        messages, warnings = _chat_parts(fields, prompts[0], template, context)
        found, source = _rendered(api, fields, prompts[0], context, warnings)
        found["messages"] = _moved(messages, prompts[0].text or "", found["prompt_text"])
        return found, source

    found, source = await asyncio.to_thread(rendered)
    await _check_forms(api, fields, [source], context)
    return json_response(found)


async def render_completion(server: Server, request: Request) -> Response:
    """A list, one entry a prompt."""
    api, context = CompletionApi(), server.context
    fields, prompts = await _prompts(api, server, request)

    def rendered() -> list[tuple[Rendered, GrammarSource | None]]:
        return [
            _rendered(api, fields, prompt, context, _cut(prompt) + bos_warnings(context.tokenizer, prompt.ids))
            for prompt in prompts
        ]

    found = await asyncio.to_thread(rendered)
    await _check_forms(api, fields, [source for _, source in found], context)
    return json_response([entry for entry, _ in found])


async def _prompts(api: Api[Any], server: Server, request: Request) -> tuple[Any, list[EncodedPrompt]]:
    context = server.context
    fields = await read_fields(request, context.limits, partial(api.parse, ignored=ignored_of(request.scope)))
    check_model(fields.model, context)
    marks = Marks(received_ns=context.clock.now_ns())
    salt = cache_salt(arrival_of(request.scope).key, fields.cache_salt, is_shared=context.shared_prefix_cache)
    return fields, await api.prompts(fields, context, marks, salt)


def _rendered(
    api: Api[Any], fields: GenerationFields, prompt: EncodedPrompt, context: ServerContext, warnings: list[Warned]
) -> tuple[Rendered, GrammarSource | None]:
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
    return rendered, grammar


async def _check_forms(
    api: Api[Any], fields: GenerationFields, sources: Sequence[GrammarSource | None], context: ServerContext
) -> None:
    """What the call would be refused for is refused here."""
    for source in sources:
        if source is not None:
            await compiled(source, api.form_name(fields), context)


def _chat_parts(
    fields: ChatFields, prompt: EncodedPrompt, template: ChatTemplate, context: ServerContext
) -> tuple[list[RenderedMessage], list[Warned]]:
    """Where each message stands in what the template wrote, and what is odd about the whole."""
    entries, options = conversation(
        template_messages(fields.messages), fields.told, render_options(fields, template), template
    )
    text = prompt.text or ""
    spans = message_spans(template, entries, text, **options)
    warnings = _cut(prompt) + warnings_of(template, context.tokenizer, entries, text, prompt.ids, **options)
    messages = [
        RenderedMessage(role=entry["role"], content_span=span) for entry, span in zip(entries, spans, strict=True)
    ]
    return messages, warnings


def _moved(messages: Sequence[RenderedMessage], written: str, text: str) -> list[RenderedMessage]:
    """Their spans in the prompt's text: a BOS may stand before what the template wrote, and either end of it may be cut off."""
    if text.endswith(written) or written.endswith(text):
        start = len(written) - len(text)
    elif written.startswith(text):
        start = 0
    else:  # cut within a character, or no text that the tokenizer gives back
        return [RenderedMessage(role=message["role"], content_span=None) for message in messages]
    moved: list[RenderedMessage] = []
    for message in messages:
        span = message["content_span"]
        if span is not None:
            begin, end = max(0, span[0] - start), min(len(text), span[1] - start)
            span = (begin, end) if begin < end else None
        moved.append(RenderedMessage(role=message["role"], content_span=span))
    return moved


def _cut(prompt: EncodedPrompt) -> list[Warned]:
    if not prompt.num_truncated:
        return []
    return [Warned(code="truncated", text=f"{prompt.num_truncated} tokens of the prompt are cut off, as asked")]
