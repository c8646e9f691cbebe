"""Structured output and its neighbours: what masks add to a step, what hostile grammars and the first grammar cost others' streams.

Three parts. Masks: rows held to JSON schemas and rows held to nothing take turns on one engine, and the medians of their decode steps are
compared. Hostile: plain streams on a server, in quiet phases and in phases in which two hostile grammars come a second. First: plain streams
on a server that has just started and has built nothing for grammars, while the first call with one comes. Usage: structured.py [PART ...]
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import msgspec
import numpy as np
from client import Answer, Exchange, ask, completion, percentile, random_ids, send
from rich.console import Console
from server import Server, serving

from jilju.assemble.engine import build_engine, open_model, resolve_engine
from jilju.bench.bars import FirstGrammarFigures, HostileFigures, MaskFigures, StructuredFigures
from jilju.bench.guard import CpuTimes, Guard, read_cpu_times
from jilju.bench.report import table_of
from jilju.config import engine_config
from jilju.engine.grammars import Grammars
from jilju.engine.loop import Engine
from jilju.engine.matcher import Grammar
from jilju.engine.request import Request, SamplingParams
from jilju.text.grammar import GrammarSource, to_llguidance

PARTS = ("masks", "hostile", "first")
NUM_STREAMS = 4
CONTEXT = 4096

# ---- masks -----------------------------------------------------------------------------------------------------------

NUM_TOKENS = 160  # of an answer; each schema has room for more
WORD = {"type": "string", "pattern": "^[a-z]{2,12}$"}
ITEMS: tuple[dict[str, Any], ...] = (
    {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    {"id": {"type": "string", "format": "uuid"}, "at": {"type": "string", "format": "date-time"}},
    {"x": {"type": "number"}, "y": {"type": "number"}, "label": {"enum": ["cat", "dog", "bird"]}},
    {"city": {"type": "string", "maxLength": 30}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    {"kind": {"anyOf": [{"type": "integer"}, {"type": "null"}, {"type": "array", "items": WORD}]}, "ok": {"type": "boolean"}},
    {f"field_{number}": WORD for number in range(12)},
    {"text": {"type": "string", "minLength": 20, "maxLength": 200}},
    {"price": {"type": "number", "minimum": 0, "multipleOf": 0.01}, "sku": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}},
)  # fmt: skip


def grammars_of_rows() -> list[str]:
    """Lists of fifty items at least: longer than an answer here."""
    texts = []
    for properties in ITEMS:
        item = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        schema = msgspec.json.encode({"type": "array", "items": item, "minItems": 50}).decode()
        texts.append(to_llguidance(GrammarSource("json_schema", schema)))
    return texts


class TimedGrammars(Grammars):
    """Those of an engine, with a note of what each batch's masks took. Filled beside the model, or by the step loop."""

    def __init__(self, make: Callable[[Request], Future[Grammar]], *, fills_beside: bool):
        super().__init__(self._no_source, fills_beside=fills_beside)
        self.make = make  # type: ignore[method-assign]
        self.took_ms: list[float] = []

    @staticmethod
    def _no_source() -> None:  # type: ignore[override]
        raise AssertionError("another one makes them")

    def _fill(self, fills: list, ready: np.ndarray) -> None:
        begin = time.perf_counter()
        super()._fill(fills, ready)
        self.took_ms.append((time.perf_counter() - begin) * 1e3)


class Rows:
    """Rows side by side on an engine; every run makes the same requests."""

    def __init__(self, engine: Engine, num_rows: int):
        self._engine, self._num_rows, self._ids = engine, num_rows, count()

    def step_ms(self, grammars: list[str], temperature: float) -> float:
        """Of the median step in which all rows decode."""
        engine, num_before = self._engine, len(self._engine.log.steps)
        for row in range(self._num_rows):
            params = SamplingParams(seed=row, max_tokens=NUM_TOKENS, temperature=temperature, ignore_eos=True)
            prompt = [(7 * row + place) % 1000 for place in range(32)]
            grammar = grammars[row % len(grammars)] if grammars else ""
            engine.submit(Request(id=f"r{next(self._ids)}", prompt_ids=prompt, params=params, grammar=grammar))
        while engine.has_work():
            engine.step()
        steps = list(engine.log.steps)[num_before:]
        return statistics.median(
            (step.end_ns - step.begin_ns) / 1e6
            for step in steps
            if step.num_decode_tokens == self._num_rows and not step.num_prefill_tokens
        )


