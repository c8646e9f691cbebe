"""`jilju trace`: a run, or the last seconds, as a trace that Perfetto opens, from an event-log file or a server.

Owns the command's flags, the call of a server and where the trace is written. Knows nothing of the format.
"""

import contextlib
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click
import msgspec

from jilju.errors import ConfigError

SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h)?")
UNIT_NS = (("ms", 10**6), ("s", 10**9), ("m", 60 * 10**9), ("h", 3600 * 10**9))
PIECE_BYTES = 1 << 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TIMEOUT_S = 60


def _span(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """ns"""
    if value is None:
        return None
    match = SPAN.fullmatch(value)
    span_ns = int(float(match[1]) * dict(UNIT_NS)[match[2] or "s"]) if match is not None else 0
    if span_ns <= 0:
        raise click.BadParameter(f"{value!r:.80}; allowed: a time such as 30s, 500ms or 5m")
    return span_ns


@click.command()
@click.option(
    "--log", "file", type=click.Path(path_type=Path), help="An event-log file, as `jilju serve --event-log` writes it."
)
@click.option("--url", metavar="URL", help="A server that runs, such as http://127.0.0.1:8000.")
@click.option("--run", metavar="ID", help="One run, by the id of its answer.")
@click.option(
    "--last",
    "last_ns",
    metavar="TIME",
    callback=_span,
    help="The last 30s, 500ms, 5m. Default: all of a file; of a server 30s.",
)
@click.option("--api-key", envvar="JILJU_KEY", help="Key for the server, with the scope view.  [JILJU_KEY]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write. Default: standard output.")
def trace(
    file: Path | None, url: str | None, run: str | None, last_ns: int | None, api_key: str | None, output: Path | None
) -> None:
    """Write a trace that https://ui.perfetto.dev opens: the engine's steps, what each call waited for, and which steps it had a part in.

    \b
    Examples:
      jilju trace --url http://127.0.0.1:8000 --last 30s -o trace.json
      jilju trace --log events.jlog --run chatcmpl-0f3a... -o trace.json
    """
    if (file is None) == (url is None):
        raise click.UsageError("give --log FILE or --url URL, one of them")
    if run is not None and last_ns is not None:
        raise click.UsageError("give --run or --last, not both")
    if output is None and sys.stdout.isatty():
        raise click.UsageError("a trace is long: give -o FILE, or pipe it")
    pieces = _of_file(file, run, last_ns) if file is not None else _of_server(url or "", run, last_ns, api_key)
    first = next(pieces)  # what is wrong is said before a file is made
    with _opened(output) as out:
        out.write(first)
        for piece in pieces:
            out.write(piece)


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[IO[bytes]]:
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with output.open("wb") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"-o is {output}, which cannot be written: {error.strerror}") from error


def _of_file(file: Path, run: str | None, last_ns: int | None) -> Iterator[bytes]:
    from jilju.account.chrome_trace import find_call, span_of, write_trace
    from jilju.account.log_file import read_log

    recording = read_log(file)
    begin_ns, end_ns = recording.first_ns, recording.now_ns
    if last_ns is not None:
        begin_ns = max(begin_ns, end_ns - last_ns)
    if run is not None:
        call = find_call(recording, run)
        if call is None:
            raise ConfigError(f"{file} has no run {run[:200]!r}: it never was, had not ended, or is in another file")
        begin_ns, end_ns = span_of(call, recording.now_ns)
    return write_trace(recording, begin_ns, end_ns, run)


def _of_server(url: str, run: str | None, last_ns: int | None, api_key: str | None) -> Iterator[bytes]:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url is {url[:200]!r}; allowed: an address such as http://127.0.0.1:8000")
    query = {"run": run} if run is not None else {"seconds": str(-(-(last_ns or 30 * 10**9) // 10**9))}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/jilju/trace?{urllib.parse.urlencode(query)}")
    if api_key is not None:
        request.add_header("authorization", f"Bearer {api_key}")
    handlers = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S) as answer:
            while piece := answer.read(PIECE_BYTES):
                yield piece
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} answers {error.code}: {_message(error.read(1 << 16))}") from error
    except OSError as error:
        raise ConfigError(f"{url} cannot be asked: {getattr(error, 'reason', None) or error}") from error


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])[:500]
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
