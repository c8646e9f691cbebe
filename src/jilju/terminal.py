"""Terminal: what the commands share: options that several have, and their progress bars.

Knows nothing of what a command does.
"""

import contextlib
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=None,
    help="Threads that compute. Default: the cores this process may use.",
)


@contextlib.contextmanager
def fetching() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar that appears only if something is fetched; plain lines where standard error is no terminal."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = None
        tenth = -1

        def show(done_bytes: int, total_bytes: int, text: str) -> None:
            nonlocal task, tenth
            if console.is_terminal:
                task = bar.add_task(text, total=total_bytes) if task is None else task
                bar.update(task, completed=done_bytes, total=total_bytes, description=text)
            elif total_bytes and done_bytes * 10 // total_bytes != tenth:
                tenth = done_bytes * 10 // total_bytes
                click.echo(f"{text}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB", err=True)

        yield show


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of what is done of a number of things, on a terminal only; the text says which one is."""
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text or what)
