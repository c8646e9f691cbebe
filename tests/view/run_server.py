"""A server for tests of the run page: the stub of the chat page, and the routes of runs, with what a test puts there.

Knows nothing of what a run means: it serves the contract's types as they are encoded on the wire.
"""

import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

import msgspec

from jilju.serve.runs.types import Run, RunList, StepOps

from .run_data import run_list, step_ops
from .stub_server import Exchange, Front, StubServer

API = "/v1/jilju/"


class RunServer(StubServer):
    """`runs` by id; a step's ops are made when they are asked for. `asked` are the paths of the API that the page called."""

    def __init__(self, front: Front) -> None:
        self.runs: dict[str, Run] = {}
        self.lost_steps: set[int] = set()
        self.asked: list[str] = []
        super().__init__(front)

    def put(self, run: Run) -> str:
        """Returns the path of its page."""
        self.runs[run.id] = run
        return f"/runs/{run.id}"

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if not handler.path.startswith(API):
            super()._get(handler)
        elif self._allowed(handler):
            self.asked.append(handler.path)
            self._answer(handler, unquote(handler.path.removeprefix(API)).split("/"))

    def _answer(self, handler: BaseHTTPRequestHandler, parts: list[str]) -> None:
        match parts:
            case ["runs"]:
                self._send(handler, run_list(*self.runs.values()))
            case ["runs", run_id] if run_id in self.runs:
                self._send(handler, self.runs[run_id])
            case [query] if query.startswith("trace?run=") and query.partition("=")[2] in self.runs:
                self._json(handler, {"traceEvents": [], "displayTimeUnit": "ms"})
            case ["steps", serial] if (ops := self._ops(int(serial))) is not None:
                self._send(handler, ops)
            case _:
                Exchange(handler, {}, self.gates, self.vocabulary).refuse(
                    404, "not_found", f"there is nothing at {handler.path}"
                )

    def _ops(self, serial: int) -> StepOps | None:
        if serial in self.lost_steps:
            return None
        sequences = [sequence for run in self.runs.values() for sequence in run.sequences]
        steps = {step.serial: step for sequence in sequences for step in sequence.steps}
        return step_ops(steps[serial]) if serial in steps else None

    def _send(self, handler: BaseHTTPRequestHandler, value: Run | RunList | StepOps) -> None:
        self._json(handler, json.loads(msgspec.json.encode(value)))
