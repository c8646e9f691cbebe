"""The command line's `bench` group: machine, model, engine, contention, overhead, serve, quality, bars.

Owns their flags and where results go: a table on standard output, JSON and a chart into files. Every command hands its work to
`jilju.bench`. Heavy parts are imported by the command that needs them, so that help is instant.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from jilju.config import DEFAULT_MODEL, FALLBACK_MODEL, usable_cores
from jilju.errors import ConfigError
from jilju.terminal import agree, counting, fetching, threads_option

if TYPE_CHECKING:
    from jilju.bench.chart import Group
    from jilju.bench.divergence import Compared, Scorer
    from jilju.bench.guard import Guard
    from jilju.bench.model import Load
    from jilju.bench.peers import Peer, PeerProgram
    from jilju.plan import KvDtype

# Engines to compare with: the environment that `make peers` makes, and the program that runs under it.
PEERS = {
    "llama.cpp": (".venv-llama-cpp", "benchmarks/peers/llama_cpp_peer.py"),
    "openvino": (".venv-openvino", "benchmarks/peers/openvino_peer.py"),
    "transformers": (".venv-oracle", "benchmarks/peers/transformers_peer.py"),
}
SAMPLING_CONTEXT = 64  # tokens before each row's own
FILE_WIDTH = 160  # characters of a line where output is no terminal


def _numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of numbers with commas between them."""

    def parse(value: str) -> tuple[int, ...]:
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdigit() and int(part) >= least for part in parts):
            raise click.BadParameter(f"{value!r}; allowed: numbers from {least} on, with commas between them")
        return tuple(int(part) for part in parts)

    return parse


def _peer_names(value: str) -> tuple[str, ...]:
    """Names of PEERS with commas between them, `all`, or nothing."""
    names = tuple(PEERS) if value == "all" else tuple(part.strip() for part in value.split(",") if part.strip())
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"{unknown[0]!r}; allowed: all, {', '.join(PEERS)}")
    return names


_json = click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the figures as JSON to this file; - is standard output.")  # fmt: skip
_chart = click.option("--chart", "chart_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures into this SVG file.")  # fmt: skip
_rounds = click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Counted rounds; a figure is their median.")  # fmt: skip
_max_others = click.option(
    "--max-others", type=click.FloatRange(0, 100), default=3.0, show_default=True, metavar="PERCENT",
    help="Share of the cores that other processes may take; a run above it is repeated, and given up after six.",
)  # fmt: skip


@click.group()
def bench() -> None:
    """Measure: `machine` its roofs, `model` steps beside roofs and other engines, `engine` its own share of a step, `sampling`
    the cost of choosing tokens, `contention` a busy neighbour, `serve` a running server, `quality` perplexity; `bars` sums up.

    \b
    Examples:
      jilju bench machine
      jilju bench model smollm2-135m --rows 1,8 --contexts 512 --peers llama.cpp
      jilju bench quality smollm2-135m --text LICENSE
    """


@bench.command("machine")
@click.option(
    "--sizes",
    type=_numbers(1),
    metavar="N,N,...",
    default=None,
    help="Working sets in MB. Default: 8,16,32,64,128,512,1024.",
)
@_rounds
@threads_option
@_max_others
@_json
@_chart
def bench_machine(
    sizes: tuple[int, ...] | None, rounds: int, threads: int | None, max_others: float, json_file: str | None, chart_file: Path | None
) -> None:  # fmt: skip
    """The roofs of this machine: read bandwidth by working set and threads, float32 FMAs, each linear kernel's peak.

    \b
    Examples:
      jilju bench machine
      jilju bench machine --sizes 100,400 --json roofs.json --chart roofs.svg
    """
    from jilju.assemble.bench import make_probes
    from jilju.bench.machine import WORKING_SETS_MB, measure_machine
    from jilju.bench.report import machine_groups, machine_table

    with counting("probes") as count:
        machine = measure_machine(
            make_probes(), threads or usable_cores()[0], guard=_guard(max_others), working_sets_mb=sizes or WORKING_SETS_MB,
            num_rounds=rounds, progress=count,
        )  # fmt: skip
    _tell(machine, [machine_table(machine)], json_file)
    _draw(
        chart_file, "Roofs of this machine", "read bandwidth by working set, peaks of kernels", machine_groups(machine)
    )


