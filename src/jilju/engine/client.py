"""EngineClient: what the server, the Python API and benchmarks see of an engine, in this process or another.

Owns the protocol only. `engine/process` implements it with a supervised process, `engine/inprocess` with a thread.
Knows nothing of text or HTTP.
"""

from typing import Literal, Protocol

import msgspec

from jilju.engine.events import EventLog
from jilju.engine.request import Request
from jilju.engine.streams import EventStream

EngineState = Literal["loading", "ready", "restarting", "draining", "gone"]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded engine says of itself, once."""

    kernel_set: str  # "native-avx2"
    invariant: bool  # same bits under any load
    num_threads: int
    max_context: int  # tokens of one sequence: the smaller of --context and what the KV pool holds
    block_size: int
    num_blocks: int
    max_rows: int
    step_tokens: int
    token_gap_ms: float  # what a step beside a stream is to take at most; prefill is cut to it. 0: no bound
    score_work: float  # what a prompt's token that is scored costs beside itself, in tokens
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    load_ms: float
    kv_bytes_per_token: int = 0
    read_bytes_per_s: float | None = None  # of this machine's memory, as measured at load
    flops_per_s: float | None = None  # of linear ops at best, likewise


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is true now, as the server's last frame from the engine said."""

    state: EngineState
    num_running: int
    num_waiting: int
    num_blocks_free: int
    num_blocks_cached: int
    num_blocks_held: int
    last_step_age_s: float  # since the last step ended, or since the engine became ready
    num_restarts: int
    imbalance: int  # broken conservation laws seen; must be 0
    num_resumed: int = 0  # started requests that an engine took over from a dead one
    num_quarantined: int = 0  # requests that were refused for good after deaths of the engine
    num_step_faults: int = 0  # steps that raised
    is_stuck: bool = False  # requests wait, none runs, and steps bring nothing: a defect of the scheduler
    step_coefficients: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of engine.step_times.StepTimes, ns


class EngineClient(Protocol):
    log: EventLog  # records of steps, of every engine since start

    @property
    def info(self) -> EngineInfo | None:
        """None until the engine is ready for the first time."""
        ...

    async def start(self) -> None:
        """Returns when the engine is ready; raises StartupError with the engine's own message if it cannot load."""
        ...

    def submit(self, request: Request) -> EventStream:
        """Events of the request, a terminal one last. Closing the iterator early (aclose) aborts the request.

        Raises here, never later, when the engine cannot take it: NotReady, EngineUnavailable, Overloaded, or
        ContextLengthExceeded and KvCapacityExceeded. A request that was taken survives the engine's death.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its iterator still yields its terminal event. Unknown ids are ignored."""
        ...

    def status(self) -> EngineStatus: ...

    async def stop(self) -> None:
        """End the engine; live requests get RequestFailed(code="not_ready")."""
        ...
