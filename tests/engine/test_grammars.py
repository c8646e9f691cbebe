"""Answers that are held to a grammar, on the fake backend with the real matchers: every answer is one of its grammar's, is the
same alone, in a batch, preempted and resumed, and one that cannot go on ends alone."""

import asyncio
import json
import os
import re
import signal
import threading
from concurrent.futures import Future

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.engine.grammars import Grammars
from jilju.engine.loop import STUCK_TURNS, Engine
from jilju.engine.request import Request, RequestAborted, RequestEnded, RequestFailed, TokenEvent
from jilju.errors import InternalError
from tests.engine.fakes import RAISE_TOKEN, VOCAB, FakeExecutor, make_limits, request, tiny_plan
from tests.engine.held import END, GRAMMARS, OTHER_END, PIECES, TOKENS, held, source
from tests.engine.test_engine import Harness
from tests.engine.test_supervisor import collect, make_client, wait_until

CHOICES = ("xyz", "no", "az", "noa")


def is_whole(name: str, text: str) -> bool:
    match name:
        case "schema":
            value = json.loads(text)
            return (
                set(value) == {"a", "b"} and type(value["a"]) is int and all(i in (True, "x", 12) for i in value["b"])
            )
        case "object":
            return all(type(value) is bool for value in json.loads(text).values())
        case "regex":
            return re.fullmatch("[abc]{2,6}-[0-2]{1,5}", text) is not None
        case "choice":
            return text in CHOICES
        case _:
            depth = text.count("[")
            return text == "[" * depth + "x" + "]" * depth


def harness(limits=None, **options) -> Harness:
    grammars = options.pop("grammars", None) or Grammars(source, fills_beside=options.pop("fills_beside", False))
    return Harness(limits or make_limits(), grammars=grammars, **options)


def text_of(tokens: list[int], end_ids=(END, OTHER_END)) -> str:
    return b"".join(TOKENS[t] for t in (tokens[:-1] if tokens and tokens[-1] in end_ids else tokens)).decode()


def alone(r: Request) -> tuple[list[int], object]:
    """Its tokens and its last event, from an engine that has nothing else to do."""
    h = harness(make_limits(num_blocks=64, max_tokens=64))
    h.run(msgspec.structs.replace(r, output_ids=[]))
    return h.tokens(r.id), h.events[r.id][-1]


# ---- the laws -------------------------------------------------------------------------------------------------------


