"""Peers: other engines that run the same loads on the same file, each in a process and an environment of its own.

Owns the protocol: a program gets the model file and the sizes as arguments, says who it is in one JSON line, then answers a JSON
line a run with one (benchmarks/peers/ holds the programs). A peer that cannot read the file says why; it stays in the tables as
a note. Knows nothing of any engine.
"""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from jilju.errors import StartupError


class PeerProgram(NamedTuple):
    name: str
    python: Path  # of an environment that has the engine
    script: Path

    def command(self, model: Path, num_threads: int, max_rows: int, max_context: int) -> list[str]:
        return [str(self.python), str(self.script), str(model), str(num_threads), str(max_rows), str(max_context)]


class Peer:
    """Idle between runs. Raises StartupError if the program ends before its time."""

    def __init__(self, name: str, command: list[str]):
        self.name, self._command = name, command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        hello = self._read()
        self._kinds = frozenset(hello["runs"])  # "prefill", "decode", "logprobs"; none if it cannot read the file
        self.note = str(hello["note"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def runs(self, kind: str) -> bool:
        return kind in self._kinds

    def prefill(self, num_tokens: int, seconds: float) -> float:
        """Prompt tokens per second, the mean of as many passes as `seconds` take."""
        answer = self._ask({"run": "prefill", "tokens": num_tokens, "seconds": seconds})
        return num_tokens / float(answer["pass_s"])

    def decode(self, num_rows: int, context: int, seconds: float) -> float:
        """Tokens per second of all rows together."""
        answer = self._ask({"run": "decode", "rows": num_rows, "context": context, "seconds": seconds})
        return num_rows / float(answer["pass_s"])

    def logprobs(self, token_ids: list[int], targets: list[list[int]]) -> list[list[float]]:
        """Of each target of the last len(targets) places, after the tokens up to and with that place."""
        answer = self._ask({"run": "logprobs", "token_ids": token_ids, "targets": targets})
        return [[float(x) for x in place] for place in answer["logprobs"]]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StartupError(
                f"{self.name} ended with exit status {self._process.wait()}; run it by hand to see why: {shlex.join(self._command)}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
