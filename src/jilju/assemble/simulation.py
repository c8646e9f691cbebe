"""What a simulation runs on, put together: the roofline executor under the real engine.

Owns the choice of plan and machine. The command and the tests come through here. Knows nothing of scripts but their settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from jilju.backends.roofline import AloneRequest, RooflineExecutor, alone, tiny_plan
from jilju.clock import VirtualClock
from jilju.engine.grammars import Grammars
from jilju.engine.loop import Engine
from jilju.engine.request import Request
from jilju.engine.step_times import StepTimes
from jilju.plan import Executor, Limits
from jilju.plan.cost import Machine
from jilju.simulation.automaton import AutomatonSource, place_after
from jilju.simulation.script import Script, Settings
from jilju.simulation.world import Solo

# So slow that the tiny plan's steps take milliseconds, as those of a small model do, and grow with tokens and contexts.
SLOW_MACHINE = Machine(flops_per_s=1e8, bytes_per_s=1e9, eta_c=0.8, eta_b=0.8, base_ns=100e3, row_ns=5e3)
PRIOR = (2e5, 2e4, 100.0)  # what the engine believes at first of its steps: wrong, as it is with a new machine


@dataclass(frozen=True)
class RooflineBackend:
    """The simulation's own: time from the cost model, tokens from the hash chain."""

    machine: Machine = SLOW_MACHINE

    def engine(self, script: Script, clock: VirtualClock, wrap: Callable[[Executor], Executor]) -> Engine:
        settings, plan, noise = script.settings, tiny_plan(script.settings.vocab_size), Random(script.seed)
        factor = None
        if settings.noise:
            factor = lambda step: noise.uniform(1 - settings.noise, 1 + settings.noise)  # noqa: E731
        executor = wrap(RooflineExecutor(clock, plan, self.machine, limits_of(settings), noise=factor))
        return Engine(
            plan, executor, limits_of(settings), clock, hash_key=b"simulation", times=StepTimes(PRIOR), gap_ms=settings.gap_us / 1e3,
            grammars=Grammars(partial(AutomatonSource, settings.vocab_size)),
        )  # fmt: skip

    def alone(self, script: Script, request: Request) -> Solo:
        params, watched = request.params, request.params.repetition_detection
        assert params.seed is not None, "whoever accepts a request draws its seed"
        vocab_size, grammar = script.settings.vocab_size, None
        if request.grammar:
            grammar = lambda tokens: place_after(request.grammar, tokens, vocab_size)  # noqa: E731
        got = alone(
            AloneRequest(
                prompt_ids=request.prompt_ids, vocab_size=vocab_size, grammar=grammar, seed=params.seed, max_tokens=params.max_tokens,
                temperature=params.temperature, min_tokens=params.min_tokens, end_ids=request.end_ids,
                repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty, logit_bias=params.logit_bias,
                allowed_token_ids=params.allowed_token_ids, num_top=params.logprobs or 0, prompt_logprobs=request.prompt_logprobs,
                logprob_token_ids=params.logprob_token_ids, bad_words_ids=params.bad_words_ids,
                repetition=(watched.min_pattern_size, watched.max_pattern_size, watched.min_count) if watched is not None else None,
            )
        )  # fmt: skip
        return Solo(got.tokens, got.logprobs, got.tops, got.scores, got.score_tops, got.finish_reason)


def limits_of(settings: Settings) -> Limits:
    return Limits(
        num_blocks=settings.num_blocks, block_size=settings.block_size, max_rows=settings.max_rows,
        max_tokens=settings.max_tokens, max_context=settings.max_context, num_threads=1,
    )  # fmt: skip
