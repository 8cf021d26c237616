"""One model's gangs over a day of traffic, simulated event by event. Called by `tests.benchmarks.fleet_sim`.

A `Fleet` gets the requests of a day and a `Control`: what scales and what routes. Ours are the very
`service.autoscaling`, `service.routing` and `workers.gang.cost`; Serve's are Ray's own default policy function and any
free gang, as each takes one request at a time. Both run inside Ray's own wrapper, which applies scaling factors and
delays.

As in Serve: requests wait in one gateway, first come first served; gangs and gateway report every ten seconds, and
numbers are means over the look-back period; a gang that is to stop is a starting one if there is, else the newest,
busy or not, and finishes its request first. Not simulated: failures, more than one gateway, a cluster without room.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from ray.serve.autoscaling_policy import _apply_autoscaling_config, default_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from service.autoscaling import BacklogPolicy
from service.state.gang_state import best
from tests.benchmarks.fleet_traffic import DAY_S, Arrival, Load
from workers.gang.cost import CostModel, shape_of
from workers.gang.stats import GangLoad

REPORT_S = 10.0


@dataclass(frozen=True)
class Control:
    """What scales the gangs and routes the requests: ours with seconds, or Serve's with counts; and the delays."""

    ours: bool
    look_back_s: float
    upscale_delay_s: float
    downscale_delay_s: float
    downscale_to_zero_delay_s: float
    target: float
    """Seconds of backlog, or ongoing requests per gang."""


@dataclass
class Gang:
    """One gang, from being asked for until its devices are free."""

    number: int
    asked_s: float
    ready_s: float
    cost: CostModel = field(default_factory=CostModel)
    warm: set[tuple[int, int, int]] = field(default_factory=set)
    running: Arrival | None = None
    began_s: float = 0.0
    stopping: bool = False
    reports: deque[dict[str, float]] = field(default_factory=deque)

    def report(self, now_s: float, target_s: float) -> dict[str, float]:
        """What `Gang.record_autoscaling_stats` would return."""
        remaining_s = 0.0
        if self.running is not None:
            needs_s = self.cost.seconds(self.running.request, self.running.forwards) or 0.0
            remaining_s = max(0.0, needs_s - (now_s - self.began_s))
        busy = float(self.running is not None)
        return GangLoad(
            remaining_s, self.cost.mean_request_s or 0.0, busy, self.ready_s - self.asked_s, target_s
        ).as_stats()


@dataclass
class Outcome:
    """What a day came to."""

    waits_s: list[float] = field(default_factory=list)
    gang_s: float = 0.0
    busy_s: float = 0.0
    most: int = 0

    @property
    def replica_hours(self) -> float:
        """Hours for which gangs held their devices, start-up and draining included."""
        return self.gang_s / 3600

    def wait_s(self, share: float) -> float:
        """The wait that this share of the requests did not exceed, in seconds."""
        return sorted(self.waits_s)[int(share * (len(self.waits_s) - 1))]


