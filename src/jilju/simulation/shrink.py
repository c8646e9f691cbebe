"""Shrink: a script that fails, made as small as it can be while it fails in the same way.

Owns the order of attempts: fewer requests and faults first (delta debugging: halves, quarters, ... , single ones), then
simpler ones, then simpler settings. Knows nothing of how a script is played; it is handed that.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from jilju.simulation.script import Script, SimRequest

T = TypeVar("T")
MAX_TRIES = 3000

_PLAIN = SimRequest(id="", at_us=0, prompt_ids=[0], max_tokens=1, seed=0)
_OPTIONAL = tuple(
    name for name in SimRequest.__struct_fields__ if name not in ("id", "at_us", "prompt_ids", "max_tokens", "seed")
)


def shrink(script: Script, fails: Callable[[Script], bool], max_tries: int = MAX_TRIES) -> Script:
    """A small script for which `fails` is true, as it is for the given one."""
    left = [max_tries]

    def still_fails(candidate: Script) -> bool:
        left[0] -= 1
        return left[0] >= 0 and fails(candidate)

    before = None
    while before != script and left[0] > 0:
        before = script
        script = _fewer(script, "requests", still_fails)
        script = _fewer(script, "faults", still_fails)
        for candidates in (_simpler_requests, _simpler_settings):
            script = _first_that_fails(script, candidates, still_fails)
    return script


def _fewer(script: Script, name: str, fails: Callable[[Script], bool]) -> Script:
    items: list[object] = getattr(script, name)
    size = len(items)
    while size >= 1:
        start = 0
        while start < len(items):
            rest = items[:start] + items[start + size :]
            candidate = msgspec.structs.replace(script, **{name: rest})
            if (rest or name == "faults") and fails(candidate):
                items, script = rest, candidate
            else:
                start += size
        size //= 2
    return script


def _first_that_fails(
    script: Script, candidates: Callable[[Script], Iterator[Script]], fails: Callable[[Script], bool]
) -> Script:
    """Take one simplification after another, each that leaves the failure."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in candidates(script):
            if candidate != script and fails(candidate):
                script, is_smaller = candidate, True
                break
    return script


def _simpler_requests(script: Script) -> Iterator[Script]:
    for index, request in enumerate(script.requests):
        for simpler in _simpler(request):
            if simpler != request:
                requests = [*script.requests[:index], simpler, *script.requests[index + 1 :]]
                yield msgspec.structs.replace(script, requests=requests)


def _simpler(request: SimRequest) -> Iterator[SimRequest]:
    replace = msgspec.structs.replace
    for name in _OPTIONAL:
        yield replace(request, **{name: getattr(_PLAIN, name)})
    yield replace(request, seed=0)
    for size in _smaller(len(request.prompt_ids), 1):
        last = request.prompt_ids[-1:] if request.fault else []
        yield replace(request, prompt_ids=[*request.prompt_ids[: size - len(last)], *last])
    for count in _smaller(request.max_tokens, 0):
        yield replace(request, max_tokens=count, min_tokens=min(request.min_tokens, count))
    for at_us in _smaller(request.at_us, 0):
        yield replace(request, at_us=at_us)


def _simpler_settings(script: Script) -> Iterator[Script]:
    settings, replace = script.settings, msgspec.structs.replace
    plain: dict[str, object] = {"gap_us": 0, "noise": 0.0, "latency_us": 20, "load_us": 50_000, "drain_us": -1, "deep_every": 1, "max_waiting": 1024}  # fmt: skip
    for name, value in plain.items():
        yield replace(script, settings=replace(settings, **{name: value}))
    if not any(f.kind in ("drop", "double", "late", "corrupt", "foreign") for f in script.faults):
        yield replace(script, settings=replace(settings, is_wired=False))
    for name in ("num_blocks", "max_rows", "max_tokens"):
        for value in _smaller(getattr(settings, name), 1):
            smaller = replace(settings, **{name: value})
            if smaller.max_context <= smaller.num_blocks * smaller.block_size:
                yield replace(script, settings=smaller)
    for index, fault in enumerate(script.faults):
        for at in _smaller(fault.at, 1):
            faults = [*script.faults[:index], replace(fault, at=at), *script.faults[index + 1 :]]
            yield replace(script, faults=faults)


def _smaller(value: int, least: int) -> Sequence[int]:
    """Values to try in its place, smallest first."""
    return sorted({v for v in (least, value // 2, value - 1) if least <= v < value})