def measure_masks(model_name: str, num_rows: int, num_rounds: int, guard: Guard) -> MaskFigures:
    model = open_model(model_name)
    _, options, _ = resolve_engine(model, engine_config(model.name, context=512, kv_memory="512MiB", max_rows=num_rows))
    engine = build_engine(options)
    assert engine.grammars is not None, "every engine of a model file has them"
    make, texts, rows = engine.grammars.make, grammars_of_rows(), Rows(engine, num_rows)
    plain = engine.grammars
    beside, in_loop = TimedGrammars(make, fills_beside=True), TimedGrammars(make, fills_beside=False)

    def one_round() -> list[float]:
        took = []
        for grammars, held in ((plain, []), (beside, texts), (in_loop, texts), (plain, []), (beside, texts)):
            engine.grammars = grammars
            took.append(rows.step_ms(held, 0.8 if len(took) < 3 else 0.0))
        return took

    one_round()
    beside.took_ms.clear()
    rounds = [guard.run(one_round) for _ in range(num_rounds)]
    of_kind = list(zip(*(each.value for each in rounds), strict=True))
    base, held, looped, greedy_base, greedy_held = map(statistics.median, of_kind)
    return MaskFigures(
        model=model.name, vocab_size=model.plan.vocab_size, num_rows=num_rows, num_rounds=num_rounds, step_ms=base, held_step_ms=held,
        share=statistics.median(b / a - 1 for a, b in zip(of_kind[0], of_kind[1], strict=True)),
        greedy_share=statistics.median(b / a - 1 for a, b in zip(of_kind[3], of_kind[4], strict=True)),
        in_loop_share=statistics.median(b / a - 1 for a, b in zip(of_kind[0], of_kind[2], strict=True)),
        greedy_step_ms=greedy_base, greedy_held_step_ms=greedy_held, in_loop_step_ms=looped,
        fill_p50_ms=statistics.median(beside.took_ms), fill_p99_ms=percentile(beside.took_ms, 99), fill_max_ms=max(beside.took_ms),
        others_share=max(each.others_share for each in rounds),
    )  # fmt: skip


# ---- hostile ---------------------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    kind: str
    status: int
    took_s: float


class Phase(NamedTuple):
    gaps_s: list[float]  # of all streams
    sent: list[Sent]


async def begin_streams(server: Server, num_streams: int, rng: random.Random) -> list[Exchange]:
    """Plain ones, each with some tokens."""
    streams = [await send(server.port, completion(random_ids(rng, 16), CONTEXT - 64)) for _ in range(num_streams)]
    for stream in streams:
        while len(stream.answer.token_times) < 16 and not stream.ended.done():
            await stream.wait(60.0)
    return streams


async def end_streams(streams: list[Exchange]) -> None:
    for stream in streams:
        stream.cancel()
        await stream.ended


def gaps_between(streams: list[Exchange], begin: float, end: float) -> list[float]:
    """Gaps that ended in that time."""
    return [
        gap
        for stream in streams
        for at, gap in zip(stream.answer.token_times[1:], stream.answer.gaps_s, strict=True)
        if begin <= at < end
    ]


async def phase(
    server: Server, bodies: list[tuple[str, dict[str, Any]]], duration_s: float, rng: random.Random
) -> Phase:
    """Streams for so long, while these bodies are sent at equal distances."""
    streams, begin = await begin_streams(server, NUM_STREAMS, rng), time.monotonic()

    async def post(number: int, kind: str, body: dict[str, Any]) -> Sent:
        await asyncio.sleep(begin + number * duration_s / len(bodies) - time.monotonic())
        answer = await ask(server.port, body)
        return Sent(kind, answer.status, answer.end - answer.start)

    posts = [asyncio.create_task(post(number, *each)) for number, each in enumerate(bodies)]
    await asyncio.sleep(begin + duration_s - time.monotonic())
    end = time.monotonic()
    gaps = gaps_between(streams, begin, end)
    sent = [await each for each in posts]
    await end_streams(streams)
    return Phase(gaps, sent)


def family_times(pids: Sequence[int]) -> CpuTimes:
    """As the guard reads them, with what the processes' children take and took: workers come and go."""
    times, own_ticks = read_cpu_times(()), 0
    family = [os.getpid(), *pids]
    for pid in family:  # grows
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                children = map(int, (task / "children").read_text().split())
                family += [child for child in children if child not in family]
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own_ticks += sum(map(int, fields[11:15]))
    return msgspec.structs.replace(times, own=own_ticks / os.sysconf("SC_CLK_TCK"))


QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "stream": False}


