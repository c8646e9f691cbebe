"""Frames for the engine page's tests: a small made-up engine whose log can be cut into the frame of any window.

Owns a toy scheduler that runs on made-up time, so that steps, rows, blocks, queue and ledgers agree with each other as those
of a real log do. Built of the real wire types: a field that the contract gains or loses breaks here first. Knows nothing of HTTP.
"""

import random
from dataclasses import dataclass, field
from statistics import median

from jilju.account.frame import (
    Blocks,
    Cost,
    Counts,
    Energy,
    Frame,
    HeldBlocks,
    LedgerPart,
    MachineTime,
    Mark,
    Owned,
    Percentiles,
    RunningRow,
    Share,
    StepColumns,
    Tiles,
    WaitingRow,
    Waterfall,
)
from jilju.serve.runs.types import StepOp, StepOps

FIRST_MS = 5_000_000.0  # of a monotonic clock, which begins anywhere
UNIX_MS = 1_767_235_200_000.0  # wall clock at FIRST_MS: 2026-01-01 02:40 UTC
BLOCK = 16
BLOCKS = 640
MAX_ROWS = 8
TOKEN_BUDGET = 256
RUSH_MS = 6000.0  # at the end of the log, so that somebody waits there
READ_BYTES_PER_S = 29.8e9
FLOPS_PER_S = 6.2e12
WEIGHT_BYTES = 290_000_000
PRICE = 0.05  # an hour


