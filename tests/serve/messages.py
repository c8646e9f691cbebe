"""What the tests of /v1/messages share: a template with calls and thoughts, bodies, and a client that puts streams together."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import jiter
import msgspec

from jilju.engine.request import Request
from jilju.text.template import ChatTemplate

from .stub import EOT, ByteTokenizer, StubClient

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
SOURCE = (
    "{% if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ '\\n' }}"
    """{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}{{ '\\n' }}"""
    "</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
TEMPLATE = ChatTemplate(SOURCE)
ROOM: dict[str, Any] = {"template": TEMPLATE, "max_context": 8192}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CLOCK: dict[str, Any] = {"name": "clock", "input_schema": {"type": "object"}}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content} | more


def tool_use(id: str = "toolu_1", name: str = "weather", **input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def result(content: Any = "", id: str = "toolu_1", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": content} | more


def body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "stub", "max_tokens": 100, "messages": [{"role": "user", "content": text}]} | fields


def call(name: str, arguments: str) -> str:
    """As the family of the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def says(text: str, context: int = 8192, **settings: Any) -> StubClient:
    """A stub that answers so, whatever it is asked."""
    stub = StubClient(answer=lambda request: [*text.encode(), EOT], **settings)
    return with_context(stub, context)


def with_context(stub: StubClient, context: int) -> StubClient:
    assert stub.info is not None
    stub.info = msgspec.structs.replace(stub.info, max_context=context, num_blocks=context)
    return stub


def prompt_of(request: Request) -> str:
    return bytes(request.prompt_ids).decode()


class PieceTokenizer(ByteTokenizer):
    """Answers come in these pieces, a token each; everything else byte by byte."""

    def __init__(self, pieces: Sequence[bytes]):
        super().__init__()
        self.pieces = pieces
        self.vocab_size = 259 + len(pieces)
        self.answer = [*range(259, self.vocab_size), EOT]

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id - 259] if token_id >= 259 else super().token_bytes(token_id)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of each event; its name is its type."""
    assert response.headers["content-type"] == "text/event-stream"
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == "event: " + event["type"]
        events.append(event)
    return events


def rebuilt(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells of, put together as clients do; the order of events is checked on the way."""
    assert [event["type"] for event in events].count("message_start") == 1
    message = json.loads(json.dumps(events[0]["message"]))
    assert message["content"] == [] and message["stop_reason"] is None and message["stop_sequence"] is None
    is_open, inputs = False, ""
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(message["content"])
            is_open, inputs = True, ""
            message["content"].append(event["content_block"])
            continue
        assert is_open and event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                assert block["input"] == {}
                block["input"] = jiter.from_json(inputs.encode(), partial_mode=True) if inputs else {}
            continue
        assert event["type"] == "content_block_delta"
        match event["delta"]:
            case {"type": "text_delta", "text": text} if block["type"] == "text" and text:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text} if block["type"] == "thinking" and text:
                assert not block["signature"]
                block["thinking"] += text
            case {"type": "signature_delta", "signature": text} if block["type"] == "thinking" and text:
                block["signature"] += text
            case {"type": "input_json_delta", "partial_json": text} if block["type"] == "tool_use" and text:
                inputs += text
            case delta:
                raise AssertionError(f"{delta} in a block of type {block['type']}")
    assert not is_open
    last, stop = events[-2:]
    assert (last["type"], stop) == ("message_delta", {"type": "message_stop"})
    before = message["usage"]
    assert before["output_tokens"] == 0
    inputs_before = {name: value for name, value in before.items() if name.endswith("input_tokens")}
    assert inputs_before.items() <= last["usage"].items(), "input is counted truly from the start"
    return message | last["delta"] | {"usage": last["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Two calls differ in their ids alone; those of tools are made of the message's own."""
    ids = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids)
    assert all(id_.startswith("toolu_" + message["id"].removeprefix("msg_")) for id_ in ids)
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}
