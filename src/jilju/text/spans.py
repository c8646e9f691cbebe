"""Spans: which message wrote which part of a rendered conversation, and what a caller should know of the rendering.

Owns the search for each message's content in the text of a template, the characters of each token, and the checks of a prompt that is likely not what its
caller meant. Knows nothing of HTTP.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Unpack

import msgspec

from jilju.errors import JiljuError
from jilju.text.template import NONCHARACTERS, ChatTemplate, RenderOptions
from jilju.text.tokenizer import Tokenizer

MAX_CHECKED_TURNS = 16  # the latest answers whose rendering is compared: each is a rendering of its own


class Span(NamedTuple):
    start: int  # characters of the text
    end: int


class Warned(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    text: str
    message: int | None = None  # index of the message that it is about


def message_spans(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], text: str, **options: Unpack[RenderOptions]
) -> list[Span | None]:
    """Where each message's content stands in `text`, its rendering; None of one that is empty or was changed.

    The contents are rendered once more between two marks. A template that looks at them so closely that the marks change
    what it writes is searched for them in order instead.
    """
    marked = _marked_spans(template, messages, text, options)
    return marked if marked is not None else found_spans(messages, text)


def _marked_spans(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], text: str, options: RenderOptions
) -> list[Span | None] | None:
    used = set(text)
    opening, closing = [mark for mark in NONCHARACTERS if mark not in used][-2:]
    shown = [index for index, message in enumerate(messages) if message.get("content")]
    contents = [
        {**message, "content": f"{opening}{message['content']}{closing}"} if message.get("content") else message
        for message in messages
    ]
    try:
        rendered = template.render(contents, **options)
    except JiljuError:
        return None
    spans: list[Span] = []
    position = start = 0
    for char in rendered:
        if char == opening:
            start = position
        elif char == closing:
            spans.append(Span(start, position))
        else:
            position += 1
    plain = rendered.replace(opening, "").replace(closing, "")
    if plain != text or len(spans) != len(shown):
        return None
    found: list[Span | None] = [None] * len(messages)
    for index, span in zip(shown, spans, strict=True):
        found[index] = span
    return found


def found_spans(messages: Sequence[Mapping[str, Any]], text: str) -> list[Span | None]:
    """Where each message's content stands in `text`, looked for in their order; None where it is not found."""
    found: list[Span | None] = []
    position = 0
    for message in messages:
        content = (message.get("content") or "").strip()
        start = text.find(content, position) if content else -1
        found.append(None if start < 0 else Span(start, start + len(content)))
        position = position if start < 0 else start + len(content)
    return found


def token_offsets(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Of each token the characters that it has a part of: [begin, end) in the text of all."""
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    data = b"".join(pieces)
    begun = list(accumulate((byte & 0xC0 != 0x80 for byte in data), initial=0))  # characters begun before each byte
    offsets: list[tuple[int, int]] = []
    position = 0
    for piece in pieces:
        is_inside = bool(piece) and piece[0] & 0xC0 == 0x80 and begun[position] > 0
        offsets.append((begun[position] - is_inside, begun[position + len(piece)]))
        position += len(piece)
    return offsets


def warnings_of(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    ids: Sequence[int],
    **options: Unpack[RenderOptions],
) -> list[Warned]:
    found = bos_warnings(tokenizer, ids)
    for index, message in enumerate(messages):
        special = next((special for special in tokenizer.special_texts if special in message.get("content", "")), None)
        if special is not None:
            what = f"it holds {special!r}, the text of a control token: it stays text, and the model sees no such token"
            found.append(Warned(code="control_token_text", text=what, message=index))
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index in answers[-MAX_CHECKED_TURNS:]:
        if (warning := _rerendered(template, messages, index, text, options)) is not None:
            found.append(warning)
    return found


def bos_warnings(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Warned]:
    if tokenizer.bos_id is None or list(ids[:2]) != [tokenizer.bos_id] * 2:
        return []
    what = "the prompt begins with two BOS tokens; leave add_special_tokens out, or the token out of the text"
    return [Warned(code="double_bos", text=what)]


def _rerendered(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], index: int, text: str, options: RenderOptions
) -> Warned | None:
    """Whether an earlier answer stands otherwise than it was generated: then the prefix cache misses from there on."""
    if index == len(messages) - 1 and options.get("continue_final_message"):
        return None
    before: RenderOptions = {**options, "add_generation_prompt": True, "continue_final_message": False}
    try:
        generated = template.render(messages[:index], **before) + (messages[index].get("content") or "")
    except JiljuError:
        return None  # a template that refuses the beginning of this conversation was never asked for this answer
    same = next((at for at, (a, b) in enumerate(zip(generated, text, strict=False)) if a != b), None)
    if same is None and len(generated) <= len(text):
        return None
    at = min(len(generated), len(text)) if same is None else same
    what = (
        f"this answer is rendered otherwise than it was generated, from character {at} on: there the model saw "
        f"{generated[at : at + 24]!r}, now it sees {text[at : at + 24]!r}; cached keys and values end there"
    )
    return Warned(code="rendered_differently", text=what, message=index)
