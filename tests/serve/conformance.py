"""The conformance table: every route's every field, and what becomes of it, as the server shows it.

Owns one value for each field that is used, and the trial: a call with it and one without, on servers that are otherwise the same. A used
field makes a difference, one without effect makes none, a refused one is refused by name. `python -m tests.serve.conformance` writes
docs/conformance.md from the rules and these trials.
"""

import hashlib
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
import msgspec

from jilju.clock import VirtualClock
from jilju.serve.app import app_of
from jilju.serve.chat.api import CHAT
from jilju.serve.embeddings import EMBEDDING
from jilju.serve.fields import ANY, Rules
from jilju.serve.messages.api import MESSAGES
from jilju.serve.openai_completions import COMPLETION
from jilju.serve.responses.fields import RESPONSE
from jilju.serve.server import make_server
from jilju.serve.tokenize import DETOKENIZE, TOKENIZE
from jilju.text.template import ChatTemplate

from .stub import StubClient, make_context

TABLE = Path(__file__).parents[2] / "docs" / "conformance.md"

# A template that reads all that calls can give one.
TEMPLATE = (
    "{{ mood }}{% if documents %}{{ documents | length }}{% endif %}"
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Well"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}


class Trial(NamedTuple):
    """`base` is what both calls have beside the field."""

    value: Any
    base: Mapping[str, Any] = MappingProxyType({})


SHARED: dict[str, Trial] = {
    "model": Trial("nobody"),
    "min_tokens": Trial(3),
    "ignore_eos": Trial(True),
    "temperature": Trial(0.3),
    "top_p": Trial(0.5),
    "top_k": Trial(3),
    "min_p": Trial(0.2),
    "repetition_penalty": Trial(1.3),
    "presence_penalty": Trial(0.5),
    "frequency_penalty": Trial(0.5),
    "logit_bias": Trial({"5": 1}),
    "allowed_token_ids": Trial([1, 2]),
    "seed": Trial(77),
    "stop": Trial(["o"]),
    "stop_token_ids": Trial([97]),
    "bad_words": Trial(["x"]),
    "repetition_detection": Trial({"max_pattern_size": 3, "min_count": 4}),
    "include_stop_str_in_output": Trial(True, {"stop": [" "], "seed": 1}),
    "skip_special_tokens": Trial(False),
    "stream": Trial(True),
    "cache_salt": Trial("s"),
    "priority": Trial(7),
    "deadline_ms": Trial(5000),
    "max_queue_ms": Trial(5000),
    "request_id": Trial("label"),
    "session_id": Trial("label"),
    "timings": Trial(True),
}
OPENAI: dict[str, Trial] = SHARED | {
    "max_tokens": Trial(2),
    "n": Trial(2),
    "logprobs": Trial(True),
    "logprob_token_ids": Trial([3], {"logprobs": True}),
    "prompt_logprobs": Trial(1),
    "response_format": Trial(SCHEMA),
    "structured_outputs": Trial({"regex": "a"}),
    "truncate_prompt_tokens": Trial(3),
    "truncation_side": Trial("right", {"truncate_prompt_tokens": 3}),
    "stream_options": Trial({"include_usage": True}, {"stream": True}),
    "stream_interval": Trial(5, {"stream": True}),
    "return_token_ids": Trial(True),
    "return_tokens_as_token_ids": Trial(True, {"logprobs": True}),
    "return_prompt_text": Trial(True),
    "return_token_offsets": Trial(True),
}
TRIALS: dict[str, dict[str, Trial]] = {
    "/v1/chat/completions": OPENAI
    | {
        "messages": Trial([USER, ASSISTANT, USER]),
        "max_completion_tokens": Trial(2),
        "top_logprobs": Trial(2, {"logprobs": True}),
        "add_special_tokens": Trial(True),
        "tools": Trial([TOOL]),
        "tool_choice": Trial("none", {"tools": [TOOL]}),
        "parallel_tool_calls": Trial(False, {"tools": [TOOL]}),
        "reasoning_effort": Trial("none"),
        "include_reasoning": Trial(False, {"messages": [{"role": "user", "content": "think"}]}),
        "add_generation_prompt": Trial(False),
        "continue_final_message": Trial(True, {"messages": [USER, ASSISTANT]}),
        "chat_template_kwargs": Trial({"mood": "merry"}),
        "chat_template": Trial("{{ messages[0].content }}"),
        "documents": Trial([{"title": "a"}]),
    },
    "/v1/completions": OPENAI
    | {
        "prompt": Trial("another"),
        "logprobs": Trial(2),
        "logprob_token_ids": Trial([3], {"logprobs": 1}),
        "return_tokens_as_token_ids": Trial(True, {"logprobs": 1}),
        "skip_special_tokens": Trial(False, {"max_tokens": 400}),
        "add_special_tokens": Trial(False),
        "best_of": Trial(3),
        "echo": Trial(True),
    },
    "/v1/responses": SHARED
    | {
        "input": Trial("another"),
        "instructions": Trial("Be brief."),
        "max_output_tokens": Trial(2),
        "tools": Trial([FLAT_TOOL]),
        "tool_choice": Trial("none", {"tools": [FLAT_TOOL]}),
        "parallel_tool_calls": Trial(False, {"tools": [FLAT_TOOL]}),
        "text": Trial({"format": {"type": "json_object"}}),
        "reasoning": Trial({"effort": "none"}),
        "include": Trial(["message.output_text.logprobs"]),
        "top_logprobs": Trial(2, {"include": ["message.output_text.logprobs"]}),
        "logprob_token_ids": Trial([3], {"include": ["message.output_text.logprobs"]}),
        "chat_template_kwargs": Trial({"mood": "merry"}),
        "metadata": Trial({"a": "b"}),
        "user": Trial("u"),
        "stream_options": Trial({}, {}),
    },
    "/v1/messages": SHARED
    | {
        "messages": Trial([USER, ASSISTANT, USER]),
        "max_tokens": Trial(2),
        "system": Trial("Be brief."),
        "stop_sequences": Trial(["o"]),
        "tools": Trial([{"name": "f", "input_schema": {"type": "object"}}]),
        "tool_choice": Trial({"type": "none"}, {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
        "thinking": Trial({"type": "enabled", "budget_tokens": 1024}),
        "output_config": Trial({"format": {"type": "json_schema", "schema": {"type": "integer"}}}),
        "chat_template_kwargs": Trial({"mood": "merry"}),
        "chat_template": Trial("{{ messages[0].content }}"),
        "documents": Trial([{"title": "a"}]),
        "add_special_tokens": Trial(True),
        "structured_outputs": Trial({"regex": "a"}),
        "stream_interval": Trial(5, {"stream": True}),
        "include_stop_str_in_output": Trial(True, {"stop_sequences": [" "], "seed": 1}),
        "context_management": Trial({"edits": [{"type": "clear_tool_uses_20250919"}]}),
    },
    "/v1/embeddings": {
        "input": Trial([]),
        "model": Trial("nobody"),
        "encoding_format": Trial("hex"),
        "dimensions": Trial(0),
    },
    "/tokenize": {
        "model": Trial("nobody"),
        "prompt": Trial("another"),
        "messages": Trial([USER, ASSISTANT], {"prompt": None, "messages": [USER]}),
        "tools": Trial([TOOL], {"prompt": None, "messages": [USER]}),
        "add_generation_prompt": Trial(False, {"prompt": None, "messages": [USER]}),
        "continue_final_message": Trial(True, {"prompt": None, "messages": [USER, ASSISTANT]}),
        "chat_template_kwargs": Trial({"mood": "merry"}, {"prompt": None, "messages": [USER]}),
        "add_special_tokens": Trial(False),
        "return_token_strs": Trial(True),
    },
    "/detokenize": {"model": Trial("nobody"), "tokens": Trial([98]), "return_token_strs": Trial(True)},
}
RULES: dict[str, Rules] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGES,
    "/v1/embeddings": EMBEDDING,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": [USER], "max_tokens": 400},
    "/v1/embeddings": {"input": "Hello"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [97]},
}


class Outcome(NamedTuple):
    status: int
    text: str
    requests: bytes  # what the engine got
    labels: tuple[Any, ...]  # what the log got

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(self.text)["error"]
        return found


async def outcome_of(path: str, body: dict[str, Any]) -> Outcome:
    """Of one call on a server of its own; two with equal bodies are the same to the last byte."""
    stub = StubClient(answer=_answer)
    counter = itertools.count()
    context = make_context(
        stub,
        clock=VirtualClock(10**9),
        random_bytes=lambda count: hashlib.sha256(str(next(counter)).encode()).digest()[:count],
        unix_time=lambda: 1.0,
        started=1,
        template=ChatTemplate(TEMPLATE),
        allow_request_template=True,
        tokenizer=_bos_tokenizer(),
    )
    server = make_server(context)
    calls: list[Any] = []
    server.ledger.listen(_Noted(calls))
    transport = httpx.ASGITransport(app_of(server), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        response = await http.post(path, json={name: value for name, value in body.items() if value is not ...})
    labels = tuple((call.request_id, call.session_id) for call in calls)
    return Outcome(response.status_code, response.text, msgspec.json.encode(stub.requests), labels)


class _Noted:
    def __init__(self, calls: list[Any]):
        self._calls = calls

    def on_token(self, call: Any, gap_ns: int | None) -> None:
        pass

    def on_end(self, call: Any) -> None:
        self._calls.append(call)


def _answer(request: Any) -> list[int]:
    from .stub import BOS, EOT, answer_ids

    if b"think" in bytes(i for i in request.prompt_ids if i < 256):
        return [*b"<think>a</think>b", EOT]
    return [*answer_ids(request)[:-1], BOS, EOT]  # with a control token in it


def _bos_tokenizer() -> Any:
    from .stub import ByteTokenizer

    return ByteTokenizer(add_bos=True)


def values_without_effect(allowed: Any) -> list[Any]:
    return ["anything", {"a": 1}, None] if allowed is ANY else [*allowed, None]


def table() -> str:
    """What the rules say of every field; the trials hold the server to it."""
    paths = list(RULES)
    names = sorted(set().union(*(_known(RULES[path]) for path in paths)))
    head = [f"`{path}`" for path in paths]
    lines = [
        "# Conformance",
        "",
        "What becomes of every field that a route knows. `used`: it makes a difference. `no-op`: taken, without effect (of the values in",
        "brackets, if there are some; others are refused). `refused`: 400, unless it is null or the value in brackets, which means off. Empty: unknown,",
        "so 400 `unknown_parameter`, or dropped and named in `x-jilju-ignored` with `--lenient`. The two render routes and",
        "`/v1/messages/count_tokens` take the fields of their routes. This page is written by `make conformance` from the rules that the server goes",
        "by; the tests try every cell of it.",
        "",
        "| Field | " + " | ".join(head) + " |",
        "|---" * (len(paths) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(RULES[path], name) for path in paths]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _known(rules: Rules) -> set[str]:
    return set(rules.fields) | set(rules.no_ops) | set(rules.later) | set(rules.content)


def _cell(rules: Rules, name: str) -> str:
    def shown(values: Any) -> str:
        return " (" + ", ".join(msgspec.json.encode(value).decode() for value in values) + ")" if values else ""

    if name in rules.fields:
        return "used"
    if name in rules.no_ops:
        allowed = rules.no_ops[name]
        return "no-op" + ("" if allowed is ANY else shown(allowed))
    if name in rules.later:
        return "refused" + shown(rules.later[name])
    return "refused" if name in rules.content else ""


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(f"wrote {TABLE}", file=sys.stderr)