@bench.command("model")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--prefill", type=_numbers(1), metavar="N,N,...", default="512,2048", show_default=True, help="Lengths of prompts."
)
@click.option(
    "--rows",
    type=_numbers(1),
    metavar="N,N,...",
    default="1,4,8,16,32",
    show_default=True,
    help="Sequences of a decode step.",
)
@click.option("--contexts", type=_numbers(0), metavar="N,N,...", default="0,512,2048", show_default=True, help="Tokens before each row's own in decode.")  # fmt: skip
@click.option("--peers", type=_peer_names, metavar="all|NAME,...", default="", help=f"Other engines to run in turn: {', '.join(PEERS)}; `make peers` installs them.")  # fmt: skip
@_rounds
@threads_option
@_max_others
@_json
@_chart
def bench_model(
    model: str, prefill: tuple[int, ...], rows: tuple[int, ...], contexts: tuple[int, ...], peers: tuple[str, ...], rounds: int,
    threads: int | None, max_others: float, json_file: str | None, chart_file: Path | None,
) -> None:  # fmt: skip
    """Speed of MODEL's steps, beside what this machine can do and beside other engines on the same file.

    Each load (a prompt, or a decode step of some rows at some context) runs in turn with a probe of the read bandwidth, with the
    kernels' peaks and with each peer. A run during which other processes took more than --max-others is repeated.

    \b
    Examples:
      jilju bench model smollm2-135m
      jilju bench model qwen2.5-coder-0.5b --prefill 512 --rows 1,16 --contexts 512 --peers all --json qwen.json
    """
    from jilju.assemble.bench import load_stepped, make_probes
    from jilju.assemble.engine import open_model
    from jilju.bench.model import Subject, measure_model
    from jilju.bench.report import model_groups, model_tables

    num_threads, programs = threads or usable_cores()[0], _programs(peers)
    agree(model)
    with fetching() as progress:
        file = open_model(model, progress)
    longest = max([*prefill, *(context + 1 for context in contexts)])
    loads = _loads(prefill, rows, contexts)
    stepped = load_stepped(file, max(rows), longest, num_threads)
    subject = Subject(file.name, stepped.plan, stepped.executor, stepped.kv_element_bytes, stepped.steps, num_threads)
    with _running(programs, Path(file.path), num_threads, max(rows), longest) as others, counting("loads") as count:
        report = measure_model(
            subject, loads, make_probes(), others, guard=_guard(max_others), num_rounds=rounds, progress=count
        )
    _tell(report, model_tables(report), json_file)
    if json_file != "-":
        for name, note in report.peer_notes.items():
            click.echo(f"{name}: {note}")
    _draw(
        chart_file, f"{file.name}, {num_threads} threads", "tokens per second, longer is better", model_groups(report)
    )


def _loads(prefill: Sequence[int], rows: Sequence[int], contexts: Sequence[int]) -> "list[Load]":
    from jilju.bench.model import Load

    loads = [Load("prefill", 1, tokens) for tokens in prefill]
    return loads + [Load("decode", n, context) for context in sorted(contexts) for n in sorted(rows)]


def _programs(names: Sequence[str]) -> "list[PeerProgram]":
    from jilju.bench.peers import PeerProgram

    programs = [PeerProgram(name, Path(PEERS[name][0], "bin", "python"), Path(PEERS[name][1])) for name in names]
    for program in programs:
        for needed in (program.python, program.script):
            if not needed.exists():
                raise ConfigError(
                    f"--peers {program.name} needs {needed}; run `make peers`, and this in the project's folder"
                )
    return programs


@contextlib.contextmanager
def _running(programs: "Sequence[PeerProgram]", *sizes: Any) -> "Iterator[list[Peer]]":
    from jilju.bench.peers import Peer

    with contextlib.ExitStack() as stack:
        peers = []
        for program in programs:
            peers.append(Peer(program.name, program.command(*sizes)))
            stack.callback(peers[-1].close)
        yield peers