class Fleet:
    """One model's gangs for one day."""

    def __init__(self, load: Load, arrivals: list[Arrival], control: Control, seed: int = 0) -> None:
        self.load, self.arrivals, self.control = load, arrivals, control
        self._rng = random.Random(seed)
        self._config = AutoscalingConfig(
            min_replicas=load.min_replicas,
            max_replicas=load.max_replicas,
            target_ongoing_requests=1 if control.ours else control.target,
            look_back_period_s=control.look_back_s,
            upscale_delay_s=control.upscale_delay_s,
            downscale_delay_s=control.downscale_delay_s,
            downscale_to_zero_delay_s=control.downscale_to_zero_delay_s,
        )
        self._policy: Callable[[AutoscalingContext], tuple[int, dict[str, Any]]] = _apply_autoscaling_config(
            BacklogPolicy() if control.ours else default_autoscaling_policy
        )
        self._state: dict[str, Any] = {}
        self._events: list[tuple[float, int, Gang]] = []
        self._asked = 0
        self._starting: list[Gang] = []
        self._serving: list[Gang] = []
        self._free: list[Gang] = []
        self._queue: deque[Arrival] = deque()
        self._queued_s = self._busy_s = self._at_s = 0.0
        self._past: deque[tuple[float, float]] = deque(maxlen=1 + round(control.look_back_s / REPORT_S))
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """The whole day."""
        for _ in range(self.load.min_replicas):
            self._start(0.0, ready_s=0.0)
        coming, following, report_s = 0, self.arrivals, REPORT_S
        with mock.patch("ray.serve.autoscaling_policy.time") as clock:  # Ray's delays follow the simulated time
            while report_s <= DAY_S:
                arrival_s = following[coming].at_s if coming < len(following) else DAY_S
                event_s = self._events[0][0] if self._events else DAY_S
                now_s = min(arrival_s, event_s, report_s)
                self._pass_time(now_s)
                if now_s == event_s and self._events:
                    self._finish(now_s, heapq.heappop(self._events)[2])
                elif now_s == report_s:
                    clock.time.return_value = now_s
                    self._scale(now_s)
                    report_s += REPORT_S
                else:
                    self._queue.append(following[coming])
                    coming += 1
                self._dispatch(now_s)
        self._close()
        return self.outcome

    def _pass_time(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        self._queued_s += passed_s * len(self._queue)
        self._busy_s += passed_s * (len(self._serving) - len(self._free))
        self._at_s = now_s

    def _dispatch(self, now_s: float) -> None:
        while self._queue and self._free:
            arrival = self._queue.popleft()
            shape = shape_of(arrival.request)
            gang = self._choose(shape)
            self._free.remove(gang)
            took_s = arrival.seconds + (0 if shape in gang.warm else self.load.cold_s)
            gang.running, gang.began_s = arrival, now_s
            gang.warm.add(shape)
            self.outcome.waits_s.append(now_s - arrival.at_s)
            self.outcome.busy_s += min(took_s, DAY_S - now_s)
            heapq.heappush(self._events, (now_s + took_s, gang.number, gang))

    def _choose(self, shape: tuple[int, int, int]) -> Gang:
        """Busy gangs refuse, so only the free ones are ranked."""
        if not self.control.ours:
            return self._rng.choice(self._free)
        free = {gang.number: gang for gang in self._rng.sample(self._free, len(self._free))}
        warm = frozenset(number for number, gang in free.items() if shape in gang.warm)
        return free[best(list(free), dict.fromkeys(free, 0.0), warm)]

    def _finish(self, now_s: float, gang: Gang) -> None:
        """A gang is ready for its first request, or done with one."""
        if gang.running is None:
            if gang in self._starting:
                self._starting.remove(gang)
                self._serving.append(gang)
                self._free.append(gang)
            return
        if self.control.ours:
            gang.cost.observe(gang.running.request, gang.running.forwards, gang.running.result)
        gang.running = None
        if gang.stopping:
            self.outcome.gang_s += now_s - gang.asked_s
        else:
            self._free.append(gang)

    def _scale(self, now_s: float) -> None:
        self._past.append((self._queued_s, self._queued_s + self._busy_s))
        before = self._past[0]
        window_s = max(REPORT_S, REPORT_S * (len(self._past) - 1))
        queued, total = ((now - then) / window_s for now, then in zip(self._past[-1], before, strict=True))
        target = len(self._serving) + len(self._starting)
        metrics = self._metrics(now_s) if self.control.ours else {}
        wanted, self._state = self._policy(self._context(now_s, target, total, queued, metrics))
        wanted = min(self.load.max_replicas, max(self.load.min_replicas, wanted))
        self.outcome.most = max(self.outcome.most, wanted)
        for _ in range(target, wanted):
            self._start(now_s, now_s + self._rng.uniform(*self.load.startup_s))
        for _ in range(wanted, target):
            self._stop(now_s)

    def _metrics(self, now_s: float) -> dict[str, dict[int, float]]:
        table: dict[str, dict[int, float]] = {}
        kept = round(self.control.look_back_s / REPORT_S)
        for gang in self._serving:
            gang.reports.append(gang.report(now_s, self.control.target))
            if len(gang.reports) > kept:
                gang.reports.popleft()
            for name in gang.reports[-1]:
                mean = sum(report[name] for report in gang.reports) / len(gang.reports)
                table.setdefault(name, {})[gang.number] = mean
        return table

    def _context(
        self, now_s: float, target: int, total: float, queued: float, metrics: dict[str, dict[int, float]]
    ) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=None,
            deployment_name="Gang",
            app_name=self.load.name,
            current_num_replicas=len(self._serving),
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=total,
            total_queued_requests=queued,
            aggregated_metrics=metrics,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self.load.min_replicas,
            capacity_adjusted_max_replicas=self.load.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )

    def _start(self, now_s: float, ready_s: float) -> None:
        self._asked += 1
        gang = Gang(self._asked, now_s, ready_s)
        self._starting.append(gang)
        heapq.heappush(self._events, (ready_s, gang.number, gang))

    def _stop(self, now_s: float) -> None:
        gang = self._starting.pop() if self._starting else self._serving.pop()
        gang.stopping = True
        if gang in self._free:
            self._free.remove(gang)
        if gang.running is None:
            self.outcome.gang_s += now_s - gang.asked_s

    def _close(self) -> None:
        """The day ends: what still waits has waited until now, what still runs has run until now."""
        self.outcome.waits_s += [DAY_S - arrival.at_s for arrival in self._queue]
        holding = [*self._starting, *self._serving, *(gang for _, _, gang in self._events if gang.stopping)]
        running = {gang.number: gang for gang in holding if gang.running is not None or not gang.stopping}
        self.outcome.gang_s += sum(DAY_S - gang.asked_s for gang in running.values())
