"""Report: what was measured, as tables for a terminal and as groups of bars for a chart.

Owns the columns and their order. Knows nothing of how a figure is had.
"""

from collections.abc import Sequence

from rich.table import Table

from jilju.bench import bars
from jilju.bench.chart import Bar, Group
from jilju.bench.contention import Contention
from jilju.bench.divergence import Compared
from jilju.bench.engine import EngineShare
from jilju.bench.load import METRICS, LoadResult
from jilju.bench.machine import Machine
from jilju.bench.model import Figure, ModelReport
from jilju.bench.sampling import SamplingReport


def table_of(title: str, headings: Sequence[str]) -> Table:
    """The first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def machine_table(machine: Machine) -> Table:
    threads = range(1, len(machine.fma_gflop_s) + 1)
    title = f"roofs of this machine (others took up to {machine.others_share:.1%} of the cores)"
    table = table_of(title, ["", *(f"{n} thread{'s' * (n > 1)}" for n in threads), "unit"])
    for row in machine.bandwidth:
        table.add_row(f"read, working set {row.working_set_mb} MB", *(f"{rate:.1f}" for rate in row.gb_s), "GB/s")
    table.add_row("float32 FMA", *(f"{rate:.0f}" for rate in machine.fma_gflop_s), "GFLOP/s")
    for family, rates in machine.kernel_gop_s.items():
        table.add_row(f"linear kernel {family}", *(f"{rate:.0f}" for rate in rates), "GOP/s")
    return table


def machine_groups(machine: Machine) -> list[Group]:
    threads = range(1, len(machine.fma_gflop_s) + 1)

    def bars(rates: Sequence[float], unit: str) -> list[Bar]:
        return [Bar(f"{n} threads", rate, f"{rate:.1f} {unit}") for n, rate in zip(threads, rates, strict=True)]

    groups = [Group(f"read {row.working_set_mb} MB", bars(row.gb_s, "GB/s")) for row in machine.bandwidth]
    groups.append(Group("float32 FMA", bars(machine.fma_gflop_s, "GFLOP/s")))
    return groups + [Group(f"kernel {f}", bars(rates, "GOP/s")) for f, rates in machine.kernel_gop_s.items()]


def model_tables(report: ModelReport) -> list[Table]:
    """Speed beside the roofs; where the time goes; the peers, if there are any."""
    title = f"{report.model}, {report.kernel_set}, {report.num_threads} threads, medians of {report.num_rounds} rounds"
    speed = table_of(
        title, ["load", "tokens/s", "GB/s", "of bandwidth", "GOP/s", "of cap", "linear of peak", "others' CPU"]
    )
    for f in report.figures:
        speed.add_row(
            f.load.label, f"{f.tokens_per_s:.1f}", f"{f.gb_s:.1f}", f"{f.bandwidth_share:.0%} of {f.bandwidth_gb_s:.1f}",
            f"{f.gop_s:.0f}", f"{f.cap_share:.0%} of {f.cap_tokens_per_s:.0f} tok/s", f"{f.linear_share:.0%}", f"{f.others_share:.1%}",
        )  # fmt: skip
    kinds = [
        kind for kind in report.figures[0].time_shares if any(f.time_shares[kind] >= 0.001 for f in report.figures)
    ]
    times = table_of(
        "share of a step's time by kind of op; sampling with every filter on", ["load", *kinds, "sampling"]
    )
    for f in report.figures:
        sampling = "-" if f.sampling_share is None else f"{f.sampling_share:.1%}"
        times.add_row(f.load.label, *(f"{f.time_shares[kind]:.1%}" for kind in kinds), sampling)
    return [speed, times, *([peer_table(report)] if report.peer_notes else [])]


def peer_table(report: ModelReport) -> Table:
    names = list(report.peer_notes)
    headings = [heading for name in names for heading in (name, "ratio")]
    table = table_of("tokens/s beside other engines on the same file, in turn", ["load", "jilju", *headings])
    for f in report.figures:
        cells = [cell for name in names for cell in _peer_cells(f, name)]
        table.add_row(f.load.label, f"{f.tokens_per_s:.1f}", *cells)
    return table


def _peer_cells(figure: Figure, name: str) -> tuple[str, str]:
    rate = figure.peers.get(name)
    return ("-", "-") if rate is None else (f"{rate.tokens_per_s:.1f}", f"{rate.ratio:.2f}x")


def model_groups(report: ModelReport) -> list[Group]:
    groups = []
    for f in report.figures:
        bars = [Bar("jilju", f.tokens_per_s, f"{f.tokens_per_s:.0f} tok/s, {f.bandwidth_share:.0%} of bandwidth")]
        bars += [Bar(name, r.tokens_per_s, f"{r.tokens_per_s:.0f} tok/s") for name, r in f.peers.items()]
        groups.append(Group(f.load.label, bars))
    return groups


LONG = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end to end",
}


def overhead_table(result: bars.OverheadFigures) -> Table:
    table = table_of(f"{result.model}: what accounting costs, medians of {result.num_rounds} rounds", ["", ""])
    table.add_row("the log by itself, a step", f"{result.step_us:.2f} us")
    table.add_row("and each row", f"{result.row_us:.2f} us")
    table.add_row(f"of the median step of {result.median_step_ms:.1f} ms", f"{result.log_share:.3%}")
    spread = f"{result.on_share_low:+.2%} to {result.on_share_high:+.2%}"
    table.add_row("everything on, CPU time of both processes", f"{result.on_share:+.2%} ({spread})")
    table.add_row("an open page, of a core", f"{result.page_core_share:.2%}")
    table.add_row("others took of the cores, at most", f"{result.others_share:.1%}")
    return table


def load_tables(result: LoadResult) -> list[Table]:
    title = f"{result.model}: {result.completed} requests in {result.duration:.1f} s, {result.failed} failed"
    rates = table_of(title, ["", ""])
    rates.add_row("request throughput", f"{result.request_throughput:.2f}/s")
    if result.request_goodput is not None:
        rates.add_row("request goodput", f"{result.request_goodput:.2f}/s")
    rates.add_row("output token throughput", f"{result.output_throughput:.1f} tok/s")
    rates.add_row("total token throughput", f"{result.total_token_throughput:.1f} tok/s")
    rates.add_row("most requests at once", str(result.max_concurrent_requests))
    rates.add_row("this client's CPU", f"{result.client_cpu_share:.1%} of a core")
    if result.first_error is not None:
        rates.add_row("first error", result.first_error)
    times = table_of("milliseconds", ["", "mean", "median", "p95", "p99"])
    for name in METRICS:
        row = [getattr(result, f"{statistic}_{name}_ms") for statistic in ("mean", "median", "p95", "p99")]
        times.add_row(f"{LONG[name]} ({name})", *(f"{value:.1f}" for value in row))
    return [rates, times]


def load_groups(result: LoadResult) -> list[Group]:
    return [
        Group(LONG[name], [
            Bar(statistic, value, f"{value:.0f} ms")
            for statistic in ("median", "p95", "p99")
            for value in [getattr(result, f"{statistic}_{name}_ms")]
        ])
        for name in METRICS
    ]  # fmt: skip


def compared_table(compared: Sequence[Compared]) -> Table:
    """The reference stands first."""
    table = table_of(
        "beside the reference backend, on the same ids", ["", "perplexity", "of reference", "KL, nats", "±"]
    )
    for c in compared:
        kl = ["-", "-"] if c.kl is None else [f"{c.kl:.2e}", f"{c.kl_error:.0e}"]
        table.add_row(c.name, f"{c.perplexity:.3f}", f"{c.perplexity / compared[0].perplexity - 1:+.2%}", *kl)
    return table


def engine_table(e: EngineShare) -> Table:
    table = table_of(f"{e.model}, {e.rows} rows, mean of {e.num_steps} steps", ["part of a step", "us", "share"])
    parts = {
        "decide": e.schedule_us, "pack": e.pack_us, "backend": e.backend_us, "commit": e.commit_us, "link, to the next": e.link_us,
    }  # fmt: skip
    for name, us in parts.items():
        table.add_row(name, f"{us:.0f}", f"{us / e.step_us:.1%}")
    table.add_row("all but the backend", f"{e.step_us - e.backend_us:.0f}", f"{e.share:.1%}")
    return table


def sampling_table(r: SamplingReport) -> Table:
    title = (
        f"{r.model}, {r.vocab_size} words, {r.rows} rows, {r.kernel_set}, {r.num_threads} threads, "
        f"medians of {r.num_rounds} rounds"
    )
    table = table_of(title, ["sampling", "ms a step", "step ms", "share", "others' CPU"])
    for c in r.costs:
        table.add_row(c.way, f"{c.sample_ms:.3f}", f"{c.step_ms:.2f}", f"{c.share:.1%}", f"{c.others_share:.1%}")
    return table


def contention_table(c: Contention) -> Table:
    title = f"{c.model}, {c.rows} x 1 at {c.context}, {c.num_threads} threads"
    table = table_of(title, ["", "ms a step", "ratio"])
    table.add_row("undisturbed", f"{c.step_ms:.2f}", "")
    table.add_row(
        f"a neighbour takes {c.neighbour_share:.0%} of a core", f"{c.disturbed_step_ms:.2f}", f"{c.ratio:.2f}x"
    )
    return table


MARKS = {True: "pass", False: "SHORT", None: ""}


def bars_table(found: Sequence["bars.Bar"]) -> Table:
    table = Table(title="bars", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "bar", "limit", "measured", "part"):
        table.add_column(heading, justify="right" if heading in ("limit", "measured") else "left")
    for bar in found:
        table.add_row(MARKS[bar.is_met], bar.text, bar.limit, bar.measured, bar.part)
    return table
