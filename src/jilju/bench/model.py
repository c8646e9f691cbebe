"""Model: how fast a model's steps are, beside the machine's roofs and beside other engines.

Owns the figures of `jilju bench model` and how each is had. A load is a prompt of so many tokens in one row, or a step of so many
rows at such a context. In every round a load runs here, then the roofs are measured (read bandwidth over as many bytes as the step
reads, each kernel family's peak), then each peer runs the same load. Knows nothing of backends or of how peers work.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import msgspec

from jilju.bench.batches import Sampling
from jilju.bench.guard import Guard
from jilju.bench.machine import Probes
from jilju.bench.peers import Peer
from jilju.bench.rounds import Contender, Rounds, take_turns
from jilju.bench.steps import ProfiledExecutor, Steps, decode_shape, prefill_shape
from jilju.plan import Attention, Linear, Plan, StepShape

RUN_S = 0.5  # a run lasts at least so long; the guard sees the clock ticks of the system, 10 ms each
ROOF_S = 0.2
OURS, BANDWIDTH = "jilju", "read bandwidth"
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)  # every filter at work


class Load(msgspec.Struct, frozen=True):
    kind: Literal["prefill", "decode"]
    rows: int  # 1 in prefill
    tokens: int  # prefill: of the prompt; decode: before each row's own

    @property
    def shape(self) -> StepShape:
        return prefill_shape(self.tokens) if self.kind == "prefill" else decode_shape(self.rows, self.tokens)

    @property
    def label(self) -> str:
        return f"prefill {self.tokens}" if self.kind == "prefill" else f"decode {self.rows} x 1 at {self.tokens}"


class Rate(msgspec.Struct, frozen=True):
    tokens_per_s: float
    ratio: float  # ours over the peer's: median over rounds


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    load: Load
    tokens_per_s: float
    gb_s: float  # packed weights and KV cache
    gop_s: float
    bandwidth_gb_s: float  # what all threads read of a buffer of as many bytes
    bandwidth_share: float
    cap_tokens_per_s: float  # if the linear ops ran at their kernels' peaks and nothing else took time
    cap_share: float
    linear_share: float  # of the mix-weighted kernel peak, while linear ops run
    kernel_gop_s: dict[str, float]  # peaks, by family
    time_shares: dict[str, float]  # by kind of op
    sampling_share: float | None  # of a decode step whose rows all sample with every filter on
    peers: dict[str, Rate]
    others_share: float


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    kernel_set: str
    num_threads: int
    num_rounds: int
    figures: list[Figure]
    peer_notes: dict[str, str]  # what a peer says of itself, or why it does not run this file


class Subject(msgspec.Struct, frozen=True):
    """The model that is measured, loaded."""

    name: str
    plan: Plan
    executor: ProfiledExecutor
    kv_element_bytes: int
    steps: Steps
    num_threads: int


def measure_model(
    subject: Subject,
    loads: Sequence[Load],
    probes: Probes,
    peers: Sequence[Peer],
    *,
    guard: Guard,
    num_rounds: int = 5,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> ModelReport:
    """Raises BusyMachine."""
    total = len(loads) * num_rounds
    figures: list[Figure] = []
    for load in loads:
        told = partial(_tell, progress, len(figures) * num_rounds, total, load.label)
        figures.append(measure_load(subject, load, probes, peers, guard, num_rounds, told))
    return ModelReport(
        model=subject.name,
        kernel_set=subject.executor.kernel_set,
        num_threads=subject.num_threads,
        num_rounds=num_rounds,
        figures=figures,
        peer_notes={peer.name: peer.note for peer in peers},
    )


def _tell(progress: Callable[[int, int, str], None], before: int, total: int, label: str, done: int) -> None:
    progress(before + done, total, label)


def measure_load(
    subject: Subject,
    load: Load,
    probes: Probes,
    peers: Sequence[Peer],
    guard: Guard,
    num_rounds: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Figure:
    shape, plan = load.shape, subject.plan
    work = linear_work(plan, shape, probes)
    num_bytes = step_bytes(plan, shape, subject.kv_element_bytes, probes)
    times = OpLedger(subject.executor)

    def ours() -> float:
        with times:
            return load.shape.num_tokens / run_load(subject.steps, load)

    contenders = [
        Contender(OURS, ours),
        Contender(BANDWIDTH, lambda: probes.read_bandwidth(num_bytes, subject.num_threads, ROOF_S)),
        *(Contender(family, partial(probes.kernel_peak, family, subject.num_threads, ROOF_S)) for family in work),
        *(Contender(peer.name, partial(run_peer, peer, load), (peer.pid,)) for peer in peers if peer.runs(load.kind)),
    ]
    subject.steps.fill(load.rows, load.tokens if load.kind == "decode" else 0)
    done = take_turns(contenders, num_rounds, guard, progress)
    return figure_of(subject, load, work, num_bytes, times, done, peers)


def figure_of(
    subject: Subject,
    load: Load,
    work: dict[str, float],
    num_bytes: int,
    times: "OpLedger",
    done: Rounds,
    peers: Sequence[Peer],
) -> Figure:
    shape, plan = load.shape, subject.plan
    rate = done.median(OURS)
    seconds = shape.num_tokens / rate  # of one pass
    peaks = {family: done.median(family) for family in work}
    best_s = sum(gop / peaks[family] for family, gop in work.items())  # the linear ops at their kernels' peaks
    gb_s, gb_s_by_round = num_bytes / seconds / 1e9, [num_bytes * r / shape.num_tokens / 1e9 for r in done.rates[OURS]]
    shares = times.shares()
    sampling_share = None
    if load.kind == "decode":
        with (sampled := OpLedger(subject.executor)):
            subject.steps.decode(load.rows, load.tokens, RUN_S, SAMPLED)
        sampling_share = sampled.shares()["sample"]
    return Figure(
        load=load,
        tokens_per_s=rate,
        gb_s=gb_s,
        gop_s=plan.flops(shape) / seconds / 1e9,
        bandwidth_gb_s=done.median(BANDWIDTH),
        bandwidth_share=statistics.median(a / b for a, b in zip(gb_s_by_round, done.rates[BANDWIDTH], strict=True)),
        cap_tokens_per_s=shape.num_tokens / best_s,
        cap_share=best_s / seconds,
        linear_share=best_s / (seconds * shares["linear"]),
        kernel_gop_s=peaks,
        time_shares=shares,
        sampling_share=sampling_share,
        peers={p.name: Rate(done.median(p.name), done.ratio(OURS, p.name)) for p in peers if p.name in done.rates},
        others_share=done.others_share,
    )


def run_load(steps: Steps, load: Load) -> float:
    """Seconds of one pass."""
    if load.kind == "decode":
        return steps.decode(load.rows, load.tokens, RUN_S)
    passes = [steps.prefill(load.tokens)]
    while sum(passes) < RUN_S:
        passes.append(steps.prefill(load.tokens))
    return statistics.fmean(passes)


def run_peer(peer: Peer, load: Load) -> float:
    """Tokens per second."""
    if load.kind == "decode":
        return peer.decode(load.rows, load.tokens, RUN_S)
    return peer.prefill(load.tokens, RUN_S)


class OpLedger:
    """Within `with`, adds up where an executor's time goes."""

    def __init__(self, executor: ProfiledExecutor):
        self._executor = executor
        self._ns: Counter[str] = Counter()

    def __enter__(self) -> "OpLedger":
        self._ns.subtract(self._executor.profile().ns)
        return self

    def __exit__(self, *exc: object) -> None:
        self._ns.update(self._executor.profile().ns)

    def shares(self) -> dict[str, float]:
        total = self._ns.total()
        return {kind: ns / total for kind, ns in self._ns.items()}


def linear_work(plan: Plan, shape: StepShape, probes: Probes) -> dict[str, float]:
    """GOP of the linear ops by kernel family, a multiply-add being two."""
    work: Counter[str] = Counter()
    for op in plan.ops:
        if isinstance(op, Linear):
            rows = shape.num_tokens if op.x.rows == "tokens" else shape.num_logits
            for part in op.parts:
                work[probes.family_of(part.type)] += 2 * rows * part.num_outputs * part.num_inputs
    return {family: count / 1e9 for family, count in work.items()}


def step_bytes(plan: Plan, shape: StepShape, kv_element_bytes: int, probes: Probes) -> int:
    """What a step must read: each matrix once, packed, and the keys and values of every row; what it writes of them besides."""
    total, weight_bytes = 0, probes.weight_bytes(plan)
    for op in plan.ops:
        if isinstance(op, Linear):
            total += sum(weight_bytes[part.name] for part in op.parts)
        elif isinstance(op, Attention):
            total += op.bytes(shape, kv_element_bytes)
    return total
