"""Draw: a script from a seed.

Owns the swarm: every option is drawn for each seed, so that seeds differ in kind and not only in numbers. Knows nothing of how
a script is played. The same seed draws the same script everywhere: `random.Random` seeded with an int is specified to be so.
Scripts for a backend that computes a model are drawn by the same hands; what differs is drawn beside and after the rest, so that
the others stay what they are.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import TypeVar

import msgspec

from jilju.simulation.automaton import NOWHERE, Automaton
from jilju.simulation.letters import letter
from jilju.simulation.script import (
    SPECIAL_IDS,
    DeathCause,
    Fault,
    FaultKind,
    RequestFault,
    Script,
    Settings,
    SimRequest,
)

T = TypeVar("T")
TURN_FAULTS: tuple[FaultKind, ...] = ("kill_begun", "kill_told", "kill_ran")
FRAME_FAULTS: tuple[FaultKind, ...] = ("drop", "double", "late", "corrupt", "foreign")
REQUEST_FAULTS: tuple[RequestFault, ...] = ("raise", "nan", "bad_id", "crash", "oom")
CAUSES: tuple[DeathCause, ...] = ("work", "pressure", "other")
FAULT_SPACING = (
    24  # calls between two that raise: else the halves of one are hit by the next, and that is the request's end
)
BUSY = 0.4  # of the seeds fill the engine
SLOW = 0.12  # of those have one row and an engine that stands still for a while, so that who waits grows old
RULED = 0.3  # of the seeds have requests with rules for their tokens ...
RULES_STREAM = 1 << 64  # ... which are drawn from a stream of their own: all else of a seed is as it is without them
HELD = 0.2  # of the seeds have requests that are held to a grammar ...
GRAMMARS_STREAM = 2 << 64  # ... which are drawn from a stream of their own too
WORK_US = 1_000_000  # in which most of a script happens

NATIVE_VOCAB = 300  # ids that prompts are drawn from
NATIVE_SHARED = 48  # tokens of a family's prompts: some blocks of 16
LARGE_REQUESTS, LARGE_TOKENS = 12, 32  # of a script for a model whose steps take milliseconds


def draw(seed: int, *, is_native: bool = False) -> Script:
    """`is_native`: for a backend that computes a model of NATIVE_VOCAB ids or more, which knows no special ids."""
    rng = Random(seed)
    is_busy = rng.random() < BUSY
    settings = _settings(rng, is_busy)
    if is_native:
        settings = _native_settings(rng, settings, is_busy)
    count = rng.randrange(24, 56) if is_busy else rng.choice((2, 4, 8, 16, 32)) + rng.randrange(4)
    tenants = [f"t{i}" for i in range(rng.choice((1, 1, 2, 4, 8)))]
    families = [_tokens(rng, settings, settings.max_context) for _ in range(rng.choice((1, 2, 4)))]
    times = _arrivals(rng, count, is_busy)
    rates = {
        name: rng.choice((0.0, 0.0, 0.1, 0.4)) for name in ("cancel", "deadline", "stall", "n", "priority", "fault")
    }
    is_slow = is_busy and not is_native and rng.random() < SLOW
    if is_slow:
        settings = msgspec.structs.replace(settings, max_rows=1)
        times = sorted(rng.randrange(4 * WORK_US) for _ in times)
        rates["priority"] = 0.4
    requests = [
        _request(rng, settings, f"r{i}", at_us, families, tenants, rates, is_native) for i, at_us in enumerate(times)
    ]
    faults = _faults(rng, settings, count)
    if is_slow:
        faults.append(Fault(kind="stall_at", at=rng.randrange(2 * WORK_US)))
    if is_native:
        requests = [_native_request(rng, settings, request) for request in requests]
        faults += _native_kills(rng)
    if (rules := Random(seed + RULES_STREAM)).random() < RULED:
        requests = [_ruled(rules, settings, request) for request in requests]
    if (grammars := Random(seed + GRAMMARS_STREAM)).random() < HELD:
        requests = [_held(grammars, request) for request in requests]
    return Script(seed=seed, settings=settings, requests=requests, faults=faults)


def draw_native(seed: int) -> Script:
    return draw(seed, is_native=True)


def draw_large(seed: int, vocab_size: int) -> Script:
    """For a model whose steps take milliseconds: the first few requests of a native script, with short answers, in a pool that
    holds little more than one context."""
    script = draw(seed, is_native=True)
    settings = script.settings
    num_blocks = min(settings.num_blocks, settings.max_context // settings.block_size + 2)
    requests = [
        msgspec.structs.replace(
            request, max_tokens=min(request.max_tokens, LARGE_TOKENS), min_tokens=min(request.min_tokens, LARGE_TOKENS), n=min(request.n, 2),
        )
        for request in script.requests[:LARGE_REQUESTS]
    ]  # fmt: skip
    settings = msgspec.structs.replace(settings, vocab_size=vocab_size, num_blocks=num_blocks)
    return msgspec.structs.replace(script, settings=settings, requests=requests)


def steady(seed: int) -> Script:
    """Load and nothing else, with full batches: what the speed of the simulation is measured with."""
    rng = Random(seed)
    settings = Settings(
        num_blocks=512,
        block_size=16,
        max_rows=32,
        max_tokens=256,
        max_context=256,
        vocab_size=40,
        gap_us=2000,
        noise=0.1,
    )
    family = _tokens(rng, settings, 64)
    requests = [
        SimRequest(
            id=f"r{index}", at_us=rng.randrange(50_000), prompt_ids=family[: rng.randrange(64)] + _tokens(rng, settings, 8),
            max_tokens=rng.randrange(16, 96), seed=index, temperature=rng.choice((0.0, 1.0)),
        )
        for index in range(48)
    ]  # fmt: skip
    return Script(seed=seed, settings=settings, requests=requests)


def _settings(rng: Random, is_busy: bool) -> Settings:
    block_size = rng.choice((1, 2, 4, 16, 32))
    num_blocks = max(2, int(2 ** rng.uniform(7 if is_busy else 4, 12) / block_size))
    max_rows = rng.choice((16, 32, 64) if is_busy else (1, 2, 4, 8, 16, 32, 64))
    return Settings(
        num_blocks=num_blocks,
        block_size=block_size,
        max_rows=max_rows,
        max_tokens=max(rng.choice((1, 4, 16, 64, 256)), max_rows if is_busy else rng.choice((1, max_rows))),
        max_context=min(num_blocks * block_size, rng.choice((16, 64, 128, 256))),
        vocab_size=rng.choice((2, 5, 16, 40, 64)),
        gap_us=rng.choice((0, 0, 300, 600, 2000)),
        is_wired=rng.random() < 0.3,
        noise=rng.choice((0.0, 0.1, 0.5)),
        load_us=rng.choice((0, 50_000, 2_000_000)),
        latency_us=rng.choice((1, 20, 2000)),
        max_waiting=rng.choice((1024, 1024, 1024, 8)),
        max_pools=rng.choice((1000.0, 1000.0, 1000.0, 1.0)),
        drain_us=rng.randrange(WORK_US) if rng.random() < 0.1 else -1,
    )


def _native_settings(rng: Random, settings: Settings, is_busy: bool) -> Settings:
    """Blocks as the kernels take them, of a pool that is mostly too small for all; few calls are turned away."""
    block_size = rng.choice((16, 16, 32))
    num_blocks = max(2, int(2 ** rng.uniform(7 if is_busy else 6, 10.5) / block_size))
    return msgspec.structs.replace(
        settings, block_size=block_size, num_blocks=num_blocks, vocab_size=NATIVE_VOCAB,
        max_context=min(num_blocks * block_size, rng.choice((64, 128, 256))), load_us=rng.choice((0, 1000, 20_000)),
        max_waiting=1024, max_pools=1000.0,
    )  # fmt: skip


def _arrivals(rng: Random, count: int, is_busy: bool) -> list[int]:
    kind = rng.choice(("at once", "bursts") if is_busy else ("at once", "bursts", "poisson"))
    if kind == "at once":
        return [rng.randrange(100) for _ in range(count)]
    if kind == "bursts":
        starts = [rng.randrange(rng.choice((WORK_US // 10, WORK_US))) for _ in range(3)]
        return [rng.choice(starts) + rng.randrange(1000) for _ in range(count)]
    mean_us = rng.choice((100, 500, 2000, 20_000))
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(1 / mean_us)
        times.append(int(now))
    return times


def _length(rng: Random, settings: Settings, mean: float) -> int:
    edges = (settings.block_size - 1, settings.block_size, settings.block_size + 1, settings.max_context - 1)
    return rng.choice(edges) if rng.random() < 0.2 else int(rng.lognormvariate(math.log(mean), 0.8))


def _tokens(rng: Random, settings: Settings, count: int) -> list[int]:
    return [rng.randrange(settings.vocab_size) for _ in range(count)]


def _request(
    rng: Random,
    settings: Settings,
    request_id: str,
    at_us: int,
    families: Sequence[list[int]],
    tenants: Sequence[str],
    rates: dict[str, float],
    is_native: bool,
) -> SimRequest:
    context, vocab_size = settings.max_context, settings.vocab_size
    family = rng.choice(families)
    shared = min(_length(rng, settings, NATIVE_SHARED if is_native else 16), context - 1)
    prompt = (family[:shared] + _tokens(rng, settings, _length(rng, settings, 3)))[: context - 1] or [0]
    room = context - len(prompt)
    max_tokens = min(_length(rng, settings, 20), room)
    if rng.random() < 0.02:
        max_tokens = room + rng.randrange(1, 4)  # can never fit
    tenant = rng.choice(tenants)
    fields: dict[str, object] = {}
    if rng.random() < 0.3:
        fields["end_ids"] = tuple(sorted({rng.randrange(vocab_size) for _ in range(rng.choice((1, 1, 3)))}))
    if rng.random() < 0.3:
        fields["stop"] = tuple(
            "".join(letter(rng.randrange(vocab_size)) for _ in range(rng.choice((1, 2, 2, 3))))
            for _ in range(rng.choice((1, 2)))
        )
    if rng.random() < 0.1:
        fields |= {"min_tokens": rng.randrange(max_tokens + 1)}
        fields.setdefault("end_ids", (rng.randrange(vocab_size),))
    if rng.random() < 0.2:
        fields["logprobs"] = rng.choice((0, 2))
    if rng.random() < 0.1:
        fields |= {"repetition_penalty": 1.3} if rng.random() < 0.5 else {"frequency_penalty": 0.5}
    if rng.random() < 0.05:
        fields["logit_bias"] = {rng.randrange(vocab_size): 3.0}
    if rng.random() < 0.05:
        fields["allowed_token_ids"] = tuple(sorted({rng.randrange(vocab_size) for _ in range(4)}))
    if rng.random() < 0.05:
        fields["prompt_logprobs"] = 0
    if rng.random() < rates["n"]:
        fields["n"] = rng.randrange(2, 5)
    if rng.random() < rates["priority"]:
        fields["priority"] = rng.choice((-1, 1, 1, 20))
    if rng.random() < rates["deadline"]:
        fields |= {"deadline_us": int(10 ** rng.uniform(3.5, 6.5)), "max_queue_us": int(10 ** rng.uniform(3.5, 6.5))}
    if rng.random() < rates["cancel"]:
        how = rng.choice(("time", "token", "at once"))
        if how == "token":
            fields["cancel_after"] = rng.randrange(1, 6)
        else:
            fields["cancel_us"] = 0 if how == "at once" else int(10 ** rng.uniform(1, 5.5))
    if rng.random() < rates["stall"] / 4:
        fields["stall_after"] = rng.randrange(1, 6)
    if not is_native and rng.random() < rates["fault"] / 4:
        fault = rng.choice(REQUEST_FAULTS)
        fields["fault"] = fault
        prompt = [*prompt[: context - max_tokens - 1], vocab_size + SPECIAL_IDS[fault]]
        max_tokens = max(1, max_tokens)
        fields.pop("min_tokens", None)
        fields.pop("prompt_logprobs", None)
    return SimRequest(
        id=request_id,
        at_us=at_us,
        prompt_ids=prompt,
        max_tokens=max_tokens,
        seed=rng.randrange(-(2**63), 2**63),
        tenant=tenant,
        salt=tenant if rng.random() < 0.9 else f"{tenant} alone",
        temperature=rng.choice((0.0, 1.0)),
        **fields,  # type: ignore[arg-type]
    )


def _native_request(rng: Random, settings: Settings, request: SimRequest) -> SimRequest:
    """With what only a model has: a distribution to cut down, and ends that must be made likely among hundreds of ids."""
    changes: dict[str, object] = {}
    if rng.random() < 0.9:
        changes["logprobs"] = rng.choice((0, 1, 5, 20))
    if request.temperature:
        changes["temperature"] = rng.choice((0.3, 1.0, 1.7))
    if rng.random() < 0.3:
        changes |= rng.choice(({"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9}))
    if rng.random() < 0.2:
        some = rng.sample(range(settings.vocab_size), 24)
        changes |= {"allowed_token_ids": tuple(sorted(some)), "end_ids": tuple(sorted(some[:2]))}
    return msgspec.structs.replace(request, **changes)


def _ruled(rng: Random, settings: Settings, request: SimRequest) -> SimRequest:
    """Perhaps with words that must not come, an end at repetitions, logprobs of given ids, and more than scores of its prompt."""
    changes: dict[str, object] = {}
    if rng.random() < 0.3:
        lengths = [rng.choice((1, 2, 2, 3)) for _ in range(rng.choice((1, 4, 12)))]
        changes["bad_words_ids"] = tuple(tuple(_tokens(rng, settings, length)) for length in lengths)
    if rng.random() < 0.3:
        least = rng.choice((1, 1, 2))
        changes["repetition"] = (least, least + rng.randrange(4), rng.choice((2, 2, 3)))
        if rng.random() < 0.3:
            changes["min_tokens"] = rng.randrange(request.max_tokens + 1)
    if rng.random() < 0.2:
        changes["logprob_token_ids"] = tuple(_tokens(rng, settings, rng.randrange(4)))
    if rng.random() < 0.2 and not request.fault:
        changes["prompt_logprobs"] = rng.choice((0, 1, 2))
    return msgspec.structs.replace(request, **changes)


def _held(rng: Random, request: SimRequest) -> SimRequest:
    """Perhaps to a grammar: of few states, so that answers end and run into dead ends. A fault is to be seen, so not with one."""
    num_states, num_classes = rng.randrange(1, 6), rng.choice((1, 2, 3, 5))
    gaps, accepting = rng.choice((0.0, 0.1, 0.3, 0.6)), rng.choice((0.2, 0.5))
    steps = [
        [NOWHERE if rng.random() < gaps else rng.randrange(num_states) for _ in range(num_classes)]
        for _ in range(num_states)
    ]
    automaton = Automaton(steps, [rng.random() < accepting for _ in range(num_states)])
    is_held = rng.random() < 0.5 and not request.fault
    return msgspec.structs.replace(request, grammar=automaton.to_text()) if is_held else request


def _native_kills(rng: Random) -> list[Fault]:
    """Early, so that the engine has work when it dies."""
    if rng.random() < 0.5:
        return []
    return [
        Fault(kind=rng.choice(TURN_FAULTS), at=rng.randrange(1, 30), cause=rng.choice(CAUSES))
        for _ in range(rng.randrange(1, 3))
    ]


def _faults(rng: Random, settings: Settings, count: int) -> list[Fault]:
    faults: list[Fault] = []
    if rng.random() < 0.35:  # of the backend
        at = rng.randrange(1, 40)
        for _ in range(rng.randrange(1, 4)):
            kind: FaultKind = "stuck" if rng.random() < 0.1 else rng.choice(("raise_before", "raise_after"))
            faults.append(Fault(kind=kind, at=at))
            at += FAULT_SPACING + rng.randrange(40)
    if rng.random() < 0.35:  # the engine dies
        for _ in range(rng.randrange(1, 5)):
            if rng.random() < 0.6:
                faults.append(Fault(kind=rng.choice(TURN_FAULTS), at=rng.randrange(1, 120), cause=rng.choice(CAUSES)))
            else:
                faults.append(Fault(kind="kill_at", at=rng.randrange(2 * WORK_US), cause=rng.choice(CAUSES)))
    if settings.is_wired and rng.random() < 0.5:
        faults += [
            Fault(kind=rng.choice(FRAME_FAULTS), at=rng.randrange(1, rng.choice((4, 30, 120))))
            for _ in range(rng.randrange(1, 3))
        ]
    if rng.random() < 0.1:
        faults.append(Fault(kind="stall_at", at=rng.randrange(WORK_US)))
    if rng.random() < 0.05:  # one death after another, with a few steps in between
        at = rng.randrange(1, 20)
        for _ in range(8):
            faults.append(Fault(kind="kill_ran", at=at, cause="other"))
            at += rng.randrange(1, 4)
    if rng.random() < 0.05:
        faults.append(Fault(kind="forged", at=rng.randrange(1, 120)))
    if rng.random() < 0.02:
        faults.append(Fault(kind="doomed_at", at=rng.randrange(WORK_US // 10)))
    return faults