def measure_hostile(
    model: str, num_rounds: int, phase_s: float, rate: float, guard: Guard
) -> tuple[HostileFigures, list[Sent]]:
    """Three phases a round, which change places: nothing is sent; plain calls are, as many; hostile ones are."""
    rng, rounds = random.Random(3), list[dict[str, Phase]]()
    made, num_calls = hostile.forms(rng), round(rate * phase_s)
    others = []

    def one_round(server: Server, first: int) -> dict[str, Phase]:
        calls = {
            "quiet": [],
            "plain": [("plain", QUESTION)] * num_calls,
            "hostile": [(kind, QUESTION | form) for kind, form in itertools.islice(made, num_calls)],
        }
        names = list(calls)
        order = names[first % 3 :] + names[: first % 3]
        return {name: asyncio.run(phase(server, calls[name], phase_s, rng)) for name in order}

    with serving(model, "--context", str(CONTEXT), "--kv-memory", "1GiB") as server:
        asyncio.run(phase(server, [("warm", QUESTION | hostile.regex("a{3}"))], 2.0, rng))
        for number in range(num_rounds):
            done = guard.run(partial(one_round, server, number), server.pids)
            rounds.append(done.value)
            others.append(done.others_share)
    sent = [one for each in rounds for one in each["hostile"].sent]
    refused = [one.took_s for one in sent if one.status != 200]

    def gap_ms(name: str, percent: float) -> float:
        return 1e3 * percentile([gap for each in rounds for gap in each[name].gaps_s], percent)

    def change(percent: float, beside: str) -> float:
        shares = [
            percentile(each["hostile"].gaps_s, percent) / percentile(each[beside].gaps_s, percent) for each in rounds
        ]
        return statistics.median(shares) - 1

    return HostileFigures(
        model=model, num_streams=NUM_STREAMS, rate=rate, num_rounds=num_rounds, num_sent=len(sent), num_refused=len(refused),
        num_failed=sum(one.status >= 500 or one.status == 0 for one in sent),
        refusal_p50_s=percentile(refused, 50), refusal_max_s=max(refused, default=0.0),
        answer_max_s=max((one.took_s for one in sent if one.status == 200), default=0.0),
        quiet_p50_ms=gap_ms("quiet", 50), quiet_p99_ms=gap_ms("quiet", 99), plain_p50_ms=gap_ms("plain", 50), plain_p99_ms=gap_ms("plain", 99),
        hostile_p50_ms=gap_ms("hostile", 50), hostile_p99_ms=gap_ms("hostile", 99), hostile_max_ms=gap_ms("hostile", 100),
        p50_change=change(50, "quiet"), p99_change=change(99, "quiet"), p99_change_from_plain=change(99, "plain"), others_share=max(others),
    ), sent  # fmt: skip


# ---- first -----------------------------------------------------------------------------------------------------------


class First(NamedTuple):
    before_ms: list[float]  # gaps of the streams before the call
    stall_ms: float  # the longest gap from the call to a second after its end
    took_s: float
    second_stall_ms: float  # of another grammar later
    second_took_s: float


async def first_grammar(server: Server, rng: random.Random) -> First:
    streams = await begin_streams(server, NUM_STREAMS, rng)
    begin = time.monotonic()
    await asyncio.sleep(1.5)
    before = gaps_between(streams, begin, time.monotonic())
    stalls: list[float] = []
    answers: list[Answer] = []
    for pattern in ("[a-z]{3}", "[A-Z]{4}"):
        sent = time.monotonic()
        body = hostile.regex(pattern) | {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 8,
            "stream": False,
        }
        answers.append(await ask(server.port, body))
        await asyncio.sleep(1.0)
        stalls.append(1e3 * max(gaps_between(streams, sent, time.monotonic())))
    await end_streams(streams)
    assert all(answer.status == 200 for answer in answers), "these are harmless"
    took = [answer.end - answer.start for answer in answers]
    return First([1e3 * gap for gap in before], stalls[0], took[0], stalls[1], took[1])


