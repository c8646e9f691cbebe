"""Why the prefix cache had no more of a prompt: the engine's explanations against an oracle that knows the texts alone.

Histories of prompts are made up and run through a real engine: families with common beginnings, texts that part at every
offset of a block, texts that go on where another ended, the same under other salts, small pools that evict, requests that are
preempted or aborted. The oracle keeps plain lists of tokens and which of them were computed. It does not know hashes,
blocks that are free or who evicts what; how many blocks were found it takes from the engine, whose tokens other tests check.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from jilju.clock import VirtualClock
from jilju.engine.events import StepRecord, iter_rows
from jilju.engine.known_texts import KnownTexts
from jilju.engine.loop import Engine
from jilju.engine.request import CacheMiss, Request, TokenEvent, is_terminal

from .fakes import VOCAB, FakeExecutor, make_limits, request, tiny_plan

PLAN = tiny_plan()
BLOCK = 4
HISTORIES = 120
PER_HISTORY = 40
SEEN: Counter[str] = Counter()


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

    def submit(self, tenant: str, salt: bytes, prompt: list[int], max_tokens: int) -> int:
        number = len(self.texts) + 1
        asked = request(str(number), prompt, max_tokens, seed=self.rng.randrange(1 << 20), salt=salt)
        asked = msgspec.structs.replace(asked, tenant=tenant, number=number)
        self.texts[number], self.asked[number] = Text(tenant, salt, list(prompt)), asked
        self.engine.submit(asked)
        return number

    def step(self) -> None:
        before = [replace(text, tokens=list(text.tokens)) for text in self.texts.values()]
        events = self.engine.step()
        for number, num_hits in self.begun:
            self.right[number] = right_answers(before, self.asked[number], num_hits)
        self.begun.clear()
        for event in events:
            number = int(event.request_id)
            if isinstance(event, TokenEvent):
                self.texts[number].tokens.append(event.token_id)
            if is_terminal(event) and event.times.miss is not None:
                self.told[number] = event.times.miss
                self.num_preempted += event.times.num_preemptions > 0
        self.engine.scheduler.check()

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
                SEEN[self.told[number].reason] += 1
                assert self.told[number] in right, (
                    f"request {number} of {self.asked[number].tenant}: told {self.told[number]}, right is {right};"
                    f" prompt {self.asked[number].prompt_ids}"
                )


def new_prompt(history: History, rng: random.Random) -> list[int]:
    """Mostly something near to an earlier text; the alphabet is small, so that texts meet by themselves too."""
    earlier = [text.tokens for text in history.texts.values()]
    kind = rng.randrange(6) if earlier else 5
    if kind == 5:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(1, 22))]
    base = rng.choice(earlier[-12:])
    if kind == 0:  # the same again
        return list(base)
    if kind == 1:  # it goes on, as a chat does
        return [*base, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9)))]
    cut = rng.randint(0, len(base))  # it parts at some place of some block, or ends there
    if kind == 2:
        return base[: max(1, cut)]
    return [*base[:cut], rng.randrange(VOCAB), *(rng.randrange(VOCAB) for _ in range(rng.randint(0, 9)))]


def make_history(seed: int) -> History:
    rng = random.Random(seed)
    history = History(rng.choice((14, 20, 400)), rng)
    shares_salts = seed % 3 == 0  # as keys do that share the cache
    for _ in range(PER_HISTORY):
        tenant = rng.choice(("ann", "bob"))
        salt = rng.choice((b"", b"", b"s1", b"s2")) + (b"" if shares_salts else tenant.encode())
        prompt = new_prompt(history, rng)[:40]
        history.submit(tenant, salt, prompt, rng.randint(1, 10))
        for _ in range(rng.choice((0, 1, 1, 3, 8))):
            history.step()
        if rng.random() < 0.15:
            history.abort_some()
        if rng.random() < 0.2:
            history.run()
    history.run()
    return history


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_every_explanation_is_right(seed):
    history = make_history(seed)
    assert len(history.told) >= PER_HISTORY * 0.8
    history.check()