@st.composite
def held_requests(draw, index: int) -> tuple[str, Request]:
    name = draw(st.sampled_from([*GRAMMARS, ""]))
    prompt = [draw(st.integers(0, VOCAB - 1))] * draw(st.integers(1, 8)) + [index]
    r = held(
        f"r{index}", name, prompt, draw(st.integers(1, 24)), seed=draw(st.integers(0, 2**62)),
        end_ids=draw(st.sampled_from([(END,), (END, OTHER_END), (), (PIECES.index("}"), END)])),
        temperature=draw(st.sampled_from([0.0, 1.0])), min_tokens=draw(st.sampled_from([0, 0, 1, 6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])), logprobs=draw(st.sampled_from([None, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )  # fmt: skip
    return name, msgspec.structs.replace(r, params=msgspec.structs.replace(r.params, min_tokens=min(r.params.min_tokens, r.params.max_tokens)))  # fmt: skip


@st.composite
def held_crowds(draw):
    block_size = draw(st.sampled_from([1, 2, 4]))
    crowd = [draw(held_requests(i)) for i in range(draw(st.integers(1, 8)))]
    num_blocks = -(-33 // block_size) + draw(st.sampled_from([0, 2, 40]))
    return make_limits(num_blocks, block_size, draw(st.integers(1, 8)), draw(st.integers(1, 20))), crowd, draw(st.booleans())  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(held_crowds(), st.data())
def test_answers_are_the_grammars_and_the_same_in_any_company(scenario, data):
    limits, crowd, fills_beside = scenario
    h = harness(limits, fills_beside=fills_beside)
    for name, r in crowd:
        tokens, end = alone(r)
        resumed = msgspec.structs.replace(r, output_ids=tokens[: data.draw(st.integers(0, max(0, len(tokens) - 1)))])
        h.engine.submit(resumed)
        reason = getattr(end, "finish_reason", None)
        is_cut = reason == "length" or (tokens and TOKENS[tokens[-1]] == b"}" and PIECES.index("}") in r.end_ids)
        if name and reason is not None and not is_cut:
            assert is_whole(name, text_of(tokens, r.end_ids)), (name, text_of(tokens))
    h.run()
    for _, r in crowd:
        tokens, end = alone(r)
        mine = h.events[r.id]
        assert tokens[len(tokens) - len(h.tokens(r.id)) :] == h.tokens(r.id)
        assert type(mine[-1]) is type(end)
        assert getattr(mine[-1], "finish_reason", None) == getattr(end, "finish_reason", None)
        assert getattr(mine[-1], "code", None) == getattr(end, "code", None)
    h.assert_empty()
    h.engine.close()


@pytest.mark.parametrize("name", [*GRAMMARS])
def test_an_answer_that_is_not_cut_off_is_one_of_the_grammar(name):
    for seed in range(8):
        for end_ids in ((END,), ()):
            tokens, end = alone(held("r", name, seed=seed, end_ids=end_ids, max_tokens=240))
            assert end.finish_reason == "stop" or (name == "recursive" and end.finish_reason == "length"), text_of(
                tokens
            )
            if end.finish_reason == "stop":
                assert is_whole(name, text_of(tokens)), text_of(tokens)


def test_a_step_that_raised_moves_no_grammar():
    h = harness(make_limits(max_rows=8, max_tokens=64))
    crowd = [held(f"r{i}", "schema", (i, 5), seed=i) for i in range(5)]
    for r in crowd:
        h.engine.submit(r)
    for _ in range(4):
        h.step()
    h.run(request("bad", [RAISE_TOKEN]))
    assert h.engine.num_step_faults > 0 and h.events["bad"][-1].code == "internal"
    for r in crowd:
        assert h.tokens(r.id) == alone(r)[0]


def test_every_place_of_an_answer_can_be_gone_on_from():
    whole, end = alone(held("r", "schema", seed=3))
    assert end.finish_reason == "stop" and len(whole) > 8
    for num in range(len(whole)):
        h = harness()
        h.run(held("r", "schema", seed=3, output_ids=whole[:num]))
        assert h.tokens("r") == whole[num:]


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_an_answer_that_nothing_can_follow_ends_with_its_last_token():
    for end_ids in ((END,), ()):
        tokens, end = alone(held("r", "start: /[ab]{3}-/", end_ids=end_ids))
        assert re.fullmatch("[ab]{3}-", text_of(tokens)) and TOKENS[tokens[-1]] == b"-"
        assert isinstance(end, TokenEvent) and end.finish_reason == "stop"


def test_an_end_id_comes_only_when_the_answer_is_whole():
    lengths = set()
    for seed in range(40):
        tokens, end = alone(held("r", "start: /a{2,}/", seed=seed, max_tokens=30))
        text = text_of(tokens)
        assert end.finish_reason == ("stop" if tokens[-1] in (END, OTHER_END) else "length")
        assert set(text) == {"a"} and len(text) >= 2
        lengths.add(len(text))
    assert len(lengths) > 2


def test_without_end_ids_it_goes_on_while_it_can():
    tokens, end = alone(held("r", "start: /a+/", end_ids=(), max_tokens=20))
    assert text_of(tokens) == "a" * 20 and end.finish_reason == "length"


def test_min_tokens_holds_back_end_ids_but_not_the_end_of_the_grammar():
    for seed in range(10):
        tokens, _ = alone(held("r", "start: /a+/", seed=seed, min_tokens=7))
        assert len(text_of(tokens)) >= 7
        tokens, end = alone(held("r", "choice", seed=seed, min_tokens=7))
        assert text_of(tokens) in CHOICES and end.finish_reason == "stop"


def test_a_whole_answer_that_nothing_may_follow_ends_without_a_token():
    """ "no" could become "noa", but the a is not allowed, and neither is an end id."""
    ids = tuple(PIECES.index(piece) for piece in ("no", "x"))
    for seed in range(6):
        tokens, end = alone(held("r", 'start: "no" | "noa"', seed=seed, allowed_token_ids=ids))
        assert text_of(tokens) == "no" and isinstance(end, RequestEnded) and end.finish_reason == "stop"
    tokens, end = alone(held("r", 'start: ""', end_ids=()))
    assert tokens == [] and isinstance(end, RequestEnded) and end.finish_reason == "stop"


def test_allowed_ids_bans_and_the_grammar_all_hold():
    ab, a, b = (PIECES.index(piece) for piece in ("ab", "a", "b"))
    for seed in range(10):
        tokens, _ = alone(
            held("r", "start: /[abc]{8}/", seed=seed, allowed_token_ids=(a, ab, b), bad_words_ids=((b,),))
        )
        assert set(tokens) <= {a, ab} and len(text_of(tokens)) == 8


def test_a_stop_token_ends_where_the_grammar_takes_it_and_where_the_answer_is_whole():
    comma, x = PIECES.index(","), PIECES.index("x")
    tokens, end = alone(held("r", 'start: "a" "," "b"', end_ids=(comma,)))
    assert [TOKENS[t] for t in tokens] == [b"a", b","] and end.finish_reason == "stop", "asked for, complete or not"
    ends = {tuple(alone(held("r", 'start: "a" "b"?', seed=seed, end_ids=(x,)))[0]) for seed in range(20)}
    a, ab = PIECES.index("a"), PIECES.index("ab")
    assert {(a, x), (ab,)} <= ends, "an x is no part of the grammar, but ends a whole answer"


# ---- dead ends ------------------------------------------------------------------------------------------------------

DEAD = 'start: "a" "Q"'  # no token has a Q


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (DEAD, "no token is left|NoExtension"),
        ("start: (((", "Expected token"),
        ('{"no": "grammar"}', "missing field"),
        ("start: nowhere", "unknown name"),
    ],
)
def test_a_grammar_that_cannot_go_on_ends_its_request_alone(grammar, says):
    h = harness()
    others = [held("a", "schema", (1,)), request("b", [2, 3], 9), held("c", "choice", (4,))]
    h.run(*others, held("dead", grammar))
    end = h.events["dead"][-1]
    assert isinstance(end, RequestFailed) and end.code == "grammar_dead_end" and re.search(says, end.message), end
    for r in others:
        assert h.tokens(r.id) == alone(r)[0]
        assert h.events[r.id][-1].finish_reason is not None
    h.assert_empty()


def test_tokens_of_an_earlier_engine_that_the_grammar_does_not_take_are_a_dead_end():
    h = harness()
    h.run(held("r", "choice", output_ids=[PIECES.index("b")]), held("s", "choice", output_ids=[PIECES.index("x")]))
    assert [type(e) for e in h.events["r"]] == [RequestFailed] and h.events["r"][0].code == "grammar_dead_end"
    assert text_of([PIECES.index("x"), *h.tokens("s")]) == "xyz"
    h.assert_empty()


def test_logits_that_are_not_finite_are_no_dead_end():
    h = harness()
    h.run(held("r", "schema", (1, VOCAB)))
    assert h.events["r"][-1].code == "nan_logits"


def test_an_engine_without_matchers_takes_no_grammar():
    h = Harness(make_limits())
    with pytest.raises(InternalError, match="without a source of matchers"):
        h.engine.submit(held("r", "choice"))
    h.run(request("b", [1]))
    h.assert_empty()


def test_a_request_without_a_token_needs_no_grammar():
    h = harness()
    h.run(held("r", "start: (((", max_tokens=0))
    assert [type(e) for e in h.events["r"]] == [RequestEnded] and h.events["r"][0].finish_reason == "length"


# ---- matchers that fail ---------------------------------------------------------------------------------------------


class Wild:
    """A matcher that takes all, but for what it is made to do."""

    is_accepting = is_stopped = False

    def __init__(self, grammar: str):
        self.grammar, self.error, self.num_taken = grammar, "", 0

    def fill(self, mask: np.ndarray) -> None:
        if self.grammar == f"raise {self.num_taken}":
            raise RuntimeError("a defect")
        mask[:] = 0xFFFFFFFF

    def take(self, token_id: int) -> bool:
        self.num_taken += 1
        if self.grammar == f"refuse {self.num_taken}":
            self.error = "refused"
        return not self.error


class WildSource:
    def __init__(self, may_make: threading.Event | None = None):
        self.may_make = may_make

    def make(self, grammar: str) -> Wild:
        if self.may_make is not None:
            assert self.may_make.wait(60)
        if grammar == "explode":
            raise MemoryError("too much")
        return Wild(grammar)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fills_beside", [False, True])
@pytest.mark.parametrize(("grammar", "num_tokens"), [("raise 3", 3), ("refuse 2", 1), ("raise 0", 0)])
def test_a_matcher_that_fails_costs_its_own_request(grammar, num_tokens, fills_beside):
    h = harness(grammars=Grammars(WildSource, fills_beside=fills_beside))
    h.run(held("good", "any", max_tokens=6, end_ids=()), held("bad", grammar, end_ids=()), request("free", [3], 6))
    assert len(h.tokens("bad")) == num_tokens and h.events["bad"][-1].code == "grammar_dead_end"
    assert len(h.tokens("good")) == len(h.tokens("free")) == 6
    assert h.engine.num_step_faults == 0
    h.assert_empty()


def test_a_grammar_that_cannot_be_made_costs_its_own_request():
    def no_source() -> WildSource:
        raise OSError("the file is gone")

    for grammars, says in ((Grammars(WildSource), "too much"), (Grammars(no_source), "the file is gone")):
        h = harness(grammars=grammars)
        h.run(held("bad", "explode"), request("free", [3], 6))
        end = h.events["bad"][-1]
        assert isinstance(end, RequestFailed) and end.code == "internal" and says in end.message
        assert len(h.tokens("free")) == 6


# ---- made beside the steps ------------------------------------------------------------------------------------------


class Waiting:
    """An engine whose grammars are made when the test says so."""

    def __init__(self):
        self.may_make = threading.Event()
        self.futures: list[Future] = []
        self.grammars = Grammars(lambda: WildSource(self.may_make), makes_beside=True, fills_beside=True)
        make = self.grammars.make

        def watched(request):
            self.futures.append(make(request))
            return self.futures[-1]

        self.grammars.make = watched
        self.h = harness(grammars=self.grammars)

    def make_all(self) -> None:
        self.may_make.set()
        for future in self.futures:
            if not future.cancelled():
                future.result(60)


def test_others_go_on_while_a_grammar_is_made():
    w = Waiting()
    h = w.h
    h.engine.submit(held("held", "any", max_tokens=5, end_ids=()))
    assert h.engine.only_makes_grammars and not h.engine.is_stuck
    for _ in range(3 * STUCK_TURNS):
        assert h.step() == []
    assert not h.engine.is_stuck and h.engine.status().num_waiting == 1
    h.engine.submit(request("free", [3], 6))
    assert not h.engine.only_makes_grammars
    while not h.tokens("free")[5:]:
        h.step()
    assert h.tokens("held") == []
    w.make_all()
    h.run()
    assert len(h.tokens("held")) == 5
    h.assert_empty()
    h.engine.close()


def test_who_waits_for_a_grammar_can_be_aborted_and_is_late_in_time():
    w = Waiting()
    h = w.h
    soon = h.clock.now_ns() + 100
    for id_, deadlines in (("first", {}), ("gone", {}), ("late", {"deadline_ns": soon}), ("unbegun", {"queue_deadline_ns": soon})):  # fmt: skip
        h.engine.submit(msgspec.structs.replace(held(id_, "any", max_tokens=3, end_ids=()), **deadlines))
    h.engine.abort("gone")
    h.step()
    assert [type(e) for e in h.events["gone"]] == [RequestAborted] and w.futures[1].cancelled()
    h.clock.advance_ns(200)
    h.step()
    assert [h.events[id_][0].code for id_ in ("late", "unbegun")] == ["deadline_exceeded"] * 2
    w.make_all()
    h.run()
    assert len(h.tokens("first")) == 3 and [len(h.events[id_]) for id_ in ("gone", "late", "unbegun")] == [1, 1, 1]
    h.assert_empty()
    h.engine.close()


def test_the_source_is_built_at_rest_or_at_the_first_grammar():
    built: list[int] = []

    def build() -> WildSource:
        built.append(1)
        return WildSource()

    for is_rested in (True, False):
        built.clear()
        limits = make_limits()
        engine = Engine(tiny_plan(), FakeExecutor(limits), limits, VirtualClock(1), grammars=Grammars(build))
        assert engine.puts_off and not built
        engine.submit(request("free", [3], 6))
        while engine.has_work():
            engine.step()
        assert engine.puts_off and not built, "nobody asked for a grammar"
        if is_rested:
            engine.rest()
            assert not engine.puts_off and built == [1]
        engine.submit(held("held", "any", max_tokens=2, end_ids=()))
        while engine.has_work():
            engine.step()
        assert built == [1] and not engine.puts_off
        engine.close()


def test_an_engine_process_holds_answers_to_grammars_through_deaths(tmp_path):
    names = [*GRAMMARS]
    requests = [held(f"r{i}", names[i % len(names)], (i, 7), 30, seed=i) for i in range(8)]

    async def main():
        client = make_client(tmp_path, step_ms=5)
        await client.start()
        answers = [asyncio.create_task(collect(client.submit(r))) for r in requests]
        for num_kills in (1, 2):
            num_steps = len(client.log.steps) + 4
            await wait_until(lambda: len(client.log.steps) > num_steps)
            os.kill(client.process_id, signal.SIGKILL)
            await wait_until(lambda: client.status().state == "ready" and client.status().num_restarts == num_kills)
        events = await asyncio.gather(*answers)
        assert client.status().num_resumed > 0 and client.status().imbalance == 0
        await client.stop()
        return events

    for r, events in zip(requests, asyncio.run(main()), strict=True):
        tokens, end = alone(r)
        assert [e.token_id for e in events if isinstance(e, TokenEvent)] == tokens
        assert events[-1].finish_reason == end.finish_reason
