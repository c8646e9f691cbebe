"""Messages of a chat: their form on the wire, and the form in which templates know them.

Owns roles, text parts, tool calls and tool results at every depth, and the refusal of content that is no text. Other families
translate their own messages into these. Knows nothing of fields beside the messages, nor of templates.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jilju.errors import ConflictingParameters, InvalidValue, MissingParameter, UnsupportedContent, UnsupportedParameter
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, refuse, take_fields

MAX_MESSAGES = 2048
MAX_ARGUMENTS_DEPTH = 128  # objects and lists in a call's arguments; as deep as an answer's are read
ROLES = "system, developer, user, assistant or tool"
CACHE_MARKS = MappingProxyType({"cache_control": ANY, "prompt_cache_breakpoint": ANY})
MEDIA_PARTS = frozenset({"image_url", "input_image", "image", "input_audio", "audio", "audio_url", "video", "video_url", "file",
                         "input_file", "image_embeds", "image_pil"})  # fmt: skip

Role = Literal["system", "developer", "user", "assistant", "tool"]


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str = ""  # the text of a JSON object


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: CalledFunction
    id: Annotated[str, Meta(max_length=256)] = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # another name of it
    refusal: str | None = None


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class RefusalPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["refusal"]
    refusal: str


MESSAGE = Rules.of(
    Message,
    no_ops=CACHE_MARKS,
    later=MappingProxyType({"function_call": (), "annotations": ([],), "audio": ()}),
)
PART = Rules.of(TextPart, no_ops=CACHE_MARKS)
REFUSAL_PART = Rules.of(RefusalPart)
TOOL_CALL = Rules.of(ToolCall, no_ops=MappingProxyType({"index": ANY}))
CALLED_FUNCTION = Rules.of(CalledFunction)


def take_messages(messages: list[Any], ignored: list[str] | None = None) -> list[Any]:
    """Messages reduced to what is taken, at every depth; types are checked by the conversion that follows."""
    if len(messages) > MAX_MESSAGES:
        raise InvalidValue(f"messages has {len(messages)} entries; allowed: 1..{MAX_MESSAGES}", param="messages")
    return [_take_message(message, f"messages[{index}]", ignored) for index, message in enumerate(messages)]


def _take_message(message: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(message, dict):
        return message
    taken = take_fields(message, MESSAGE, path, ignored)
    if taken.get("role") == "function":
        raise refuse(f"{path}.role", "function", f"{ROLES}; function is the old name of tool")
    if isinstance(content := taken.get("content"), list):
        taken["content"] = [
            _take_part(part, f"{path}.content[{number}]", ignored) for number, part in enumerate(content)
        ]
    if isinstance(calls := taken.get("tool_calls"), list):
        taken["tool_calls"] = [
            _take_call(call, f"{path}.tool_calls[{number}]", ignored) for number, call in enumerate(calls)
        ]
    return taken


def _take_part(part: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        raise UnsupportedContent(f"{path} is of type {shown(kind)}; this server takes text only", param=path)
    rules, name = (REFUSAL_PART, "refusal") if kind == "refusal" else (PART, "text")
    taken = take_fields(part, rules, path, ignored)
    for field, allowed in (("type", "text"), (name, "a string")):
        if field not in taken:
            raise refuse(f"{path}.{field}", None, allowed)
    if taken["type"] not in ("text", "refusal"):
        raise refuse(f"{path}.type", taken["type"], "text")
    if not isinstance(taken[name], str):
        raise refuse(f"{path}.{name}", taken[name], "a string")
    return {"type": "text", "text": taken[name]}


def _take_call(call: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(call, dict):
        return call
    if call.get("type") == "custom":
        raise UnsupportedParameter(
            f'{path}.type is "custom"; this server takes only function; leave it out', param=f"{path}.type"
        )
    taken = take_fields(call, TOOL_CALL, path, ignored)
    if isinstance(function := taken.get("function"), dict):
        taken["function"] = take_fields(function, CALLED_FUNCTION, f"{path}.function", ignored)
    return taken


def check_messages(messages: Sequence[Message]) -> None:
    """What the types alone do not say."""
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.content is None and not message.tool_calls and message.refusal is None:
            raise MissingParameter(f"{path}.content is missing; give a string or text parts", param=f"{path}.content")
        if message.content == []:
            raise refuse(f"{path}.content", [], "a string, or a list of at least one text part")
        if message.role == "tool" and message.tool_call_id is None:
            raise MissingParameter(
                f"{path}.tool_call_id is missing; say which call this is the result of", param=f"{path}.tool_call_id"
            )
        if (
            None not in (message.reasoning, message.reasoning_content)
            and message.reasoning != message.reasoning_content
        ):
            raise ConflictingParameters(
                f"{path} has different texts in reasoning and reasoning_content, two names of the same; give one of them",
                param=f"{path}.reasoning_content",
            )
        if message.tool_calls and message.role != "assistant":
            raise refuse(f"{path}.tool_calls", f"calls of the role {message.role}", "calls of the role assistant")
        for number, call in enumerate(message.tool_calls):
            arguments_of(call, f"{path}.tool_calls[{number}]")


def text_of(message: Message) -> str:
    """Parts are joined by line ends."""
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        return message.refusal or ""
    return "\n".join(part["text"] for part in message.content)


def arguments_of(call: ToolCall, path: str) -> dict[str, Any]:
    """The arguments as an object: templates write them in their own way."""
    if not call.function.arguments.strip():
        return {}
    try:
        arguments = msgspec.json.decode(call.function.arguments)
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or _nests_too_deep(arguments):
        where = f"{path}.function.arguments"
        raise refuse(where, call.function.arguments, f"the text of a JSON object, at most {MAX_ARGUMENTS_DEPTH} deep")
    return arguments


def _nests_too_deep(value: Any) -> bool:
    """What templates and guards walk through recursively."""
    level = [value]
    for _ in range(MAX_ARGUMENTS_DEPTH):
        level = [inner for item in level if isinstance(item, dict | list) for inner in _values(item)]
    return any(isinstance(item, dict | list) for item in level)


def _values(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As templates know them: `developer` is the newer name of `system`, arguments are objects."""
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text_of(message),
    }
    if message.name is not None:
        entry["name"] = message.name
    if message.tool_calls:
        entry["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments_of(call, "")}}
            for call in message.tool_calls
        ]  # fmt: skip
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    if (reasoning := message.reasoning or message.reasoning_content) is not None:
        entry["reasoning_content"] = reasoning
    return entry


def num_texts(messages: Sequence[Message]) -> int:
    """Messages, and the parts of their contents."""
    return sum(1 + (len(message.content) if isinstance(message.content, list) else 0) for message in messages)


def num_bytes_of(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of all texts, roughly what a template will write."""
    total = 0
    for message in messages:
        total += len(text_of(message).encode())
        total += sum(len(call.function.name) + len(call.function.arguments.encode()) for call in message.tool_calls)
    return total


def message_from(value: Mapping[str, Any]) -> Message:
    """For families that translate: a message of parts that are checked already."""
    return msgspec.convert(value, Message)
