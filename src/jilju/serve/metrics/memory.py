"""Memory: what the server's and the engine's process hold, by owner.

Owns the byte ledger of the moment: the lines of a process sum to what the system says it has in memory. What nobody is known
to hold stands as `unattributed`, and what was promised and has no page yet as `not_resident`, below 0. Pages of mapped files,
which the system can take back, are lines of their own. Reads /proc and asks no process. Knows nothing of metrics.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jilju.account.frame import Owned
from jilju.account.records import CallRing
from jilju.serve.context import ServerContext
from jilju.serve.runs.store import RunStore

Process = Literal["server", "engine"]


class Memory:
    def __init__(self, context: ServerContext, calls: CallRing, runs: RunStore):
        self._context, self._calls, self._runs = context, calls, runs
        pages = resident_bytes("self")
        self._start_bytes = 0 if pages is None else pages.anonymous  # what was loaded before the first call

    def owned(self) -> list[Owned]:
        """A process that cannot be looked at has no lines."""
        return self._server() + self._engine()

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
        owners = {"weights": info.weight_bytes, "kv": info.kv_bytes, "workspace": info.workspace_bytes}
        # Weights that are mapped are among the pages of files, and next to all of them have been read.
        mapped = min(pages.files, owners.pop("weights")) if pages.files > info.weight_bytes // 2 else 0
        lines = balanced("engine", pages.anonymous, owners)
        if mapped:
            lines.append(_of_files("engine", "weights", mapped))
        return [*lines, _of_files("engine", "start", pages.files - mapped)]


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
