"""The simulation's scripts on the native backend, by the hundred: every token, logprob and alternative as the request has it alone.

Three parts: scripts on small random models, scripts on smollm2-135m, and engine processes on a small model that are killed at random
moments by signal 9 while eight streams run. Ends with status 1 if anything differs, and names the seed. One process, up to two threads.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jilju.assemble.native_simulation import SMALL_NAMES, NativeBackend, file_model, small_models
from jilju.clock import WallClock
from jilju.engine.link import serve_engine
from jilju.engine.loop import Engine
from jilju.engine.process import SupervisedClient
from jilju.engine.request import Request, SamplingParams, TokenEvent
from jilju.model.sources import cache_dir
from jilju.plan import Limits
from jilju.simulation.draw import NATIVE_VOCAB, draw_large, draw_native
from jilju.simulation.runs import Outcome, Total, be_quiet, play
from jilju.simulation.script import Script

LARGE = "smollm2-135m"
KILL_LIMITS = Limits(num_blocks=256, block_size=16, max_rows=8, max_tokens=64, max_context=1024, num_threads=2)
NUM_STREAMS, PROMPT_TOKENS, ANSWER_TOKENS = 8, (24, 200), 500
KILLS_A_ROUND = (
    2  # of an engine that works: who is alone in three of its requests' deaths is put into quarantine, by design
)
LOAD_S = 0.5  # about what a process takes to be ready

Stream = list[tuple[int, float | None, list[tuple[int, float]] | None]]


# ---- scripts on a virtual clock --------------------------------------------------------------------------------------


def soak(title: str, backend: NativeBackend, scripts: Iterable[Script], count: int, console: Console) -> list[Outcome]:
    """Play scripts; print what they came to."""
    total, num_killed, num_tokens, num_requests, begin = Total(), 0, 0, 0, time.monotonic()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=count)
        for script in scripts:
            outcome = play(script, backend)
            total.add(outcome)
            num_killed += outcome.tally.num_deaths > 0
            num_requests += outcome.tally.num_compared_requests
            num_tokens += outcome.tally.num_compared_tokens
            if outcome.failure:
                console.print(f"seed {outcome.seed}: {outcome.failure}", style="red", markup=False)
            progress.advance(task)
    tally = total.tally
    show(console, title, {
        "seeds": total.num_runs, "of them with deaths of the engine": num_killed, "deaths": tally.num_deaths,
        "sequences whole and equal": num_requests, "tokens equal": num_tokens, "steps": tally.num_steps,
        "rows a step": f"{total.mean_batch:.1f}", "steps that raised": tally.num_step_faults, "preemptions": tally.num_preemptions,
        "prompt tokens from the prefix cache": tally.num_cached_tokens, "minutes": f"{(time.monotonic() - begin) / 60:.1f}",
        "failures": len(total.failures),
    })  # fmt: skip
    return total.failures


def show(console: Console, title: str, rows: dict[str, object]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)


# ---- processes that are killed ---------------------------------------------------------------------------------------


def run_engine(index: int, descriptor: int) -> None:
    """The program of the engine's process."""
    model = small_models()[index]

    def load(progress: object) -> Engine:
        return Engine(model.plan, model.load(KILL_LIMITS), KILL_LIMITS, WallClock(), load_ms=1.0)

    serve_engine(load, socket.socket(fileno=descriptor))


