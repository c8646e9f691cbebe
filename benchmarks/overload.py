"""Overload: what `jilju serve` still gives when ten times as much is asked of it as it can, and how soon it is well again.

The peak first: a closed loop whose concurrency doubles until goodput grows no more. Then an open loop of Poisson arrivals: at half the
peak for a baseline, at ten times the peak, and at half again. Goodput counts complete answers whose first token and mean gap were in time.
The load comes from this process; it asks nothing twice, and says how late its own loop was. A part during which other processes took
more than --max-others of the cores is repeated.
"""

import argparse
import asyncio
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from client import Answer, closed_loop, completion, open_loop, percentile, random_ids, with_lag
from rich.console import Console
from server import Server, idle_metrics, num_waiting, serving

from jilju.bench.bars import OpenLoop, OverloadFigures
from jilju.bench.guard import Guard, num_cores, read_cpu_times
from jilju.bench.report import table_of

FACTOR, BASE = 10.0, 0.5  # of the peak
GROWS_BELOW = (
    1.05  # the search ends when two doublings after each other do not give so much more than the best before them
)
FIRST_TOKEN_S, TOKEN_S = 2.0, 0.15  # what an answer must keep to count
MAX_QUEUE_MS = 1000  # of the open loops
WINDOW_S, WITHIN = 5.0, 1.25  # recovered: the p99 of those sent in a window is within so many times the baseline's


class Load:
    def __init__(self, server: Server, num_input: int, num_output: int, seed: int):
        self.server, self.rng = server, random.Random(seed)
        self._num_input, self._num_output = num_input, num_output

    def bodies(self, **fields: Any) -> Iterator[dict[str, Any]]:
        while True:
            yield completion(random_ids(self.rng, self._num_input), self._num_output, **fields)

    def is_good(self, answer: Answer) -> bool:
        is_whole = answer.is_complete and len(answer.token_times) == self._num_output
        return is_whole and answer.first_token_s <= FIRST_TOKEN_S and answer.token_s <= TOKEN_S

    def peak(self, duration_s: float, guard: Guard) -> tuple[float, int]:
        """Goodput, and with how many at a time."""
        best, best_at, num_worse = 0.0, 0, 0
        for concurrency in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            goodput = guard.run(lambda: self.at_a_time(concurrency, duration_s), self.server.pids).value  # noqa: B023
            print(f"{concurrency} at a time: {goodput:.1f}/s", file=sys.stderr)
            num_worse = num_worse + 1 if goodput < GROWS_BELOW * best else 0
            if goodput > best:
                best, best_at = goodput, concurrency
            if num_worse == 2:
                break
        return best, best_at

    def at_a_time(self, concurrency: int, duration_s: float) -> float:
        """Goodput of a closed loop, from its first answer to its last request. Its clients wait for as long as it takes: one that
        is refused would ask again at once, thousands of times a second."""
        answers = asyncio.run(closed_loop(self.server.port, self.bodies(), concurrency, duration_s))
        begin, end = min(answer.end for answer in answers), max(answer.start for answer in answers)
        return sum(self.is_good(answer) for answer in answers if begin < answer.end <= end) / max(end - begin, 1e-9)

    def at(self, rate: float, duration_s: float) -> tuple[OpenLoop, list[Answer]]:
        bodies = list(itertools.islice(self.bodies(max_queue_ms=MAX_QUEUE_MS), int(rate * duration_s)))
        before = read_cpu_times(self.server.pids)
        answers, lags = asyncio.run(with_lag(open_loop(self.server.port, bodies, rate, self.rng)))
        others = before.others_share(read_cpu_times(self.server.pids), num_cores())
        sent_s = answers[-1].start - answers[0].start
        good = [answer for answer in answers if self.is_good(answer)]
        done = [answer for answer in answers if answer.is_complete]
        refused_ms = [1e3 * (a.end - a.start) for a in answers if a.status == 429]
        first_ms = [1e3 * a.first_token_s for a in done]
        figures = OpenLoop(
            rate=len(answers) / sent_s,
            goodput=len(good) / sent_s,
            by_status=dict(Counter(str(a.status) if a.is_complete or a.status != 200 else "200, cut" for a in answers)),
            num_late=len(done) - len(good),
            first_token_p50_ms=percentile(first_ms, 50),
            first_token_p99_ms=percentile(first_ms, 99),
            token_p99_ms=percentile([1e3 * a.token_s for a in done], 99),
            refusal_p50_ms=percentile(refused_ms, 50),
            refusal_p99_ms=percentile(refused_ms, 99),
            client_lag_p99_ms=1e3 * percentile(lags, 99),
            client_lag_max_ms=1e3 * max(lags),
            others_share=others,
        )
        return figures, answers


def recovery_s(answers: list[Answer], bound_ms: float) -> float | None:
    """Whole seconds after the first arrival from which on windows keep the bound; None: the last one does not."""
    begin, end = answers[0].start, answers[-1].start
    recovered: float | None = None
    for second in range(max(1, int(end - begin - WINDOW_S) + 1)):
        sent = [a for a in answers if begin + second <= a.start < begin + second + WINDOW_S]
        is_well = all(a.is_complete for a in sent) and percentile([1e3 * a.first_token_s for a in sent], 99) <= bound_ms
        recovered = (recovered if recovered is not None else float(second)) if is_well else None
    return recovered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload; of each other part half of it")
    parser.add_argument("--peak-seconds", type=float, default=10.0, help="of each step of the search")
    parser.add_argument("--max-others", type=float, default=3.0, help="percent of the cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with serving(arguments.model, "--context", "1024", "--kv-memory", "1GiB") as server:
        load = Load(server, arguments.input, arguments.output, seed=1)
        guard = Guard(arguments.max_others / 100)
        load.at_a_time(8, 3.0)  # what is slower the first time is over then
        peak, concurrency = load.peak(arguments.peak_seconds, guard)
        base, _ = guard.run(lambda: load.at(BASE * peak, arguments.seconds / 2), server.pids).value
        (over, _), (after, answers) = guard.run(
            lambda: (load.at(FACTOR * peak, arguments.seconds), load.at(BASE * peak, arguments.seconds / 2)),
            server.pids,
        ).value
        _, metrics = idle_metrics(server)
    figures = OverloadFigures(
        model=arguments.model,
        num_input=arguments.input,
        num_output=arguments.output,
        peak_goodput=peak,
        peak_concurrency=concurrency,
        base=base,
        over=over,
        after=after,
        recovery_s=recovery_s(answers, WITHIN * base.first_token_p99_ms),
        num_left=int(metrics["jilju_num_requests_running"] + num_waiting(metrics)),
    )
    title = (
        f"{arguments.model}, {arguments.input} tokens in, {arguments.output} out; peak {peak:.1f}/s at {concurrency}"
    )
    table = table_of(title, ["arrivals", "goodput", "first token p50", "p99", "token p99", "429 p50", "p99", "answers", "client's lag p99", "others"])  # fmt: skip
    for part in (base, over, after):
        milliseconds = (
            part.first_token_p50_ms, part.first_token_p99_ms, part.token_p99_ms, part.refusal_p50_ms, part.refusal_p99_ms,
        )  # fmt: skip
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(part.by_status.items()))
        table.add_row(
            f"{part.rate:.1f}/s", f"{part.goodput:.1f}/s", *(f"{ms:.0f} ms" for ms in milliseconds), statuses,
            f"{part.client_lag_p99_ms:.0f} ms", f"{part.others_share:.1%}",
        )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
    print(f"goodput {figures.kept:.0%} of the peak; first tokens as before after {figures.recovery_s} s")
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
