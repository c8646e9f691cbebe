"""Terminal: what the commands share: options that several have, the question for a model's terms, and progress bars.

Knows nothing of what a command does.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jilju.errors import ModelSourceError

LINE_S = 2.0  # between two lines about something that goes on, where no bar can be drawn

threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=None,
    help="Threads that compute. Default: the cores this process may use.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What computes; cuda is an NVIDIA GPU, and needs the extra jilju[cuda].",
)
accept_licence_option = click.option(
    "--accept-licence",
    metavar="NAME",
    default=None,
    help="Accept the terms of a model that has some, such as gemma; recorded, so needed once.  [JILJU_ACCEPT_LICENCE]",
)


def agree(model: str, accepted: str | None = None) -> None:
    """Record the terms accepted by a flag; in a terminal, show and ask for those that the model still needs. Elsewhere nothing
    is asked: who opens the model is refused, with the way to accept."""
    from jilju.model import sources
    from jilju.model.licences import FLAG

    if accepted is not None:
        sources.accept_licence(accepted, FLAG)
    terms = sources.terms_to_accept(model)
    if terms is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    licence = terms.licence
    try:
        where = f"{licence.url}\n{sources.terms_text(terms)}"
    except ModelSourceError as error:
        where = f"{licence.url} (a copy could not be fetched: {error.message})"
    click.echo(f"{model} comes under the {licence.title}:\n{where}\n\nIn short: {licence.summary}\n", err=True)
    if click.confirm(f"Do you accept the {licence.title}?", err=True):
        sources.accept_licence(licence.name, "asked in the terminal")


@contextlib.contextmanager
def fetching() -> Iterator[Callable[[int, int, str], None]]:
    """A bar while something is fetched or packed, else nothing; where standard error is no terminal, a line now and then."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar: Progress | None = None
    told_s = 0.0

    def show(done_bytes: int, total_bytes: int, text: str) -> None:
        nonlocal bar, told_s
        if not total_bytes:  # of something that has no size
            click.echo(text, err=True)
            return
        is_done = done_bytes == total_bytes
        if bar is None:
            bar = Progress(*columns, console=console, disable=not console.is_terminal)
            bar.add_task(text)
            bar.start()
            told_s = -LINE_S
        bar.update(bar.task_ids[0], completed=done_bytes, total=total_bytes, description=text)
        if not console.is_terminal and (is_done or time.monotonic() - told_s > LINE_S):
            told_s = time.monotonic()
            click.echo(f"{text}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB", err=True)
        if is_done:
            bar.stop()
            bar = None

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of what is done of a number of things, on a terminal only; the text says which one is."""
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text or what)
