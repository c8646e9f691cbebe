"""A long prompt beside streams: how long they wait for their tokens while `jilju serve` computes it.

Some streams run, then a prompt of thousands of tokens comes; several times, with other prompts. Two things are looked at in its time: what
the engine's records say of its steps (predicted, allowed, measured), and the gaps that the streams' client sees, each beside the bound
of the step that made its token. A turn during which other processes took more than --max-others of the cores is repeated.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import msgspec
from client import Answer, Exchange, completion, percentile, random_ids, send
from plot import Series, plot
from rich.console import Console
from server import Server, read_records, serving

from jilju.bench.bars import LongPromptFigures
from jilju.bench.guard import Guard
from jilju.bench.report import table_of
from jilju.engine.events import StepRecord

CONTEXT = 8192
BEFORE_TOKENS = 16  # that every stream has before the prompt comes


class Turn(NamedTuple):
    """One arrival of the prompt."""

    prompt: Answer
    streams: list[Answer]


class Gap(NamedTuple):
    at: float  # of the token at its end
    gap_s: float
    bound_s: float


async def turn(server: Server, num_streams: int, num_prompt: int, rng: random.Random) -> Turn:
    streams = [await send(server.port, completion(random_ids(rng, 64), CONTEXT - 64)) for _ in range(num_streams)]
    for stream in streams:
        await has_tokens(stream, BEFORE_TOKENS)
    prompt = await send(server.port, completion(random_ids(rng, num_prompt), 1))
    answer = await prompt.ended
    for stream in streams:
        stream.cancel()
        await stream.ended
    return Turn(answer, [stream.answer for stream in streams])


async def has_tokens(stream: Exchange, count: int) -> None:
    while len(stream.answer.token_times) < count and not stream.ended.done():
        await stream.wait(60.0)


def steps_of(turn: Turn, records: list[StepRecord]) -> list[StepRecord]:
    """Those that began and ended in the prompt's time, and computed some of it."""
    begin_ns, end_ns = turn.prompt.start * 1e9, turn.prompt.token_times[0] * 1e9
    return [r for r in records if begin_ns < r.begin_ns and r.end_ns < end_ns and r.num_prefill_tokens]


def gaps_of(turn: Turn, steps: list[StepRecord], token_gap_s: float) -> list[Gap]:
    """Of the tokens that came in the prompt's time, and the bound of the step that made each: the last that had ended."""
    ends = [step.end_ns / 1e9 for step in steps]
    gaps = []
    for stream in turn.streams:
        for at, gap_s in zip(stream.token_times[1:], stream.gaps_s, strict=True):
            index = bisect_right(ends, at) - 1
            if index >= 0 and at < turn.prompt.token_times[0] + token_gap_s:
                gaps.append(Gap(at, gap_s, max(token_gap_s, steps[index].bound_ns / 1e9)))
    return gaps


def chart_of(turn: Turn, gaps: list[Gap], steps: list[StepRecord], title: str) -> str:
    begin = turn.prompt.start
    in_order = sorted(gaps)
    return plot(
        title,
        "each dot a token of one of the streams, from the prompt's arrival to its first token",
        ("s", "ms"),
        [
            Series("gap before a token", [(gap.at - begin, 1e3 * gap.gap_s) for gap in in_order], is_line=False),
            Series("bound of its step", [(gap.at - begin, 1e3 * gap.bound_s) for gap in in_order], is_line=True),
            Series("predicted time of the step", [(s.end_ns / 1e9 - begin, s.predicted_ns / 1e6) for s in steps], is_line=True),
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=6000, help="tokens")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--gap", type=int, default=100, help="--token-gap-ms of the server")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-others", type=float, default=3.0, help="percent of the cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--chart", type=Path, help="write the gaps of the median turn to this SVG file")
    arguments = parser.parse_args()
    flags = ("--context", str(CONTEXT), "--kv-memory", "1GiB", "--token-gap-ms", str(arguments.gap))
    rng, gap_s, guard = random.Random(1), arguments.gap / 1e3, Guard(arguments.max_others / 100)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        with serving(arguments.model, *flags, records=file) as server:
            guarded = [
                guard.run(lambda: asyncio.run(turn(server, arguments.streams, arguments.prompt, rng)), server.pids)
                for _ in range(arguments.turns)
            ]
        records = read_records(file)
    turns = [each.value for each in guarded]
    steps = [steps_of(turn, records) for turn in turns]
    gaps = [gaps_of(turn, found, gap_s) for turn, found in zip(turns, steps, strict=True)]
    all_steps, all_gaps = [step for found in steps for step in found], [gap for found in gaps for gap in found]
    took = [(step.end_ns - step.begin_ns) / step.predicted_ns for step in all_steps]
    shares = [gap.gap_s / gap.bound_s for gap in all_gaps]
    firsts = [turn.prompt.first_token_s for turn in turns]
    figures = LongPromptFigures(
        model=arguments.model,
        num_prompt=arguments.prompt,
        num_streams=arguments.streams,
        token_gap_ms=arguments.gap,
        first_token_s=statistics.median(firsts),
        num_steps=len(all_steps),
        num_over_bound=sum(step.predicted_ns > step.bound_ns for step in all_steps if step.bound_ns),
        step_share_p50=percentile(took, 50),
        step_share_p99=percentile(took, 99),
        num_gaps=len(all_gaps),
        gap_p50_ms=1e3 * percentile([gap.gap_s for gap in all_gaps], 50),
        gap_p99_ms=1e3 * percentile([gap.gap_s for gap in all_gaps], 99),
        gap_share_p50=percentile(shares, 50),
        gap_share_p99=percentile(shares, 99),
        gap_share_max=max(shares),
        others_share=max(each.others_share for each in guarded),
    )
    title = f"{arguments.model}, {arguments.prompt} tokens beside {arguments.streams} streams, bound {arguments.gap} ms"
    table = table_of(title, ["turn", "first token", "steps", "gap p50", "p99", "of its bound p50", "p99", "step's time of predicted p50", "p99", "others"])  # fmt: skip
    for number, (each, found, seen) in enumerate(zip(guarded, steps, gaps, strict=True), 1):
        taken = [(step.end_ns - step.begin_ns) / step.predicted_ns for step in found]
        of_bound = [gap.gap_s / gap.bound_s for gap in seen]
        table.add_row(
            str(number), f"{each.value.prompt.first_token_s:.2f} s", str(len(found)),
            *(f"{1e3 * percentile([gap.gap_s for gap in seen], p):.0f} ms" for p in (50, 99)),
            *(f"{percentile(values, p):.2f}" for values in (of_bound, taken) for p in (50, 99)),
            f"{each.others_share:.1%}",
        )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 180).print(table)
    print(f"of {len(all_gaps)} gaps p99 is {figures.gap_share_p99:.2f} of the bound; {figures.num_over_bound} of {len(all_steps)} steps predicted above it")  # fmt: skip
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))
    if arguments.chart:
        middle = sorted(range(len(turns)), key=lambda index: firsts[index])[len(turns) // 2]
        arguments.chart.write_text(chart_of(turns[middle], gaps[middle], steps[middle], title))


if __name__ == "__main__":
    main()
