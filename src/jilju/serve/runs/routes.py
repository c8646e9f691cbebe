"""The data of runs: GET /v1/jilju/runs, /v1/jilju/runs/{id} and /v1/jilju/steps/{serial}.

Owns who may see what: a key sees its own runs. Folds are made in a thread, beside the streams. Knows nothing of pages.
"""

import asyncio
from itertools import islice

from starlette.requests import Request
from starlette.responses import Response

from jilju.account.records import CallRecord
from jilju.engine.client import EngineInfo
from jilju.errors import NotReady, RunNotFound
from jilju.serve.door.gate import arrival_of
from jilju.serve.errors import shown
from jilju.serve.health import json_response
from jilju.serve.runs.fold import Sight, encoded, make_run, run_list, run_without_text, summary
from jilju.serve.runs.ops import step_ops
from jilju.serve.server import Server

MAX_LISTED = 100


class RunRoutes:
    def __init__(self, server: Server):
        self._server = server

    async def list_runs(self, request: Request) -> Response:
        """The newest runs of the key."""
        context = self._server.context
        newest = islice(self._server.runs.newest(_key_name(request)), MAX_LISTED)
        now_ns = context.clock.now_ns()
        lines = [summary(run, now_ns) for run in newest]
        return json_response(await asyncio.to_thread(run_list, lines, context.tokenizer))

    async def get_run(self, request: Request) -> Response:
        """What the fold reads is copied first: it is made in a thread, while calls and their log go on."""
        call_id, key_name = _call_id(request.path_params["id"]), _key_name(request)
        record = self._record(call_id, key_name)
        if record is None:
            raise self._not_found(request.path_params["id"])
        sight = self._sight(record, key_name)
        kept = self._server.runs.find(call_id, key_name)
        if kept is None:
            return json_response(run_without_text(record, sight))
        copied = kept if record.state is not None else kept.copied()
        data = await asyncio.to_thread(lambda: encoded(make_run(copied, record, sight)))
        return Response(data, media_type="application/json")

    async def get_step(self, request: Request) -> Response:
        serial, log = request.path_params["serial"], self._server.context.client.log
        logged = log.step(int(serial)) if serial.isascii() and serial.isdecimal() and len(serial) < 19 else None
        if logged is None:
            first = log.num_steps - len(log.steps)
            kept = f"{first} to {log.num_steps - 1}" if len(log.steps) else "none yet"
            raise RunNotFound(
                f"there is no step {shown(serial)} in the log; it keeps {kept}, and a run in /v1/jilju/runs/ID names its own"
            )
        return json_response(await asyncio.to_thread(step_ops, logged, self._server.recordings.step_model()))

    def _info(self) -> EngineInfo:
        info = self._server.context.client.info
        if info is None:
            raise NotReady("the engine has not been ready yet; try again when /readyz answers 200", retry_after_s=1.0)
        return info

    def _sight(self, record: CallRecord, key_name: str | None) -> Sight:
        context, info, log = self._server.context, self._info(), self._server.context.client.log
        live = {life.number: call for call in self._server.ledger.live.values() for life in call.lives}
        now_ns = context.clock.now_ns()
        serials = log.serials(record.received_ns, record.ended_ns or now_ns)

        def run_of(number: int) -> str | None:
            if (call := live.get(number)) is not None:
                return call.run_id if call.key_name == key_name else None
            record = self._server.calls.of_number(number)
            return record.run_id if record is not None and record.key_name == key_name else None

        return Sight(
            model_name=context.model_name,
            tokenizer=context.tokenizer,
            log=log.part(range(serials.start, serials.stop + 1)),  # with the one that was under way at its end
            model=self._server.recordings.step_model(),
            info=info,
            plan=context.plan,
            now_ns=now_ns,
            run_of=run_of,
            cost=self._server.billing.share_of(record),
        )

    def _record(self, call_id: str, key_name: str | None) -> CallRecord | None:
        """None: there is none, or it is another key's."""
        server = self._server
        call = server.ledger.live.get(call_id)
        if call is None and (kept := server.runs.find(call_id, key_name)) is not None:
            call = kept.call
        record = server.calls.find(call_id) if call is None else call.record()
        return record if record is not None and record.key_name == key_name else None

    def _not_found(self, run_id: str) -> RunNotFound:
        if not self._server.context.run_store_bytes:
            return RunNotFound("this server keeps no runs; start it with a larger --run-store")
        return RunNotFound(
            f"there is no run {shown(run_id)}: it never was, is another key's, or newer runs have taken its place; see /v1/jilju/runs"
        )


def _key_name(request: Request) -> str | None:
    key = arrival_of(request.scope).key
    return None if key is None else key.name


def _call_id(run_id: str) -> str:
    """Of a run's id, which is that of its answer: "chatcmpl-" and the call's."""
    return run_id.replace("_", "-").rpartition("-")[2]
