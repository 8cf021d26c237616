"""Reads the state of the cluster in the background, so that nobody has to wait for it. For `service.gateway`.

Serve's status, Ray's nodes and the gangs' reports come in; a `ModelState` per model goes out. If Serve's controller
does not answer, the last state stays, and requests go on.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray.serve.schema import ServeStatus

from deploy.model_spec import ModelSpec
from service.jobs.records import Queued
from service.names import app_name
from service.rollout.serve_client import serve_state
from service.state import router_registry
from service.state.model_states import ModelState, cluster_object, model_state
from service.state.observed import ObservedModels
from workers.gang.placement import Node, alive_nodes, free_nodes

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0

STEADY_S = 4.0
"""Seconds between two looks at Serve and Ray while every model is well and nothing waits for more gangs: each look
costs both sides CPU time. The gangs' own reports are read every PERIOD_S."""


class Poller:
    """Knows the state of each model. It is a second old; up to `STEADY_S` if nothing was about to change.

    Args:
        jobs: returns the jobs that wait in the store, for metrics.
        greet: called for each model that Serve knows, before its gangs' reports are looked up.
    """

    def __init__(
        self, jobs: Callable[[], Mapping[str, Queued]], greet: Callable[[str], None] = lambda model: None
    ) -> None:
        self._jobs, self._greet = jobs, greet
        self._models: Mapping[str, ModelSpec] = {}
        self._states: dict[str, ModelState] = {}
        self._nodes: list[Node] = []
        self._free: list[Node] = []
        self._logged: dict[str, str] = {}
        self._status = ServeStatus()
        self._targets: Mapping[str, int] = {}
        self._observed = ObservedModels()
        self._unplaced: Collection[str] = ()
        self._due = 0.0  # on the loop's clock: when Serve and Ray are asked again
        self._polling: asyncio.Task[None] | None = None

    def follow(self, models: Mapping[str, ModelSpec]) -> None:
        """Poll the state of these models from now on."""
        self._models = models
        self._due = 0.0
        self._polling = self._polling or asyncio.create_task(self._run())

    @property
    def states(self) -> dict[str, ModelState]:
        """States by model. A model that was not polled yet counts as starting."""
        return {name: self._states.get(name, ModelState("starting")) for name in self._models}

    def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""
        states = self.states
        seen = [(model, states[name]) for name, model in self._models.items()]
        return cluster_object(seen, self._nodes, self._free, self._targets)

    async def _run(self) -> None:
        """Poll forever. One failure must not end it: the controller may be restarting."""
        while True:
            try:
                await self._poll()
            except Exception as error:
                logger.warning("the state of the cluster cannot be read: %s", error)
            await asyncio.sleep(PERIOD_S)

    async def _poll(self) -> None:
        clock = asyncio.get_running_loop().time
        if clock() >= self._due:
            self._due = clock() + STEADY_S
            # In a thread, for these calls block; requests are answered meanwhile. The table may change during this
            # wait, so it is read afterwards.
            try:
                self._status, self._nodes, self._free, self._targets = await asyncio.to_thread(_read)
                self._unplaced = await asyncio.to_thread(_read_unplaced) if _starts(self._status) else ()
            except Exception:
                self._due = 0.0  # the next round asks again, before anything is told from what was never read
                raise
        for name, model in self._models.items():
            if app_name(name) in self._status.applications:
                self._greet(name)
            queued, gangs = router_registry.lookup(app_name(name))
            placed = not any(f"::{app_name(name)}#" in group for group in self._unplaced)
            state = model_state(model, self._status, self._nodes, self._free, placed, queued=queued, gangs=gangs)
            self._states[name] = state
            if state.reason and state.reason != self._logged.get(name):
                logger.warning("%s is %s: %s", name, state.state, state.reason)
            self._logged[name] = state.reason
        if not all(_is_steady(model, self._states[name]) for name, model in self._models.items()):
            self._due = 0.0
        self._observed.tell(self._models, self._states, self._targets, self._jobs())
        self._states = {name: state for name, state in self._states.items() if name in self._models}


def _read() -> tuple[Any, list[Node], list[Node], Mapping[str, int]]:
    """Serve's status, the nodes, their free resources, and the number of gangs that Serve aims at."""
    status, targets = serve_state()
    return status, alive_nodes(), free_nodes(), targets


def _is_steady(model: ModelSpec, state: ModelState) -> bool:
    """Whether nothing is about to change, as far as can be seen. Waiting requests call for gangs, unless all run."""
    settled = set(state.replicas) <= {"RUNNING"}
    all_run = state.replicas.get("RUNNING", 0) >= model.autoscaling.max_replicas
    return state.state in ("running", "asleep") and settled and not state.reason and (not state.queued or all_run)


def _starts(status: Any) -> bool:
    """Whether any gang is starting."""
    deployments = (each for application in status.applications.values() for each in application.deployments.values())
    return any(str(state).endswith("STARTING") for each in deployments for state in each.replica_states)


def _read_unplaced() -> tuple[str, ...]:
    """The names of the placement groups that wait for resources; Serve names each after its replica."""
    groups = ray.util.placement_group_table().values()
    return tuple(group["name"] for group in groups if group["state"] in ("PENDING", "RESCHEDULING"))
