"""Chat templates: messages to the text a model was trained on, and that text to token ids.

Owns the rendering of the model's own template and the rule that only the template writes control tokens: the text of one that
stands in a message stays text. The template runs in `text.sandbox`. Knows nothing of HTTP: whoever calls has checked the
messages' form.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypedDict, Unpack

from jinja2 import meta
from jinja2.exceptions import SecurityError

from jilju.clock import Clock, WallClock
from jilju.errors import InvalidValue, JiljuError, ModelFileError, TemplateFailed
from jilju.text.sandbox import METER, DeadlinePassed, Meter, MeteredEnvironment, TemplateRefusal
from jilju.text.specials import SpecialGuard
from jilju.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content: a string or None, and whatever else the template reads

MAX_SOURCE_CHARS = 256 * 1024
MAX_SHOWN_CHARS = 200  # of a template's own words, which may be a caller's
MAX_RENDER_NS = 1_000_000_000
# What one rendering may cost: a template of some 100 operations a message that copies the content 32 times.
FREE_UNITS, UNITS_PER_CHAR = 1 << 20, 32
FREE_OUTPUT_CHARS, OUTPUT_PER_CHAR = 64 * 1024, 4

# Roles that reach the template as they are: templates build control tokens from them, as in '<|' + role + '|>'.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")

# Code points that never stand for a character: marks inside texts while a template handles them.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


# What a rendering itself gives a template, besides the tokens' texts.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "tokenize"})


class RenderOptions(TypedDict, total=False):
    """How a conversation is rendered, and what it holds besides its messages."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None  # {type: "function", function: {name, description, parameters}}
    documents: Sequence[Mapping[str, str]] | None
    variables: Mapping[str, Any]  # others that the template reads: names of ChatTemplate.variables


class TemplateOverrun(TemplateFailed):
    """A rendering that its budget cut off."""


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
            environment = MeteredEnvironment(now)
            self._template = environment.compile_metered(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))  # names that it reads
        except Exception as error:  # the file's program: whatever it breaks in the compiler is its fault
            raise ModelFileError(file, field, _described(error), "a jinja2 chat template") from None
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._clock = clock or WallClock()
        self._guard: SpecialGuard | None = None

    def render(
        self, messages: Sequence[Message], *, budget_ns: int = MAX_RENDER_NS, **options: Unpack[RenderOptions]
    ) -> str:
        """The text of a conversation. With `continue_final_message` it ends where the last message's content ends, for the
        model to go on; a generation prompt has no place then. TemplateFailed with the template's own words if it refuses,
        TemplateOverrun if it takes longer than the budget."""
        plain = [_plain(message) for message in messages]
        continues = options.get("continue_final_message", False)
        end_mark = ""
        if continues:
            end_mark = _unused_mark([plain, options], self.source)
            if not plain or not isinstance(plain[-1].get("content"), str):
                raise InvalidValue("the final message has no text content to continue", param="messages")
            plain[-1]["content"] += end_mark
        variables = {
            **options.get("variables", {}),
            "messages": plain,
            "add_generation_prompt": options.get("add_generation_prompt", True) and not continues,
            "tools": options.get("tools"),
            "documents": options.get("documents"),
            **self._tokens,
        }
        rendered = self._run(variables, sum(map(len, _strings([plain, options]))), budget_ns)
        if not continues:
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

    def _run(self, variables: Mapping[str, Any], num_chars: int, budget_ns: int) -> str:
        max_output = FREE_OUTPUT_CHARS + OUTPUT_PER_CHAR * num_chars
        meter = Meter(FREE_UNITS + UNITS_PER_CHAR * num_chars, self._clock, self._clock.now_ns() + budget_ns)
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
        except DeadlinePassed as error:
            raise TemplateOverrun(f"the chat template fails on these messages: {error}", param="messages") from None
        except TemplateRefusal as refusal:
            raise TemplateFailed(
                f"the chat template refuses these messages: {(refusal.message or '')[:MAX_SHOWN_CHARS]}",
                param="messages",
            ) from None
        except Exception as error:  # the file's program: whatever it raises is its failure
            raise TemplateFailed(
                f"the chat template fails on these messages: {_described(error)}", param="messages"
            ) from None
        return "".join(pieces)


