"""`jilju serve` with an engine that costs nothing: what is left is the server's own work for a token.

Every request gets tokens of one text, over and over, as fast as the event loop takes them. Knows nothing of models but the tokenizer.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator

from jilju.assemble.engine import open_model
from jilju.assemble.text import load_text
from jilju.clock import WallClock
from jilju.engine.client import EngineInfo, EngineStatus
from jilju.engine.events import EventLog
from jilju.engine.request import EngineEvent, Request, RequestTimes, TokenEvent
from jilju.serve.context import ServerContext
from jilju.serve.runner import run_server

TEXT = "A sprint is a short race, run at full speed. 질주는 짧은 거리를 온 힘으로 달리는 것이다. "
CONTEXT = 8192


class FreeEngine:
    """An EngineClient whose steps take no time. A step brings a token to every live request, as a real one does."""

    def __init__(self, token_ids: list[int]):
        self.log = EventLog()
        self.info = EngineInfo(
            kernel_set="free", invariant=True, num_threads=1, max_context=CONTEXT, block_size=16, num_blocks=4096, max_rows=64,
            step_tokens=512, token_gap_ms=0.0, score_work=0.0, weight_bytes=0, kv_bytes=0, workspace_bytes=0, load_ms=0.0,
        )  # fmt: skip
        self._token_ids, self._clock = token_ids, WallClock()
        self._num_live = 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def abort(self, request_id: str) -> None:
        pass

    def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        return self._events(request)

    async def _events(self, request: Request) -> AsyncIterator[EngineEvent]:
        now_ns = self._clock.now_ns()
        times = RequestTimes(queued_ns=now_ns, scheduled_ns=now_ns, first_token_ns=now_ns, last_token_ns=now_ns)
        for index in range(request.params.max_tokens):
            is_last = index + 1 == request.params.max_tokens
            token_id = self._token_ids[index % len(self._token_ids)]
            yield TokenEvent(
                request_id=request.id, index=index, token_id=token_id, finish_reason="length" if is_last else None,
                times=times if is_last or index == 0 else None,
            )  # fmt: skip
            await asyncio.sleep(0)

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready", num_running=0, num_waiting=0, num_blocks_free=4096, num_blocks_cached=0, num_blocks_held=0,
            last_step_age_s=0.0, num_restarts=0, imbalance=0,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, required=True)
    core = parser.parse_args().core
    text = load_text(open_model("smollm2-135m"))
    os.sched_setaffinity(0, {core})
    context = ServerContext(
        model_name="stub", tokenizer=text.tokenizer, template=text.template,
        client=FreeEngine(text.tokenizer.encode(TEXT)), max_context=CONTEXT, fingerprint="fp_stub", version="0",
    )  # fmt: skip
    run_server(context, port=0, on_ready=lambda url: print(f"ready: {url}", flush=True))


if __name__ == "__main__":
    main()
