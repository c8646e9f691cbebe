"""Frames: what is sent arrives, however it is cut; what is damaged is refused."""

import zlib
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jilju.config import SERVE_OPTIONS
from jilju.engine.client import EngineStatus
from jilju.engine.link import (
    MAX_FRAME_BYTES,
    Abort,
    Beat,
    FrameReader,
    FrameWriter,
    Hello,
    LinkBroken,
    Stepped,
    Submit,
    ToEngine,
    ToServer,
)
from jilju.engine.request import PromptScored
from jilju.plan.batch import MAX_TOP

from .fakes import request

MESSAGES = [Hello(1), Beat(), *(Submit(request(f"r{i}", list(range(i)))) for i in range(5)), Abort("r1"), Beat(7)]


def frames_of(messages=MESSAGES, epoch=3) -> list[bytes]:
    writer = FrameWriter(epoch)
    return [writer.frame(m) for m in messages]


@given(st.lists(st.integers(0, len(b"".join(frames_of())))))
def test_frames_survive_any_cut(cuts):
    data = b"".join(frames_of())
    edges = [0, *sorted(cuts), len(data)]
    reader = FrameReader(ToEngine, 3)
    got = [m for a, b in pairwise(edges) for m in reader.feed(data[a:b])]
    assert got == MESSAGES


@given(st.data())
def test_a_flipped_bit_is_never_taken_for_a_message(data):
    frames = b"".join(frames_of())
    bit = data.draw(st.integers(0, 8 * len(frames) - 1))
    damaged = bytearray(frames)
    damaged[bit // 8] ^= 1 << (bit % 8)
    reader = FrameReader(ToEngine, 3)
    got = []
    try:
        for i in range(len(damaged)):
            got += reader.feed(bytes(damaged[i : i + 1]))
    except LinkBroken:
        pass
    assert got == MESSAGES[: len(got)] and len(got) < len(MESSAGES)


def test_order_loss_and_doubles_are_seen():
    first, second, third, *_ = frames_of()
    for stream in (second, first + third, first + first, first + third + second):
        with pytest.raises(LinkBroken, match="was next"):
            FrameReader(ToEngine, 3).feed(stream)


def test_a_truncated_frame_yields_nothing():
    (frame,) = frames_of([Abort("x")])
    assert FrameReader(ToEngine, 3).feed(frame[:-1]) == []


def test_a_foreign_epoch_is_refused_and_the_first_is_adopted():
    frames = frames_of(epoch=4)
    with pytest.raises(LinkBroken, match="epoch 4"):
        FrameReader(ToEngine, 3).feed(frames[0])
    reader = FrameReader(ToEngine)
    assert reader.feed(frames[0]) == [MESSAGES[0]] and reader.epoch == 4
    with pytest.raises(LinkBroken, match="epoch 3"):
        reader.feed(frames_of(epoch=3)[1])


def test_length_and_type_are_bounded():
    with pytest.raises(LinkBroken, match=str(MAX_FRAME_BYTES)):
        FrameReader(ToEngine, 3).feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little") + bytes(4))
    with pytest.raises(LinkBroken, match="not a message of this direction"):
        FrameReader(ToServer, 3).feed(frames_of()[0])
    with pytest.raises(LinkBroken, match="not a message"):
        body = msgspec.msgpack.encode([3, 0])
        FrameReader(ToEngine, 3).feed(len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body)


def test_scores_of_the_largest_step_fit_a_frame():
    """They come in pieces of a step, and of those the command line allows no larger ones."""
    most = next(option.high for option in SERVE_OPTIONS if option.name == "step_tokens")
    top = [(2**31 - 1, -123.456)] * MAX_TOP
    scored = PromptScored(request_id="r" * 64, start=2**31 - 1, logprobs=[-123.456] * most, tops=[top] * most)
    status = EngineStatus(
        state="ready", num_running=1, num_waiting=0, num_blocks_free=1, num_blocks_cached=2, num_blocks_held=3,
        last_step_age_s=0, num_restarts=0, imbalance=0,
    )  # fmt: skip
    message = Stepped([scored], [], status, [], 0)
    frame = FrameWriter(1).frame(message)
    assert len(frame) < MAX_FRAME_BYTES / 4
    assert FrameReader(ToServer, 1).feed(frame) == [message]
