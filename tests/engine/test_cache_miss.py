"""Why the prefix cache had no more of a prompt: the engine's explanations against an oracle that knows the texts alone.

Histories of prompts are made up and run through a real engine: families with common beginnings, texts that part at every
offset of a block, texts that go on where another ended, the same under other salts, small pools that evict, requests that are
preempted or aborted. The oracle keeps plain lists of tokens and which of them were computed. It does not know hashes,
blocks that are free or who evicts what; how many blocks were found it takes from the engine, whose tokens other tests check.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.clock import VirtualClock
from jilju.engine.events import StepRecord, iter_rows
from jilju.engine.known_texts import KnownTexts
from jilju.engine.loop import Engine
from jilju.engine.request import CacheMiss, MissReason, Request, TokenEvent, is_terminal

from .fakes import VOCAB, FakeExecutor, make_limits, request, tiny_plan

PLAN = tiny_plan()
BLOCK = 4
PER_HISTORY = 40
MAX_PROMPT = 40


@dataclass
class Text:
    """A request as the oracle knows it: all its tokens, and how many of them were ever computed."""

    tenant: str
    salt: bytes
    tokens: list[int]
    num_computed: int = 0

    @property
    def computed(self) -> list[int]:
        return self.tokens[: self.num_computed]


def num_common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def right_answers(texts: list[Text], asked: Request, num_hits: int) -> list[CacheMiss]:
    """What may be said; several, where several earlier texts are equally close."""
    prompt, position = asked.prompt_ids, num_hits * BLOCK
    usable = prompt[: len(prompt) - 1]  # the newest token is always computed
    if position >= len(usable):
        return [CacheMiss(reason="none")]
    rest = usable[position : position + BLOCK]
    own = [t.computed for t in texts if t.tenant == asked.tenant and t.salt == asked.salt]
    followers = [t[position : position + BLOCK] for t in own if t[:position] == prompt[:position] and len(t) > position]
    if len(rest) == BLOCK and rest in followers:
        return [CacheMiss(reason="evicted", position=position)]
    others = [t.computed[:BLOCK] for t in texts if t.tenant == asked.tenant and t.salt != asked.salt]
    if len(rest) == BLOCK and position == 0 and rest in others:
        return [CacheMiss(reason="salt", position=0)]
    best = max((num_common(follower, rest) for follower in followers), default=-1)
    if best < 0 or (position == 0 and best == 0):
        return [CacheMiss(reason="never_seen", position=position)]
    answers = []
    for follower in followers:
        if num_common(follower, rest) == best:
            if best in (len(follower), len(rest)):
                answers.append(CacheMiss(reason="block_tail", position=position))
            else:
                miss = CacheMiss(reason="diverged", position=position + best, earlier_id=follower[best])
                answers.append(miss)
    return answers


@dataclass
class History:
    """An engine, and beside it the texts that it was given."""

    num_blocks: int
    rng: random.Random
    texts: dict[int, Text] = field(default_factory=dict)  # by number
    asked: dict[int, Request] = field(default_factory=dict)
    right: dict[int, list[CacheMiss]] = field(default_factory=dict)
    told: dict[int, CacheMiss] = field(default_factory=dict)
    num_preempted: int = 0
    num_aborted: int = 0
    begun: list[tuple[int, int]] = field(default_factory=list)  # in this step: number, and blocks that were found
    num_hits: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = VirtualClock(1)
        limits = make_limits(self.num_blocks, BLOCK, max_rows=4, max_tokens=24)
        executor = FakeExecutor(limits, before_step=lambda: self.clock.advance_ns(1000))
        self.engine = Engine(PLAN, executor, limits, self.clock)
        self.engine.log.listen(self._on_step)

    def submit(self, tenant: str, salt: bytes, prompt: list[int], max_tokens: int, sibling_of: str = "") -> int:
        number = len(self.texts) + 1
        asked = request(str(number), prompt, max_tokens, seed=self.rng.randrange(1 << 20), salt=salt)
        asked = msgspec.structs.replace(asked, tenant=tenant, number=number, sibling_of=sibling_of)
        self.texts[number], self.asked[number] = Text(tenant, salt, list(prompt)), asked
        self.engine.submit(asked)
        return number

    def step(self) -> None:
        before = {number: replace(text, tokens=list(text.tokens)) for number, text in self.texts.items()}
        events = self.engine.step()
        for (
            number,
            num_hits,
        ) in self.begun:  # in the order in which they were let in; what one has found it has from then on
            self.right[number] = right_answers(list(before.values()), self.asked[number], num_hits)
            before[number].num_computed = num_hits * BLOCK
        self.begun.clear()
        for event in events:
            number = int(event.request_id)
            if isinstance(event, TokenEvent):
                self.texts[number].tokens.append(event.token_id)
            if is_terminal(event) and event.times.miss is not None:
                self.told[number] = event.times.miss
                self.num_preempted += event.times.num_preemptions > 0
        self.engine.scheduler.check()
        assert not self.engine.log.num_failures

    def _on_step(self, record: StepRecord) -> None:
        for number, start, count, _ in iter_rows(record.rows):
            if number not in self.num_hits:
                self.num_hits[number] = start // BLOCK
                self.begun.append((number, start // BLOCK))
            text = self.texts[number]
            text.num_computed = max(text.num_computed, start + count)

    def run(self) -> None:
        while self.engine.has_work():
            self.step()

    def abort_some(self) -> None:
        live = [number for number in self.texts if number not in self.told and number in self.num_hits]
        if live:
            self.num_aborted += 1
            self.engine.abort(str(self.rng.choice(live)))

    def check(self) -> None:
        for number, right in self.right.items():
            if number in self.told:
                assert self.told[number] in right, (
                    f"request {number} of {self.asked[number].tenant}: told {self.told[number]}, right is {right};"
                    f" prompt {self.asked[number].prompt_ids}"
                )


def new_prompt(history: History, rng: random.Random) -> list[int]:
    """Mostly something near to an earlier text."""
    earlier = [text.tokens for text in history.texts.values()][-12:]
    kind = rng.choice(("new", "same", "longer", "shorter", "parted", "parted")) if earlier else "new"
    base = rng.choice(earlier) if earlier else []
    cut = rng.randint(0, len(base))
    more = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
    if kind == "new":
        return [rng.randrange(VOCAB) for _ in range(rng.randint(1, 22))]
    if kind == "same":
        return base[:MAX_PROMPT]
    if kind == "longer":  # it goes on where an answer ended, as a chat does
        return [*base, *more][:MAX_PROMPT]
    if kind == "shorter":
        return base[: max(1, cut)][:MAX_PROMPT]
    return [*base[:cut], *more][:MAX_PROMPT]


def make_history(seed: int, *, shares_salts: bool) -> History:
    rng = random.Random(seed)
    history = History(rng.choice((14, 20, 400)), rng)
    for _ in range(PER_HISTORY):
        tenant = rng.choice(("ann", "bob"))
        salt = rng.choice((b"", b"", b"s1", b"s2")) + (b"" if shares_salts else tenant.encode())
        first = history.submit(tenant, salt, new_prompt(history, rng), rng.randint(1, 10))
        if rng.random() < 0.1:
            history.submit(tenant, salt, history.asked[first].prompt_ids, rng.randint(1, 10), sibling_of=str(first))
        for _ in range(rng.choice((0, 1, 1, 3, 8))):
            history.step()
        if rng.random() < 0.15:
            history.abort_some()
        if rng.random() < 0.2:
            history.run()
    history.run()
    return history


@pytest.mark.parametrize("shares_salts", [False, True], ids=["a salt a key", "keys that share"])
@pytest.mark.parametrize("seed", range(40))
def test_every_explanation_is_right(seed, shares_salts):
    """2 x 40 histories of 40 requests and more: some 3,300 explanations."""
    history = make_history(seed, shares_salts=shares_salts)
    assert len(history.told) >= PER_HISTORY * 0.9
    history.check()


def test_the_histories_have_it_all():
    histories = [make_history(seed, shares_salts=False) for seed in range(20)]
    told = [miss for history in histories for miss in history.told.values()]
    reasons = Counter(miss.reason for miss in told)
    assert set(reasons) == set(get_args(MissReason)) and min(reasons.values()) >= 20, reasons
    offsets = Counter(miss.position % BLOCK for miss in told if miss.reason == "diverged")
    assert set(offsets) == set(range(BLOCK)), offsets
    assert sum(history.num_preempted for history in histories) >= 10
    assert sum(history.num_aborted for history in histories) >= 10


# ---- one by one ---------------------------------------------------------------------------------------------------------

LONG = list(range(1, 13))  # three blocks


def told_of(history: History, number: int) -> CacheMiss:
    history.run()
    return history.told[number]


def test_nobody_is_told_of_the_texts_of_another_key():
    """Both share the cache: ann's blocks are found, what ann wrote after them is not told."""
    history = History(64, random.Random(0))
    history.submit("ann", b"shared", [*LONG, 20, 21, 22, 23], 1)
    history.run()
    parted = history.submit("bob", b"shared", [*LONG, 20, 30, 31, 32, 33], 1)
    assert told_of(history, parted) == CacheMiss(reason="never_seen", position=12)
    assert history.num_hits[parted] == 3
    again = history.submit("bob", b"shared", [*LONG, 20, 30, 31, 35, 33], 1)  # his own text now
    assert told_of(history, again) == CacheMiss(reason="diverged", position=15, earlier_id=32)
    other_salt = history.submit("bob", b"own", [20, 21, 22, 23, 24], 1)
    assert told_of(history, other_salt) == CacheMiss(reason="never_seen", position=0)
    of_ann = history.submit("bob", b"own", [*LONG, 1], 1)  # hers and his are under the shared salt
    assert told_of(history, of_ann).reason == "salt"
    of_ann = history.submit("cat", b"other", [*LONG, 1], 1)  # she never had it
    assert told_of(history, of_ann).reason == "never_seen"


