"""Api: what a generating route asks of its family: fields, prompts, forms, the shape of answers.

Owns the protocol alone; each family's module implements it, and routes that run a call or show what one would be are written
against it. Knows nothing of any family.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from jilju.serve.answer import Head, Renderer
from jilju.serve.context import ServerContext
from jilju.serve.generation import Choice, EncodedPrompt
from jilju.serve.sampling import GenerationFields
from jilju.serve.timings import Marks
from jilju.text.grammar import GrammarSource
from jilju.text.message import MessageParser

F = TypeVar("F", bound=GenerationFields)


class Api(Protocol[F]):
    """One family of generating routes."""

    path: str
    id_prefix: str

    def parse(self, body: Mapping[str, Any], ignored: list[str] | None) -> F:
        """`ignored` takes unknown fields, where they are let pass."""
        ...

    def logprobs(self, fields: F) -> int | None:
        """That the engine is asked for."""
        ...

    def shown_logprobs(self, fields: F) -> int | None: ...

    def prompt_logprobs(self, fields: F) -> int | None: ...

    def num_sampled(self, fields: F) -> int:
        """Sequences of each prompt; `n` of them are shown."""
        ...

    def is_named(self, fields: F) -> bool:
        """Whether the caller named the function to be called."""
        ...

    async def prompts(self, fields: F, context: ServerContext, marks: Marks, salt: bytes) -> list[EncodedPrompt]: ...

    def estimates(self, fields: F) -> list[int]:
        """Tokens of each prompt, roughly and at once."""
        ...

    def asked(self, fields: F) -> int | None:
        """Tokens of output at most; None: the rest of the context."""
        ...

    def max_tokens(self, fields: F, num_prompt_tokens: int, context: ServerContext) -> int: ...

    def has_form(self, fields: F) -> bool:
        """Whether the answer may be held to one."""
        ...

    def grammar(self, fields: F, prompt: EncodedPrompt, context: ServerContext) -> GrammarSource | None:
        """What holds the answer to this prompt to a form. May take its time."""
        ...

    def form_name(self, fields: F) -> str:
        """The field that the grammar comes from, for errors."""
        ...

    def parser(self, fields: F, prompt: EncodedPrompt, context: ServerContext) -> MessageParser:
        """Of one answer's text."""
        ...

    def shown_ids(self, fields: F, context: ServerContext) -> frozenset[int]:
        """Control tokens whose texts the parser needs."""
        ...

    def renderer(self, fields: F, head: Head, choices: Sequence[Choice], context: ServerContext) -> Renderer: ...
