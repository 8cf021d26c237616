"""GangReport: what a gang says of itself, every second: to the autoscaler, to the routers and to people.

Made and asked by `workers.gang.gang`, whose methods Serve calls. It reads what the gang's parts know, and sets the
gang's gauges.
"""

import time
from typing import Any

from ray import serve

from workers.gang.cost import CostModel
from workers.gang.elastic import NO_REQUESTS, Elastic, slots
from workers.gang.setup import Setup
from workers.gang.stats import GangBacklog, GangLoad, Movement, Progress, progress, step_split
from workers.gang.supervisor import Supervisor

LOST = "a gang has lost its ranks, new ones start"
SOME_LOST = "a gang has lost some of its ranks; it finishes what it has on the others, then new ones start"


class GangReport:
    """What one gang says of itself.

    Args:
        setup: of the gang.
        supervisor: of its ranks.
        elastic: its requests, if it is elastic.
        costs: what its requests took.
    """

    def __init__(self, setup: Setup, supervisor: Supervisor, elastic: Elastic | None, costs: CostModel) -> None:
        self._setup, self._supervisor, self._elastic, self._costs = setup, supervisor, elastic, costs
        self._movement = Movement()

    def to_autoscaler(self) -> dict[str, float]:
        """A `GangLoad`. Also sets what Prometheus reads of the gang."""
        setup, remaining_s = self._setup, self._remaining_s()
        capacity = len(self._supervisor.living) / setup.model.parallel.world_size
        setup.metrics.now(remaining_s, capacity, self._moved_at())
        if self._elastic:
            setup.metrics.elastic(*self._elastic.take_counts())
        return GangLoad(
            remaining_s=remaining_s,
            request_s=self._costs.mean_cost_s or 0.0,
            busy=self._elastic.busy if self._elastic else float(self._supervisor.running is not None),
            startup_s=self._supervisor.startup_s,
            target_s=setup.model.autoscaling.target_backlog_seconds,
        ).as_stats()

    def to_routers(self) -> dict[str, Any]:
        """A `GangBacklog`, `Costs`, and under `now` what people see of the gang."""
        model = self._setup.model
        backlog = GangBacklog(
            backlog_s=self._remaining_s(),
            reported_at=time.time(),
            request_s=self._costs.mean_cost_s or 0.0,
            shapes=frozenset(self._costs.shapes) | {(s.width, s.height, s.num_frames) for s in model.warmup_shapes},
            replacing=self._supervisor.replacing,
            busy=self._is_running,
            slots=slots(model),
            takes_s=self._costs.mean_request_s or 0.0,
        )
        costs = self._costs.costs(self._setup.family.pipeline)
        return backlog.as_stats() | {"costs": costs.as_stats(), "now": self._now()}

    def _now(self) -> dict[str, Any]:
        """For people."""
        supervisor = self._supervisor
        ranks, living, running = supervisor.ranks, supervisor.living, supervisor.running
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "pids": [status.pid for status in living],
            "kernel": living[0].kernel if living else "",
            "guidance": living[0].guidance if living else "",
            "request_id": running.request_id if running else "",
            "spare_ranks": supervisor.spares.ready,
            **(self._elastic.now if self._elastic else NO_REQUESTS),
            **self.progress._asdict(),
            "split": step_split(ranks.statuses) if ranks and not supervisor.replacing else None,
            "trouble": self._trouble,
            "startup_s": round(supervisor.startup_s, 3),
        }

    @property
    def progress(self) -> Progress:
        """What the gang is doing."""
        ranks, living = self._supervisor.ranks, self._supervisor.living
        answering = ranks is not None and ranks.answering
        return progress(living[0] if living else None, self._supervisor.running, answering)

    @property
    def _is_running(self) -> bool:
        return self._elastic.has_work if self._elastic else self._supervisor.running is not None

    @property
    def _trouble(self) -> str:
        """For people."""
        if self._supervisor.replacing:
            return SOME_LOST if self._supervisor.living else LOST
        return self._setup.adapters.trouble

    def _moved_at(self) -> float:
        ranks = self._supervisor.ranks
        idle = not self._is_running and not self._supervisor.replacing
        return self._movement.at(ranks.statuses if ranks else (), idle)

    def _remaining_s(self) -> float:
        """Seconds until the gang is free; 0 while no request was ever finished."""
        supervisor = self._supervisor
        replacing_s = supervisor.startup_s if supervisor.replacing else 0.0
        if self._elastic and supervisor.living:
            return self._elastic.remaining_s + replacing_s
        if supervisor.replacing:
            return replacing_s
        if supervisor.running is None:
            return 0.0
        forwards = self._setup.forwards(supervisor.running)
        return self._costs.seconds(supervisor.running, forwards, self.progress.step) or 0.0
