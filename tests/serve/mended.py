"""Bodies that the description allows, made such that a small server runs them.

A schema cannot say what fields say of one another, what the vocabulary holds, or that an answer be short. So that generated
calls reach the engine, and not one refusal after the other, what stands in the way is mended and all else left as it came.
"""

from types import MappingProxyType
from typing import Any

MAX_TOKENS = 6
MAX_CHOICES = 2
FORMS = MappingProxyType({"response_format": {"type": "json_object"}, "structured_outputs": {"json_object": True}})


def mended(path: str, body: Any, vocab_size: int) -> Any:
    if not isinstance(body, dict):
        return body
    body = _whole_numbers(body)
    for name in ("chat_template", "documents", "chat_template_kwargs", "thinking", "output_config", "reasoning",
                 "reasoning_effort", "deadline_ms", "max_queue_ms"):  # fmt: skip
        body.pop(name, None)
    _mend_length(path, body)
    _mend_choices(body)
    _mend_ids(body, vocab_size)
    _mend_probabilities(path, body)
    _mend_tools(path, body)
    if isinstance(body.get("messages"), list):
        body["messages"] = _turns(body["messages"]) if "/messages" in path else _messages(body["messages"])
    if isinstance(body.get("input"), list) and path == "/v1/responses":
        body["input"] = _items(body["input"])
    if path == "/tokenize":
        _mend_tokenize(body)
    return body


def _whole_numbers(value: Any) -> Any:
    """4.0 is an integer to JSON Schema, and none to us."""
    if isinstance(value, dict):
        return {name: _whole_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _mend_length(path: str, body: dict[str, Any]) -> None:
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    if path.startswith(("/v1/chat", "/v1/completions", "/v1/responses", "/v1/messages")):
        body.pop("max_completion_tokens", None)
        given = body.get(name)
        body[name] = MAX_TOKENS if given is None else min(given, MAX_TOKENS)
        if body.get("min_tokens") is not None:
            body["min_tokens"] = min(body["min_tokens"], body[name])
    if body.get("truncate_prompt_tokens") == 0:
        body["truncate_prompt_tokens"] = 1
    if isinstance(loop := body.get("repetition_detection"), dict) and loop.get("min_pattern_size") is not None:
        loop["min_pattern_size"] = min(loop["min_pattern_size"], loop["max_pattern_size"])


def _mend_choices(body: dict[str, Any]) -> None:
    if body.get("n") is not None:
        body["n"] = min(body["n"], MAX_CHOICES)
    if body.get("best_of") is not None:
        body["best_of"] = (body.get("n") or 1) if body.get("stream") else max(body.get("n") or 1, MAX_CHOICES)
    if isinstance(prompts := body.get("prompt"), list):
        kind = type(prompts[0])
        body["prompt"] = [prompt for prompt in prompts if type(prompt) is kind][: 64 if kind is int else MAX_CHOICES]
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("return_token_offsets"):
        body["return_token_offsets"] = None


def _mend_ids(body: dict[str, Any], vocab_size: int) -> None:
    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(inner) for inner in value] or [0]
        return value % vocab_size if type(value) is int else value

    for name in ("prompt", "tokens", "allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
        if isinstance(body.get(name), list):
            body[name] = known(body[name])
    if isinstance(biases := body.get("logit_bias"), dict):
        body["logit_bias"] = {str(int(key) % vocab_size): bias for key, bias in biases.items()}
    if body.get("top_k") is not None:
        body["top_k"] = min(body["top_k"], vocab_size)


def _mend_probabilities(path: str, body: dict[str, Any]) -> None:
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    wanted = body.get("top_logprobs") or body.get("logprob_token_ids")
    if wanted and path == "/v1/responses":
        body["include"] = ["message.output_text.logprobs"]
    elif wanted and path.startswith("/v1/chat"):
        body["logprobs"] = True
    elif wanted and path.startswith("/v1/completions"):
        body["logprobs"] = body.get("logprobs") or 1


def _mend_tools(path: str, body: dict[str, Any]) -> None:
    tools = body.get("tools") or []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        function["name"] = f"f{index}"
        function["input_schema" if path.startswith("/v1/messages") else "parameters"] = {"type": "object"}
    if isinstance(body.get("tool_choice"), dict):
        body["tool_choice"] = None
    if body.get("tool_choice") == "required" and not tools:
        body["tool_choice"] = "auto"
    given = [name for name in FORMS if body.get(name) is not None]
    for name in given:
        body[name] = FORMS[name] if name == given[0] and not tools else None
    if path == "/v1/responses" and isinstance(text := body.get("text"), dict):
        text["format"] = None if tools else FORMS["response_format"]
        given.append("text")
    if given or tools:  # else bans may leave no token that the form allows
        for name in ("allowed_token_ids", "logit_bias", "bad_words"):
            body.pop(name, None)


def _messages(messages: list[Any]) -> list[Any]:
    for message in messages:
        if message["role"] != "assistant":
            message["tool_calls"] = None
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = '{"a": 1}'
        if message["role"] == "tool":
            message["tool_call_id"] = "c1"
        if message.get("content") is None:
            message["content"] = "hi"
    return messages


def _turns(turns: list[Any]) -> list[Any]:
    """A conversation begins and ends with the user; blocks of other roles are texts."""
    for turn in turns:
        if isinstance(turn["content"], list):
            turn["content"] = [block for block in turn["content"] if block["type"] == "text"] or "hi"
    return [{"role": "user", "content": "hi"}, *turns, {"role": "user", "content": "and?"}]


def _items(items: list[Any]) -> list[Any]:
    for item in items:
        kind = item.get("type")
        if kind == "function_call":
            item["arguments"] = "{}"
        elif kind == "reasoning":
            item["encrypted_content"] = None
            item["content"] = [{"type": "reasoning_text", "text": "so"}]
    return items


def _mend_tokenize(body: dict[str, Any]) -> None:
    if body.get("messages") is None:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            body.pop(name, None)
        body["prompt"] = body.get("prompt") or "hi"
    else:
        body["prompt"] = None
        if body.get("add_generation_prompt"):
            body["continue_final_message"] = None