@bench.command("engine")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--rows", type=click.IntRange(1), default=16, show_default=True, help="Requests that are answered at once."
)
@click.option("--output-tokens", type=click.IntRange(2), default=100, show_default=True, help="Tokens of each answer.")
@click.option("--penalties", is_flag=True, help="With repetition, presence and frequency penalties in every request.")
@threads_option
@_max_others
@_json
def bench_engine(
    model: str, rows: int, output_tokens: int, penalties: bool, threads: int | None, max_others: float, json_file: str | None
) -> None:  # fmt: skip
    """What of a decode step the engine's own Python takes, in the process and over the link that `jilju serve` uses.

    \b
    Example:
      jilju bench engine smollm2-135m --rows 16
    """
    from jilju.assemble.bench import measure_engine
    from jilju.bench.report import engine_table

    with fetching() as progress:
        share = measure_engine(model, rows, output_tokens, penalties, threads, _guard(max_others), progress)
    _tell(share, [engine_table(share)], json_file)


@bench.command("sampling")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--vocab", type=click.IntRange(1), metavar="N", default=None, help="No model: a random output head of so many words.")  # fmt: skip
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Sequences of a decode step.")
@_rounds
@threads_option
@_max_others
@_json
def bench_sampling(
    model: str, vocab: int | None, rows: int, rounds: int, threads: int | None, max_others: float, json_file: str | None
) -> None:
    """What choosing tokens costs of a decode step of MODEL, by how the rows sample: greedy, filters, penalties, masks.

    \b
    Examples:
      jilju bench sampling smollm2-135m
      jilju bench sampling --vocab 262144
    """
    from jilju.assemble.bench import load_stepped, load_stepped_head
    from jilju.assemble.engine import open_model
    from jilju.bench.report import sampling_table
    from jilju.bench.sampling import SamplingReport, measure_sampling

    num_threads, context = threads or usable_cores()[0], 0 if vocab else SAMPLING_CONTEXT
    if vocab:
        name, stepped = "a head alone", load_stepped_head(vocab, rows, num_threads)
    else:
        with fetching() as progress:
            file = open_model(model, progress)
        name, stepped = file.name, load_stepped(file, rows, context + 1, num_threads)
    with counting("ways") as count:
        costs = measure_sampling(
            stepped.executor, stepped.steps, rows, context, guard=_guard(max_others), num_rounds=rounds, progress=count
        )
    report = SamplingReport(
        model=name, kernel_set=stepped.executor.kernel_set, vocab_size=stepped.plan.vocab_size, rows=rows, num_threads=num_threads,
        num_rounds=rounds, costs=costs,
    )  # fmt: skip
    _tell(report, [sampling_table(report)], json_file)


@bench.command("contention")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Sequences of a step.")
@click.option("--context", type=click.IntRange(0), default=512, show_default=True, help="Tokens before each row's own.")
@_rounds
@threads_option
@_max_others
@_json
def bench_contention(
    model: str, rows: int, context: int, rounds: int, threads: int | None, max_others: float, json_file: str | None
) -> None:
    """How much longer a decode step takes beside a process that takes half of one core.

    \b
    Example:
      jilju bench contention smollm2-135m
    """
    from jilju.assemble.bench import load_stepped
    from jilju.assemble.engine import open_model
    from jilju.bench.contention import measure_contention
    from jilju.bench.report import contention_table

    num_threads = threads or usable_cores()[0]
    with fetching() as progress:
        file = open_model(model, progress)
    stepped = load_stepped(file, rows, context + 1, num_threads)
    with counting("rounds") as count:
        result = measure_contention(
            file.name, stepped.steps, rows, context, num_threads, guard=_guard(max_others), num_rounds=rounds,
            progress=lambda done: count(done, rounds, "rounds"),
        )  # fmt: skip
    _tell(result, [contention_table(result)], json_file)


@bench.command("overhead")
@click.argument("model", default=FALLBACK_MODEL)
@_rounds
@_max_others
@_json
def bench_overhead(model: str, rounds: int, max_others: float, json_file: str | None) -> None:
    """What it costs that everything is accounted for: the log by itself, all that can be kept, an open page.

    Starts two servers. Most exact on a machine on which nothing else runs.

    \b
    Example:
      jilju bench overhead smollm2-135m --rounds 15
    """
    from jilju.bench.overhead import measure_overhead
    from jilju.bench.report import overhead_table

    with counting("rounds") as count:
        result = measure_overhead(model, guard=_guard(max_others), num_rounds=max(2, rounds), progress=count)
    _tell(result, [overhead_table(result)], json_file)


