"""The cluster: `GET /v1/cluster` for callers; `GET /livez` and `GET /readyz` for probes, which have no key."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.api.backend import Backend, Served

TAKES_REQUESTS = ("running", "asleep")
"""The states of a model whose requests are answered without anybody's help."""

router = APIRouter()
probes = APIRouter()


@router.get("/cluster")
async def cluster(http: Request, backend: Served) -> dict[str, Any]:
    backend.admit(http.headers.get("authorization"), admin=True)
    return backend.cluster()


@probes.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@probes.get("/readyz")
async def readyz(backend: Served) -> Response:
    status, waiting = readiness(backend)
    body = {
        "status": status,
        "waiting_for": waiting,
        "in_flight": backend.in_flight,
        "instance_id": backend.instance_id,
    }
    return JSONResponse(body, status_code=200 if status == "ok" else 503)


def readiness(backend: Backend) -> tuple[Literal["ok", "waiting", "draining"], list[str]]:
    """Whether the gateway takes requests, and the models that do not."""
    states = backend.states()
    waiting = [name for name, state in states.items() if state.state not in TAKES_REQUESTS]
    ready = len(waiting) < len(states)  # one model that cannot start must not take the others off the network
    return "draining" if backend.draining else "ok" if ready else "waiting", waiting
