"""GET /v1/models: what this server serves, with limits and defaults in force.

Owns the entry's shape, which OpenAI, vLLM and Anthropic clients all read. Knows nothing of where models come from.
"""

import time

from starlette.requests import Request
from starlette.responses import Response

from jilju.errors import ModelNotFound
from jilju.serve.answer_types import ModelEntry, ModelList
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.health import json_response
from jilju.serve.openai_completions import MAX_PROMPTS
from jilju.serve.sampling import MAX_CHOICES, MAX_DEADLINE_MS, MAX_SEQUENCES, MAX_STOP_CHARS, MAX_STOPS
from jilju.serve.server import Server
from jilju.text.reasoning import reasoning_of


def model_entry(server: Server) -> ModelEntry:
    context = server.context
    info, limits = context.client.info, context.limits
    context_tokens = context.context_tokens()
    return {
        "id": context.model_name,
        "object": "model",
        "type": "model",
        "created": context.started,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(context.started)),
        "display_name": context.model_name,
        "owned_by": "jilju",
        "root": context.model_name,
        "parent": None,
        "max_model_len": context_tokens,
        "max_input_tokens": context_tokens,
        "max_tokens": context_tokens,
        "jilju": {
            "limits": {
                "prompts": MAX_PROMPTS,
                "n": MAX_CHOICES,
                "sequences": MAX_SEQUENCES,
                "stop": MAX_STOPS,
                "stop_chars": MAX_STOP_CHARS,
                "top_logprobs": 20,
                "queue_requests": limits.queue_requests,
                "queue_tokens": None if info is None else int(limits.queue_pools * info.num_blocks * info.block_size),
                "max_queue_ms": round(limits.queue_s * 1000),
                "deadline_ms": min(MAX_DEADLINE_MS, round(limits.total_s * 1000)),
                "token_gap_ms": None if info is None else info.token_gap_ms,
            },
            "defaults": context.defaults,
            "quantization": context.quantization,
            "kernel_set": None if info is None else info.kernel_set,
            "deterministic": None if info is None else info.invariant,
            "features": features_of(context),
        },
    }


def features_of(context: ServerContext) -> list[str]:
    """What calls can ask of the model, by the names of routes and fields."""
    features = ["completions"]
    if context.template is not None:
        features += ["chat", "responses", "messages"]
        features += ["reasoning"] if reasoning_of(context.template.source) is not None else []
    if context.workers is not None:
        features += ["structured_outputs", *(["tools"] if context.template is not None else [])]
    return features


async def list_models(server: Server, request: Request) -> Response:
    name = server.context.model_name
    return json_response(
        ModelList(object="list", data=[model_entry(server)], has_more=False, first_id=name, last_id=name)
    )


async def get_model(server: Server, request: Request) -> Response:
    name = request.path_params["model"]
    if name != server.context.model_name:
        raise ModelNotFound(
            f"model is {shown(name)}; this server has {shown(server.context.model_name)}", param="model"
        )
    return json_response(model_entry(server))
