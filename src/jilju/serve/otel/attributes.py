"""Attributes: what a call's span and its measurements say of it.

Owns which facts go under which name. Content is told only where it is asked for, and only of runs that the run store keeps.
Knows nothing of OpenTelemetry's objects.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from jilju.engine.request import SamplingParams
from jilju.serve.ledger import Call
from jilju.serve.otel import names
from jilju.serve.otel.origins import Origin
from jilju.serve.runs.kept import KeptRun, KeptSequence

Value = str | int | float | bool | Sequence[str]
INSTRUCTION_ROLES = frozenset({"system", "developer"})


def operation_of(call: Call) -> str:
    return names.OPERATIONS.get(call.route, names.CHAT)


def error_of_call(call: Call) -> str | None:
    """A word of a closed set; None: it completed."""
    return None if call.state == "completed" else call.code or call.state


def measured_attributes(call: Call, model: str, origin: Origin) -> dict[str, Value]:
    """Of its measurements too: each is one of few values."""
    found: dict[str, Value] = {
        names.OPERATION_NAME: operation_of(call),
        names.PROVIDER_NAME: names.PROVIDER,
        names.REQUEST_MODEL: model,
        names.RESPONSE_MODEL: model,
    }
    if origin.address is not None:
        found[names.SERVER_ADDRESS] = origin.address
    if origin.port is not None:
        found[names.SERVER_PORT] = origin.port
    return found


def span_attributes(call: Call) -> dict[str, Value]:
    """What it asked for and what came of it, beside what is measured."""
    found: dict[str, Value] = {names.RESPONSE_ID: call.run_id or call.id, names.REQUEST_STREAM: call.is_streamed}
    if call.params is not None:
        found |= _asked(call.params)
    if call.num_choices > 1:
        found[names.REQUEST_CHOICES] = call.num_choices
    if call.lives:
        found[names.INPUT_TOKENS] = call.num_prompt_tokens
        found[names.OUTPUT_TOKENS] = call.num_output_tokens
        found[names.CACHED_INPUT_TOKENS] = call.num_cached_tokens
        reasons = [life.finish_reason for life in call.lives if life.finish_reason is not None]
        if reasons:
            found[names.RESPONSE_FINISH_REASONS] = reasons
    if call.first_token_ns:
        found[names.RESPONSE_FIRST_CHUNK_S] = (call.first_token_ns - call.received_ns) / 1e9
    return found


def _asked(params: SamplingParams) -> dict[str, Value]:
    found: dict[str, Value] = {
        names.REQUEST_MAX_TOKENS: params.max_tokens,
        names.REQUEST_TEMPERATURE: params.temperature,
        names.REQUEST_TOP_P: params.top_p,
        names.REQUEST_TOP_K: params.top_k,
        names.REQUEST_FREQUENCY_PENALTY: params.frequency_penalty,
        names.REQUEST_PRESENCE_PENALTY: params.presence_penalty,
    }
    if params.seed is not None:
        found[names.REQUEST_SEED] = params.seed
    if params.stop:
        found[names.REQUEST_STOPS] = list(params.stop)
    return found


def content_attributes(run: KeptRun, decode: Callable[[Sequence[int]], str]) -> dict[str, Value]:
    """Messages as JSON in the form that the conventions give them. A prompt that came as text is one of the user."""
    messages: list[Mapping[str, Any]] = []
    for prompt in run.prompts:
        messages += prompt.messages or [{"role": "user", "content": decode(prompt.ids)}]
    instructions = [part for message in messages if _role(message) in INSTRUCTION_ROLES for part in _parts(message)]
    others = [message for message in messages if _role(message) not in INSTRUCTION_ROLES]
    found: dict[str, Value] = {
        names.INPUT_MESSAGES: _json([{"role": _role(message), "parts": _parts(message)} for message in others]),
        names.OUTPUT_MESSAGES: _json([_answer(run, sequence, decode) for sequence in run.sequences]),
    }
    if instructions:
        found[names.SYSTEM_INSTRUCTIONS] = _json(instructions)
    return found


def _answer(run: KeptRun, sequence: KeptSequence, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    reasons = [life.finish_reason for life in run.call.lives if life.index == sequence.index]
    return {
        "role": "assistant",
        "parts": [{"type": "text", "content": decode(sequence.output_ids)}],
        "finish_reason": (reasons[0] if reasons else None) or "error",
    }


def _role(message: Mapping[str, Any]) -> str:
    return str(message.get("role", "user"))


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    return [{"type": "text", "content": text} for text in texts if isinstance(text, str)]


def _json(data: Any) -> str:
    return msgspec.json.encode(data).decode()
