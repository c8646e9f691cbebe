"""What is kept of a run: its prompts, its tokens and the probabilities that the call asked for.

Owns the packed forms and their sizes. Times, causes and costs are not in here: they are folds over the log. Knows nothing of how
long a run is kept.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jilju.engine.request import PromptScored, SamplingParams, TokenEvent
from jilju.serve.ledger import Call

OBJECT_BYTES = 200  # of a run or a sequence beside its lists, roughly
PAIR_BYTES = 100  # of an id and its logprob in a list


@dataclass(slots=True, eq=False)
class KeptPrompt:
    ids: "array[int]"
    messages: Sequence[Mapping[str, Any]]  # that it was rendered from; empty: it came as text or ids
    num_truncated: int
    logprobs: "array[float]" = field(
        default_factory=lambda: array("f")
    )  # of its tokens from the second on, if they were asked for

    @property
    def num_bytes(self) -> int:
        texts = [value for message in self.messages for value in message.values() if isinstance(value, str)]
        return OBJECT_BYTES + 4 * len(self.ids) + 4 * len(self.logprobs) + sum(map(len, texts))


@dataclass(slots=True, eq=False)
class KeptSequence:
    index: int
    prompt: KeptPrompt
    params: SamplingParams
    output_ids: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: "array[float]" = field(default_factory=lambda: array("f"))  # empty: none were asked for
    tops: list[list[tuple[int, float]]] = field(default_factory=list)  # likewise
    stop_reason: str | int | None = None

    def add(self, event: TokenEvent) -> None:
        self.output_ids.append(event.token_id)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.top:
            self.tops.append(event.top)

    def add_scores(self, scored: PromptScored) -> None:
        self.prompt.logprobs.extend(scored.logprobs)

    @property
    def num_bytes(self) -> int:
        num_pairs = sum(map(len, self.tops))
        return OBJECT_BYTES + 4 * len(self.output_ids) + 4 * len(self.logprobs) + PAIR_BYTES * num_pairs


@dataclass(slots=True, eq=False)
class KeptRun:
    call: Call
    created: float  # unix s
    prompts: list[KeptPrompt] = field(default_factory=list)
    sequences: list[KeptSequence] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        num_bytes = OBJECT_BYTES + sum(prompt.num_bytes for prompt in self.prompts)
        return num_bytes + sum(sequence.num_bytes for sequence in self.sequences)

    def parameters(self) -> dict[str, Any]:
        """Sampling as it was understood, of the first sequence."""
        if not self.sequences:
            return {}
        params: dict[str, Any] = msgspec.to_builtins(self.sequences[0].params, str_keys=True)
        return params
