"""Speed: prefill of one long prompt and decode of one stream, in this process, side by side with a peer engine.

Owns the method: runs of jilju and of the peer alternate, each figure is the median, the ratio is the median of the pairs'
ratios, and each run tells what share of the cores other processes took, since such a figure means nothing on a busy machine.
The peer is a program that reads a JSON line per run and answers with one (benchmarks/peers/). Knows nothing of backends.
"""

import json
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from jilju.engine.loop import Engine
from jilju.engine.request import Request, SamplingParams
from jilju.errors import StartupError

BUSY_SHARE = 0.03  # of all cores: above it a run counts as disturbed


class Run(msgspec.Struct, frozen=True):
    prefill_tok_s: float
    decode_tok_s: float
    others_share: float  # of all cores' time, spent by other processes during the run (steal included)


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    ours: list[Run]
    peer: list[Run]
    peer_name: str

    def ratio(self, field: str) -> float:
        """Median over pairs of ours / peer."""
        pairs = zip(self.ours, self.peer, strict=True)
        ratios: list[float] = [getattr(mine, field) / getattr(other, field) for mine, other in pairs]
        return statistics.median(ratios)


def run_ours(engine: Engine, prompt_ids: list[int], num_output: int, run_id: str) -> tuple[float, float]:
    """(prefill, decode) in tokens per second: prompt tokens over the time to the first token; later tokens over theirs.

    Each run has its own salt, so that nothing comes from the prefix cache.
    """
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=num_output + 1)
    engine.submit(Request(id=run_id, prompt_ids=prompt_ids, params=params, salt=run_id.encode()))
    begin = time.perf_counter()
    marks: list[float] = []
    while engine.has_work():
        num_tokens = len(engine.step())
        marks += [time.perf_counter()] * num_tokens
    return len(prompt_ids) / (marks[0] - begin), num_output / (marks[-1] - marks[0])


class Peer:
    """A peer engine in a process of its own: one JSON line in, one out, per run; idle in between."""

    def __init__(self, python: Path, script: Path, model: Path, num_threads: int):
        self._command = [str(python), str(script), str(model), str(num_threads)]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name = str(self._read()["name"])

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StartupError(
                f"the peer ended with exit status {self._process.wait()}; run it by hand to see why: {shlex.join(self._command)}"
            )
        answer: dict[str, object] = json.loads(line)
        return answer

    def run(self, prompt_ids: list[int], num_output: int) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt_ids": prompt_ids, "num_output": num_output}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return len(prompt_ids) / float(str(answer["prefill_s"])), num_output / float(str(answer["decode_s"]))

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=10)


def compare(
    engine: Engine,
    peer: Peer,
    prompt_ids: list[int],
    num_output: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> Comparison:
    """`repeats` counted pairs after one warm-up pair, ours and the peer's in turn."""
    ours, theirs = [], []
    for index in range(repeats + 1):
        mine = measured(lambda i=index: run_ours(engine, prompt_ids, num_output, f"speed-{i}"), {})  # type: ignore[misc]
        other = measured(lambda: peer.run(prompt_ids, num_output), {"pid": peer._process.pid})
        if index > 0:
            ours.append(mine)
            theirs.append(other)
        progress(index, repeats)
    return Comparison(ours=ours, peer=theirs, peer_name=peer.name)


def measured(run: Callable[[], tuple[float, float]], also: dict[str, int]) -> Run:
    """Run once, and tell what other processes took of the machine meanwhile. `also`: the pid that counts as ours."""
    begin, busy, own = time.perf_counter(), machine_busy_s(), process_s(also.get("pid"))
    prefill, decode = run()
    wall = time.perf_counter() - begin
    others = (machine_busy_s() - busy) - (process_s(also.get("pid")) - own)
    return Run(prefill, decode, max(0.0, others / (wall * num_cores())))


def num_cores() -> int:
    return sum(
        1 for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu") and line[3].isdigit()
    )


def machine_busy_s() -> float:
    """Seconds of CPU time spent by everything on this machine, steal included; idle and waiting for disks left out."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / 100


def process_s(pid: int | None) -> float:
    """Seconds of CPU time of this process, and of the process `pid` if one is named."""
    total = time.process_time()
    if pid is not None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / 100
    return total
