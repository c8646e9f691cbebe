"""`jilju simulate`: scripts on a virtual clock, replayed from a seed, by the thousand, or from a file.

Owns the command's flags and what is printed. Knows nothing of how a script is drawn or played, and imports that only when it
is asked for, so that help is instant.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jilju.config import usable_cores
from jilju.errors import ConfigError

if TYPE_CHECKING:
    from jilju.simulation import Outcome, Script
    from jilju.simulation.runs import Total

MAX_SHOWN = 10  # failures that are told one by one
SHOWN_CHARS = 2000


def _range(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", value)
    if match is None or int(match[2]) <= int(match[1]):
        raise click.BadParameter(f"{value!r}; allowed: two numbers A..B, A below B; B itself is not played")
    return range(int(match[1]), int(match[2]))


@click.command()
@click.option("--seed", type=click.IntRange(0), help="Play the script of one seed, and tell of it.")
@click.option("--seeds", metavar="A..B", callback=_range, help="Play the seeds from A up to, but not including, B.")
@click.option(
    "--script",
    "script_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Play a script that was kept.",
)
@click.option(
    "--steady",
    "is_steady",
    is_flag=True,
    help="With --seeds: scripts of full batches without faults, to measure the speed of the simulation.",
)
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes. Default: the cores this process may use.")
@click.option("--log", "is_logged", is_flag=True, help="With --seed or --script: print what happens, event by event.")
@click.option(
    "--shrink",
    "is_shrunk",
    is_flag=True,
    help="With --seed or --script: make a script that fails as small as it can be, and print it.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the scripts that fail, shrunk; with --seeds.",
)
def simulate(
    seed: int | None,
    seeds: range | None,
    script_file: Path | None,
    is_steady: bool,
    jobs: int | None,
    is_logged: bool,
    is_shrunk: bool,
    keep: Path | None,
) -> None:
    """Play scripts on a virtual clock: the engine's own scheduler, admission, supervisor and ledger under drawn load and faults.

    Every token is compared with what its request gets alone, and the laws of the engine are checked in every turn. The same
    seed always plays the same script in the same way, so a failure can be replayed.

    \b
    Examples:
      jilju simulate --seeds 0..2000
      jilju simulate --seed 1234 --log
      jilju simulate --seed 1234 --shrink > tests/simulation/scripts/name.json
    """
    given = [
        name for name, value in (("--seed", seed), ("--seeds", seeds), ("--script", script_file)) if value is not None
    ]
    if len(given) != 1:
        raise ConfigError(f"given: {', '.join(given) or 'nothing'}; allowed: one of --seed, --seeds, --script")
    from jilju.simulation import draw
    from jilju.simulation.runs import be_quiet
    from jilju.simulation.script import from_json

    be_quiet()
    if seeds is not None:
        sys.exit(_many(seeds, is_steady, jobs or usable_cores()[0], keep))
    if script_file is not None:
        try:
            script = from_json(script_file.read_bytes())
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{script_file} is no script: {error}") from error
    else:
        assert seed is not None, "one of the three is given"
        script = draw(seed)
    sys.exit(_one(script, is_logged, is_shrunk))


def _one(script: "Script", is_logged: bool, is_shrunk: bool) -> int:
    from jilju.assemble.simulation import RooflineBackend
    from jilju.simulation import World, play, shrink

    backend, errors = RooflineBackend(), Console(stderr=True, highlight=False, soft_wrap=True)
    if is_logged:
        world = World(script, backend, keep_log=True)
        try:
            world.run()
        except Exception as error:
            errors.print(f"{type(error).__name__}: {str(error)[:SHOWN_CHARS]}", markup=False)
        for line in world.log or ():
            click.echo(line)
    outcome = play(script, backend)
    if is_shrunk and outcome.failure:
        with errors.status("making it smaller"):
            script = shrink(script, lambda candidate: play(candidate, backend).law == outcome.law)
        outcome = play(script, backend)
        click.echo(script.to_json())
    _print_outcome(errors, script, outcome)
    return 1 if outcome.failure else 0


def _many(seeds: range, is_steady: bool, jobs: int, keep: Path | None) -> int:
    from jilju.assemble.simulation import RooflineBackend
    from jilju.simulation import draw, play, play_many, shrink
    from jilju.simulation.draw import steady
    from jilju.simulation.runs import Total

    backend, total = RooflineBackend(), Total()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("playing", total=len(seeds))
        for outcome in play_many(seeds, backend, jobs, steady if is_steady else draw):
            total.add(outcome)
            failed = len(total.failures)
            bar.update(task, advance=1, description=f"{failed} failed" if failed else "playing")
            if not console.is_terminal and total.num_runs % 10_000 == 0:
                click.echo(f"{total.num_runs} of {len(seeds)} played, {failed} failed", err=True)
    _print_total(Console(highlight=False), total)
    for outcome in total.failures[:MAX_SHOWN]:
        script = steady(outcome.seed) if is_steady else draw(outcome.seed)
        if keep is not None:
            law = outcome.law
            with console.status(f"making seed {outcome.seed} smaller"):
                script = shrink(script, lambda candidate, law=law: play(candidate, backend).law == law)  # type: ignore[misc]
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"seed-{outcome.seed}.json").write_text(script.to_json() + "\n", encoding="utf-8")
        console.print(f"seed {outcome.seed}: {outcome.failure[:SHOWN_CHARS]}", markup=False)
    if len(total.failures) > MAX_SHOWN:
        rest = " ".join(str(outcome.seed) for outcome in total.failures[MAX_SHOWN:])
        console.print(f"and {len(total.failures) - MAX_SHOWN} more: {rest[:SHOWN_CHARS]}", markup=False)
    return 1 if total.failures else 0


def _print_outcome(console: Console, script: "Script", outcome: "Outcome") -> None:
    tally = outcome.tally
    console.print(
        f"seed {script.seed}: {script.num_events} events, {tally.num_turns} turns, {tally.num_rows} rows, {tally.num_deaths} deaths of the"
        f" engine, {tally.virtual_ns / 1e9:.3f} s on the virtual clock, digest {outcome.digest}",
        markup=False,
    )
    if outcome.failure:
        console.print(f"FAILED: {outcome.failure[:SHOWN_CHARS]}\n{outcome.details[-SHOWN_CHARS:]}", markup=False)
    else:
        console.print("every law held", markup=False)


def _print_total(console: Console, total: "Total") -> None:
    tally = total.tally
    table = Table("all seeds", "")
    for name, value in (
        ("seeds", f"{total.num_runs:,}"),
        ("failed", f"{len(total.failures):,}"),
        ("rows", f"{tally.num_rows:,}"),
        ("mean batch", f"{total.mean_batch:.1f}"),
        ("rows/s of a core", f"{total.rows_per_second:,.0f}"),
        ("deaths of the engine", f"{tally.num_deaths:,}"),
        ("steps that raised", f"{tally.num_step_faults:,}"),
        ("preemptions", f"{tally.num_preemptions:,}"),
        ("tokens from the prefix cache", f"{tally.num_cached_tokens:,}"),
        ("time on the virtual clock", f"{tally.virtual_ns / 3.6e12:.1f} h"),
    ):
        table.add_row(name, value)
    console.print(table)
    ends = Table("how calls ended", "calls")
    for end, count in tally.ends.most_common():
        ends.add_row(end, f"{count:,}")
    console.print(ends)
