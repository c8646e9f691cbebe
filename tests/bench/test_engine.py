"""The engine's own share of a step, from records that are known and from a real engine; and the busy neighbour."""

import asyncio
import time

import pytest

from jilju.assemble.engine import EngineOptions, build_engine
from jilju.bench.contention import Neighbour
from jilju.bench.engine import PROMPT_TOKENS, run_rows, share_of
from jilju.bench.guard import process_cpu_s
from jilju.engine.events import StepRecord
from jilju.engine.inprocess import InProcessClient
from jilju.errors import StartupError
from tests.bench.test_quality import GOLDEN


def record(step_id: int, begin: int, num_decode: int, num_prefill: int = 0) -> StepRecord:
    """Of 1000 ns: 10 to decide, 20 to pack, 900 in the backend, 40 to commit; then 30 until the next begins."""
    zeros = dict.fromkeys(
        set(StepRecord.__struct_fields__)
        - {
            "step_id",
            "begin_ns",
            "scheduled_ns",
            "packed_ns",
            "done_ns",
            "end_ns",
            "num_prefill_tokens",
            "num_decode_tokens",
        },
        0,
    )
    return StepRecord(
        step_id=step_id, begin_ns=begin, scheduled_ns=begin + 10, packed_ns=begin + 30, done_ns=begin + 930, end_ns=begin + 970,
        num_prefill_tokens=num_prefill, num_decode_tokens=num_decode, **zeros,
    )  # fmt: skip


def test_the_share_is_all_but_the_backend_to_the_begin_of_the_next_step():
    records = [record(1, 0, 0, 64), record(2, 5000, 4), record(3, 6000, 4), record(4, 7000, 4), record(5, 9000, 3)]
    share = share_of("m", 4, records, 0.01)
    assert share.num_steps == 2, "pairs of steps that decode all rows"
    parts = (share.schedule_us, share.pack_us, share.backend_us, share.commit_us, share.link_us)
    assert parts == pytest.approx((0.01, 0.02, 0.9, 0.04, 0.03)) and sum(parts) == pytest.approx(share.step_us)
    assert share.share == pytest.approx(0.1)


def test_steps_that_never_hold_all_rows_are_an_error():
    with pytest.raises(StartupError, match="decoded 4 rows"):
        share_of("m", 4, [record(1, 0, 3), record(2, 1000, 3)], 0.0)


def test_rows_of_a_real_engine_decode_side_by_side():
    options = EngineOptions(
        path=str(GOLDEN / "llama-tied.gguf"), num_blocks=32, max_context=64, max_rows=4, step_tokens=256, num_threads=1,
        backend="reference",
    )  # fmt: skip

    async def run():
        client = InProcessClient(build_engine(options))
        await client.start()
        try:
            return await run_rows(client, 300, 3, 10, "run")
        finally:
            await client.stop()

    share = share_of("tiny", 3, asyncio.run(run()), 0.0)
    assert share.num_steps >= 5 and 0 < share.share < 1
    assert PROMPT_TOKENS + 10 <= 64


def test_the_neighbour_works_only_beside_a_run():
    neighbour = Neighbour()
    try:
        before = process_cpu_s(neighbour.pid)
        assert neighbour.beside(lambda: time.sleep(0.3) or 7.0) == 7.0
        worked = process_cpu_s(neighbour.pid) - before
        assert neighbour.shares and worked > 0
        time.sleep(0.05)  # a signal takes its time
        stopped = process_cpu_s(neighbour.pid)
        time.sleep(0.1)
        assert process_cpu_s(neighbour.pid) == stopped
    finally:
        neighbour.close()
