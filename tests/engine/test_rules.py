"""Rules of tokens: words that never come, ends at repetitions, logprobs of given ids; against what a look at all tokens says."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.engine.loop import Engine
from jilju.engine.request import (
    MAX_BAD_WORD_IDS,
    MAX_BAD_WORDS,
    MAX_PATTERN,
    RepetitionDetection,
    SamplingParams,
    TokenEvent,
)
from jilju.engine.rules import BadWords, Repetition
from jilju.errors import InvalidValue, NoAllowedToken
from jilju.plan.batch import MAX_WANTED

from .fakes import VOCAB, FakeExecutor, ends_with, make_limits, oracle, repeats, request, tiny_plan

FEW_IDS = st.lists(st.integers(0, 2), max_size=60)  # so few that words and patterns come by chance
WORDS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=8)
PATTERNS = st.builds(
    lambda least, more, count: RepetitionDetection(
        min_pattern_size=least, max_pattern_size=least + more, min_count=count
    ),
    st.integers(1, 5), st.integers(0, 8), st.integers(2, 5),
)  # fmt: skip


@given(WORDS, FEW_IDS)
def test_banned_is_what_would_end_a_word(words, output):
    found = BadWords(words)
    banned = found.always | found.after(np.array(output, np.int32))
    assert banned == {word[-1] for word in words if ends_with(output, word[:-1])}


@given(PATTERNS, FEW_IDS, st.integers(0, 60))
def test_a_repetition_is_seen_where_a_look_at_all_tokens_sees_it(watched, output, resumed_after):
    """Token by token, and from the middle on as after a resume."""
    tokens = np.array(output, np.int32)
    whole, resumed = Repetition(watched, tokens[:0]), None
    for count in range(1, len(output) + 1):
        whole.add(tokens[:count])
        assert whole.is_found == repeats(output[:count], watched), f"after {output[:count]}"
        if resumed is not None:
            resumed.add(tokens[:count])
        elif count > resumed_after:
            resumed = Repetition(watched, tokens[:count])
        if resumed is not None:
            assert (resumed._runs == whole._runs).all()


def tokens_of(*requests):
    """What they get side by side, with blocks for one and a half of them."""
    limits = make_limits(num_blocks=24, block_size=4, max_rows=4, max_tokens=8)
    engine = Engine(tiny_plan(), FakeExecutor(limits), limits, VirtualClock(1))
    events = {r.id: [] for r in requests}
    for r in requests:
        engine.submit(r)
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokenEvent):
                events[event.request_id].append(event)
    return list(events.values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bad_words_never_come(data):
    """Words are cut out of what the request gets without them, so that they would come; and the same after a resume."""
    r = request(
        "a", [1, 2, 3], 24, seed=data.draw(st.integers(0, 99)), temperature=data.draw(st.sampled_from([0.0, 1.0]))
    )
    free, _ = oracle(r)
    words = []
    for _ in range(data.draw(st.integers(1, 6))):
        start, length = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 3))
        words.append(tuple(free[start : start + length]))
    params = msgspec.structs.replace(r.params, bad_words_ids=tuple(words))
    ruled = msgspec.structs.replace(r, params=params)
    got = [event.token_id for event in tokens_of(ruled)[0]]
    assert len(got) == 24 and got != free
    for end in range(1, len(got) + 1):
        assert not any(ends_with(got[:end], word) for word in words), (got[:end], words)
    resumed = msgspec.structs.replace(ruled, output_ids=got[: data.draw(st.integers(1, 23))])
    assert [event.token_id for event in tokens_of(resumed)[0]] == got[len(resumed.output_ids) :]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), PATTERNS, st.integers(0, 20))
def test_an_answer_ends_at_its_first_repetition(seed, watched, min_tokens):
    """Beside others that take its blocks away now and then. Of two ids, so that patterns come soon."""
    rs = [
        request(f"r{i}", [i], 40, seed=seed + i, allowed_token_ids=(4, 9), min_tokens=min_tokens, repetition_detection=watched)
        for i in range(4)
    ]  # fmt: skip
    for r, events in zip(rs, tokens_of(*rs), strict=True):
        got = [event.token_id for event in events]
        ends = [n for n in range(max(1, min_tokens), len(got) + 1) if repeats(got[:n], watched)]
        assert ends in ([], [len(got)])
        assert events[-1].finish_reason == ("repetition" if ends else "length") and (ends or len(got) == 40)


def test_a_repetition_is_told_before_the_length_and_after_an_end_id():
    watched = RepetitionDetection(max_pattern_size=1, min_count=3)
    same = {"allowed_token_ids": (7,), "repetition_detection": watched}
    last, stopped, later = (
        request("last", [1], 3, **same),
        request("stopped", [1], 9, end_ids=(7,), **same),
        request("later", [1], 9, min_tokens=5, **same),
    )
    ends = [(len(events), events[-1].finish_reason) for events in tokens_of(last, stopped, later)]
    assert ends == [(3, "repetition"), (1, "stop"), (5, "repetition")]


def test_logprobs_of_given_ids_come_in_their_order():
    ids = (30, 2, 30, 7)
    plain, wanted, nothing = tokens_of(
        request("plain", [1, 2], 6, logprobs=20),
        request("wanted", [1, 2], 6, logprobs=5, logprob_token_ids=ids),
        request("nothing", [1, 2], 6, logprob_token_ids=()),
    )
    for a, b, c in zip(plain, wanted, nothing, strict=True):
        assert a.token_id == b.token_id == c.token_id and a.logprob == b.logprob == c.logprob
        assert [i for i, _ in b.top] == list(ids) and c.top == []
        known = dict(a.top)  # the fake's alternatives are its first ids
        assert [logprob for i, logprob in b.top if i in known] == [known[i] for i in ids if i in known]


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bad_words_ids", ((1,),) * (MAX_BAD_WORDS + 1), "has 257 sequences; allowed: 256"),
        ("bad_words_ids", ((1,), ()), "a sequence of 0 ids; allowed: 1 to 256"),
        ("bad_words_ids", ((1,) * (MAX_BAD_WORD_IDS + 1),), "a sequence of 257 ids; allowed: 1 to 256"),
        ("bad_words_ids", (("a",),), "Expected `int`, got `str`"),
        ("logprob_token_ids", (1,) * (MAX_WANTED + 1), "has 129 ids; allowed: 128"),
        ("repetition_detection", RepetitionDetection(max_pattern_size=MAX_PATTERN + 1, min_count=2), "1 to 257 tokens"),
        ("repetition_detection", RepetitionDetection(max_pattern_size=0, min_count=2), "1 to 0 tokens"),
        ("repetition_detection", RepetitionDetection(min_pattern_size=3, max_pattern_size=2, min_count=2), "3 to 2"),
        ("repetition_detection", RepetitionDetection(max_pattern_size=2, min_count=1), "min_count 1; allowed: 2"),
        ("repetition_detection", RepetitionDetection(max_pattern_size=2.0, min_count=2), "whole numbers"),
        ("repetition_detection", {"max_pattern_size": 2, "min_count": 2}, "make a RepetitionDetection"),
    ],
)
def test_what_is_out_of_range_is_refused(field, value, message):
    with pytest.raises(InvalidValue, match=message) as caught:
        SamplingParams(**{field: value}).check()
    assert caught.value.param == field


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(bad_words_ids=((1,) * MAX_BAD_WORD_IDS,) * MAX_BAD_WORDS),
        SamplingParams(logprob_token_ids=(0,) * MAX_WANTED),
        SamplingParams(repetition_detection=RepetitionDetection(max_pattern_size=MAX_PATTERN, min_count=1 << 31)),
    ],
)
def test_the_largest_that_is_allowed_runs(params):
    params.check()
    params.check_ids(VOCAB)
    (events,) = tokens_of(request("a", [1, 2], 4, **{name: getattr(params, name) for name in ("bad_words_ids", "logprob_token_ids", "repetition_detection")}))  # fmt: skip
    assert len(events) == 4


@pytest.mark.parametrize("field", ["bad_words_ids", "logprob_token_ids"])
def test_ids_beyond_the_vocabulary_are_refused(field):
    value = ((3,), (1, VOCAB)) if field == "bad_words_ids" else (3, VOCAB)
    with pytest.raises(InvalidValue, match=f"{field} has {VOCAB}; allowed: 0 to {VOCAB - 1}"):
        SamplingParams(**{field: value}).check_ids(VOCAB)


def test_bad_words_that_leave_no_token_are_refused():
    with pytest.raises(NoAllowedToken, match="bad word"):
        request("a", [1], allowed_token_ids=(3, 4), bad_words_ids=((3,), (4,))).check()
    request("a", [1], allowed_token_ids=(3, 4), bad_words_ids=((3,), (3, 4))).check()


@pytest.mark.parametrize("value", [-1, 21])
def test_prompt_logprobs_are_bounded(value):
    with pytest.raises(InvalidValue, match=f"prompt_logprobs is {value}; allowed: 0 to 20"):
        request("a", [1], prompt_logprobs=value).check()
