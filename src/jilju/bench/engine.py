"""Engine: what of a step's time the engine's own Python takes, in its own process, with rows that decode side by side.

Owns the method: rows are submitted together, and of the steps in which all of them decode the records say when the backend ran; all
else, to the begin of the next step, is the engine's: deciding, packing, committing, and the link to this process. Knows nothing of
backends.
"""

import asyncio
import statistics
from itertools import pairwise

import msgspec

from jilju.engine.client import EngineClient
from jilju.engine.events import StepRecord
from jilju.engine.request import Request, RequestFailed, SamplingParams
from jilju.errors import StartupError

PROMPT_TOKENS = 32


class EngineShare(msgspec.Struct, frozen=True, kw_only=True):
    """Means over steps, in microseconds; the parts and the backend sum to the step."""

    model: str
    rows: int
    num_steps: int
    step_us: float
    schedule_us: float
    pack_us: float
    backend_us: float
    commit_us: float
    link_us: float  # from the end of a step to the begin of the next
    share: float  # of all but the backend
    others_share: float


async def run_rows(
    client: EngineClient, vocab_size: int, rows: int, num_output: int, run_id: str, penalties: bool = False
) -> list[StepRecord]:
    """The records of a run in which `rows` requests are answered at once. Raises StartupError if one fails."""
    records: list[StepRecord] = []
    client.log.listen(records.append)

    async def one(index: int) -> None:
        ids = [(7919 * index + 31 * place) % vocab_size for place in range(PROMPT_TOKENS)]  # no two rows alike
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=num_output)
        if penalties:
            params = msgspec.structs.replace(
                params, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
            )
        async for event in client.submit(Request(id=f"{run_id}-{index}", prompt_ids=ids, params=params)):
            if isinstance(event, RequestFailed):
                raise StartupError(f"a request of the benchmark failed: {event.message}")

    await asyncio.gather(*(one(index) for index in range(rows)))
    return records


def share_of(model: str, rows: int, records: list[StepRecord], others_share: float) -> EngineShare:
    """Of pairs of steps, one right after the other, in which every row decodes."""
    full = [
        (record, after)
        for record, after in pairwise(records)
        if record.num_decode_tokens == after.num_decode_tokens == rows
        and not record.num_prefill_tokens + after.num_prefill_tokens
        and after.step_id == record.step_id + 1
    ]
    if not full:
        raise StartupError(f"no two steps in a row decoded {rows} rows; give more output tokens, or fewer rows")

    def mean(ns: list[int]) -> float:
        return statistics.fmean(ns) / 1e3

    step, backend = mean([b.begin_ns - a.begin_ns for a, b in full]), mean([a.done_ns - a.packed_ns for a, _ in full])
    return EngineShare(
        model=model,
        rows=rows,
        num_steps=len(full),
        step_us=step,
        schedule_us=mean([a.scheduled_ns - a.begin_ns for a, _ in full]),
        pack_us=mean([a.packed_ns - a.scheduled_ns for a, _ in full]),
        backend_us=backend,
        commit_us=mean([a.end_ns - a.done_ns for a, _ in full]),
        link_us=mean([b.begin_ns - a.end_ns for a, b in full]),
        share=1 - backend / step,
        others_share=others_share,
    )
