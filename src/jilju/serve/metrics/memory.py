"""Memory: what the server's and the engine's process hold, by owner.

Owns the byte ledger of the moment: the lines of a process sum to what the system says it has in memory. What nobody is known
to hold stands as `unattributed`, and what was promised and has no page yet as `not_resident`, below 0. Reads /proc and asks
no process. Knows nothing of metrics.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jilju.account.frame import Owned
from jilju.serve.context import ServerContext
from jilju.serve.runs.store import RunStore

Process = Literal["server", "engine"]


class Memory:
    def __init__(self, context: ServerContext, runs: RunStore):
        self._context, self._runs = context, runs
        self._start_bytes = resident_bytes("self") or 0  # of code and what was loaded before the first call

    def owned(self) -> list[Owned]:
        """A process that cannot be looked at has no lines."""
        return self._server() + self._engine()

    def _server(self) -> list[Owned]:
        context = self._context
        owners = {"start": self._start_bytes, "run store": self._runs.num_bytes}
        if context.history is not None:
            owners["history"] = context.history.num_bytes
        if context.workers is not None:
            owners["grammars"] = context.workers.compile_cache_bytes
        return balanced("server", resident_bytes("self"), owners)

    def _engine(self) -> list[Owned]:
        info, process_id = self._context.client.info, getattr(self._context.client, "process_id", None)
        if info is None or process_id is None:
            return []
        owners = {"weights": info.weight_bytes, "kv": info.kv_bytes, "workspace": info.workspace_bytes}
        return balanced("engine", resident_bytes(str(process_id)), owners)


def balanced(process: Process, resident: int | None, owners: Mapping[str, int]) -> list[Owned]:
    """Lines that sum to what is resident."""
    if resident is None:
        return []
    rest = resident - sum(owners.values())
    lines = {**owners, "unattributed": max(0, rest), "not_resident": min(0, rest)}
    return [Owned(process=process, owner=owner, bytes=count) for owner, count in lines.items()]


def resident_bytes(process_id: str) -> int | None:
    """Anonymous pages, and those of files that are mapped; None: there is no such process."""
    try:
        text = Path(f"/proc/{process_id}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None  # of a process that has ended and was not seen out yet
