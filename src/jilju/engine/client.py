"""EngineClient: what the server, the Python API and benchmarks see of an engine, in this process or another.

Owns the protocol only. `engine/link` implements it over a socket with a supervised process, `engine/loop` in-process.
Knows nothing of text or HTTP.
"""

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from jilju.engine.events import EventLog
from jilju.engine.request import EngineEvent, Request

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
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    load_ms: float


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


class EngineClient(Protocol):
    info: EngineInfo | None  # None until the engine is ready for the first time
    log: EventLog  # records of steps and requests, of every engine since start

    async def start(self) -> None:
        """Returns when the engine is ready; raises StartupError with the engine's own message if it cannot load."""
        ...

    def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        """Events of the request, a terminal one last. Closing the iterator early (aclose) aborts the request.

        Raises NotReady or EngineUnavailable here, never later, when the engine cannot take it; a request that was taken
        survives the engine's death.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its iterator still yields its terminal event. Unknown ids are ignored."""
        ...

    def status(self) -> EngineStatus: ...

    async def stop(self) -> None:
        """End the engine; live requests get RequestFailed(code="not_ready")."""
        ...
