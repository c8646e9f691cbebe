"""What is kept of a run: its prompts, its tokens and the probabilities that the call asked for.

Owns the packed forms and their sizes. Times, causes and costs are not in here: they are folds over the log. Knows nothing of how
long a run is kept.
"""

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from jilju.engine.request import PromptScored, SamplingParams, TokenEvent
from jilju.serve.ledger import Call

# Beside lists and texts, as measured: of a run with its call and the call's marks, of a prompt, of a sequence with its parameters.
RUN_BYTES, PROMPT_BYTES, SEQUENCE_BYTES = 1700, 700, 1200
PAIR_BYTES, LIST_BYTES = 136, 72  # of an id and its logprob in a list, of such a list
NUMBER_BYTES, ITEM_BYTES, MAPPING_BYTES = 32, 8, 232


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
        return PROMPT_BYTES + 4 * len(self.ids) + 4 * len(self.logprobs) + held_bytes(self.messages)


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
        num_bytes = LIST_BYTES * len(self.tops) + PAIR_BYTES * sum(map(len, self.tops))
        return SEQUENCE_BYTES + 4 * len(self.output_ids) + 4 * len(self.logprobs) + num_bytes


@dataclass(slots=True, eq=False)
class KeptRun:
    call: Call
    created: float  # unix s
    prompts: list[KeptPrompt] = field(default_factory=list)
    sequences: list[KeptSequence] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        num_bytes = RUN_BYTES + sum(prompt.num_bytes for prompt in self.prompts)
        if self.sequences:  # lists of ids may be long; all sequences share them
            num_bytes += sum(map(held_bytes, msgspec.structs.astuple(self.sequences[0].params)))
        return num_bytes + sum(sequence.num_bytes for sequence in self.sequences)

    def copied(self) -> "KeptRun":
        """As it is now, for a thread to read while it goes on."""
        prompts = {id(prompt): replace(prompt, logprobs=prompt.logprobs[:]) for prompt in self.prompts}
        sequences = [
            replace(
                each, prompt=prompts[id(each.prompt)], output_ids=each.output_ids[:], logprobs=each.logprobs[:], tops=each.tops[:]
            )
            for each in self.sequences
        ]  # fmt: skip
        return KeptRun(self.call, self.created, list(prompts.values()), sequences)

    def parameters(self) -> dict[str, Any]:
        """Sampling as it was understood, of the first sequence."""
        if not self.sequences:
            return {}
        params: dict[str, Any] = msgspec.to_builtins(self.sequences[0].params, str_keys=True)
        return params


def held_bytes(value: object) -> int:
    """Of texts, numbers, and what holds them."""
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return MAPPING_BYTES + sum(map(held_bytes, value.values()))
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], int):  # ids
            return LIST_BYTES + (ITEM_BYTES + NUMBER_BYTES) * len(value)
        return LIST_BYTES + ITEM_BYTES * len(value) + sum(map(held_bytes, value))
    return NUMBER_BYTES if isinstance(value, int | float) and not isinstance(value, bool) else 0