def test_what_was_found_in_a_shared_cache_is_known_after_it_was_evicted():
    history = History(8, random.Random(0))
    history.submit("ann", b"shared", [*LONG, 1], 1)
    history.run()
    found = history.submit("bob", b"shared", [*LONG, 2], 1)
    told_of(history, found)
    assert history.num_hits[found] == 3
    history.submit("eve", b"", [30 + i % 9 for i in range(31)], 1)  # takes all blocks
    history.run()
    for tenant, reason in (("bob", "evicted"), ("ann", "evicted"), ("cat", "never_seen")):
        number = history.submit(tenant, b"shared", [*LONG, 3], 1)
        assert told_of(history, number) == CacheMiss(reason=reason, position=0), tenant
        history.submit("eve", b"", [30 + i % 8 for i in range(31)], 1)
        history.run()


def test_a_sequence_that_goes_on_has_a_tail():
    history = History(64, random.Random(0))
    history.submit("ann", b"", LONG[:6], 9)
    history.step()
    number = history.submit("ann", b"", [*LONG[:5], 20, 21, 22, 23], 1)
    assert told_of(history, number) == CacheMiss(reason="diverged", position=5, earlier_id=6)


class TestKnownTexts:
    """Texts of two tokens fill a block here."""

    @staticmethod
    def text(*tokens: int) -> bytes:
        return np.array(tokens, np.int32).tobytes()

    def ask(self, known: KnownTexts, parent: bytes, *tokens: int, tenant: str = "ann") -> str:
        is_first = parent.startswith(b"salt")
        miss = known.explain(parent, self.text(*tokens), 0, tenant, is_whole=len(tokens) == 2, is_first=is_first)
        return miss.reason

    def test_what_has_left_is_forgotten_in_its_order(self):
        known = KnownTexts(max_gone=2)
        for token in range(4):
            known.note(b"parent", self.text(token, 9), "ann", is_first=False)
        assert len(known) == 2
        assert [self.ask(known, b"parent", token, 9) for token in range(4)] == [
            "diverged",
            "diverged",
            "evicted",
            "evicted",
        ]

    def test_what_is_held_is_not_forgotten(self):
        known = KnownTexts(max_gone=1)
        for token in range(4):
            known.hold(b"parent", self.text(token, 9), "ann", is_first=False)
        assert len(known) == 4
        for token in range(3):
            known.note(b"parent", self.text(token, 9), "ann", is_first=False, has_left=True)
        assert len(known) == 2
        assert [self.ask(known, b"parent", token, 9) for token in (0, 2, 3)] == ["diverged", "evicted", "evicted"]

    def test_a_salt_is_known_as_long_as_the_text_is_under_another(self):
        known = KnownTexts(max_gone=2)
        for salt in (b"salt1", b"salt2"):
            known.note(salt, self.text(1, 2), "ann", is_first=True)
        assert self.ask(known, b"salt3", 1, 2) == "salt"
        known.note(b"parent", self.text(5, 5), "ann", is_first=False)  # the oldest goes
        assert self.ask(known, b"salt1", 1, 2) == "salt" and self.ask(known, b"salt2", 1, 2) == "evicted"
        known.note(b"parent", self.text(6, 6), "ann", is_first=False)
        assert self.ask(known, b"salt3", 1, 2) == "never_seen"

    def test_tenants_are_apart(self):
        known = KnownTexts()
        known.hold(b"salt1", self.text(1, 2), "ann", is_first=True)
        for parent in (b"salt1", b"salt2"):
            for tokens in ((1, 2), (1, 3), (1,)):
                assert self.ask(known, parent, *tokens, tenant="bob") == "never_seen"

    @given(
        st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=4), max_size=12),
        st.lists(st.integers(-1, 3), min_size=1, max_size=4),
    )
    def test_the_nearest_is_found_among_many(self, texts, wanted):
        known = KnownTexts()
        for text in texts:
            known.note(b"parent", self.text(*text), "ann", is_first=False)
        best = max((num_common(text, wanted) for text in texts), default=-1)
        miss = known.explain(b"parent", self.text(*wanted), 0, "ann", is_whole=False, is_first=False)
        if miss.reason == "diverged":
            assert miss.position == best < len(wanted)
            assert [*wanted[:best], miss.earlier_id] in [text[: best + 1] for text in texts]
        else:
            ends = best == len(wanted) or any(text == wanted[:best] for text in texts)
            assert miss.reason == ("never_seen" if not texts else "block_tail") and (not texts or ends)
