"""Chat templates: messages to the text a model was trained on, and that text to token ids.

Owns the rendering of the model's own template and the rule that only the template writes control tokens: the text of one that
stands in a message stays text. The template runs in `text.sandbox`. Knows nothing of HTTP: whoever calls has checked the
messages' form.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError

from jilju.clock import Clock, WallClock
from jilju.errors import InvalidValue, JiljuError, ModelFileError, TemplateFailed
from jilju.text.sandbox import METER, Meter, MeteredEnvironment, TemplateRefusal
from jilju.text.specials import SpecialGuard
from jilju.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content: a string or None, and whatever else the template reads

MAX_SOURCE_CHARS = 256 * 1024
MAX_RENDER_NS = 1_000_000_000
# What one rendering may cost: a template of some 100 operations a message that copies the content 32 times.
FREE_UNITS, UNITS_PER_CHAR = 1 << 20, 32
FREE_OUTPUT_CHARS, OUTPUT_PER_CHAR = 64 * 1024, 4

# Roles that reach the template as they are: templates build control tokens from them, as in '<|' + role + '|>'.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")

# Code points that never stand for a character: marks inside texts while a template handles them.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class ChatTemplate:
    """A compiled template; threads share it. ModelFileError if the source, which comes with a model file, is no template."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        file: str = "the model file",
        clock: Clock | None = None,
        now: Callable[[], datetime] = datetime.now,
    ):
        field = "tokenizer.chat_template"
        if not isinstance(source, str) or len(source) > MAX_SOURCE_CHARS:
            given = f"{len(source)} characters" if isinstance(source, str) else type(source).__name__
            raise ModelFileError(file, field, given, f"text of at most {MAX_SOURCE_CHARS} characters")
        try:
            self._template = MeteredEnvironment(now).compile_metered(source)
        except Exception as error:  # the file's program: whatever it breaks in the compiler is its fault
            raise ModelFileError(file, field, _described(error), "a jinja2 chat template") from None
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._clock = clock or WallClock()
        self._guard: SpecialGuard | None = None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """The text of a conversation. With `continue_final_message` it ends where the last message's content ends, for the
        model to go on; a generation prompt has no place then. TemplateFailed with the template's own words if it refuses."""
        plain = [_plain(message) for message in messages]
        end_mark = ""
        if continue_final_message:
            end_mark = _unused_mark(plain, self.source)
            if not plain or not isinstance(plain[-1].get("content"), str):
                raise InvalidValue("the final message has no text content to continue", param="messages")
            plain[-1]["content"] += end_mark
        num_chars = sum(map(len, _strings(plain)))
        variables = {
            "messages": plain,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "tools": None,
            "documents": None,
            **self._tokens,
        }
        rendered = self._run(variables, num_chars)
        if not continue_final_message:
            return rendered
        end = rendered.rfind(end_mark)
        if end < 0:
            raise TemplateFailed(
                "the chat template leaves the final message out, so it cannot be continued", param="messages"
            )
        return rendered[:end].replace(end_mark, "")

    def guard_for(self, tokenizer: Tokenizer) -> SpecialGuard:
        """The tokenizer's guard, kept: a server has one tokenizer for a template."""
        if self._guard is None or self._guard.specials is not tokenizer.special_texts:
            self._guard = SpecialGuard(tokenizer.special_texts)
        return self._guard

    def _run(self, variables: Mapping[str, Any], num_chars: int) -> str:
        max_output = FREE_OUTPUT_CHARS + OUTPUT_PER_CHAR * num_chars
        meter = Meter(FREE_UNITS + UNITS_PER_CHAR * num_chars, self._clock, self._clock.now_ns() + MAX_RENDER_NS)
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate({**variables, METER: meter}):
                length += len(piece)
                if length > max_output:
                    raise SecurityError(f"it writes more than {max_output} characters for {num_chars} of input")
                pieces.append(piece)
        except JiljuError:
            raise
        except TemplateRefusal as refusal:
            raise TemplateFailed(
                f"the chat template refuses these messages: {refusal.message}", param="messages"
            ) from None
        except Exception as error:  # the file's program: whatever it raises is its failure
            raise TemplateFailed(
                f"the chat template fails on these messages: {_described(error)}", param="messages"
            ) from None
        return "".join(pieces)


def chat_pieces(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[str]:
    """A rendered conversation: plain text and control tokens' texts in turn, plain first and last. Control tokens come from
    the template alone: inside the messages their texts are broken by a mark before rendering, so that none is found there,
    and the mark is taken out of the plain text afterwards.

    A template that deletes characters from a message could still join a control token's parts; none is known that does.
    """
    mark = _unused_mark(messages, template.source)
    guard = template.guard_for(tokenizer)
    guarded = [_guarded(message, guard, mark) for message in messages]
    rendered = template.render(
        guarded, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
    )
    pieces = guard.split(rendered)
    return [piece if index % 2 == 1 else piece.replace(mark, "") for index, piece in enumerate(pieces)]


def encode_piece(tokenizer: Tokenizer, index: int, piece: str) -> list[int]:
    """Ids of one of a conversation's pieces: each second one is a control token."""
    return [tokenizer.special_texts[piece]] if index % 2 == 1 else tokenizer.encode(piece)


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of a conversation, the plain ones of its text."""
    pieces = chat_pieces(
        template,
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    return [id_ for index, piece in enumerate(pieces) for id_ in encode_piece(tokenizer, index, piece)]


def _guarded(message: Message, guard: SpecialGuard, mark: str) -> Message:
    """The message with every text of its author's guarded; roles are ours."""

    def walk(value: Any) -> Any:
        match value:
            case str():
                return guard.guarded(value, mark)
            case dict():  # names of fields: broken where they hold a control token, otherwise what the template looks for
                return {guard.broken(str(key), mark): walk(item) for key, item in value.items()}
            case list() | tuple():
                return [walk(item) for item in value]
        return value

    role = message.get("role")
    if role not in ROLES:
        raise InvalidValue(f"a message's role is {role!r:.80}; allowed: {', '.join(ROLES)}", param="messages")
    return {**{key: walk(value) for key, value in message.items()}, "role": role}


def _unused_mark(messages: Sequence[Message], source: str) -> str:
    used = set(source).union(*_strings(list(messages)))
    for mark in NONCHARACTERS:
        if mark not in used:
            return mark
    raise InvalidValue("the messages hold every noncharacter from U+FDD0 to U+FDEF; leave one out", param="messages")


def _plain(message: Message) -> dict[str, Any]:
    """A copy with no content as empty content: templates add texts together."""
    return {**message, "content": "" if message.get("content") is None else message["content"]}


def _strings(value: Any) -> list[str]:
    """Every text in a tree of lists and dicts, keys included."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                found.append(text)
            case dict() as mapping:
                waiting += mapping.keys()
                waiting += mapping.values()
            case list() | tuple() as items:
                waiting += items
    return found


def _described(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    text = str(error)
    return f"{text[:300] or type(error).__name__}"
