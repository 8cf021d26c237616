"""The state of each model, with its reason: for `GET /v1/cluster`, `GET /v1/models`, `/readyz` and `spray ps`.

It follows from Serve's status (how many gangs are in which state), Ray's nodes (whether a gang can be placed), and the
gangs' own reports (`service.state.router_registry`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from deploy.model_spec import ModelSpec
from service.names import GANG, app_name
from workers.gang.placement import Node, Unschedulable, unschedulable
from workers.metrics import WantedReason

State = Literal["running", "starting", "waiting", "asleep", "failed"]

COLOR = re.compile(r"\x1b\[[0-9;]*m")
RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Lost|Failed|Unavailable): (.+)$", re.MULTILINE)
"""The last line of a traceback: the exception and its message."""

SERVING = ("RUNNING", "UPDATING", "PENDING_MIGRATION")
"""Serve's states of a gang that takes requests, or does so again in a moment. On a node that drains it is
PENDING_MIGRATION until another one runs."""

STATES: Mapping[State, str] = {
    "running": "at least one gang takes requests",
    "starting": "its gangs are loading, or replace their ranks",
    "waiting": "its gangs cannot be placed; the reason says what is missing",
    "asleep": "no gang runs; the first request wakes one",
    "failed": "its gangs cannot be started; the reason says why",
}


@dataclass(frozen=True)
class ModelState:
    """How one model is doing.

    Attributes:
        state: see `STATES`.
        reason: why it does not run, or not as it should; empty if all is well.
        replicas: number of gangs by Serve's state: RUNNING, STARTING, STOPPING, ...
        queued: requests that wait in this gateway.
        gangs: the last report of each running gang.
    """

    state: State
    reason: str = ""
    replicas: Mapping[str, int] = field(default_factory=dict)
    queued: int = 0
    gangs: Sequence[Mapping[str, Any]] = ()

    @property
    def ready(self) -> int:
        """Gangs to which Serve sends requests, those on nodes that drain included."""
        return self.replicas.get("RUNNING", 0) + self.replicas.get("PENDING_MIGRATION", 0)


def model_state(
    model: ModelSpec,
    status: ServeStatus,
    nodes: Sequence[Node],
    free: Sequence[Node],
    placed: bool = False,
    **reported: Any,
) -> ModelState:
    """The state of one model.

    Args:
        model: as it was deployed.
        status: the status of Serve.
        nodes: the nodes of the cluster, with their total resources.
        free: the same nodes, with their free resources.
        placed: whether none of its gangs waits for a place, so that a starting gang has what it needs.
        reported: `queued` and `gangs` of `ModelState`.
    """
    application = status.applications.get(app_name(model.name))
    deployment = application.deployments.get(GANG) if application else None
    replicas = _replicas(deployment) if deployment else {}
    lacking = unschedulable(model, free) if replicas.get("STARTING") and not placed else None
    state, reason = _state(model, application, replicas, nodes, lacking)
    if state == "running":
        gangs = [gang["now"] for gang in reported.get("gangs", ())]
        reason = "; ".join(dict.fromkeys(text for text in [reason, *(gang["trouble"] for gang in gangs)] if text))
        silent = sum(replicas.get(each, 0) for each in SERVING) - len(gangs)  # they have not reported yet
        if gangs and silent <= 0 and all(gang["phase"] == "starting" for gang in gangs):
            state = "starting"  # Serve calls them running, but their ranks are being replaced
    return ModelState(state, reason, replicas, **reported)


def is_broken(application: ApplicationStatusOverview) -> bool:
    """Whether an application cannot serve. One that serves meanwhile can, and so can one that is being replaced."""
    replicas = {name for deployment in application.deployments.values() for name in _replicas(deployment)}
    if not replicas.isdisjoint(SERVING):
        return False
    # UNHEALTHY while one starts means that it is being replaced
    broken = ("DEPLOY_FAILED",) if "STARTING" in replicas else ("DEPLOY_FAILED", "UNHEALTHY")
    return application.status in broken


def failure(application: ApplicationStatusOverview) -> str:
    """Why Serve could not start an application: the last exception's message. The log has the traceback."""
    return last_error(application) or _said(application)


def last_error(application: ApplicationStatusOverview) -> str:
    """The message of the last exception that Serve reports of an application; empty if there is none."""
    raised = RAISED.findall(_said(application))
    return str(raised[-1]) if raised else ""


def _replicas(deployment: DeploymentStatusOverview) -> dict[str, int]:
    """The replicas of a deployment by state. The states are typed as members of an enum; in fact they are names."""
    return {str(state).rpartition(".")[2]: count for state, count in deployment.replica_states.items() if count}


def _said(application: ApplicationStatusOverview) -> str:
    details = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return COLOR.sub("", " ".join(detail for detail in details if detail))


def cluster_object(
    models: Iterable[tuple[ModelSpec, ModelState]],
    nodes: Sequence[Node],
    free: Sequence[Node],
    targets: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The body of `GET /v1/cluster`.

    Args:
        models: each with its state.
        nodes: the nodes of the cluster, with their total resources.
        free: the same nodes, with their free resources.
        targets: the number of gangs that Serve aims at, by application.
    """
    return {
        "object": "cluster",
        "nodes": len(nodes),
        "devices": {name: {"total": _sum(nodes, name), "free": _sum(free, name)} for name in ("CPU", "GPU")},
        "models": [state_object(model, state, (targets or {}).get(app_name(model.name))) for model, state in models],
    }


def state_object(model: ModelSpec, state: ModelState, wanted: int | None = None) -> dict[str, Any]:
    """One model of `GET /v1/cluster`; `wanted` is the number of gangs that Serve aims at."""
    scaling = model.autoscaling
    return {
        "id": model.name,
        "state": state.state,
        "reason": state.reason,
        "layout": str(model.parallel),
        "ranks": model.parallel.world_size,
        "device": model.device,
        "replicas": dict(state.replicas),
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "wanted_replicas": wanted,
        "wanted_reason": None if wanted is None else wanted_reason(model, wanted),
        "queued": state.queued,
        "gangs": [{name: told for name, told in gang.items() if name != "costs"} for gang in state.gangs],
    }


def wanted_reason(model: ModelSpec, target: int) -> WantedReason:
    """Why Serve aims at this number of gangs: the file allows no other, no fewer or no more; or the load."""
    fewest, most = model.autoscaling.min_replicas, model.autoscaling.max_replicas
    if fewest == most:
        return "fixed"
    if target <= fewest:
        return "minimum"
    return "maximum" if target >= most else "load"


def _state(
    model: ModelSpec,
    application: Any,
    replicas: Mapping[str, int],
    nodes: Sequence[Node],
    lacking: Unschedulable | None,
) -> tuple[State, str]:
    starting = replicas.get("STARTING", 0)
    if not replicas.keys().isdisjoint(SERVING):
        return "running", f"{starting} more: loading, or waiting: {lacking} free" if lacking else ""
    if application is not None and is_broken(application):
        return "failed", failure(application)
    if application is not None and set(replicas) <= {"STOPPING"} and not model.autoscaling.min_replicas:
        return "asleep", ""
    never = unschedulable(model, nodes)
    if never:
        return "waiting", str(never)
    if lacking:
        return "starting", f"loading, or waiting: {lacking} free"
    error = last_error(application) if application is not None else ""
    return "starting", f"starting again: {error}" if error else ""


def _sum(nodes: Sequence[Node], resource: str) -> float:
    return round(sum(node.resources.get(resource, 0.0) for node in nodes), 3)
