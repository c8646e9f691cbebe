"""Alone: what a request gets by itself, as a pure function of the request.

Owns the oracle of the simulation: the hash chain token by token, a running sum in place of a cache. No blocks, chunks,
batch, prefix or engine can be at fault here. Knows the chain's formulas and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jilju.backends.roofline.chain import (
    MASK,
    MAX_GREEDY,
    RATIO,
    bias_sum,
    draw_of,
    logprob_of,
    noise_of,
    penalty_key,
    penalty_term,
    slot_value,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AloneRequest:
    """All that decides a request's tokens."""

    prompt_ids: Sequence[int]  # >= 1
    vocab_size: int
    seed: int
    max_tokens: int
    temperature: float = 1.0
    min_tokens: int = 0  # until then end ids are banned
    end_ids: Sequence[int] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    num_top: int = 0
    logprob_token_ids: Sequence[int] | None = None  # their logprobs are asked for in place of the most probable
    bad_words_ids: Sequence[Sequence[int]] = ()
    repetition: tuple[int, int, int] | None = (
        None  # least and most tokens of a pattern, and how often it comes at the end
    )
    prompt_logprobs: int | None = None
    # After some tokens: the ids that may follow, whether they are a whole answer, whether nothing can follow.
    grammar: Callable[[Sequence[int]], tuple[set[int], bool, bool]] | None = None


@dataclass(frozen=True, slots=True)
class Alone:
    tokens: list[int]
    logprobs: list[float]  # of the tokens
    finish_reason: Literal[
        "stop", "length", "repetition", "no_token"
    ]  # no_token: bans and masks left none, so the request fails
    scores: list[float]  # of prompt_ids[1:], if they were asked for
    score_tops: list[list[tuple[int, float]]]
    tops: list[list[tuple[int, float]]]  # per token, if they were asked for


def alone(request: AloneRequest) -> Alone:
    result = Alone([], [], "length", [], [], [])
    word, before, weight = 0, 0, 1  # the last word of the chain; the weighted sum of all; the next one's weight
    for position, token_id in enumerate(request.prompt_ids):
        if request.prompt_logprobs is not None and position:
            result.scores.append(logprob_of(word, token_id))
            if request.prompt_logprobs:
                result.score_tops.append(_top(word, request.prompt_logprobs, request.vocab_size))
        word = slot_value(before, position, token_id)
        before = before + weight * word & MASK
        weight = weight * RATIO & MASK

    end_ids = frozenset(request.end_ids)
    choices = _choices(request)
    choices_before_min = [token_id for token_id in choices if token_id not in end_ids]
    is_greedy = np.float32(request.temperature) < MAX_GREEDY
    seed = request.seed & MASK
    changes = _Changes(request)
    tokens, logprobs = result.tokens, result.logprobs
    for position in range(len(request.prompt_ids), len(request.prompt_ids) + request.max_tokens):
        allowed = choices_before_min if len(tokens) < request.min_tokens else choices
        if request.bad_words_ids:
            banned = {bad[-1] for bad in request.bad_words_ids if _ends_with(tokens, list(bad[:-1]))}
            allowed = [token_id for token_id in allowed if token_id not in banned]
        is_whole = False
        if request.grammar is not None:
            taken, is_whole, _ = request.grammar(tokens)
            allowed = [token_id for token_id in allowed if token_id in taken or (is_whole and token_id in end_ids)]
        if not allowed:
            return replace(result, finish_reason="stop" if is_whole else "no_token")
        draw = draw_of(word, 0 if is_greedy else noise_of(seed, position), changes.sum)
        token_id = allowed[draw % len(allowed)]
        tokens.append(token_id)
        logprobs.append(logprob_of(word, token_id))
        if request.logprob_token_ids is not None:
            result.tops.append([(wanted, logprob_of(word, wanted)) for wanted in request.logprob_token_ids])
        elif request.num_top:
            result.tops.append(_top(word, request.num_top, request.vocab_size))
        if token_id in end_ids or (request.grammar is not None and request.grammar(tokens)[2]):
            return replace(result, finish_reason="stop")
        if (
            request.repetition is not None
            and len(tokens) >= request.min_tokens
            and _repeats(tokens, *request.repetition)
        ):
            return replace(result, finish_reason="repetition")
        if changes.has_penalties:
            changes.add(token_id)
        word = slot_value(before, position, token_id)
        before = before + weight * word & MASK
        weight = weight * RATIO & MASK
    return result


def _ends_with(tokens: list[int], end: list[int]) -> bool:
    return len(tokens) >= len(end) and tokens[len(tokens) - len(end) :] == end


def _repeats(tokens: list[int], least: int, most: int, count: int) -> bool:
    return any(_ends_with(tokens, tokens[-size:] * count) for size in range(least, most + 1))


class _Changes:
    """What biases and penalties add to a draw; a token costs O(1)."""

    def __init__(self, request: AloneRequest):
        penalties = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
        self.sum = bias_sum(request.logit_bias)
        self._key = penalty_key(penalties)
        self.has_penalties = penalties != (1, 0, 0)
        self._counts: dict[int, int] = {}
        if request.repetition_penalty != 1:  # it is over the prompt too
            self._counts = dict.fromkeys(request.prompt_ids, 0)
            self.sum += sum(penalty_term(self._key, token_id, 0) for token_id in self._counts)

    def add(self, token_id: int) -> None:
        """One more token of the output."""
        count = self._counts.get(token_id)
        if count is not None:
            self.sum -= penalty_term(self._key, token_id, count)
        self._counts[token_id] = (count or 0) + 1
        self.sum = self.sum + penalty_term(self._key, token_id, (count or 0) + 1) & MASK


def _choices(request: AloneRequest) -> Sequence[int]:
    """The ids that may ever be sampled, ascending."""
    every = range(request.vocab_size)
    allowed = request.allowed_token_ids
    return every if allowed is None else sorted(set(every).intersection(allowed))


def _top(word: int, num_top: int, vocab_size: int) -> list[tuple[int, float]]:
    """Most probable first, ties to the lowest id."""
    logprobs = [(token_id, logprob_of(word, token_id)) for token_id in range(vocab_size)]
    return sorted(logprobs, key=lambda pair: (-pair[1], pair[0]))[:num_top]