def load_template(
    metadata: Mapping[str, Any], token_bytes: Callable[[int], bytes], *, file: str, source: str | None = None
) -> ChatTemplate | None:
    """The template of a GGUF file's metadata, or `source` in its place; None where there is none, as in base models."""
    source = metadata.get("tokenizer.chat_template") if source is None else source

    def text_of(key: str) -> str:
        token_id = metadata.get(key)
        return "" if token_id is None else token_bytes(token_id).decode("utf-8", errors="replace")

    if source is None:
        return None
    bos_token, eos_token = text_of("tokenizer.ggml.bos_token_id"), text_of("tokenizer.ggml.eos_token_id")
    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token, file=file)


class GuardedChat(NamedTuple):
    """A conversation that can be rendered, here or elsewhere: `pieces(template.render(chat.messages, **chat.options))`.

    Control tokens come from the template alone: inside messages, tools, documents and variables their texts are broken by a mark
    before rendering, so that none is found there, and the mark is taken out of the plain text afterwards. A template that deletes
    characters from a message could still join a control token's parts; none is known that does.
    """

    messages: list[Message]
    options: RenderOptions
    guard: SpecialGuard
    mark: str

    def pieces(self, rendered: str) -> list[str]:
        """Plain text and control tokens' texts in turn, plain first and last."""
        return [
            piece if index % 2 == 1 else piece.replace(self.mark, "")
            for index, piece in enumerate(self.guard.split(rendered))
        ]


def guard_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], **options: Unpack[RenderOptions]
) -> GuardedChat:
    mark = _unused_mark([messages, options], template.source)
    guard = template.guard_for(tokenizer)
    return GuardedChat(
        [_guarded(message, guard, mark) for message in messages], _walked(options, guard, mark), guard, mark
    )


def chat_pieces(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], **options: Unpack[RenderOptions]
) -> list[str]:
    """A rendered conversation: plain text and control tokens' texts in turn, plain first and last."""
    chat = guard_chat(template, tokenizer, messages, **options)
    return chat.pieces(template.render(chat.messages, **chat.options))


def encode_piece(tokenizer: Tokenizer, index: int, piece: str) -> list[int]:
    """Ids of one of a conversation's pieces: each second one is a control token."""
    if index % 2 == 1:
        return [tokenizer.special_texts[piece]]
    return tokenizer.encode(piece, after_special=index > 0)


def encode_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], **options: Unpack[RenderOptions]
) -> list[int]:
    """Ids of a conversation, the plain ones of its text."""
    pieces = chat_pieces(template, tokenizer, messages, **options)
    return [id_ for index, piece in enumerate(pieces) for id_ in encode_piece(tokenizer, index, piece)]


def _guarded(message: Message, guard: SpecialGuard, mark: str) -> Message:
    """The message with every text of its author's guarded; roles are ours."""
    role = message.get("role")
    if role not in ROLES:
        raise InvalidValue(f"a message's role is {role!r:.80}; allowed: {', '.join(ROLES)}", param="messages")
    guarded: Message = {**_walked(message, guard, mark), "role": role}
    return guarded


def _walked(value: Any, guard: SpecialGuard, mark: str) -> Any:
    """A tree of lists and dicts with every text in it guarded."""
    match value:
        case str():
            return guard.guarded(value, mark)
        case dict():  # names of fields: broken where they hold a control token, otherwise what the template looks for
            return {guard.broken(str(key), mark): _walked(item, guard, mark) for key, item in value.items()}
        case list() | tuple():
            return [_walked(item, guard, mark) for item in value]
    return value


def _unused_mark(values: Any, source: str) -> str:
    used = set(source).union(*_strings(values))
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
    return text[:MAX_SHOWN_CHARS] or type(error).__name__
