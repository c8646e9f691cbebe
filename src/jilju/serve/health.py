"""Health: /livez, /readyz, /health, /version and /metrics.

Owns what they answer. Health is progress, not existence: work that is pending and no step for 5 s is not healthy. Knows
nothing of what the work is.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jilju.serve.answer_types import Alive, Health, HealthChecks, Readiness, Version
from jilju.serve.metrics.text import CONTENT_TYPE
from jilju.serve.server import Server

REASONS = {"loading": "loading", "restarting": "restarting", "draining": "draining", "gone": "engine_unavailable"}


def json_response(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")


async def livez(server: Server, request: Request) -> Response:
    return json_response(Alive(status="ok"))


async def readyz(server: Server, request: Request) -> Response:
    state = server.context.client.status().state
    reason = "draining" if server.drain.draining else REASONS.get(state)
    return json_response(Readiness(ready=reason is None, reason=reason), 200 if reason is None else 503)


async def health(server: Server, request: Request) -> Response:
    status, ledger, clock = server.context.client.status(), server.ledger, server.context.clock
    stuck_s = server.context.limits.stuck_s
    pending_s = (clock.now_ns() - ledger.busy_since_ns) / 1e9 if ledger.num_live_sequences else 0.0
    checks: HealthChecks = {
        "steps": min(status.last_step_age_s, pending_s) <= stuck_s,
        "engine": status.state != "gone",
        "scheduler": not status.is_stuck,  # requests wait, none runs, and turn after turn brings no step: a defect
        "ledger": ledger.imbalance() + status.imbalance == 0,
    }
    healthy = (
        checks["steps"] and checks["engine"] and checks["scheduler"]
    )  # a ledger that does not balance is shown, and serving goes on
    data: Health = {
        "status": "ok" if healthy else "unhealthy",
        "last_step_age_s": status.last_step_age_s,
        "running": status.num_running,
        "waiting": status.num_waiting,
        "checks": checks,
    }
    return json_response(data, 200 if healthy else 503)


async def version(server: Server, request: Request) -> Response:
    return json_response(Version(version=server.context.version))


async def metrics(server: Server, request: Request) -> Response:
    return Response(server.metrics.expose(), headers={"content-type": CONTENT_TYPE})
