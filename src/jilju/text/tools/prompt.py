"""Prompt: tools, calls and results as plain messages, for models whose chat template reads none of them.

Owns the words. Knows nothing of templates; that a template wants users and assistants in turn is kept in mind.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jilju.text.tools.spec import ToolSpec, template_tools

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


class Wording(msgspec.Struct, frozen=True):
    """How one family is told of tools: `{}` stands for what is being told."""

    instructions: str  # of all tools
    calls: tuple[str, str, str]  # what stands before a message's calls, between and after them
    call_arguments: str  # key of the arguments in a call
    result: str


TAGGED = Wording(
    "You can call functions. These are the functions, one a line:\n<tools>\n{}\n</tools>\n"
    "To call one, answer with its name and its arguments in this form:\n"
    '<tool_call>\n{{"name": "the function\'s name", "arguments": {{"argument": "value"}}}}\n</tool_call>\n'
    "To call several, write several of these. Their results come back between <tool_response> and </tool_response>. "
    "When no function helps, answer in plain words.",
    ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    "arguments",
    "<tool_response>\n{}\n</tool_response>",
)
FENCED = Wording(
    "You can call functions. These are the functions, one a line:\n```json\n{}\n```\n"
    "To call one, answer with its name and its arguments in this form:\n"
    '```tool_code\n{{"name": "the function\'s name", "parameters": {{"argument": "value"}}}}\n```\n'
    "To call several, write several such lines. Their results come back in blocks of tool_output. "
    "When no function helps, answer in plain words.",
    ("```tool_code\n", "\n", "\n```"),
    "parameters",
    "```tool_output\n{}\n```",
)


def plain_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[ToolSpec], wording: Wording, *, system_role: bool = True
) -> list[dict[str, Any]]:
    """No role tool, and no calls beside a message's content. The tools stand in the system message; results are a user's
    words, one message for all in a row, and with what the user says next, since some templates let no role speak twice."""
    plain: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "tool":
            role, content = "user", wording.result.format(content)
        if message.get("tool_calls"):
            content = joined(content, written(message["tool_calls"], wording))
        if after_result and role == "user":
            plain[-1]["content"] = joined(plain[-1]["content"], content)
        else:
            plain.append({**_without_calls(message), "role": role, "content": content})
            after_result = message["role"] == "tool"
    if not tools:
        return plain
    return with_instructions(plain, wording.instructions.format(listed(tools)), "system" if system_role else "user")


def with_instructions(messages: list[dict[str, Any]], instructions: str, role: str) -> list[dict[str, Any]]:
    """Behind what the system message says, if there is one at the beginning; else before all in a message of this role,
    which a user's first message joins."""
    first, rest = (messages[0], messages[1:]) if messages else ({"role": "user", "content": ""}, [])
    if first["role"] in ("system", "developer"):
        return [{**first, "content": joined(first["content"], instructions, "\n\n")}, *rest]
    if first["role"] == role:
        return [{**first, "content": joined(instructions, first["content"], "\n\n")}, *rest]
    return [{"role": role, "content": instructions}, *messages]


def listed(tools: Sequence[ToolSpec]) -> str:
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in template_tools(tools))


def written(tool_calls: Sequence[Mapping[str, Any]], wording: Wording) -> str:
    before, between, after = wording.calls
    objects = (
        json.dumps(
            {"name": call["function"]["name"], wording.call_arguments: call["function"]["arguments"]},
            ensure_ascii=False,
        )
        for call in tool_calls
    )
    return before + between.join(objects) + after


def joined(first: str, second: str, between: str = "\n") -> str:
    return f"{first}{between}{second}" if first and second else first or second


def with_short_call_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with call ids of nine letters and digits, which is what Mistral's templates insist on."""
    changed = []
    for message in map(dict, messages):
        if message.get("tool_call_id"):
            message["tool_call_id"] = short_id(message["tool_call_id"])
        if message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": short_id(call["id"])} for call in message["tool_calls"]]
        changed.append(message)
    return changed


def short_id(call_id: str) -> str:
    if SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _without_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("tool_calls", "tool_call_id", "name") if message["role"] == "tool" else ("tool_calls", "tool_call_id")
    return {key: value for key, value in message.items() if key not in left_out}