def measure_first(model: str, num_starts: int) -> FirstGrammarFigures:
    rng = random.Random(4)
    firsts, others = [], []
    for _ in range(num_starts):
        with serving(model, "--context", str(CONTEXT), "--kv-memory", "1GiB") as server:
            before = Guard(1.0, read=family_times).run(lambda: asyncio.run(first_grammar(server, rng)), server.pids)
            firsts.append(before.value)
            others.append(before.others_share)
    return FirstGrammarFigures(
        model=model, num_streams=NUM_STREAMS, num_starts=num_starts,
        gap_p50_ms=percentile([gap for first in firsts for gap in first.before_ms], 50),
        gap_max_ms=statistics.median(max(first.before_ms) for first in firsts),
        stall_ms=statistics.median(first.stall_ms for first in firsts), stall_max_ms=max(first.stall_ms for first in firsts),
        took_s=statistics.median(first.took_s for first in firsts),
        second_stall_ms=statistics.median(first.second_stall_ms for first in firsts),
        second_took_s=statistics.median(first.second_took_s for first in firsts), others_share=max(others),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="of the masks")
    parser.add_argument("--turns", type=int, default=6, help="of a quiet phase, one with plain calls and a hostile one")
    parser.add_argument("--phase", type=float, default=10.0, help="seconds")
    parser.add_argument("--rate", type=float, default=2.0, help="hostile grammars a second")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--max-others", type=float, default=3.0, help="percent of the cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: no such part; allowed: {', '.join(PARTS)}")
    max_others = arguments.max_others / 100
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    masks = (
        measure_masks(arguments.model, arguments.rows, arguments.rounds, Guard(max_others))
        if "masks" in parts
        else None
    )
    hostile_figures, sent = None, list[Sent]()
    if "hostile" in parts:
        hostile_figures, sent = measure_hostile(
            arguments.model, arguments.turns, arguments.phase, arguments.rate, Guard(max_others, read=family_times)
        )
    first = measure_first(arguments.model, arguments.starts) if "first" in parts else None
    show(console, StructuredFigures(masks=masks, hostile=hostile_figures, first=first), sent)
    if arguments.json:
        figures = StructuredFigures(masks=masks, hostile=hostile_figures, first=first)
        arguments.json.write_bytes(msgspec.json.encode(figures))


def show(console: Console, figures: StructuredFigures, sent: list[Sent]) -> None:
    if m := figures.masks:
        print(
            f"masks of {m.num_rows} rows, vocabulary {m.vocab_size}: step {m.step_ms:.2f} ms, with grammars {m.held_step_ms:.2f} ({m.share:+.1%}); "
            f"greedy {m.greedy_step_ms:.2f}, {m.greedy_held_step_ms:.2f} ({m.greedy_share:+.1%}); filled in the loop {m.in_loop_step_ms:.2f} ({m.in_loop_share:+.1%})"
        )
        print(
            f"  filling a step's masks: p50 {m.fill_p50_ms:.3f} ms, p99 {m.fill_p99_ms:.3f}, max {m.fill_max_ms:.2f}; others {m.others_share:.1%}"
        )
    if h := figures.hostile:
        table = table_of("hostile grammars", ["kind", "sent", "by status", "p50", "max"])
        for kind in sorted({one.kind for one in sent}):
            of_kind = [one for one in sent if one.kind == kind]
            statuses = {
                str(status): sum(one.status == status for one in of_kind)
                for status in sorted({one.status for one in of_kind})
            }
            took = [one.took_s for one in of_kind]
            told = ", ".join(f"{number} x {status}" for status, number in statuses.items())
            table.add_row(kind, str(len(of_kind)), told, f"{percentile(took, 50):.2f} s", f"{max(took):.2f} s")
        console.print(table)
        print(
            f"{h.num_sent} at {h.rate:g}/s: {h.num_refused} refused, at most {h.refusal_max_s:.2f} s; {h.num_failed} failed; answers at most {h.answer_max_s:.2f} s\n"
            f"gaps of {h.num_streams} streams, p50 and p99: quiet {h.quiet_p50_ms:.1f}, {h.quiet_p99_ms:.1f} ms; beside plain calls {h.plain_p50_ms:.1f}, {h.plain_p99_ms:.1f}; "
            f"beside hostile ones {h.hostile_p50_ms:.1f}, {h.hostile_p99_ms:.1f}, max {h.hostile_max_ms:.0f}\n"
            f"p99 beside hostile calls: {h.p99_change:+.1%} of quiet, {h.p99_change_from_plain:+.1%} of plain calls (medians of {h.num_rounds} turns; p50 {h.p50_change:+.1%}); "
            f"others {h.others_share:.1%}"
        )
    if f := figures.first:
        print(
            f"first grammar after a start ({f.num_starts} starts): gaps p50 {f.gap_p50_ms:.1f} ms, longest before {f.gap_max_ms:.0f}; longest while the first comes "
            f"{f.stall_ms:.0f} (at worst {f.stall_max_ms:.0f}), answered after {f.took_s:.2f} s; while a second comes {f.second_stall_ms:.0f}, after {f.second_took_s:.2f} s; "
            f"others {f.others_share:.1%}"
        )


if __name__ == "__main__":
    main()
