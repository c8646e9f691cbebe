"""Memory: what the server's and the engine's process hold, and the GPU's memory, by owner.

Owns the byte ledger of the moment: the lines of a process sum to what the system says it has in memory, those of the GPU to what
its driver says is used. What nobody is known to hold stands as `unattributed`, and what was promised and has no page yet as
`not_resident`, below 0. Pages of mapped files, which the system can take back, are lines of their own. Reads /proc and asks no
process. Knows nothing of metrics.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jilju.account.frame import Owned
from jilju.account.records import CallRing
from jilju.engine.client import EngineInfo
from jilju.serve.context import ServerContext
from jilju.serve.runs.store import RunStore

Process = Literal["server", "engine", "gpu"]


class Memory:
    def __init__(self, context: ServerContext, calls: CallRing, runs: RunStore):
        self._context, self._calls, self._runs = context, calls, runs
        pages = resident_bytes("self")
        self._start_bytes = 0 if pages is None else pages.anonymous  # what was loaded before the first call
        self._engine_start = (0, 0)  # process, and what it had when it was first seen ready; beside a GPU

    def owned(self) -> list[Owned]:
        """A process that cannot be looked at has no lines, nor has a GPU whose driver does not answer."""
        return self._server() + self._engine() + self._gpu()

    def _server(self) -> list[Owned]:
        context = self._context
        owners = {
            "start": self._start_bytes,
            "run store": self._runs.num_bytes,
            "calls": self._calls.num_bytes,
            "log": context.client.log.num_bytes,
        }
        if context.history is not None:
            owners["history"] = context.history.num_bytes
        if context.workers is not None:
            owners["grammars"] = context.workers.compile_cache_bytes
        pages = resident_bytes("self")
        return (
            []
            if pages is None
            else [*balanced("server", pages.anonymous, owners), _of_files("server", "start", pages.files)]
        )

    def _engine(self) -> list[Owned]:
        info, process_id = self._context.client.info, getattr(self._context.client, "process_id", None)
        if info is None or process_id is None:
            return []
        pages = resident_bytes(str(process_id))
        if pages is None:
            return []
        owners, mapped = _set_aside(info), 0
        if self._context.gpu is not None:
            owners = {"start": self._start_of_engine(process_id, pages.anonymous)}
        elif pages.files > info.weight_bytes // 2:
            # Weights that are mapped are among the pages of files, and next to all of them have been read.
            mapped = min(pages.files, owners.pop("weights"))
        lines = balanced("engine", pages.anonymous, owners)
        if mapped:
            lines.append(_of_files("engine", "weights", mapped))
        return [*lines, _of_files("engine", "start", pages.files - mapped)]

    def _start_of_engine(self, process_id: int, now_bytes: int) -> int:
        """The host's part of an engine on a GPU: what it had once it was ready, its libraries most of all."""
        if self._engine_start[0] != process_id:
            if self._context.client.status().state in ("loading", "restarting"):
                return now_bytes
            self._engine_start = (process_id, now_bytes)
        return min(now_bytes, self._engine_start[1])

    def _gpu(self) -> list[Owned]:
        gpu, info = self._context.gpu, self._context.client.info
        used_bytes = None if gpu is None or info is None else gpu.used_bytes()
        return [] if info is None or used_bytes is None else balanced("gpu", used_bytes, _set_aside(info))


def _set_aside(info: EngineInfo) -> dict[str, int]:
    return {"weights": info.weight_bytes, "kv": info.kv_bytes, "workspace": info.workspace_bytes}


def _of_files(process: Process, owner: str, num_bytes: int) -> Owned:
    return Owned(process=process, owner=owner, bytes=num_bytes, is_file=True)


def balanced(process: Process, resident: int, owners: Mapping[str, int]) -> list[Owned]:
    """Lines that sum to what is resident."""
    rest = resident - sum(owners.values())
    lines = {**owners, "unattributed": max(0, rest), "not_resident": min(0, rest)}
    return [Owned(process=process, owner=owner, bytes=count) for owner, count in lines.items()]


class Resident(NamedTuple):
    anonymous: int
    files: int  # pages of files that are mapped


def resident_bytes(process_id: str) -> Resident | None:
    """None: there is no such process, or it has ended and was not seen out yet."""
    try:
        text = Path(f"/proc/{process_id}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in text.splitlines() if line.startswith("Rss"))
    }
    return Resident(sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"]) if sizes else None
