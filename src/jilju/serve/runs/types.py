"""Run: everything that the page of one run shows, as it goes over the wire.

Owns the types only. Times are ms from the moment the request's head was read; bytes are hexadecimal where they are a
token's. `runs` in here are ids as the answer has them ("chatcmpl-…"), None where the run belongs to another key.
"""

from typing import Any

import msgspec


class Blame(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an interval that others caused."""

    run: str | None  # None: of another key, or of nobody in particular
    is_self: bool = False  # another sequence of this same call
    ms: float


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """One cut of the ledger. Consecutive ones touch; all of them sum to total_ms."""

    kind: str  # see account.time_ledger.KINDS
    begin_ms: float
    ms: float
    blame: list[Blame] = []


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    total_ms: float
    is_balanced: bool
    intervals: list[Interval]
    by_kind: dict[str, float]
    blame: list[Blame]  # of all intervals together, the largest first


class TextSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the prompt's text, in characters."""

    begin: int
    end: int
    role: str | None  # of the message whose content it is; None: the template wrote it
    message_index: int | None


class PromptToken(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str  # "" for a part of a character; see `bytes`
    bytes: str
    begin: int  # characters of the text that it has a part of
    end: int
    is_special: bool
    is_cached: bool
    logprob: float | None = None  # if the call asked


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """Why the match in the prefix cache ended where it did."""

    hit_tokens: int
    miss_reason: str  # "none", "never_seen", "diverged", "evicted", "block_tail", "salt"
    first_miss_position: int | None
    earlier_text: str | None  # the token that an earlier text of the same key had there
    own_text: str | None
    block_size: int


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    bytes: str
    logprob: float


class OutputToken(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    id: int
    text: str  # that leaves with this token; "" while a character is incomplete or text is held back
    bytes: str
    is_special: bool
    begin: int  # characters of the output's text that its bytes have a part of; begin == end: of none
    end: int
    step_index: int | None  # in `steps`
    at_ms: float  # committed
    logprob: float | None
    top: list[Alternative]  # as the call asked, most probable first


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    run: str | None
    count: int  # tokens that it had in the step
    is_prefill: bool


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A step with a row of this sequence. schedule + pack + run + commit = ms."""

    serial: int  # of the log; /v1/jilju/steps/{serial} has its ops
    begin_ms: float
    ms: float
    schedule_ms: float
    pack_ms: float
    run_ms: float
    commit_ms: float
    predicted_ms: float
    kind: str  # of this sequence's row: "prefill" or "decode"
    start: int  # its tokens [start, start + count) were computed
    count: int
    cached: int  # tokens that it found in the cache as it began
    is_recompute: bool
    rows: int  # of the whole step
    prefill_tokens: int
    decode_tokens: int
    flops: int  # of the whole step, modelled
    bytes: int
    own_ms: float  # of run_ms
    others_ms: float
    memory_roof_share: float | None  # of the whole step
    compute_roof_share: float | None
    neighbours: list[Neighbour]


class CostShare(msgspec.Struct, frozen=True, kw_only=True):
    currency: str
    price_per_hour: float
    is_default: bool
    amount: float  # of this call; 0 without a price
    machine_ms: float  # of the machine's time: what the price is multiplied with
    joules: float | None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    kernel_set: str
    num_threads: int
    read_bytes_per_s: float | None
    flops_per_s: float | None
    weight_bytes: int
    kv_bytes_per_token: int
    num_layers: int | None


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the call."""

    index: int
    prompt_index: int
    finish_reason: str | None
    stop_reason: str | int | None
    ledger: Ledger
    steps: list[Step]
    output: list[OutputToken]
    text: str
    ttft_ms: float | None
    tpot_ms: float | None
    preemptions: int
    resumes: int


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    spans: list[TextSpan]  # in order, without gaps
    tokens: list[PromptToken]
    num_tokens: int  # may be more than `tokens`: see is_cut
    is_cut: bool  # the run store keeps only the first of so many
    num_truncated: int  # that the call asked to cut off
    cache: Cache | None  # None: it was never in a step


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One call. While it runs, what there is so far."""

    id: str
    model: str
    route: str
    created: float | None  # unix s
    state: str  # "running", "completed", "client_cancelled", "deadline", "shed", "failed"
    status: int
    code: str | None
    message: str | None
    is_streamed: bool
    total_ms: float
    ttft_ms: float | None
    parameters: dict[str, Any]  # sampling, as it was understood
    prompts: list[Prompt]
    sequences: list[Sequence]
    cost: CostShare | None
    machine: Machine


class StepOp(msgspec.Struct, frozen=True, kw_only=True):
    """An op of the plan in one step; equal ones of all layers are one line. Predicted from the roofs, scaled to what was measured."""

    op: str  # "linear", "attention", ...
    shape: str  # "[16 tokens, 896] x [896, 4864] Q4_K"
    count: int  # times in a step: the layers
    flops: int  # of all of them
    bytes: int
    ms: float  # modelled, scaled so that all ops sum to the step's run_ms
    share: float  # of the step's run
    bound: str  # "memory" or "compute": which roof it touches first


class StepOps(msgspec.Struct, frozen=True, kw_only=True):
    serial: int
    run_ms: float
    rows: int
    tokens: int
    logits: int
    flops: int
    bytes: int
    memory_roof_share: float | None
    compute_roof_share: float | None
    is_modelled: bool  # True: hardware counted nothing
    ops: list[StepOp]  # the longest first


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the list of runs."""

    id: str
    route: str
    created: float
    state: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    total_ms: float
    ttft_ms: float | None
    text: str  # the beginning of the answer


class RunList(msgspec.Struct, frozen=True, kw_only=True):
    runs: list[RunSummary]  # the newest first, of the viewer's key
