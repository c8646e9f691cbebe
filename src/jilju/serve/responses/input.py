"""Input of POST /v1/responses: its items, as messages of a chat.

Owns the kinds of items and of their parts, at every depth, and which of them are one turn of the assistant: thoughts, a
message and the calls after it become one message, as templates know it. Knows nothing of the fields beside the input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.errors import InvalidValue, MissingParameter, UnsupportedContent, UnsupportedParameter
from jilju.serve.chat.messages import (
    CACHE_MARKS,
    MAX_MESSAGES,
    MEDIA_PARTS,
    CalledFunction,
    Message,
    ToolCall,
    arguments_of,
)
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, refuse, take_fields
from jilju.serve.sealed import unsealed

ROLES = ("user", "assistant", "system", "developer")

Name = Annotated[str, Meta(min_length=1, max_length=256)]


class _Tagged(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class InputText(_Tagged, frozen=True, kw_only=True, tag="input_text"):
    text: str


class OutputText(_Tagged, frozen=True, kw_only=True, tag="output_text"):
    text: str


class RefusalText(_Tagged, frozen=True, kw_only=True, tag="refusal"):
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ReasoningText(_Tagged, frozen=True, kw_only=True, tag="reasoning_text"):
    text: str


class MessageItem(_Tagged, frozen=True, kw_only=True, tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | RefusalText]


class CallItem(_Tagged, frozen=True, kw_only=True, tag="function_call"):
    call_id: Name
    name: Name
    arguments: str  # the text of a JSON object


class ResultItem(_Tagged, frozen=True, kw_only=True, tag="function_call_output"):
    call_id: Name
    output: str | list[InputText | OutputText]
    name: Name | None = None  # of the function


class ReasoningItem(_Tagged, frozen=True, kw_only=True, tag="reasoning"):
    content: list[ReasoningText] = []
    encrypted_content: str | None = None


Item = MessageItem | CallItem | ResultItem | ReasoningItem
Items = Annotated[list[Item], Meta(min_length=1, max_length=MAX_MESSAGES)]


def _rules(struct: type[msgspec.Struct], **rest: Any) -> Rules:
    return Rules(frozenset({"type", *struct.__struct_encode_fields__}), **rest)


LABELS = MappingProxyType({"id": ANY, "status": ANY})  # of items that an answer gave, and that come back
CALLER: Mapping[str, tuple[Any, ...]] = MappingProxyType({"namespace": (), "caller": ({"type": "direct"},)})
ITEM_RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "message": _rules(MessageItem, no_ops=MappingProxyType({**LABELS, **CACHE_MARKS, "phase": ANY})),
        "function_call": _rules(CallItem, no_ops=LABELS, later=MappingProxyType({**CALLER, "async": (False,)})),
        "function_call_output": _rules(ResultItem, no_ops=LABELS, later=CALLER),
        "reasoning": _rules(ReasoningItem, no_ops=LABELS, later=MappingProxyType({"summary": ([],)})),
    }
)
PART_RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "input_text": _rules(InputText, no_ops=CACHE_MARKS),
        "output_text": _rules(
            OutputText,
            no_ops=MappingProxyType({**CACHE_MARKS, "logprobs": ANY}),
            later=MappingProxyType({"annotations": ([],)}),
        ),
        "refusal": _rules(RefusalText),
        "reasoning_text": _rules(ReasoningText),
    }
)
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(  # by item: the field of its parts, their kinds
    {
        "message": ("content", ("input_text", "output_text", "refusal")),
        "function_call_output": ("output", ("input_text", "output_text")),
        "reasoning": ("content", ("reasoning_text",)),
    }
)


def take_items(items: list[Any], ignored: list[str] | None) -> list[Any]:
    """Items reduced to what is taken, at every depth; types are checked by the conversion that follows."""
    if len(items) > MAX_MESSAGES:
        raise InvalidValue(f"input has {len(items)} items; allowed: 1..{MAX_MESSAGES}", param="input")
    return [_take_item(item, f"input[{index}]", ignored) for index, item in enumerate(items)]


def _take_item(item: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(item, dict):
        return item
    kind = _kind_of(item, path)
    taken = take_fields(item, ITEM_RULES[kind], path, ignored) | {"type": kind}
    if kind == "message" and "role" in taken and taken["role"] not in ROLES:
        raise refuse(f"{path}.role", taken["role"], ", ".join(ROLES))
    name, kinds = PARTS.get(kind, ("", ()))
    if isinstance(parts := taken.get(name), list):
        if not parts and kind == "message":
            raise refuse(f"{path}.{name}", [], "a string, or a list of at least one text part")
        taken[name] = [_take_part(part, kinds, f"{path}.{name}[{index}]", ignored) for index, part in enumerate(parts)]
    return taken


def _kind_of(item: Mapping[str, Any], path: str) -> str:
    """A message needs no type."""
    where, kind = f"{path}.type", item.get("type")
    if kind is None and "role" in item:
        return "message"
    if kind is None:
        raise MissingParameter(f"{where} is missing; allowed: {', '.join(ITEM_RULES)}", param=where)
    if not isinstance(kind, str):
        raise refuse(where, kind, ", ".join(ITEM_RULES))
    if kind not in ITEM_RULES:
        raise UnsupportedParameter(
            f"{where} is {shown(kind)}; this server takes only {', '.join(ITEM_RULES)}", param=where
        )
    return kind


def _take_part(part: Any, kinds: tuple[str, ...], path: str, ignored: list[str] | None) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        raise UnsupportedContent(f"{path} is of type {shown(kind)}; this server takes text only", param=path)
    if not isinstance(kind, str) or kind not in kinds:
        raise refuse(f"{path}.type", kind, ", ".join(kinds))
    return take_fields(part, PART_RULES[kind], path, ignored)


@dataclass(slots=True)
class _Turn:
    """What the assistant did without being interrupted, as long as one message can hold it."""

    thoughts: list[str] = field(default_factory=list)
    message: MessageItem | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def fits(self, item: Item) -> bool:
        """A message holds thoughts, then text, then calls."""
        if isinstance(item, CallItem):
            return True
        is_own = isinstance(item, ReasoningItem) or (isinstance(item, MessageItem) and item.role == "assistant")
        return is_own and self.message is None and not self.calls

    def messages(self) -> list[Message]:
        if self.message is None and not (self.thoughts or self.calls):
            return []
        content = "" if self.message is None else content_of(self.message.content)
        reasoning = "\n".join(self.thoughts) if self.thoughts else None
        return [Message(role="assistant", content=content, tool_calls=self.calls, reasoning=reasoning)]


def messages_of(given: str | Sequence[Item], instructions: str | None) -> list[Message]:
    """Instructions come first, as the system's."""
    messages = [] if instructions is None else [Message(role="system", content=instructions)]
    if isinstance(given, str):
        return [*messages, Message(role="user", content=given)]
    turn = _Turn()
    for index, item in enumerate(given):
        path = f"input[{index}]"
        if not turn.fits(item):
            messages += turn.messages()
            turn = _Turn()
        match item:
            case ReasoningItem():
                turn.thoughts.append(_thoughts_of(item, path))
            case CallItem():
                turn.calls.append(_call_of(item, path))
            case ResultItem():
                output = content_of(item.output)
                messages.append(Message(role="tool", content=output, tool_call_id=item.call_id, name=item.name))
            case MessageItem(role="assistant"):
                turn.message = item
            case MessageItem():
                messages.append(Message(role=item.role, content=content_of(item.content)))
    return messages + turn.messages()


def content_of(content: str | Sequence[InputText | OutputText | RefusalText]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


def _thoughts_of(item: ReasoningItem, path: str) -> str:
    """Of both forms the sealed one, which nobody has altered."""
    if item.encrypted_content is not None:
        text = unsealed(item.encrypted_content)
        if text is None:
            raise refuse(
                f"{path}.encrypted_content", item.encrypted_content, "what this server gave, unchanged; or send content"
            )
        return text
    if not item.content:
        raise MissingParameter(f"{path}.content is missing; give content or encrypted_content", param=f"{path}.content")
    return "\n".join(part.text for part in item.content)


def _call_of(item: CallItem, path: str) -> ToolCall:
    call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
    try:
        arguments_of(call, path)
    except InvalidValue:
        raise refuse(f"{path}.arguments", item.arguments, "the text of a JSON object") from None
    return call
