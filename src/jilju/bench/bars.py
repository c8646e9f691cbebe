"""Bars: what the project means to reach, each beside what was measured.

Owns the list of bars and how each is read from the files that the benchmarks write (`--json`). A bar whose measurement is not there
says so; one without a limit is told for orientation. Knows nothing of how anything is measured.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from jilju.bench.contention import Contention
from jilju.bench.divergence import Compared
from jilju.bench.engine import EngineShare
from jilju.bench.load import LoadResult
from jilju.bench.model import Figure, Load, ModelReport
from jilju.errors import ConfigError

LONG, SHORT = 512, 128  # tokens before a row's own: of a single stream, of rows side by side
PREFILL = Load("prefill", 1, 512)
ONE = Load("decode", 1, LONG)
EIGHT, SIXTEEN = Load("decode", 8, SHORT), Load("decode", 16, SHORT)
NAMED = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")
GUIDES = {"smollm2-135m": 1000.0, "qwen2.5-coder-0.5b": 300.0}  # tokens/s of prefill 512
# Ratios to other engines: prefill 512, decode of one row, of 16 rows; None: no bar.
LLAMA_CPP = {
    "smollm2-135m": (4.0, 1.5, 5.0),
    "gemma3-270m": (3.0, 1.5, 2.5),
    "qwen2.5-coder-0.5b": (2.7, 1.5, 3.0),
    "smollm2-135m-q4_0": (2.0, 1.2, 2.5),  # formats that llama.cpp has its best kernels for
    "smollm2-135m-q8_0": (2.0, 1.2, 2.5),
    "llama-2048-q4_k": (2.0, 1.2, 2.5),
}
OTHERS = {"openvino": (3.0, 2.5, 4.0), "transformers": (2.5, None, None)}  # on the first named model
OWN_BYTES = 120e6  # of an engine's process besides packed weights and KV cache
READY_S = {"smollm2-135m": 1.0, "qwen2.5-coder-0.5b": 2.0}
MAX_KL, MAX_PERPLEXITY_CHANGE = 1e-3, 0.005
IDLE_SHARE = 0.005  # of a core: what rounds to 0 %
# Output tokens/s beside the other server's, at least, and the time to first token, at most.
SERVED, SERVED_SHARED = (3.0, 1 / 3), (4.0, 1 / 5)
# Under load: of the peak at ten times the peak, ms of a refusal, s until first tokens are as before, of the bound of a step, MiB.
KEPT, REFUSAL_MS, RECOVERY_S, GAP_SHARE, GROWTH_MIB = 0.80, 50.0, 10.0, 1.25, 2.0

# Of a decode step that masks may add; of the p99 gap of streams beside hostile grammars; s until one of these is refused.
MASK_SHARE, HOSTILE_CHANGE, GRAMMAR_REFUSAL_S = 0.05, 0.10, 2.0
BLAMED = 0.9
LOG_STEP_US, LOG_ROW_US, LOG_SHARE, ON_SHARE, PAGE_SHARE = 5.0, 0.7, 0.001, 0.01, 0.005

T = TypeVar("T")


class Bar(msgspec.Struct, frozen=True):
    part: str
    text: str
    limit: str  # as it is shown
    measured: str
    is_met: bool | None  # None: not measured, or no limit


class StartFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model, as `benchmarks/start.py` writes it; medians."""

    model: str
    first_ready_s: float  # of the first start, which packs the weights
    ready_s: float
    first_token_s: float
    engine_private_bytes: int
    weight_bytes: int  # packed, and what is read of the file
    kv_bytes: int
    server_resident_bytes: int
    idle_share: float  # of one core, both processes


class ServedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one load, as `benchmarks/served.py` writes it."""

    load: str
    shares_prefix: bool
    ours: LoadResult
    peer: LoadResult | None
    peer_name: str


class OpenLoop(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rate of arrivals, as the client saw it; rates are a second of arrivals."""

    rate: float
    goodput: float  # complete answers whose first token and mean gap were in time
    by_status: dict[str, int]  # answers by HTTP status; 0: none came
    num_late: int  # complete, but not in time
    first_token_p50_ms: float
    first_token_p99_ms: float
    token_p99_ms: float  # of answers' mean gaps
    refusal_p50_ms: float  # from the connection's begin to the whole 429
    refusal_p99_ms: float
    client_lag_p99_ms: float  # how late the client's own loop was
    client_lag_max_ms: float
    others_share: float


class OverloadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `benchmarks/overload.py` writes it."""

    model: str
    num_input: int
    num_output: int
    peak_goodput: float  # a second, of a closed loop
    peak_concurrency: int
    base: OpenLoop
    over: OpenLoop
    after: OpenLoop
    recovery_s: (
        float | None
    )  # from the end of the overload until the p99 of first tokens is as before; None: it never was
    num_left: int  # sequences in the engine at the end

    @property
    def kept(self) -> float:
        """Goodput under overload, of the peak."""
        return self.over.goodput / self.peak_goodput


class LongPromptFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `benchmarks/long_prompt.py` writes it; of the steps and gaps of tokens while the prompt was computed."""

    model: str
    num_prompt: int
    num_streams: int
    token_gap_ms: float
    first_token_s: float  # of the long prompt, median
    num_steps: int
    num_over_bound: int  # steps that were predicted to take more than their bound
    step_share_p50: float  # of steps: measured of predicted time
    step_share_p99: float
    num_gaps: int
    gap_p50_ms: float
    gap_p99_ms: float
    gap_share_p50: float  # of gaps: of the bound, that of token_gap_ms or of the step where that is larger
    gap_share_p99: float
    gap_share_max: float
    others_share: float


class CancellationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `benchmarks/cancellations.py` writes it."""

    model: str
    num_cancelled: int
    num_before_first_token: int  # of them, in the queue or in prefill
    num_steps: int
    num_late_steps: int  # ended with a sequence whose client had left before the step before them began
    settled_s: float  # from the last cancellation until nobody runs or waits
    num_left: int  # sequences and held blocks afterwards, broken conservation laws, calls that are not accounted for


class MemoryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `benchmarks/memory.py` writes it; growth between two counts of requests, in bytes."""

    model: str
    first_request: int
    last_request: int
    num_steps: int
    server_anonymous: int
    server_resident: int
    engine_anonymous: int
    engine_resident: int
    kept: int = 0  # of the server's: the log, marks of calls and the run store, which grow up to their bounds

    @property
    def anonymous(self) -> int:
        """Without what is kept on purpose, and without pages of files, such as the table of embeddings, which come in as words
        are used and can go again."""
        return self.server_anonymous + self.engine_anonymous - self.kept


class LedgerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `benchmarks/ledger.py` writes it."""

    model: str
    num_requests: int
    num_unbalanced: int  # runs whose intervals do not sum to their wall time
    num_off: int  # runs whose time is not their client's within 1 % + 5 ms
    num_timed: int  # runs that were answered, so that a client has a time
    num_preempted: int
    num_resumed: int  # over deaths of the engine
    num_cancelled: int
    num_kills: int
    imbalance: float  # broken conservation laws at the end
    excess_ms: float  # client's clock over the run's time, median
    excess_ms_max: float
    blamed_share: float  # on a long prompt, of what a short stream beside it lost to others; the least of all streams


class OverheadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `jilju bench overhead` writes it; shares of CPU time are of both processes together, medians over rounds."""

    model: str
    step_us: float  # what the log takes of a step, by itself, in both processes
    row_us: float  # and of each of its rows
    median_step_ms: float
    log_share: float  # of the median step
    num_rounds: int
    on_share: float  # CPU time of a token with everything on, beside one with everything off
    on_share_low: float  # quartiles
    on_share_high: float
    page_core_share: float  # of a core, what the server takes more while a page is open
    others_share: float


class MaskFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of rows that decode side by side, held to grammars and not; shares are of a step without, medians over rounds."""

    model: str
    vocab_size: int
    num_rows: int
    num_rounds: int
    step_ms: float  # sampled
    held_step_ms: float
    share: float
    greedy_step_ms: float
    greedy_held_step_ms: float
    greedy_share: float
    in_loop_step_ms: float  # with masks filled by the step loop itself, for comparison
    in_loop_share: float
    fill_p50_ms: float  # of a step's masks, by the thread that fills them beside the model
    fill_p99_ms: float
    fill_max_ms: float
    others_share: float


class HostileFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of streams beside hostile grammars; in turn beside plain calls, and with nothing beside them."""

    model: str
    num_streams: int
    rate: float  # calls a second
    num_rounds: int
    num_sent: int
    num_refused: int  # of them; the others turn out to be harmless
    num_failed: int  # with a fault of ours, or without an answer
    refusal_p50_s: float
    refusal_max_s: float
    answer_max_s: float  # of the harmless ones
    quiet_p50_ms: float  # gaps between tokens
    quiet_p99_ms: float
    plain_p50_ms: float
    plain_p99_ms: float
    hostile_p50_ms: float
    hostile_p99_ms: float
    hostile_max_ms: float
    p50_change: float  # from quiet to hostile, median over rounds
    p99_change: float
    p99_change_from_plain: float
    others_share: float


class FirstGrammarFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of streams while the first grammar since a server's start comes; medians over starts."""

    model: str
    num_streams: int
    num_starts: int
    gap_p50_ms: float
    gap_max_ms: float  # before it comes
    stall_ms: float  # longest gap while it does
    stall_max_ms: float
    took_s: float
    second_stall_ms: float  # while another one comes
    second_took_s: float
    others_share: float


class StructuredFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As `benchmarks/structured.py` writes it; None: that part was not measured."""

    masks: MaskFigures | None
    hostile: HostileFigures | None
    first: FirstGrammarFigures | None


class QualityFigures(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    compared: list[Compared]


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    models: dict[str, ModelReport]
    engines: list[EngineShare]
    contentions: list[Contention]
    starts: list[StartFigures]
    served: list[ServedFigures]
    overload: OverloadFigures | None
    long_prompt: LongPromptFigures | None
    cancellations: CancellationFigures | None
    memory: MemoryFigures | None
    ledger: LedgerFigures | None
    overhead: OverheadFigures | None
    structured: StructuredFigures | None
    qualities: list[QualityFigures]


def read_results(folder: Path) -> Results:
    """Of the folder's JSON files, told apart by how their names begin. Raises ConfigError for one that is something else."""

    def read(prefix: str, type_: type[T]) -> list[T]:
        found = []
        for path in sorted(folder.glob(f"{prefix}*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=type_))
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{path} is no result of this version ({error}); measure again, or delete it"
                ) from error
        return found

    return Results(
        models={report.model: report for report in read("model-", ModelReport)},
        engines=read("engine", EngineShare),
        contentions=read("contention", Contention),
        starts=[figures for file in read("start", list[StartFigures]) for figures in file],
        served=[figures for file in read("served", list[ServedFigures]) for figures in file],
        overload=next(iter(read("overload", OverloadFigures)), None),
        long_prompt=next(iter(read("long-prompt", LongPromptFigures)), None),
        cancellations=next(iter(read("cancellations", CancellationFigures)), None),
        memory=next(iter(read("memory", MemoryFigures)), None),
        ledger=next(iter(read("ledger", LedgerFigures)), None),
        overhead=next(iter(read("overhead", OverheadFigures)), None),
        structured=next(iter(read("structured", StructuredFigures)), None),
        qualities=read("quality-", QualityFigures),
    )


def bars_of(results: Results) -> list[Bar]:
    return [
        *_roofs(results),
        *_peers(results),
        *_sampling_and_engine(results),
        *_quality(results),
        *_process(results),
        *_served(results),
        *_loads(results),
        *_account(results),
        *_structured(results),
    ]


def at_least(part: str, text: str, measured: float | None, limit: float, shown: str) -> Bar:
    """`shown` formats both numbers."""
    told = "not measured" if measured is None else shown.format(measured)
    return Bar(part, text, ">= " + shown.format(limit), told, None if measured is None else measured >= limit)


def at_most(part: str, text: str, measured: float | None, limit: float, shown: str) -> Bar:
    told = "not measured" if measured is None else shown.format(measured)
    return Bar(part, text, "<= " + shown.format(limit), told, None if measured is None else measured <= limit)


def _figure(results: Results, model: str, load: Load) -> Figure | None:
    report = results.models.get(model)
    return next((f for f in report.figures if f.load == load), None) if report is not None else None


def _roofs(results: Results) -> Iterator[Bar]:
    for model in NAMED:
        one, prefill = _figure(results, model, ONE), _figure(results, model, PREFILL)
        text = f"{model}, {ONE.label}: share of read bandwidth"
        yield at_least("roof", text, one.bandwidth_share if one else None, 0.85, "{:.0%}")
        text = f"{model}, {PREFILL.label}: linear ops, share of kernel peak"
        yield at_least("roof", text, prefill.linear_share if prefill else None, 0.65, "{:.0%}")
        if model in GUIDES:
            text = f"{model}, {PREFILL.label}: tokens/s, a guide"
            yield at_least("roof", text, prefill.tokens_per_s if prefill else None, GUIDES[model], "{:.0f}")
        for load, limit in ((EIGHT, 0.60), (SIXTEEN, 0.65)):
            figure = _figure(results, model, load)
            text = f"{model}, {load.label}: share of cap"
            yield at_least("roof", text, figure.cap_share if figure else None, limit, "{:.0%}")


def _peers(results: Results) -> Iterator[Bar]:
    for model, limits in LLAMA_CPP.items():
        yield from _ratios(results, "llama.cpp", model, limits)
    for peer, own_limits in OTHERS.items():
        yield from _ratios(results, peer, NAMED[0], own_limits)


def _ratios(results: Results, peer: str, model: str, limits: tuple[float | None, ...]) -> Iterator[Bar]:
    for load, limit in zip((PREFILL, ONE, SIXTEEN), limits, strict=True):
        if limit is not None:
            figure = _figure(results, model, load)
            rate = figure.peers.get(peer) if figure is not None else None
            yield at_least(peer, f"{model}, {load.label}", rate.ratio if rate else None, limit, "{:.2f}x")


def _sampling_and_engine(results: Results) -> Iterator[Bar]:
    for model in NAMED:
        figures = [f for load in (ONE, SIXTEEN) if (f := _figure(results, model, load)) is not None]
        worst = max((f.sampling_share for f in figures if f.sampling_share is not None), default=None)
        yield at_most("step", f"{model}: sampling with every filter, share of a decode step", worst, 0.05, "{:.1%}")
    share = max((engine.share for engine in results.engines), default=None)
    yield at_most("step", "engine's own Python at 16 rows, share of a step", share, 0.05, "{:.1%}")
    ratio = max((contention.ratio for contention in results.contentions), default=None)
    yield at_most("step", "decode step beside a process that takes half of one core of two", ratio, 1.53, "{:.2f}x")


def _quality(results: Results) -> Iterator[Bar]:
    """Of each file that was compared with the reference; ours stands second there."""
    compared = [quality for quality in results.qualities if quality.compared]
    if not compared:
        yield at_most("quality", "KL from float32, every format", None, MAX_KL, "{:.1e}")
    for quality in compared:
        reference, native, *peers = quality.compared
        change = abs(native.perplexity / reference.perplexity - 1)
        yield at_most("quality", f"{quality.model}: perplexity beside float32", change, MAX_PERPLEXITY_CHANGE, "{:.2%}")
        limit = max([MAX_KL, *(peer.kl for peer in peers if peer.kl is not None)])
        text = f"{quality.model}: KL from float32" + (" (limit: llama.cpp's)" if limit > MAX_KL else "")
        yield at_most("quality", text, native.kl, limit, "{:.1e}")


def _process(results: Results) -> Iterator[Bar]:
    starts = {start.model: start for start in results.starts}
    for model, limit in READY_S.items():
        start = starts.get(model)
        yield at_most("process", f"{model}: start to ready, s", start.ready_s if start else None, limit, "{:.2f}")
        own = start.engine_private_bytes - start.weight_bytes - start.kv_bytes if start else None
        text = f"{model}: engine's private memory besides packed weights and KV, MB"
        yield at_most("process", text, own / 1e6 if own is not None else None, OWN_BYTES / 1e6, "{:.0f}")
        resident = start.server_resident_bytes / 1e6 if start else None
        yield at_most("process", f"{model}: server's memory, MB", resident, 180, "{:.0f}")
        text = f"{model}: CPU of an idle server, share of a core"
        yield at_most("process", text, start.idle_share if start else None, IDLE_SHARE, "{:.1%}")


def _served(results: Results) -> Iterator[Bar]:
    """Beside the other server: the rate, and the time to first token: its median, or its p95 where prompts share a prefix."""
    for text, shares_prefix, limits in (
        ("streams side by side", False, SERVED),
        ("streams with a shared prefix", True, SERVED_SHARED),
    ):
        found = [s for s in results.served if s.shares_prefix == shares_prefix and s.peer is not None]
        if not found:
            yield at_least("served", f"{text}: output tokens/s", None, limits[0], "{:.1f}x")
        for served in found:
            ours, peer = served.ours, served.peer
            assert peer is not None
            rate = ours.output_throughput / peer.output_throughput
            yield at_least(
                "served", f"{served.load}: output tokens/s beside {served.peer_name}", rate, limits[0], "{:.1f}x"
            )
            if shares_prefix:
                name, first = "p95", ours.p95_ttft_ms / peer.p95_ttft_ms
            else:
                name, first = "median", ours.median_ttft_ms / peer.median_ttft_ms
            yield at_most(
                "served",
                f"{served.load}: {name} time to first token beside {served.peer_name}",
                first,
                limits[1],
                "{:.2f}x",
            )


def _loads(results: Results) -> Iterator[Bar]:
    over, long, left, memory = results.overload, results.long_prompt, results.cancellations, results.memory
    text = "ten times the peak's arrivals: "
    yield at_least("load", text + "goodput, of the peak", over.kept if over else None, KEPT, "{:.0%}")
    refusal = over.over.refusal_p99_ms if over else None
    yield at_most("load", text + "p99 of a refusal, ms", refusal, REFUSAL_MS, "{:.0f}")
    recovery = (math.inf if over.recovery_s is None else over.recovery_s) if over else None
    yield at_most("load", text + "s until first tokens are as before", recovery, RECOVERY_S, "{:.0f}")
    yield at_most("load", text + "sequences left over", over.num_left if over else None, 0, "{:.0f}")
    text = "a long prompt beside streams: "
    num_over = long.num_over_bound if long else None
    yield at_most("load", text + "steps predicted above their bound", num_over, 0, "{:.0f}")
    share = long.gap_share_p99 if long else None
    yield at_most("load", text + "p99 gap of a stream, of the bound", share, GAP_SHARE, "{:.2f}")
    text = "clients that leave: "
    num_late = left.num_late_steps if left else None
    yield at_most("load", text + "steps that still hold one a step later", num_late, 0, "{:.0f}")
    yield at_most("load", text + "sequences, blocks, calls left over", left.num_left if left else None, 0, "{:.0f}")
    growth = memory.anonymous / (1 << 20) if memory else None
    yield at_most("load", "growth of both processes over 8,000 requests, MiB", growth, GROWTH_MIB, "{:.1f}")


def _account(results: Results) -> Iterator[Bar]:
    ledger, overhead = results.ledger, results.overhead
    text = "a mixed load: "
    unbalanced = ledger.num_unbalanced if ledger else None
    yield at_most("ledger", text + "runs whose intervals do not sum to their time", unbalanced, 0, "{:.0f}")
    off = ledger.num_off if ledger else None
    yield at_most("ledger", text + "runs off their client's clock by over 1 % + 5 ms", off, 0, "{:.0f}")
    yield at_most("ledger", text + "broken conservation laws", ledger.imbalance if ledger else None, 0, "{:.0f}")
    blamed = ledger.blamed_share if ledger else None
    yield at_least("ledger", "blamed on a long prompt, of what streams beside it lose", blamed, BLAMED, "{:.0%}")
    yield at_most("log", "us of a step", overhead.step_us if overhead else None, LOG_STEP_US, "{:.2f}")
    yield at_most("log", "us of a row", overhead.row_us if overhead else None, LOG_ROW_US, "{:.2f}")
    yield at_most("log", "of the median step", overhead.log_share if overhead else None, LOG_SHARE, "{:.3%}")
    yield at_most("log", "everything on, of CPU time", overhead.on_share if overhead else None, ON_SHARE, "{:+.2%}")
    page = overhead.page_core_share if overhead else None
    yield at_most("log", "an open page, of a core", page, PAGE_SHARE, "{:.2%}")


def _structured(results: Results) -> Iterator[Bar]:
    figures = results.structured
    masks, hostile = (figures.masks, figures.hostile) if figures else (None, None)
    share = max(masks.share, masks.greedy_share) if masks else None
    yield at_most("form", "what masks of 8 rows add to a decode step", share, MASK_SHARE, "{:.1%}")
    text = "hostile grammars beside streams: "
    refusal = hostile.refusal_max_s if hostile else None
    yield at_most("form", text + "s until the slowest is refused", refusal, GRAMMAR_REFUSAL_S, "{:.2f}")
    change = hostile.p99_change if hostile else None
    yield at_most("form", text + "p99 gap of a stream, beside quiet", change, HOSTILE_CHANGE, "{:+.0%}")
    yield at_most("form", text + "faults of ours", hostile.num_failed if hostile else None, 0, "{:.0f}")
