"""`jilju view`: the engine page of an event-log file.

Owns the command's flags and what is printed. Knows nothing of the format or of the page, and imports what does only when it is asked
for, so that help is instant.
"""

from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="Port; 0 takes a free one."
)
def view(file: Path, port: int) -> None:
    """Show the engine page of FILE, which `jilju serve --event-log FILE` has written, on this machine alone. Ctrl-C ends it.

    \b
    Example:
      jilju view /var/log/jilju/events.jlog
    """
    from jilju.account.log_file import read_log
    from jilju.serve.recorded import serve_recording
    from jilju.view import DIRECTORY

    recording = read_log(file)
    seconds = (recording.now_ns - recording.first_ns) / 1e9
    click.echo(
        f"{file}: {recording.model}, {len(recording.log.steps):,} steps and {len(recording.calls):,} calls in {seconds:,.0f} s",
        err=True,
    )
    serve_recording(recording, DIRECTORY, port, lambda url: click.echo(f"{url}/engine  (Ctrl-C ends)"))