@bench.command("bars")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_json
def bench_bars(folder: Path, json_file: str | None) -> None:
    """What the project means to reach, beside what the JSON files in FOLDER say was measured (`make bench` writes them).

    \b
    Example:
      jilju bench bars build/bench
    """
    from jilju.bench.bars import bars_of, read_results
    from jilju.bench.report import bars_table

    found = bars_of(read_results(folder))
    _tell(found, [bars_table(found)], json_file)
    if json_file != "-":
        met = [bar.is_met for bar in found]
        click.echo(f"{met.count(True)} pass, {met.count(False)} short, {met.count(None)} without a figure or a limit")


@bench.command("serve")
@click.option(
    "--url", required=True, help="Address of a running server with /v1/completions, such as http://127.0.0.1:8000."
)
@click.option("--model", default=None, help="Name of the model. Default: the first that the server names.")
@click.option("--num-prompts", type=click.IntRange(1), default=128, show_default=True, help="Requests that count.")
@click.option(
    "--warmup",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Requests sent before them, which do not count.",
)
@click.option(
    "--request-rate",
    type=click.FloatRange(0, min_open=True),
    default=math.inf,
    help="Requests a second, with Poisson arrivals. Default: all at once, as far as --max-concurrency lets them.",
)
@click.option(
    "--max-concurrency",
    type=click.IntRange(1),
    default=None,
    help="Requests under way at once, at most. Default: no bound.",
)
@click.option(
    "--random-input-len",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Random ids of each prompt's own.",
)
@click.option(
    "--random-prefix-len",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Ids before them that all prompts share.",
)
@click.option(
    "--random-output-len",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens to generate; the end of text is ignored.",
)
@click.option(
    "--random-vocab", type=click.IntRange(1), default=20_000, show_default=True, help="Ids are drawn below it."
)
@click.option(
    "--goodput",
    multiple=True,
    metavar="METRIC:MS",
    help="Bound that a good request keeps, such as ttft:500; may be repeated. Metrics: ttft, tpot, e2el.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same prompts and arrivals.")
@click.option("--api-key", envvar="OPENAI_API_KEY", default=None, help="Key to send.  [OPENAI_API_KEY]")
@_json
@_chart
def bench_serve(goodput: tuple[str, ...], json_file: str | None, chart_file: Path | None, **flags: Any) -> None:
    """Load a running OpenAI-compatible server with streamed completions. Flags and metrics are named as in `vllm bench serve`.

    \b
    Examples:
      jilju bench serve --url http://127.0.0.1:8000 --max-concurrency 16 --warmup 16
      jilju bench serve --url http://127.0.0.1:8000 --request-rate 2 --goodput ttft:500 --goodput tpot:50
      jilju bench serve --url http://127.0.0.1:8000 --max-concurrency 16 --random-prefix-len 800 --random-input-len 50
    """
    from jilju.bench.load import LoadOptions, run_load
    from jilju.bench.report import load_groups, load_tables

    options = LoadOptions(goodput=dict(map(_bound, goodput)), **flags)
    with counting("requests") as count:
        result = run_load(options, count)
    _tell(result, load_tables(result), json_file)
    note = f"{result.output_throughput:.0f} output tokens per second, {result.completed} requests"
    _draw(chart_file, f"{result.model} at {options.url}", note, load_groups(result))


def _bound(text: str) -> tuple[str, float]:
    name, _, bound = text.partition(":")
    try:
        value = float(bound)
    except ValueError:
        value = math.nan
    if name not in ("ttft", "tpot", "e2el") or not value > 0:
        raise click.UsageError(f"--goodput {text!r}; allowed: ttft, tpot or e2el, a colon and milliseconds above 0")
    return name, value


