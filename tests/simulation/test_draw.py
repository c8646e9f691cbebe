"""Drawing scripts: the same seed draws the same, the swarm holds what it is for, and what is drawn can be kept as JSON."""

from collections import Counter
from typing import get_args

import msgspec
import pytest

from jilju.simulation import Script, draw
from jilju.simulation.script import SPECIAL_IDS, FaultKind, RequestFault, from_json

SEEDS = range(300)


@pytest.fixture(scope="module")
def scripts() -> list[Script]:
    return [draw(seed) for seed in SEEDS]


def test_the_same_seed_draws_the_same_script(scripts):
    assert all(draw(seed) == script for seed, script in zip(SEEDS, scripts, strict=True))
    assert len({script.to_json() for script in scripts}) == len(scripts)


def test_a_script_survives_json(scripts):
    assert all(from_json(script.to_json()) == script for script in scripts)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": 1, "settings": {}, "requests": []}'])
def test_what_is_no_script_is_refused(text):
    with pytest.raises(msgspec.MsgspecError):
        from_json(text)


def test_scripts_are_what_clients_could_send(scripts):
    for script in scripts:
        settings = script.settings
        assert settings.max_context <= settings.num_blocks * settings.block_size
        assert len({request.id for request in script.requests}) == len(script.requests)
        for request in script.requests:
            assert request.prompt_ids and request.max_tokens >= request.min_tokens >= 0
            special = settings.vocab_size + SPECIAL_IDS[request.fault] if request.fault else -1
            assert all(0 <= token < settings.vocab_size or token == special for token in request.prompt_ids)
            assert special < 0 or special in request.prompt_ids


def test_the_swarm_holds_every_option(scripts):
    """What is not drawn is not tested: each kind of fault, of client and of setting is in some of the first seeds."""
    faults = Counter(fault.kind for script in scripts for fault in script.faults)
    assert set(faults) == set(get_args(FaultKind))
    requests = [request for script in scripts for request in script.requests]
    assert {request.fault for request in requests} == set(get_args(RequestFault))
    for name in (
        "n", "tenant", "salt", "priority", "temperature", "min_tokens", "end_ids", "stop", "logprobs", "repetition_penalty",
        "frequency_penalty", "logit_bias", "allowed_token_ids", "logprob_token_ids", "bad_words_ids", "repetition", "grammar", "prompt_logprobs", "deadline_us", "max_queue_us", "cancel_us",
        "cancel_after", "stall_after",
    ):  # fmt: skip
        assert len({str(getattr(request, name)) for request in requests}) > 1, name
    settings = [script.settings for script in scripts]
    for name in msgspec.structs.fields(type(settings[0])):
        if name.name != "deep_every":
            assert len({getattr(s, name.name) for s in settings}) > 1, name.name
