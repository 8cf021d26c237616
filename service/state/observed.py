"""The gauges of each model's gangs and queue that a gateway sets for Prometheus. Called by `service.state.poller`."""

from collections.abc import Mapping
from typing import get_args

from deploy.model_spec import ModelSpec
from service.jobs.records import Queued
from service.names import app_name
from service.state.model_states import ModelState, wanted_reason
from workers.metrics import BACKLOG, GANGS, GANGS_LIMIT, GANGS_WANTED, QUEUED, TARGET_BACKLOG, WantedReason
from workers.observing import GONE

GANG_STATES = ("STARTING", "UPDATING", "RECOVERING", "RUNNING", "STOPPING", "PENDING_MIGRATION")
"""Serve's names of a replica's states."""

REASONS: tuple[WantedReason, ...] = get_args(WantedReason)
BOUNDS = ("min", "max")
NO_JOBS: Mapping[str, Queued] = {}


class ObservedModels:
    """Sets the gauges of models, and ends those of models that are removed."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._request_s: dict[str, float] = {}  # of a typical request, by model; kept while it is asleep

    def tell(
        self,
        models: Mapping[str, ModelSpec],
        states: Mapping[str, ModelState],
        targets: Mapping[str, int],
        jobs: Mapping[str, Queued] = NO_JOBS,
    ) -> None:
        """Set all gauges.

        Args:
            models: of the deployment, by name.
            states: their states, by name.
            targets: the number of gangs that Serve aims at, by application.
            jobs: the jobs that wait in the store, by model.
        """
        for name in self._told - set(models):
            self._end(name)
        self._told = set(models)
        for name, model in models.items():
            if name in states:
                self._tell(model, states[name], targets.get(app_name(name)), jobs.get(name, Queued()))

    def _tell(self, model: ModelSpec, state: ModelState, target: int | None, jobs: Queued) -> None:
        name, scaling = model.name, model.autoscaling
        QUEUED.labels(name).set(state.queued + jobs.jobs)
        learned = [gang["request_s"] for gang in state.gangs if gang.get("request_s")]
        if learned:
            self._request_s[name] = sum(learned) / len(learned)
        BACKLOG.labels(name, "").set(state.queued * self._request_s.get(name, 0.0) + jobs.seconds)
        for gangs in GANG_STATES:
            GANGS.labels(name, gangs.lower()).set(state.replicas.get(gangs, 0))
        for bound, limit in zip(BOUNDS, (scaling.min_replicas, scaling.max_replicas), strict=True):
            GANGS_LIMIT.labels(name, bound).set(limit)
        TARGET_BACKLOG.labels(name).set(scaling.target_backlog_seconds)
        why = wanted_reason(model, target) if target is not None else None
        for reason in REASONS:
            GANGS_WANTED.labels(name, reason).set(GONE if target is None or reason != why else target)

    def _end(self, name: str) -> None:
        self._request_s.pop(name, None)
        for gauge in (QUEUED.labels(name), BACKLOG.labels(name, ""), TARGET_BACKLOG.labels(name)):
            gauge.set(GONE)
        for gangs in GANG_STATES:
            GANGS.labels(name, gangs.lower()).set(GONE)
        for bound in BOUNDS:
            GANGS_LIMIT.labels(name, bound).set(GONE)
        for reason in REASONS:
            GANGS_WANTED.labels(name, reason).set(GONE)