@bench.command("quality")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--text",
    "text_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="UTF-8 text to score.",
)
@click.option(
    "--window",
    type=click.IntRange(16),
    default=512,
    show_default=True,
    help="Tokens of a window; the second half of each is scored.",
)
@click.option(
    "--reference",
    is_flag=True,
    help="Compare with the reference backend in float32, on the same ids: its perplexity, and the divergence (KL) from it. Takes minutes and four bytes a weight.",
)
@click.option(
    "--peers",
    type=_peer_names,
    metavar="all|NAME,...",
    default="",
    help="Engines to compare too, with --reference; those that give logprobs: llama.cpp.",
)
@threads_option
@click.option(
    "--kv-dtype",
    type=click.Choice(["f16", "int8"]),
    default="f16",
    show_default=True,
    help="Keys and values in the KV cache. The reference keeps float32.",
)
@_json
def bench_quality(
    model: str,
    text_file: Path,
    window: int,
    reference: bool,
    peers: tuple[str, ...],
    threads: int | None,
    kv_dtype: "KvDtype",
    json_file: str | None,
) -> None:
    """Perplexity of MODEL over a text, cut into windows; the second half of each is scored.

    \b
    Examples:
      jilju bench quality smollm2-135m --text LICENSE
      jilju bench quality smollm2-135m --text LICENSE --reference --peers llama.cpp
    """
    import msgspec

    from jilju.bench.quality import measure_quality, windows
    from jilju.bench.report import compared_table
    from jilju.llm import LLM

    if peers and not reference:
        raise click.UsageError("--peers needs --reference, which is what all are compared with")
    programs = _programs(peers)
    agree(model)
    with fetching() as progress:
        llm = LLM(model, context=window, kv_memory="256MiB", threads=threads, kv_dtype=kv_dtype, progress=progress)
    with llm, counting("windows") as count:
        tokenizer = llm.text.tokenizer
        ids = tokenizer.encode(_read_text(text_file))
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        quality = measure_quality(llm.engine, ids, window=window, bos_id=bos, progress=count)
    compared = _compared(llm.path, list(windows(ids, window, bos)), programs, threads, kv_dtype) if reference else []
    told = {
        "model": llm.name,
        "text": text_file.name,
        "kv_dtype": kv_dtype,
        **msgspec.to_builtins(quality),
        "compared": compared,
    }
    _tell(told, [compared_table(compared)] if compared else [], json_file)
    if json_file != "-":
        click.echo(
            f"{llm.name}, {kv_dtype} KV: perplexity {quality.perplexity:.3f} over {quality.num_scored} tokens in {quality.num_windows} windows of {window}"
        )


def _compared(
    path: str, windows: list[list[int]], programs: "Sequence[PeerProgram]", threads: int | None, kv_dtype: "KvDtype"
) -> "list[Compared]":
    """What is compared: this machine's kernels and the peers, with the reference backend."""
    from jilju.assemble.bench import load_reference, load_stepped
    from jilju.assemble.engine import open_model
    from jilju.bench.divergence import ExecutorScores, compare

    file, window, num_threads = open_model(path), len(windows[0]), threads or usable_cores()[0]
    native = load_stepped(file, 1, window, num_threads, kv_dtype)
    with _running(programs, Path(path), num_threads, 1, window) as peers, counting("windows") as count:
        others: dict[str, Scorer] = {
            native.executor.kernel_set: ExecutorScores(native.executor, native.plan, native.limits)
        }
        others |= {peer.name: peer for peer in peers if peer.runs("logprobs")}
        return compare(ExecutorScores(*load_reference(file, window)), others, windows, progress=count)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path} is no UTF-8 at byte {error.start}; give a text file in UTF-8") from None


def _guard(max_others: float) -> "Guard":
    from jilju.bench.guard import Guard

    return Guard(max_others / 100)


def _tell(result: Any, tables: Sequence[Table], json_file: str | None) -> None:
    """JSON where it is wanted; the tables, unless standard output is taken by it."""
    _write_json(result, json_file)
    if json_file != "-":
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        for table in tables:
            console.print(table)


def _write_json(result: Any, json_file: str | None) -> None:
    import msgspec

    if json_file is None:
        return
    text = msgspec.json.format(msgspec.json.encode(result), indent=1).decode()
    if json_file == "-":
        click.echo(text)
    else:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


def _draw(chart_file: Path | None, title: str, note: str, groups: "list[Group]") -> None:
    from jilju.bench.chart import draw

    if chart_file is not None:
        chart_file.write_text(draw(title, note, groups), encoding="utf-8")