class KilledEngine:
    """Eight streams, again and again, on an engine that is killed meanwhile."""

    def __init__(self, index: int, seed: int):
        self.client = SupervisedClient([sys.executable, __file__, "--engine", str(index)])
        self.num_kills = 0
        self._killed: int | None = None
        self._rng = random.Random(seed)
        self._prompts = [
            [self._rng.randrange(NATIVE_VOCAB) for _ in range(self._rng.randrange(*PROMPT_TOKENS))]
            for _ in range(NUM_STREAMS)
        ]
        self._num_rounds = self._num_tokens = 0

    async def round(self) -> list[Stream]:
        while self.client.status().state != "ready":
            await asyncio.sleep(0.002)
        self._num_rounds += 1
        self._num_tokens = 0
        return await asyncio.gather(*(self._stream(index, prompt) for index, prompt in enumerate(self._prompts)))

    async def _stream(self, index: int, prompt: list[int]) -> Stream:
        params = SamplingParams(
            temperature=index % 3 / 2, seed=index, max_tokens=ANSWER_TOKENS, logprobs=index % 4, ignore_eos=True
        )
        tokens: Stream = []
        async for event in self.client.submit(
            Request(id=f"{self._num_rounds}-{index}", prompt_ids=prompt, params=params)
        ):
            assert isinstance(event, TokenEvent), f"a stream ends by {event}"
            assert event.index == len(tokens), f"token {event.index} after {len(tokens)}"
            tokens.append((event.token_id, event.logprob, event.top))
            self._num_tokens += 1
        return tokens

    async def killed_round(self, num_kills: int) -> list[Stream]:
        """At most so many kills at random places of the answers, and in between now and then one of a load."""
        streams = asyncio.create_task(self.round())
        places = sorted(self._rng.randrange(NUM_STREAMS * ANSWER_TOKENS) for _ in range(min(num_kills, KILLS_A_ROUND)))
        for place in places:
            while self._num_tokens < place and not streams.done():
                await asyncio.sleep(0.0005)
            await asyncio.sleep(self._rng.uniform(0, 0.002))
            if streams.done():
                break
            killed = self._kill()
            if self._rng.random() < 0.2 and self.num_kills < num_kills:
                while self.client.process_id in (None, killed):
                    await asyncio.sleep(0.001)
                await asyncio.sleep(self._rng.uniform(0, LOAD_S))
                self._kill()
        return await streams

    def _kill(self) -> int | None:
        pid = self.client.process_id
        if pid not in (None, self._killed):  # which is dead, though it has not been noticed yet
            os.kill(pid, signal.SIGKILL)
            self._killed = pid
            self.num_kills += 1
        return pid


async def soak_kills(wanted: int, index: int, console: Console) -> int:
    """The number of streams that differ."""
    engine, begin, num_bad, num_streams = KilledEngine(index, seed=index), time.monotonic(), 0, 0
    await engine.client.start()
    try:
        undisturbed = await engine.round()
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("kill -9", total=wanted)
            while engine.num_kills < wanted:
                got = await engine.killed_round(wanted - engine.num_kills)
                num_streams += len(got)
                num_bad += sum(a != b for a, b in zip(got, undisturbed, strict=True))
                progress.update(task, completed=engine.num_kills)
    finally:
        await engine.client.stop()
    show(console, f"processes killed by signal 9, {SMALL_NAMES[index]}", {
        "kills": engine.num_kills, "streams compared": num_streams, "tokens compared": num_streams * ANSWER_TOKENS,
        "minutes": f"{(time.monotonic() - begin) / 60:.1f}", "failures": num_bad,
    })  # fmt: skip
    return num_bad


# ---- the command -----------------------------------------------------------------------------------------------------


def drawn(draw_script: Callable[[int], Script], first: int, count: int) -> Iterable[Script]:
    return map(draw_script, range(first, first + count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=500, help="seeds on small random models")
    parser.add_argument("--large", type=int, default=30, help=f"seeds on {LARGE}")
    parser.add_argument("--kills", type=int, default=60, help="kills of an engine's process")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--engine", type=int, nargs=2, metavar=("INDEX", "FD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_engine(*args.engine)
        return
    be_quiet()
    console, num_bad = Console(), 0
    if args.small:
        backend = NativeBackend(small_models())
        title = "small random models: " + "; ".join(SMALL_NAMES)
        num_bad += len(soak(title, backend, drawn(draw_native, args.first, args.small), args.small, console))
    if args.large:
        model = file_model(LARGE, cache_dir() / "packed")
        scripts = drawn(partial(draw_large, vocab_size=model.plan.vocab_size), args.first, args.large)
        num_bad += len(soak(LARGE, NativeBackend([model]), scripts, args.large, console))
    if args.kills:
        num_bad += asyncio.run(soak_kills(args.kills, 0, console))
    sys.exit(bool(num_bad))


if __name__ == "__main__":
    main()