@dataclass(eq=False)
class Call:
    number: int
    arrival_ms: float
    prompt: int
    cached: int
    want: int
    computed: int = 0
    output: int = 0
    begin_ms: float = 0.0
    end_ms: float = 0.0
    first_ms: float = 0.0
    parts: list[tuple[str, float]] = field(default_factory=list)
    phase: str = ""
    stretch: int = 0  # where the phase's parts begin

    @property
    def run(self) -> str | None:
        return None if self.number % 7 == 3 else f"chatcmpl-{self.number:04d}b7c2"

    @property
    def blocks(self) -> int:
        return -(-max(self.computed, 1) // BLOCK)

    def spend(self, kind: str, ms: float) -> None:
        """Within a stretch of prefill or decode steps, as in the log's own ledgers, the parts are summed by kind."""
        phase = kind.partition("_")[0]
        phase = self.phase if phase == "host" else phase
        if phase != self.phase:
            self.phase, self.stretch = phase, len(self.parts)
        for place in range(self.stretch, len(self.parts)):
            if self.parts[place][0] == kind:
                self.parts[place] = (kind, self.parts[place][1] + ms)
                return
        self.parts.append((kind, ms))

    def waterfall(self) -> Waterfall:
        before = [
            ("receive", 0.3),
            ("parse", 0.2),
            ("render", 0.3),
            ("tokenize", self.prompt * 0.004),
            ("link_in", 0.3),
        ]
        parts = [*before, *self.parts, ("link_out", 0.3), ("text", 0.2), ("write", 0.2)]
        return Waterfall(
            run=self.run,
            route="/v1/chat/completions",
            state="client_cancelled" if self.number % 11 == 5 else "completed",
            begin_ms=self.arrival_ms - sum(ms for _, ms in before),
            total_ms=sum(ms for _, ms in parts),
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            output_tokens=self.output,
            parts=[LedgerPart(kind=kind, ms=ms) for kind, ms in parts],
        )


@dataclass(frozen=True)
class Step:
    serial: int
    begin_ms: float
    host_ms: float
    run_ms: float
    predicted_ms: float
    prefill: int
    decode: int
    running: tuple[RunningRow, ...]
    waiting: tuple[WaitingRow, ...]
    blocks: Blocks

    @property
    def ms(self) -> float:
        return self.host_ms + self.run_ms

    @property
    def end_ms(self) -> float:
        return self.begin_ms + self.ms

    @property
    def bytes(self) -> int:
        return WEIGHT_BYTES + sum(row.computed_tokens for row in self.running) * 12_288

    @property
    def flops(self) -> int:
        return (self.prefill + self.decode) * 2 * 494_000_000


class World:
    """`seconds` of a busy engine, 50 steps a second or so; `until_ms` is the end of its log."""

    def __init__(self, *, seconds: float = 150.0, step_ms: float = 16.0, seed: int = 7):
        self.until_ms = FIRST_MS + seconds * 1000
        self.steps: list[Step] = []
        self.ended: list[Call] = []
        self._draw = random.Random(seed)
        self._step_ms = step_ms
        self._run()
        self.marks = [
            self._mark(0.30, "refused", None, "429 overloaded"),
            self._mark(0.62, "cancelled", "chatcmpl-0042b7c2", "the client went away"),
            self._mark(0.80, "restart", None, "the engine was started again"),
            self._mark(0.86, "preempted", "chatcmpl-0051b7c2", "14 blocks were taken"),
            self._mark(0.955, "refused", None, "429 overloaded"),
            self._mark(0.956, "refused", None, "429 overloaded"),
            self._mark(0.958, "deadline", "chatcmpl-0061b7c2", "2 s had passed"),
        ]

    @property
    def busy_ms(self) -> float:
        """A moment near the end of the log at which some wait."""
        found = (step for step in self.steps if step.end_ms > self.until_ms - RUSH_MS and len(step.waiting) > 3)
        return next(found).end_ms + 0.01

    def _mark(self, where: float, kind: str, run: str | None, text: str) -> Mark:
        return Mark(at_ms=FIRST_MS + where * (self.until_ms - FIRST_MS), kind=kind, run=run, text=text)

    # The toy engine

    def _run(self) -> None:
        now, next_arrival, number = FIRST_MS, FIRST_MS + 40, 0
        running: list[Call] = []
        waiting: list[Call] = []
        while now < self.until_ms:
            while next_arrival <= now:
                number += 1
                waiting.append(self._arrive(number, next_arrival))
                mean_ms = 190.0 if now < self.until_ms - RUSH_MS else 60.0
                next_arrival += self._draw.expovariate(1 / mean_ms) + 20
            while waiting and len(running) < MAX_ROWS:
                call = waiting.pop(0)
                call.begin_ms, call.computed = now, call.cached
                call.spend("queue_rows", now - call.arrival_ms)
                running.append(call)
            if not running:
                now = next_arrival
                continue
            now = self._step(now, running, waiting)
            for call in [call for call in running if call.output >= call.want]:
                running.remove(call)
                call.end_ms = now
                self.ended.append(call)

    def _arrive(self, number: int, at_ms: float) -> Call:
        prompt = self._draw.choice([60, 90, 140, 214, 320, 480, 900])
        cached = self._draw.choice([0, 0, 16, 48, 64]) if prompt > 64 else 0
        return Call(number, at_ms, prompt, cached, want=self._draw.randint(18, 110))

    def _step(self, now: float, running: list[Call], waiting: list[Call]) -> float:
        budget = TOKEN_BUDGET - sum(1 for call in running if call.computed >= call.prompt)
        counts = []
        for call in running:
            count = 1 if call.computed >= call.prompt else min(call.prompt - call.computed, budget)
            budget -= count if count > 1 else 0
            counts.append(count)
        prefill = sum(n for call, n in zip(running, counts, strict=True) if call.computed < call.prompt)
        decode = sum(1 for call in running if call.computed >= call.prompt)
        host_ms = 0.5 + 0.04 * len(running)
        run_ms = self._step_ms * (0.8 + 0.004 * prefill + 0.03 * decode) * self._draw.uniform(0.95, 1.12)
        end_ms = now + host_ms + run_ms
        total = sum(counts)
        for call, count in zip(running, counts, strict=True):
            kind = "prefill" if call.computed < call.prompt else "decode"
            call.spend("host", host_ms)
            call.spend(f"{kind}_own", run_ms * count / total)
            call.spend(f"{kind}_others", run_ms * (total - count) / total)
            call.computed += count
            if call.computed >= call.prompt:
                call.output += 1
                call.first_ms = call.first_ms or end_ms
        self.steps.append(
            Step(
                serial=48_000 + len(self.steps),
                begin_ms=now,
                host_ms=host_ms,
                run_ms=run_ms,
                predicted_ms=(host_ms + run_ms) * self._draw.gauss(0.98, 0.05),
                prefill=prefill,
                decode=decode,
                running=tuple(self._running_row(call) for call in running),
                waiting=tuple(self._waiting_row(call, end_ms, place, running) for place, call in enumerate(waiting)),
                blocks=self._blocks(running),
            )
        )
        return end_ms

    def _running_row(self, call: Call) -> RunningRow:
        return RunningRow(
            run=call.run,
            phase="prefill" if call.computed < call.prompt else "decode",
            prompt_tokens=call.prompt,
            computed_tokens=call.computed,
            output_tokens=call.output,
            blocks=call.blocks,
            since_ms=call.arrival_ms - 1.2,
        )

    def _waiting_row(self, call: Call, now: float, place: int, running: list[Call]) -> WaitingRow:
        shares = sorted(((holder.blocks, holder.run) for holder in running), key=lambda share: -share[0])[:3]
        total = sum(blocks for blocks, _ in shares)
        return WaitingRow(
            run=call.run,
            prompt_tokens=call.prompt,
            since_ms=call.arrival_ms,
            cause=("rows", "order", "tokens", "blocks")[place % 4],
            predicted_start_ms=None if place > 3 else now + 180.0 * (place + 1),
            holders=[Share(run=run, share=blocks / total) for blocks, run in shares],
        )

    def _blocks(self, running: list[Call]) -> Blocks:
        shared = max((call.cached // BLOCK for call in running), default=0)
        held = sum(call.blocks - call.cached // BLOCK for call in running) + shared
        cached = min(BLOCKS - held, sum(call.blocks for call in self.ended[-9:]))
        return Blocks(
            total=BLOCKS,
            held=held,
            cached=cached,
            free=BLOCKS - held - cached,
            block_size=BLOCK,
            bytes_per_block=BLOCK * 12_288,
            holders=[HeldBlocks(run=call.run, blocks=call.blocks, cached=call.cached // BLOCK) for call in running],
        )

    # Windows of its log

    def frame(self, end_ms: float | None = None, *, since_ms: float | None = None, **changes: object) -> Frame:
        """The window of 60 s that ends at `end_ms`; its steps and marks are those after `since_ms`, where that is given."""
        end_ms = self.until_ms if end_ms is None else end_ms
        begin_ms = max(FIRST_MS, end_ms - 60_000)
        window = [step for step in self.steps if begin_ms < step.end_ms <= end_ms]
        shown_since = begin_ms if since_ms is None else since_ms
        last = next(
            (step for step in reversed(self.steps) if step.end_ms < end_ms), None
        )  # the log has no later one then
        ended = [call for call in self.ended if begin_ms < call.end_ms <= end_ms]
        falls = sorted((call.waterfall() for call in ended), key=lambda fall: -fall.total_ms)
        uptime_s = (end_ms - FIRST_MS) / 1000 + 12
        completed = sum(1 for call in self.ended if call.end_ms <= end_ms)
        live = len(last.running) + len(last.waiting) if last else 0
        values = {
            "model": "qwen2.5-coder-0.5b-instruct",
            "version": "0.6.0",
            "kernel_set": "avx512-vnni",
            "num_threads": 2,
            "unix_ms": UNIX_MS + end_ms - FIRST_MS,
            "begin_ms": begin_ms,
            "end_ms": end_ms,
            "first_ms": FIRST_MS,
            "is_live": True,
            "uptime_s": uptime_s,
            "state": "ready",
            "read_bytes_per_s": READ_BYTES_PER_S,
            "flops_per_s": FLOPS_PER_S,
            "tiles": _tiles(window, ended, last, begin_ms, end_ms),
            "steps": _columns([step for step in window if step.end_ms > shown_since]),
            "marks": [mark for mark in self.marks if shown_since < mark.at_ms <= end_ms],
            "running": list(last.running) if last else [],
            "waiting": list(last.waiting) if last else [],
            "blocks": last.blocks if last else _no_blocks(),
            "slowest": falls[:20],
            "memory": memory(),
            "cost": cost(uptime_s, completed),
            "energy": Energy(
                source="RAPL package counter",
                joules=31.0 * uptime_s,
                requests_joules=24.0 * uptime_s,
                idle_joules=6.1 * uptime_s,
                joules_per_output_token=0.34,
            ),
            "counts": Counts(
                accepted=completed + live + 3,
                live=live,
                completed=completed,
                cancelled=2,
                deadline=1,
                shed=0,
                failed=0,
                refused=3,
                restarts=1,
            ),
        }
        return Frame(**(values | changes))  # type: ignore[arg-type]


def empty_frame(**changes: object) -> Frame:
    """Of an engine that has just started and has not had a call."""
    world = object.__new__(World)
    world.until_ms, world.steps, world.ended, world.marks = FIRST_MS + 900, [], [], []
    counts = Counts(accepted=0, live=0, completed=0, cancelled=0, deadline=0, shed=0, failed=0, refused=0, restarts=0)
    return world.frame(**({"counts": counts, "cost": None, "energy": None} | changes))


def _tiles(window: list[Step], ended: list[Call], last: Step | None, begin_ms: float, end_ms: float) -> Tiles:
    seconds = max(1e-3, (end_ms - begin_ms) / 1000)
    errors = [(step.predicted_ms - step.ms) / step.ms for step in window]
    busy_s = sum(step.run_ms for step in window) / 1000
    first = sorted(call.first_ms - call.arrival_ms for call in ended)
    gaps = sorted(step.ms for step in window)
    return Tiles(
        seconds=seconds,
        streams=len(last.running) if last else 0,
        waiting=len(last.waiting) if last else 0,
        output_tokens_per_s=sum(step.decode for step in window) / seconds,
        prompt_tokens_per_s=sum(step.prefill for step in window) / seconds,
        ttft_ms=_percentiles(first),
        gap_ms=_percentiles(gaps),
        goodput_per_s=sum(1 for ms in first if ms <= 1000) / seconds,
        slo_ttft_ms=1000.0,
        slo_gap_ms=100.0,
        memory_roof_share=sum(step.bytes for step in window) / busy_s / READ_BYTES_PER_S if window else None,
        compute_roof_share=sum(step.flops for step in window) / busy_s / FLOPS_PER_S if window else None,
        kv_used_share=last.blocks.held / last.blocks.total if last else 0.0,
        imbalance=0,
        prediction_error=median(abs(error) for error in errors) if errors else None,
        prediction_bias=sum(errors) / len(errors) if errors else None,
    )


def _percentiles(values: list[float]) -> Percentiles | None:
    if not values:
        return None
    return Percentiles(p50=values[len(values) // 2], p99=values[min(len(values) - 1, len(values) * 99 // 100)])


def _columns(steps: list[Step]) -> StepColumns:
    return StepColumns(
        serial=[step.serial for step in steps],
        begin_ms=[step.begin_ms for step in steps],
        ms=[step.ms for step in steps],
        host_ms=[step.host_ms for step in steps],
        predicted_ms=[step.predicted_ms for step in steps],
        bound_ms=[40.0 if step.prefill else 0.0 for step in steps],
        rows=[len(step.running) for step in steps],
        prefill_tokens=[step.prefill for step in steps],
        decode_tokens=[step.decode for step in steps],
        waiting=[len(step.waiting) for step in steps],
        closed_by=["rows" if step.waiting else "" for step in steps],
        flops=[step.flops for step in steps],
        bytes=[step.bytes for step in steps],
    )


def _no_blocks() -> Blocks:
    return Blocks(
        total=BLOCKS, held=0, cached=0, free=BLOCKS, block_size=BLOCK, bytes_per_block=BLOCK * 12_288, holders=[]
    )


def memory() -> list[Owned]:
    mib = 1 << 20
    return [
        Owned(process="engine", owner="weights", bytes=281 * mib),
        Owned(process="engine", owner="weights", bytes=96 * mib, is_file=True),
        Owned(process="engine", owner="kv", bytes=120 * mib),
        Owned(process="engine", owner="workspace", bytes=22 * mib),
        Owned(process="engine", owner="log", bytes=48 * mib),
        Owned(process="engine", owner="unattributed", bytes=24 * mib),
        Owned(process="engine", owner="not_resident", bytes=-10 * mib),
        Owned(process="server", owner="run store", bytes=9 * mib),
        Owned(process="server", owner="start", bytes=21 * mib),
        Owned(process="server", owner="history", bytes=1 * mib),
        Owned(process="server", owner="unattributed", bytes=31 * mib),
    ]


def cost(uptime_s: float, completed: int) -> Cost:
    shares = {"requests": 0.71, "idle": 0.19, "load": 0.06, "failed": 0.0, "recompute": 0.01, "host": 0.03}
    keys = {"team-a": 0.5, "team-b": 0.21}
    total = PRICE * uptime_s / 3600
    per_million_s = 3100.0 if completed else None
    return Cost(
        currency="USD",
        price_per_hour=PRICE,
        is_default=False,
        machine_s=MachineTime(
            total=uptime_s,
            by_key={key: uptime_s * share for key, share in keys.items()},
            per_million_output_tokens=per_million_s,
            **{name: uptime_s * share for name, share in shares.items()},
        ),
        total=total,
        by_key={key: total * share for key, share in keys.items()},
        per_million_output_tokens=per_million_s and PRICE * per_million_s / 3600,
        **{name: total * share for name, share in shares.items()},
    )


def step_ops(serial: int) -> StepOps:
    rows = [
        ("linear", "[9 tokens, 896] x [896, 9728] Q4_K", 24, 0.58, "memory"),
        ("linear", "[9 tokens, 4864] x [4864, 896] Q6_K", 24, 0.24, "memory"),
        ("attention", "[9 tokens, 14 heads] over 2,140 tokens", 24, 0.11, "memory"),
        ("take_rows", "[9 rows, 896] x [896, 151936] Q8_0", 1, 0.07, "compute"),
    ]
    run_ms = 18.0
    return StepOps(
        serial=serial,
        run_ms=run_ms,
        rows=8,
        tokens=9,
        logits=8,
        flops=8_892_000_000,
        bytes=316_000_000,
        memory_roof_share=0.59,
        compute_roof_share=0.26,
        is_modelled=True,
        ops=[
            StepOp(
                op=op,
                shape=shape,
                count=count,
                flops=int(8.9e9 * share),
                bytes=int(316e6 * share),
                ms=run_ms * share,
                share=share,
                bound=bound,
            )
            for op, shape, count, share, bound in rows
        ],
    )
