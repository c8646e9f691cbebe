"""The command line: serve, chat, generate, tokenize, pull, models, bench, simulate, view, trace.

Owns flags, help texts and what is printed; every command hands its work to a part made by `assemble`. Errors that stop a
command print one line and exit with 1. Heavy parts are imported by the command that needs them, so that help is instant.
"""

import contextlib
import io
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.table import Table

from jilju import __version__
from jilju.cli_bench import bench
from jilju.cli_simulate import simulate
from jilju.cli_trace import trace
from jilju.cli_view import view
from jilju.config import DEFAULT_MODEL, FALLBACK_MODEL, OFF, SERVE_OPTIONS, Option, ServeConfig, resolve_serve_config
from jilju.errors import InvalidRequest, JiljuError, ModelSourceError, PlatformError, TemplateFailed
from jilju.terminal import accept_licence_option, agree, device_option, fetching, threads_option

if TYPE_CHECKING:
    from jilju.assemble.engine import ModelFile
    from jilju.assemble.fit import MemoryPlan
    from jilju.engine.request import SamplingParams
    from jilju.llm import Completion, Piece

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main() -> None:
    """Run the command line; an error of ours is one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows few characters is no reason to fail
    try:
        check_platform()
        commands(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except JiljuError as error:
        click.echo(f"jilju: {error.message}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def check_platform() -> None:
    if sys.platform != "linux":
        raise PlatformError(
            f"jilju runs on Linux; this is {platform.system()}. On Windows use WSL 2, on a Mac a Linux container."
        )


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="jilju")
def commands() -> None:
    """Serve large language models and account for every token.

    \b
    Examples:
      jilju serve                                     the default model, with a chat at http://127.0.0.1:8000
      jilju chat                                      a chat in the terminal
      jilju generate "The sky is" --max-tokens 20
      jilju tokenize "나는 오늘 학교에 간다"
    """


def _option(option: Option) -> Callable[[Any], Any]:
    default = next(f.default for f in _fields() if f.name == option.name)
    open_value = {"text": "the model's own", "file": "none", "number": "none"}.get(option.kind, "auto")
    shown = {None: open_value, (): "none", False: "off"}.get(default, default)
    text = f"{option.help}  [{option.variable}]  Default: {shown}."
    if option.kind == "bool":
        return click.option(option.flag, option.name, is_flag=True, default=None, help=text)
    metavars = {
        "int": "N",
        "tokens": "N|auto",
        "bytes": "SIZE|auto",
        "list": "NAME",
        "keys": "KEY",
        "origins": "ORIGIN",
        "file": "PATH",
        "folder": "DIR|auto|off",
        "endpoint": "URL|env|off",
        "number": "NUMBER",
    }
    metavar = "|".join(option.choices) if option.choices else metavars.get(option.kind)
    return click.option(
        option.flag,
        option.name,
        default=None,
        multiple=option.kind in ("list", "keys", "origins"),
        metavar=metavar or "TEXT",
        help=text,
    )


def _fields() -> Any:
    import msgspec

    return msgspec.structs.fields(ServeConfig)


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(SERVE_OPTIONS):
        function = _option(option)(function)
    return function


# Options that several commands have.
_model = click.option(
    "--model",
    "-m",
    default=DEFAULT_MODEL,
    show_default=True,
    help="A name of `jilju models`, or the path of a GGUF file or a model folder.",
)
_temperature = click.option(
    "--temperature", type=click.FloatRange(0, 2), default=None, help="0 is greedy. Default: the model's own."
)


@commands.command()
@click.argument("model", required=False)
@accept_licence_option
@_options
def serve(model: str | None, accept_licence: str | None, **flags: Any) -> None:
    """Serve MODEL over an OpenAI-compatible API, with a chat page at the address that is printed.

    MODEL is a name of `jilju models`, or the path of a GGUF file or a model folder.

    \b
    Examples:
      jilju serve
      jilju serve smollm2-135m --port 9000
      jilju serve ./model.gguf --device cuda
      JILJU_API_KEY=team=some-long-secret jilju serve ./model.gguf --host 0.0.0.0 --allow-host chat.example.org
    """
    from jilju.assemble.gpu import find_device
    from jilju.serve.door.auth import check_bind
    from jilju.serve.door.key_file import keys_of
    from jilju.serve.otel.providers import check_telemetry
    from jilju.serve.usage_log import check_usage_log

    config = resolve_serve_config(model, flags)
    check_bind(config.host, keys_of(config), config.insecure)  # before a model is fetched for nothing
    check_telemetry(config.otel, config.trace_content)
    check_usage_log(config.usage_log)
    find_device(config)
    agree(config.model, accept_licence)
    with fetching() as progress:
        model_file = _open_or_fall_back(config, progress)
    from jilju.assemble.launch import launch_engine

    console = Console(stderr=True, highlight=False)
    with fetching() as progress:
        launched = launch_engine(
            model_file,
            config,
            announce=lambda resolved, memory: _announce(console, model_file, resolved, memory),
            on_loading=progress,
        )
        from jilju.assemble.server import serve_model  # takes a while to import, in which the engine loads

        def on_ready(url: str) -> None:
            text = f"ready: {url}  (chat in a browser, or point an OpenAI client at {url}/v1; Ctrl-C ends)"
            console.print("\n" + text, soft_wrap=True)

        sys.exit(serve_model(launched, on_ready=on_ready))


def _open_or_fall_back(config: ServeConfig, progress: Callable[[int, int, str], None]) -> "ModelFile":
    """The default model falls back to the small one when it cannot be had, and says so; a model that was asked for does not."""
    from jilju.assemble.engine import open_model

    try:
        return open_model(config.model, progress, load_format=config.load_format)
    except ModelSourceError as error:
        if config.origins["model"] != "default":
            raise
        click.echo(f"jilju: {error.message}", err=True)
        click.echo(
            f"jilju: {config.model} cannot be had; serving {FALLBACK_MODEL} instead, a smaller model that knows English only",
            err=True,
        )
        return open_model(FALLBACK_MODEL, progress)


def _announce(console: Console, model: "ModelFile", config: ServeConfig, memory: "MemoryPlan") -> None:
    """What will be held in memory and which settings are in force, before anything is loaded."""
    from jilju.assemble.fit import show_bytes

    settings = Table(title=f"jilju {__version__} · settings", title_justify="left", box=None, pad_edge=False)
    for heading in ("setting", "value", "origin"):
        settings.add_column(heading)
    settings.add_row("model", model.name, config.origins["model"])
    for option in SERVE_OPTIONS:
        value = getattr(config, option.name)
        if option.kind == "keys":
            value = ", ".join(key.name for key in value)
        elif option.kind == "bytes" and value is not None:
            value = show_bytes(value)
        elif isinstance(value, tuple):
            value = ", ".join(value)
        settings.add_row(option.name, "-" if value in (None, "") else str(value), config.origins[option.name])
    console.print(settings)

    plan = Table(title="memory plan", title_justify="left", box=None, pad_edge=False)
    plan.add_column("part")
    plan.add_column("bytes", justify="right")
    plan.add_column("what it is")
    numbers = "random numbers for " if config.load_format == "dummy" else ""
    weights = f"{numbers}{len(model.plan.weights)} tensors of {model.path}, {_weights_form(config)}"
    plan.add_row("weights", show_bytes(memory.weight_bytes), weights)
    kv = f"{memory.pool_tokens:,} tokens of {show_bytes(memory.kv_bytes_per_token)} ({config.kv_dtype}), in {memory.num_blocks:,} blocks"
    plan.add_row("KV cache", show_bytes(memory.kv_bytes), kv)
    plan.add_row(
        "workspace", show_bytes(memory.workspace_bytes), f"activations of a step of {config.step_tokens} tokens, logits"
    )
    available = f"of {show_bytes(memory.available_bytes)} available"
    if memory.gpu is not None:
        available += f" on {memory.gpu.shown}, beside {show_bytes(memory.reserve_bytes)} for CUDA itself"
    plan.add_row("in all", show_bytes(memory.total_bytes), available)
    assert config.max_rows is not None, "resolved"
    fits = f"{memory.pool_tokens / memory.context:.1f} sequences of {memory.context:,} tokens at once, or {config.max_rows} of {memory.pool_tokens // config.max_rows:,}"
    plan.add_row("fits", "", fits)
    console.print(plan)
    if memory.gpu is not None:
        mode = "fast: bits may depend on the batch" if config.fast else "invariant: the same bits in any batch"
        console.print(f"computes on {memory.gpu.name}, {mode}")


def _weights_form(config: ServeConfig) -> str:
    if config.device == "cuda":
        return f"as {config.weight_dtype}"
    return "packed into memory" if config.packed_cache == OFF else f"packed in {config.packed_cache}"


@commands.command()
@click.argument("model", required=False)
@click.option("--system", default=None, metavar="TEXT", help="System prompt.")
@_temperature
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=None,
    help="Longest answer in tokens. Default: the rest of the context.",
)
@click.option("--seed", type=int, default=None, help="Same seed, same answer.")
@click.option(
    "--context",
    type=click.IntRange(16),
    default=None,
    help="Longest conversation in tokens. Default: the model's own maximum, or what a quarter of the memory holds.",
)
@threads_option
@device_option
@accept_licence_option
def chat(
    model: str | None,
    system: str | None,
    context: int | None,
    threads: int | None,
    device: Literal["cpu", "cuda"],
    accept_licence: str | None,
    **sampling: Any,
) -> None:
    """Chat with MODEL in the terminal. An empty line or Ctrl-D ends it; Ctrl-C stops an answer; /new starts over.

    \b
    Examples:
      jilju chat
      jilju chat smollm2-135m --system "Answer in one sentence." --temperature 0
    """
    from jilju.llm import LLM

    agree(model or DEFAULT_MODEL, accept_licence)
    with fetching() as progress:
        llm = LLM(model or DEFAULT_MODEL, context=context, threads=threads, device=device, progress=progress)
    with llm:
        if llm.text.template is None:
            raise TemplateFailed(f"{llm.name} has no chat template: it continues text; use `jilju generate`")
        params = _params(llm.defaults, sampling)
        start = [{"role": "system", "content": system}] if system else []
        messages: list[dict[str, str]] = list(start)
        click.echo(f"{llm.name} · /new starts over · Ctrl-D ends", err=True)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if not text.strip():
                return
            if text.strip() == "/new":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": text})
            try:
                done = _print_pieces(llm.chat_stream(messages, params))
            except InvalidRequest as error:  # too long, most likely: the message is taken back and the chat goes on
                click.echo(f"jilju: {error.message}\n/new starts over; this message is not part of the chat", err=True)
                done = None
            if done is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": done.text})


def _print_pieces(pieces: "Iterator[Piece]") -> "Completion | None":
    """Print an answer as it comes; Ctrl-C stops it after the step that runs, a second one at once. None if it was stopped."""
    done = None
    with _interruptible() as is_stopped:
        for piece in pieces:
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
            done = piece.completion or done
            if is_stopped() and done is None:
                pieces.close()  # type: ignore[attr-defined]
                click.echo(" [stopped]", nl=False)
                break
    click.echo()
    return done


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it a first Ctrl-C only sets what is yielded, so that no step of the engine is broken off in its middle."""
    stopped = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _params(defaults: "SamplingParams", given: dict[str, Any]) -> "SamplingParams":
    import msgspec

    return msgspec.structs.replace(defaults, **{name: value for name, value in given.items() if value is not None})


