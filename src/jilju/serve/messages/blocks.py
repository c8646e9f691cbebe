"""Turns of the Messages API: their blocks on the wire, and the chat messages that they stand for.

Owns roles and blocks at every depth, the refusal of blocks that are no text or call, and the checks that types do not make.
Knows nothing of fields beside the turns, of templates, or of answers.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from jilju.errors import InvalidValue, UnsupportedContent
from jilju.serve.chat.messages import MAX_MESSAGES, CalledFunction, Message, ToolCall
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, refuse, take_fields
from jilju.serve.sealed import unsealed

CACHE_MARK = MappingProxyType({"cache_control": ANY})
ERROR_MARK = "Error: "  # how a template, which knows no failed results, is told of one

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Role = Literal["user", "assistant", "system"]


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class ToolUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    id: Name
    name: Name
    input: dict[str, Any]


class ToolResult(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_result"
):
    tool_use_id: Name
    content: str | list[TextBlock] = ""
    is_error: bool = False


class ThinkingBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="thinking"
):
    thinking: str  # empty where the caller asked not to see it
    signature: str  # the thoughts, sealed


Block = TextBlock | ToolUse | ToolResult | ThinkingBlock
System = str | list[TextBlock]


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "ctx", "msg"]  # the last two of some agents' clients: read as user
    content: str | list[Block]


def _rules(block: type[msgspec.Struct], **later: tuple[Any, ...]) -> Rules:
    names = frozenset(block.__struct_encode_fields__) | {"type"}
    return Rules(names, no_ops=CACHE_MARK, later=MappingProxyType(later))


TURN = Rules.of(Turn, no_ops=CACHE_MARK)
BLOCKS: Mapping[str, Rules] = MappingProxyType(
    {
        "text": _rules(TextBlock, citations=([],)),
        "tool_use": _rules(ToolUse, caller=({"type": "direct"},), toolset_name=()),
        "tool_result": _rules(ToolResult, toolset_name=()),
        "thinking": _rules(ThinkingBlock),
    }
)
OF_ROLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "user": ("text", "tool_result"),
        "assistant": ("text", "thinking", "tool_use"),
        "system": ("text",),
        "ctx": ("text", "tool_result"),
        "msg": ("text", "tool_result"),
    }
)
OTHER_BLOCKS = frozenset({"image", "document", "search_result", "redacted_thinking", "server_tool_use", "mcp_tool_use",
                          "container_upload", "tool_reference", "browser_state", "compaction"})  # fmt: skip


def take_turns(turns: list[Any], ignored: list[str] | None = None) -> list[Any]:
    """Turns reduced to what is taken, at every depth; types are checked by the conversion that follows."""
    if len(turns) > MAX_MESSAGES:
        raise InvalidValue(f"messages has {len(turns)} entries; allowed: 1..{MAX_MESSAGES}", param="messages")
    return [_take_turn(turn, f"messages[{index}]", ignored) for index, turn in enumerate(turns)]


def _take_turn(turn: Any, path: str, ignored: list[str] | None) -> Any:
    if not isinstance(turn, dict):
        return turn
    taken = take_fields(turn, TURN, path, ignored)
    if isinstance(content := taken.get("content"), list):
        role = taken.get("role")
        kinds = OF_ROLE.get(role, tuple(BLOCKS)) if isinstance(role, str) else tuple(BLOCKS)
        taken["content"] = take_blocks(content, kinds, f"{path}.content", ignored)
    return taken


def take_blocks(blocks: list[Any], kinds: Sequence[str], path: str, ignored: list[str] | None) -> list[Any]:
    """`kinds` may stand here."""
    return [_take_block(block, kinds, f"{path}[{number}]", ignored) for number, block in enumerate(blocks)]


def _take_block(block: Any, kinds: Sequence[str], path: str, ignored: list[str] | None) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        return block
    if kind not in kinds:
        allowed = " or ".join(kinds)
        if kind in OTHER_BLOCKS or kind.endswith("_tool_result"):
            raise UnsupportedContent(
                f"{path}.type is {shown(kind)}; this server takes {allowed} here; leave it out", param=f"{path}.type"
            )
        raise refuse(f"{path}.type", kind, f"{allowed} here")
    taken = take_fields(block, BLOCKS[kind], path, ignored)
    if kind == "tool_result" and isinstance(content := taken.get("content"), list):
        taken["content"] = take_blocks(content, ("text",), f"{path}.content", ignored)
    return taken


class Conversation(NamedTuple):
    messages: list[Message]
    is_prefilled: bool  # the last message is the beginning of the answer


def conversation_of(system: System | None, turns: Sequence[Turn]) -> Conversation:
    """Turns of one role in a row are one turn, as the API has it; results of calls come before what else their turn says."""
    _check_turns(turns)
    joined: list[tuple[Role, list[Block]]] = []
    if system is not None and system != []:
        joined.append(("system", _blocks(system)))
    for turn in turns:
        role = _role_of(turn)
        if joined and joined[-1][0] == role:
            joined[-1][1].extend(_blocks(turn.content))
        else:
            joined.append((role, _blocks(turn.content)))
    names: dict[str, str] = {}  # of the tools called so far, by the id of the call
    messages = [message for role, blocks in joined for message in _messages(role, blocks, names)]
    return Conversation(messages, joined[-1][0] == "assistant")


def _role_of(turn: Turn) -> Role:
    return "user" if turn.role == "ctx" or turn.role == "msg" else turn.role


def _blocks(content: str | Sequence[Block]) -> list[Block]:
    return [TextBlock(text=content)] if isinstance(content, str) else list(content)


def _messages(role: Role, blocks: Sequence[Block], names: dict[str, str]) -> list[Message]:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [unsealed(block.signature) or "" for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUse)]
    results = [block for block in blocks if isinstance(block, ToolResult)]
    names.update((call.id, call.name) for call in calls)
    messages = [
        Message(
            role="tool", content=_result_text(result), tool_call_id=result.tool_use_id, name=names[result.tool_use_id]
        )
        for result in results
    ]
    if texts or not results:
        message = Message(
            role=role,
            content="\n".join(texts) if texts or not calls else None,
            tool_calls=[_call(call) for call in calls],
            reasoning="\n".join(thoughts) if thoughts else None,
        )
        messages.append(message)
    return messages


def _call(call: ToolUse) -> ToolCall:
    return ToolCall(
        id=call.id, function=CalledFunction(name=call.name, arguments=msgspec.json.encode(call.input).decode())
    )


def _result_text(result: ToolResult) -> str:
    blocks = result.content
    text = blocks if isinstance(blocks, str) else "\n".join(block.text for block in blocks)
    says_so = text.lstrip().lower().startswith("error")
    return text if says_so or not result.is_error else ERROR_MARK + text


def _check_turns(turns: Sequence[Turn]) -> None:
    """What the types alone do not say."""
    calls: set[str] = set()
    for index, turn in enumerate(turns):
        path = f"messages[{index}].content"
        if turn.content == []:
            raise refuse(path, [], "a string, or a list of at least one block")
        for number, block in enumerate(_blocks(turn.content)):
            if isinstance(block, ToolUse):
                calls.add(block.id)
            elif isinstance(block, ToolResult) and block.tool_use_id not in calls:
                raise refuse(
                    f"{path}[{number}].tool_use_id",
                    block.tool_use_id,
                    "the id of a tool_use block of a message before it",
                )
            elif isinstance(block, ThinkingBlock) and not _is_signed(block):
                raise refuse(
                    f"{path}[{number}].signature",
                    block.signature,
                    "that of this very text; send thinking blocks back as this server gave them, or leave them out",
                )
    _check_prefill(turns)


def _is_signed(block: ThinkingBlock) -> bool:
    thoughts = unsealed(block.signature)
    return thoughts is not None and block.thinking in ("", thoughts)


def _check_prefill(turns: Sequence[Turn]) -> None:
    """The answer goes on behind a final message of the assistant, so this must end in text, and in none that a token would
    begin with; calls stand behind the text of a message, where nothing can go on."""
    final = next((number for number, turn in enumerate(reversed(turns)) if turn.role != "assistant"), len(turns))
    if final == 0:
        return
    for index in range(len(turns) - final, len(turns)):
        for number, block in enumerate(_blocks(turns[index].content)):
            if isinstance(block, ToolUse):
                where = f"messages[{index}].content[{number}].type"
                raise refuse(where, "tool_use", "text in a final message; a call is followed by its result")
    path, content = f"messages[{len(turns) - 1}].content", turns[-1].content
    where = path if isinstance(content, str) else f"{path}[{len(content) - 1}]"
    last = _blocks(content)[-1]
    if not isinstance(last, TextBlock):
        raise refuse(f"{where}.type", "thinking", "text at the end of a final message")
    if last.text != last.text.rstrip():
        where = where if isinstance(content, str) else f"{where}.text"
        raise refuse(where, last.text[-20:], "a final message of the assistant that does not end in white space")
