"""Frame: what the engine page shows of one window of time, as it goes over the wire.

Owns the types only; `window` fills them from the log. The same frame is sent each second while the engine lives, for any
window of the past that the rings still hold, and for a recorded file. Times are ms of the log's monotonic clock, floats; a
name without a unit is a count.
"""

import msgspec


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p99: float


class Tiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of the window's last `seconds`, 60 at most. None: nothing to say it of."""

    seconds: float
    streams: int  # sequences that run now
    waiting: int  # sequences that wait now
    output_tokens_per_s: float
    prompt_tokens_per_s: float  # computed, without those out of the cache
    ttft_ms: Percentiles | None  # of calls that ended
    gap_ms: Percentiles | None  # between tokens of a sequence
    goodput_per_s: float  # calls that completed within both limits
    slo_ttft_ms: float
    slo_gap_ms: float  # of a call's mean gap
    memory_roof_share: float | None  # bytes that steps moved, as modelled, over what memory can read in their time
    compute_roof_share: float | None
    kv_used_share: float
    imbalance: int
    prediction_error: float | None  # median size of (predicted - measured) / measured of steps
    prediction_bias: float | None  # its signed mean


class StepColumns(msgspec.Struct, frozen=True, kw_only=True):
    """Steps that ended in the window, the newest 16,384, a list a column, the oldest first. `serial` names a step for good."""

    serial: list[int]
    begin_ms: list[float]
    ms: list[float]  # begin to committed
    host_ms: list[float]  # of it, schedule, pack and commit
    predicted_ms: list[float]
    bound_ms: list[float]  # what it might take at most for the streams beside it; 0: no bound
    rows: list[int]
    prefill_tokens: list[int]
    decode_tokens: list[int]
    waiting: list[int]
    closed_by: list[str]  # why who waits was not let in: "", "rows", "tokens", "blocks", "order"
    flops: list[int]
    bytes: list[int]


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened and is no step."""

    at_ms: float
    kind: str  # "refused", "shed", "cancelled", "deadline", "failed", "restart", "preempted"
    run: str | None  # id of the run, where the viewer may see it
    text: str  # in a few words: "429 overloaded", "the engine was started again"


class RunningRow(msgspec.Struct, frozen=True, kw_only=True):
    run: str | None  # None: of another key
    phase: str  # "prefill" or "decode"
    prompt_tokens: int
    computed_tokens: int  # whose keys and values are held
    output_tokens: int
    blocks: int
    since_ms: float  # received


class Share(msgspec.Struct, frozen=True, kw_only=True):
    run: str | None  # None: of another key, or of nobody
    share: float


class WaitingRow(msgspec.Struct, frozen=True, kw_only=True):
    run: str | None
    prompt_tokens: int
    since_ms: float  # submitted to the engine
    cause: str  # "step", "rows", "tokens", "blocks", "order", "restart", "grammar"
    predicted_start_ms: float | None
    holders: list[Share]  # who holds what it waits for, the largest 8 first


class HeldBlocks(msgspec.Struct, frozen=True, kw_only=True):
    run: str | None
    blocks: int
    cached: int  # of them, found in the prefix cache, so perhaps shared


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """held + cached + free = total. Holders' blocks may add up to more than `held`: shared ones count for each."""

    total: int
    held: int
    cached: int
    free: int
    block_size: int
    bytes_per_block: int
    holders: list[HeldBlocks]


class LedgerPart(msgspec.Struct, frozen=True):
    kind: str  # of account.time_ledger
    ms: float


class Waterfall(msgspec.Struct, frozen=True, kw_only=True):
    """One call as its ledger bar."""

    run: str | None
    route: str
    state: str
    begin_ms: float
    total_ms: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    parts: list[LedgerPart]  # in order; of a wait, a prompt and an answer each kind is summed; they sum to total_ms


class Owned(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one owner."""

    process: str  # "engine" or "server"; "gpu": what the engine holds there
    owner: str  # "weights", "kv", "workspace", "log", "run store", "prefix index", "unattributed", ...
    bytes: int
    is_file: bool = False  # pages of a mapped file, which the system can take back


class MachineTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of the machine since the server's start, by whose they were; a cost is these times the price."""

    total: float
    requests: float
    idle: float
    load: float
    failed: float
    recompute: float
    host: float
    by_key: dict[str, float]
    per_million_output_tokens: float | None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Since the server's start. requests + the operator's lines = price * uptime. Without a price all amounts are 0."""

    currency: str
    price_per_hour: float
    is_default: bool  # nobody has set a price
    machine_s: MachineTime
    total: float
    requests: float
    idle: float
    load: float  # loading, warm-up and restarts
    failed: float  # steps that raised
    recompute: float  # tokens computed again after a preemption or a restart
    host: float  # between steps, while there was work
    by_key: dict[str, float]  # of requests; the viewer's own key only, unless there are no keys
    per_million_output_tokens: float | None  # of requests: what nobody asked for is not in it


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Since the server's start. `source` says whether it was measured."""

    source: str  # "RAPL package counter", "RAPL package counter, NVML GPU counter", "declared watts"
    joules: float
    requests_joules: float
    idle_joules: float
    joules_per_output_token: float | None


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Calls since the server's start. accepted = completed + cancelled + deadline + shed + failed + live."""

    accepted: int
    live: int
    completed: int
    cancelled: int
    deadline: int
    shed: int
    failed: int
    refused: int
    restarts: int


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    version: str
    kernel_set: str
    num_threads: int
    unix_ms: float  # wall clock at end_ms
    begin_ms: float
    end_ms: float
    first_ms: float  # oldest moment that can be asked for
    is_live: bool  # False: of a recorded file
    uptime_s: float
    state: str  # of the engine: "ready", "restarting", ...
    read_bytes_per_s: float | None  # of this machine's memory, as measured at start
    flops_per_s: float | None
    tiles: Tiles
    steps: StepColumns
    marks: list[Mark]  # the newest 1,024
    running: list[RunningRow]
    waiting: list[WaitingRow]  # those 256 that wait longest
    blocks: Blocks
    slowest: list[Waterfall]  # 20 at most, of those that ended in the window
    memory: list[Owned] | None  # None: of a recorded file
    cost: Cost | None
    energy: Energy | None  # None: this machine tells of none
    counts: Counts