@commands.command()
@click.argument("prompt")
@_model
@click.option(
    "--chat", "as_chat", is_flag=True, help="Send the prompt as a user's message through the model's chat template."
)
@click.option("--max-tokens", type=click.IntRange(0), default=128, show_default=True, help="Longest answer in tokens.")
@_temperature
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=None,
    help="Sample from the most probable tokens that make up this share; 1 is off. Default: the model's own.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=None,
    help="Sample from so many most probable tokens; 0 is off. Default: the model's own.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=None,
    help="Drop tokens below this share of the most probable one's probability; 0 is off. Default: the model's own.",
)
@click.option("--seed", type=int, default=None, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Go on past the model's end of text.")
@threads_option
@device_option
@accept_licence_option
def generate(
    prompt: str,
    model: str,
    as_chat: bool,
    threads: int | None,
    device: Literal["cpu", "cuda"],
    stop: tuple[str, ...],
    accept_licence: str | None,
    **sampling: Any,
) -> None:
    """Complete PROMPT and print the text as it comes. `-` reads the prompt from standard input.

    \b
    Examples:
      jilju generate "The capital of France is" --max-tokens 8 --temperature 0
      jilju generate --chat "대한민국의 수도는 어디인가요?"
      cat question.txt | jilju generate -m smollm2-135m -
    """
    from jilju.llm import LLM

    agree(model, accept_licence)
    text = sys.stdin.read() if prompt == "-" else prompt
    with fetching() as progress:
        llm = LLM(model, threads=threads, device=device, progress=progress)
    with llm:
        params = _params(llm.defaults, {**sampling, "stop": stop or None})
        messages = [{"role": "user", "content": text}]
        done = _print_pieces(llm.chat_stream(messages, params) if as_chat else llm.stream(text, params))
        if done is None:
            sys.exit(130)
        click.echo(
            f"[{len(done.prompt_ids)} tokens in, {len(done.token_ids)} out, ended by {done.finish_reason}, seed {done.seed}]",
            err=True,
        )


@commands.command()
@click.argument("text")
@_model
@click.option("--special", is_flag=True, help="Read the text of special tokens, such as <|im_end|>, as these tokens.")
@accept_licence_option
def tokenize(text: str, model: str, special: bool, accept_licence: str | None) -> None:
    """Print the tokens of TEXT: piece, id and bytes. `-` reads the text from standard input.

    \b
    Examples:
      jilju tokenize "나는 오늘 학교에 간다"
      jilju tokenize -m smollm2-135m "def f(x): return x"
    """
    from jilju.assemble.engine import open_model
    from jilju.assemble.text import load_text

    agree(model, accept_licence)
    given = sys.stdin.read() if text == "-" else text
    with fetching() as progress:
        model_file = open_model(model, progress)
    tokenizer = load_text(model_file).tokenizer
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("piece")
    table.add_column("id", justify="right")
    table.add_column("bytes")
    ids = tokenizer.encode(given, parse_special=special)
    for index, token_id in enumerate(ids):
        raw = tokenizer.token_bytes(token_id)
        table.add_row(str(index), _piece(raw), str(token_id), raw.hex(" "))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{len(ids)} tokens, {len(given)} characters, {len(given.encode())} bytes")


def _piece(raw: bytes) -> str:
    """A token's bytes as text; bytes that are no whole character are shown as such (‹eb 82›)."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "‹" + raw.hex(" ") + "›"
    return (
        text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
        if text.isprintable() or text.isspace()
        else repr(text)[1:-1]
    )


@commands.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Check the SHA-256 of a model that is in the cache already.")
@accept_licence_option
def pull(name: str, verify: bool, accept_licence: str | None) -> None:
    """Fetch the model NAME into the cache, with progress, and check its SHA-256.

    \b
    Examples:
      jilju pull qwen2.5-coder-0.5b
      jilju pull smollm2-135m --verify
    """
    from jilju.model import sources

    agree(name, accept_licence)
    with fetching() as progress:
        path = sources.pull(name, progress)
        if verify:
            sources.verify(name, progress)
    click.echo(str(path))


@commands.command()
def models() -> None:
    """List the models that have a name: size, licence and whether it was accepted where that is needed, sampling defaults, whether
    they are in the cache, and where that is.

    \b
    Example:
      jilju models
    """
    from jilju.assemble.fit import show_bytes
    from jilju.model import sources

    for listed in sources.list_models():
        entry, d = listed.entry, listed.entry.defaults
        click.echo(f"{entry.name}{' (default)' if entry.name == DEFAULT_MODEL else ''}")
        click.echo(
            f"    {entry.title}, {show_bytes(entry.num_bytes)}, {entry.licence}, {'cached' if listed.cached else 'not fetched yet'}"
        )
        if entry.terms is not None:
            a = listed.acceptance
            told = f"accepted at {a.accepted_at} ({a.how})" if a else "not accepted yet; asked for before first use"
            click.echo(f"    terms: {entry.terms.licence.url}, {told}")
        filters = f"top_p {d.top_p:g}, top_k {d.top_k}, repetition_penalty {d.repetition_penalty:g}"
        click.echo(f"    samples with temperature {d.temperature:g}, {filters} ({d.source})")
    click.echo(
        f"cache: {sources.cache_dir()}  (JILJU_CACHE names another)\nAny other GGUF file or model folder is given by its path."
    )


@commands.command()
@click.option(
    "--packed-cache",
    metavar="DIR",
    default=None,
    help="The folder. Default: JILJU_PACKED_CACHE, else one in the cache folder.",
)
@click.option(
    "--clear", is_flag=True, help="Remove the packed weights; servers that use them go on, the next start packs anew."
)
def cache(packed_cache: str | None, clear: bool) -> None:
    """List the packed weights that are kept so that a next start need not pack: size, last use, model file. --clear removes them.

    \b
    Examples:
      jilju cache
      jilju cache --clear
    """
    from jilju.assemble.fit import show_bytes
    from jilju.assemble.packed import kept_files, packed_folder, remove_kept

    folder = packed_folder(resolve_serve_config(None, {"packed_cache": packed_cache}))
    if folder is None:
        click.echo("no packed weights are kept: the packed cache is off")
    elif clear:
        click.echo(f"{show_bytes(remove_kept(folder))} removed from {folder}")
    else:
        files = kept_files(folder)
        for file in files:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used_ns / 1e9))
            click.echo(f"{show_bytes(file.num_bytes):>10}  {used}  {file.model_file or 'unknown'}  {file.name}")
        click.echo(f"{show_bytes(sum(file.num_bytes for file in files))} in {folder}")


commands.add_command(bench)
commands.add_command(simulate)
commands.add_command(trace)
commands.add_command(view)


if __name__ == "__main__":
    main()
