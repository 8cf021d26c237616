"""The cluster: `GET /v1/cluster` for callers; `/livez`, `/readyz` and `/health` for probes, which have no key."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.api.answers import Alive, ClusterObject, Ready
from service.api.backend import Backend, Served
from service.api.openapi import READING_ERRORS

TAKES_REQUESTS = ("running", "asleep")
"""The states in which a model's requests are answered without an operator."""

router = APIRouter()
probes = APIRouter()

NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "they should not"}}


@router.get("/cluster", response_model=ClusterObject, responses=READING_ERRORS)
async def cluster(http: Request, backend: Served) -> Response:
    """Nodes, devices, gangs and queues."""
    backend.admit(http.headers.get("authorization"), admin=True)
    return JSONResponse(backend.cluster())


@probes.get("/livez", response_model=Alive)
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@probes.get("/health", response_model=Ready, responses=NOT_READY)
@probes.get("/readyz", response_model=Ready, responses=NOT_READY)
async def readyz(backend: Served) -> Response:
    """Whether requests should come here: some model runs or sleeps, and the gateway does not stop."""
    status, waiting = readiness(backend)
    body = {
        "status": status,
        "waiting_for": waiting,
        "in_flight": backend.in_flight,
        "gateway": backend.name,
        "instance_id": backend.instance_id,
    }
    return JSONResponse(body, status_code=200 if status == "ok" else 503)


def readiness(backend: Backend) -> tuple[Literal["ok", "waiting", "draining"], list[str]]:
    """Whether the gateway takes requests, and the models that do not."""
    states = backend.states()
    waiting = [name for name, state in states.items() if state.state not in TAKES_REQUESTS]
    ready = len(waiting) < len(states)  # one model that cannot start must not take the others off the network
    return "draining" if backend.draining else "ok" if ready else "waiting", waiting
