"""Blocks and the prefix cache against a model that is a plain dictionary of contents."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from jilju.engine.blocks import BlockPool
from jilju.engine.prefix import PrefixIndex
from jilju.engine.sequence import Sequence

from .fakes import request

BLOCK_SIZE = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # two tokens only: prefixes are shared all the time


def make_sequence(tokens: list[int], salt: bytes = b"") -> Sequence:
    return Sequence(0, request("s", tokens, salt=salt), 0)


class BlocksMachine(RuleBasedStateMachine):
    """Sequences hold what they matched and took; the model says what each block holds."""

    held = Bundle("held")

    @initialize(num_blocks=st.integers(5, 12), weak=st.booleans())
    def start(self, num_blocks: int, weak: bool):
        # A weak digest makes contents collide: then hits may be missed, but never wrong.
        digest = (lambda data: bytes([sum(data) % 3 + len(data) % 5])) if weak else None
        self.index = PrefixIndex(BLOCK_SIZE, digest=digest)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, self.index)
        self.content: dict[int, tuple] = {}  # block -> salt and all tokens up to its end
        self.sequences: list[Sequence] = []

    @rule(target=held, tokens=TOKENS, salt=st.sampled_from([b"", b"x"]))
    def admit(self, tokens: list[int], salt: bytes):
        sequence = make_sequence(tokens, salt)
        hits = self.index.match(sequence, len(tokens) - 1)
        assert len(hits) * BLOCK_SIZE < len(tokens)
        for i, block_id in enumerate(hits):
            assert self.content[block_id] == (salt, *tokens[: (i + 1) * BLOCK_SIZE])
        num_new = self.pool.blocks_for(len(tokens)) - len(hits)
        if num_new + sum(self.pool.is_cached(b) for b in hits) > self.pool.num_available:
            return None
        for block_id in hits:
            self.pool.share(block_id)
        sequence.block_ids = hits + [self.pool.take() for _ in range(num_new)]
        for i in range(len(hits), len(sequence.block_ids)):
            self.content[sequence.block_ids[i]] = (salt, *tokens[: (i + 1) * BLOCK_SIZE])
        for i in range(len(hits), len(tokens) // BLOCK_SIZE):
            self.index.add(sequence, i)
        self.sequences.append(sequence)
        return sequence

    @rule(sequence=consumes(held), is_trusted=st.booleans())
    def end(self, sequence: Sequence | None, is_trusted: bool):
        if sequence is None:
            return
        self.sequences.remove(sequence)
        (self.pool.release if is_trusted else self.pool.discard)(sequence.block_ids)
        if not is_trusted:
            assert not any(block_id in self.index for block_id in sequence.block_ids)

    @invariant()
    def everything_adds_up(self):
        if hasattr(self, "pool"):
            self.pool.check([s.block_ids for s in self.sequences])

    def teardown(self):
        if hasattr(self, "pool"):
            for sequence in self.sequences:
                self.pool.release(sequence.block_ids)
            self.pool.check([])
            assert self.pool.num_available == self.pool.num_blocks


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_misuse_is_caught():
    index = PrefixIndex(BLOCK_SIZE)
    pool = BlockPool(2, BLOCK_SIZE, index)
    block_id = pool.take()
    with pytest.raises(AssertionError, match="not in the prefix index"):
        pool.share(block_id)
    pool.release([block_id])
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release([block_id])
    pool.take(), pool.take()
    with pytest.raises(AssertionError, match="2 of 2 are held"):
        pool.take()


def test_tails_are_evicted_before_what_they_continue():
    index = PrefixIndex(BLOCK_SIZE)
    pool = BlockPool(3, BLOCK_SIZE, index)
    sequence = make_sequence([1, 2, 3, 4, 5, 6])
    sequence.block_ids = [pool.take() for _ in range(3)]
    for i in range(3):
        index.add(sequence, i)
    head, middle, tail = sequence.block_ids
    pool.release(sequence.block_ids)
    assert [pool.take() for _ in range(3)] == [tail, middle, head]


def test_the_hash_key_and_the_salt_enter_the_hash():
    keys = set()
    for hash_key, salt in ((b"", b""), (b"secret", b""), (b"", b"a")):
        index = PrefixIndex(BLOCK_SIZE, hash_key)
        sequence = make_sequence([1, 2, 3], salt)
        index.match(sequence, 2)
        keys.add(sequence.block_keys[0])
    assert len(keys) == 3
