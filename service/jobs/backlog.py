"""Jobs that wait in the store, as work that waits: for the autoscaler, for metrics, and for deadlines of new jobs.

The store's counts and the gangs' reports come in. Serve's autoscaler is told of the jobs as of requests that wait, so
they wake a model that sleeps and bring more gangs. A job that a runner has claimed waits in Serve's own queue, or runs;
it is not counted here. Called by `service.jobs.runner` at each look for work, and by `service.gateway`.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ray.exceptions import RayError

from service.autoscaling import LOOK_BACK_S
from service.jobs.records import Counts, Queued
from service.names import app_name
from service.rollout.serve_client import report_waiting
from workers.gang.cost import Costs

logger = logging.getLogger("ray.serve")

SOURCE = "jobs"
"""All gateways tell the same of the same store, under one name, so that Serve counts it once."""

POINT_S = 0.5
"""Between two points of what Serve is told, and between two reports."""

HELD_S = 600.0
"""Seconds for which this gateway says nothing of jobs after one that it could not begin. Longer than a folder or bucket
may be silent before that is noticed again."""

Gangs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By model, the last report of each running gang."""


class Speed(NamedTuple):
    """How fast the gangs of a model are, by the requests that they have run. Seconds are those of a whole gang.

    Attributes:
        per_work_s: seconds for a unit of `NewJob.work`.
        outside_s: seconds of a request outside its steps.
        request_s: seconds of a typical request.
    """

    per_work_s: float
    outside_s: float
    request_s: float

    def seconds(self, counts: Counts) -> float:
        """What jobs that wait will take."""
        return counts.queued_work * self.per_work_s + counts.queued * self.outside_s


class JobBacklog:
    """The jobs of the deployment that wait in the store.

    Args:
        gangs: the last reports of the gangs of each model of the deployment.
    """

    def __init__(self, gangs: Callable[[], Gangs]) -> None:
        self._gangs = gangs
        self._speeds: dict[str, Speed] = {}  # also of models that are asleep
        self._counts: Mapping[str, Counts] = {}
        self._told: dict[str, deque[tuple[float, float]]] = {}  # by model: when how many waited
        self._told_at = -math.inf  # by the monotonic clock
        self._held_until = -math.inf  # likewise
        self._reported: set[str] = set()  # applications of which Serve believes that jobs wait
        self.gateways = 1

    async def tell(self, counts: Mapping[str, Counts]) -> None:
        """Tell Serve of what waits in the store now."""
        self._counts, now, gangs = counts, time.time(), self._gangs()
        self._learn(gangs)
        woken, moment = False, time.monotonic()
        held = moment < self._held_until
        for model in gangs:
            told, count = self._told.setdefault(model, deque()), 0.0 if held else self._requests(model)
            if told and now < told[-1][0]:  # the clock was set back: these times are yet to come
                told.clear()
            woken |= bool(count) and not any(before for _, before in told)
            if told and now - told[-1][0] < POINT_S:
                told[-1] = (told[-1][0], count)
            else:
                told.append((now, count))
            while told[0][0] < now - LOOK_BACK_S:
                told.popleft()
        self._told = {model: told for model, told in self._told.items() if model in gangs}
        if not held and (woken or moment - self._told_at >= POINT_S):
            self._told_at = moment
            await self._report()

    def hold(self) -> None:
        """A job could not be begun: what it reads or writes is full or away, and so for all others of this gateway.

        More gangs would be of no use. Serve hears nothing of this gateway's until one can be begun, and forgets what it
        was told. It is not told that nothing waits: another gateway may reach the place, and reports the same jobs.
        """
        self._held_until = time.monotonic() + HELD_S

    def release(self) -> None:
        """A job can be begun."""
        self._held_until = -math.inf

    def share(self) -> dict[str, Queued]:
        """By model, what waits, divided by the number of gateways: in metrics the gateways are summed."""
        shares = {}
        for model, counts in self._counts.items():
            seconds = self.seconds(model, counts)
            shares[model] = Queued(counts.queued / self.gateways, seconds / self.gateways)
        return shares

    def seconds(self, model: str, counts: Counts) -> float:
        """What jobs that wait will take on one gang; 0 while nobody knows."""
        speed = self._speeds.get(model)
        return speed.seconds(counts) if speed else 0.0

    def wait_s(self, model: str, ahead: Counts) -> float:
        """Seconds until the gangs of a model have drawn what is ahead of a job in the store; 0 while nobody knows."""
        return self.seconds(model, ahead) / max(1, len(self._gangs().get(model, ())))

    def _requests(self, model: str) -> float:
        """What waits, in requests of a typical length: by these Serve's autoscaler counts seconds."""
        counts, speed = self._counts.get(model, Counts()), self._speeds.get(model)
        return speed.seconds(counts) / speed.request_s if speed else float(counts.queued)

    def _learn(self, gangs: Gangs) -> None:
        for model, reports in gangs.items():
            if speed := _speed(reports):
                self._speeds[model] = speed

    async def _report(self) -> None:
        found = {app_name(model): list(told) for model, told in self._told.items()}
        busy = {application for application, told in found.items() if any(count for _, count in told)}
        waiting = {application: found[application] for application in busy | (self._reported & found.keys())}
        if not waiting:
            return
        try:
            await asyncio.to_thread(report_waiting, SOURCE, waiting)
            self._reported = busy
        except (RayError, ValueError, TimeoutError) as error:  # Serve's controller may be starting again
            logger.warning("the autoscaler cannot be told of the jobs that wait: %s", error)


def _speed(reports: Iterable[Mapping[str, Any]]) -> Speed | None:
    """The speed of a model's gangs; None before the first request of one."""
    known = [cost for gang in reports for cost in Costs.from_stats(gang.get("costs", {})).known]
    typical = [gang["request_s"] for gang in reports if gang.get("request_s")]
    ran = sum(cost.requests for cost in known)
    if not ran or not typical:
        return None
    work = sum(cost.requests * cost.width * cost.height * cost.num_frames * cost.n for cost in known)
    return Speed(
        sum(cost.requests * cost.step_s * cost.share for cost in known) / work,
        sum(cost.requests * cost.outside_s * cost.share for cost in known) / ran,
        sum(typical) / len(typical),
    )
