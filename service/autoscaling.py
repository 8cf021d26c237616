"""How many gangs a model needs, from what its gangs report and what waits.

Ray Serve's controller calls `BacklogPolicy` several times a second, with what `GangLoad.as_stats` gave; the number goes
back to Serve, which keeps it within min_replicas and max_replicas and waits for the delays of the deployment file.

`decide` is the policy itself and knows nothing of Ray. It looks at seconds of work, never at numbers of requests:

1. *Offered load*: the gangs that all arriving work keeps busy. Work that arrives = work done + growth of what is
   outstanding, so it is right also while every gang is busy and the queue grows. Averaged over the time that it takes
   to start a gang and run a few requests, since no faster answer is possible and a slower one lags.
2. *Enough for the load*: the fewest gangs at which 80 of 100 requests would wait at most the target while the load
   stays as it is, by Erlang's formula for queues. A lucky moment does not change it, so the number of gangs is steady.
3. *Enough for the backlog*: a gang started now helps only after its start-up time. What will wait by then, given what
   the gangs at hand and the starting ones clear until then, has to be cleared within the target.

The larger one counts. A backlog that will be gone before a new gang is ready starts none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ray.serve.config import AutoscalingContext

from workers.gang.stats import GangLoad

LATE = 0.2
"""Share of requests that may wait for longer than the target, as far as the steady load decides."""

REQUESTS_AVERAGED = 2.0
"""The offered load is averaged over the start-up time plus so many requests."""

EVERY_S = 1.0
"""Serve asks ten times a second, and the reports change every few."""


@dataclass(frozen=True)
class PolicyState:
    """What the policy keeps from one decision to the next; plain numbers, as Serve stores it.

    Attributes:
        at_s: when it was made, in seconds.
        wanted: the decision.
        offered: gangs that the arriving work keeps busy.
        busy: gangs at work.
        queued: requests that waited.
        remaining_s: seconds of work left of the running requests.
        request_s: seconds of a typical request.
        startup_s: seconds until a new gang serves.
        target_s: seconds that a request should wait at most.
    """

    at_s: float
    wanted: int = 0
    offered: float = 0.0
    busy: float = 0.0
    queued: float = 0.0
    remaining_s: float = 0.0
    request_s: float = 0.0
    startup_s: float = 0.0
    target_s: float = 0.0


def decide(
    now_s: float, queued: float, loads: Sequence[GangLoad], starting: int, before: PolicyState | None = None
) -> PolicyState:
    """The number of gangs wanted, and what to remember until the next decision.

    Args:
        now_s: the time, in seconds.
        queued: requests that wait for a gang.
        loads: of the running gangs; at least one.
        starting: gangs that were asked for and do not serve yet.
        before: the last decision; None for the first.
    """
    target_s = max(load.target_s for load in loads)
    startup_s = sum(load.startup_s for load in loads) / len(loads)
    learnt = [load.request_s for load in loads if load.request_s > 0]
    request_s = sum(learnt) / len(learnt) if learnt else (before and before.request_s) or target_s
    busy = sum(load.busy for load in loads)
    remaining_s = sum(load.remaining_s for load in loads)
    offered = busy
    if before is not None:
        passed_s = max(now_s - before.at_s, 1e-3)
        # Requests are compared, not their seconds of then: a better estimate of a request is no work that came or went.
        grown_s = (queued - before.queued) * request_s + remaining_s - before.remaining_s
        arriving = before.busy + grown_s / passed_s
        weight = _weight(passed_s, startup_s, request_s)
        offered = max(0.0, before.offered + weight * (arriving - before.offered))
    waiting_then_s = queued * request_s + startup_s * (offered - len(loads) - starting / 2)  # half started, on average
    wanted = max(gangs_for_load(offered, request_s, target_s), math.ceil(offered + waiting_then_s / target_s - 1e-9))
    if wanted <= 1:
        wanted = int(queued > 0 or remaining_s > 0 or busy > 0)
    return PolicyState(now_s, wanted, offered, busy, queued, remaining_s, request_s, startup_s, target_s)


def asleep(now_s: float, before: PolicyState) -> PolicyState:
    """What is remembered while no gang runs and nothing waits: the offered load fades, so that a wake-up starts low."""
    weight = _weight(now_s - before.at_s, before.startup_s, before.request_s)
    offered = before.offered * (1 - weight)
    return replace(before, at_s=now_s, wanted=0, offered=offered, busy=0.0, queued=0.0, remaining_s=0.0)


def _weight(passed_s: float, startup_s: float, request_s: float) -> float:
    """Of what arrived in some seconds, in the average of the offered load."""
    return 1 - math.exp(-passed_s / (startup_s + REQUESTS_AVERAGED * request_s))


def gangs_for_load(offered: float, request_s: float, target_s: float) -> int:
    """The fewest gangs at which no more than `LATE` of the requests wait longer than the target.

    Erlang's C formula: the share of requests that wait, by the number of gangs; how long they wait falls off
    exponentially.

    Args:
        offered: gangs that the arriving work keeps busy, on average.
        request_s: seconds of a typical request.
        target_s: seconds that a request should wait at most.
    """
    blocked, gangs = 1.0, 0
    while True:
        gangs += 1
        blocked = offered * blocked / (gangs + offered * blocked)
        spare = gangs - offered
        if spare <= 0:
            continue
        share_waiting = gangs * blocked / (spare + offered * blocked)
        if share_waiting * math.exp(-spare * target_s / request_s) <= LATE:
            return gangs


def loads_in(metrics: Mapping[str, Mapping[Any, float]]) -> list[GangLoad]:
    """The gangs that have reported, from Serve's table of metric name -> replica -> value."""
    names = [field.name for field in fields(GangLoad)]
    columns = [metrics.get(name, {}) for name in names]
    reported = [gang for gang in columns[0] if all(gang in column for column in columns)]
    return [GangLoad(*(column[gang] for column in columns)) for gang in reported]


class BacklogPolicy:
    """What Serve calls: `AutoscalingPolicy(policy_function="service.autoscaling:BacklogPolicy")`.

    It takes no arguments, since Serve restarts an application whose policy changes.
    """

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of gangs wanted, and the state for the next call.

        Without a running gang, or before the first report, nothing is known in seconds: one is wanted if anything
        waits, and what was asked for stays.
        """
        now_s = ctx.current_time or 0.0
        known = {field.name for field in fields(PolicyState)}
        state = {name: value for name, value in ctx.policy_state.items() if name in known}
        before = PolicyState(**state) if state else None
        if before is not None and 0 <= now_s - before.at_s < EVERY_S and ctx.current_num_replicas:
            return before.wanted, state
        loads = loads_in(ctx.aggregated_metrics or {})
        queued = ctx.total_queued_requests or 0.0
        if not loads:
            wanted = ctx.target_num_replicas if ctx.current_num_replicas else 0
            if before is not None and not wanted and not queued:
                state = dict(vars(asleep(now_s, before)))
            return max(wanted, int(queued > 0)), state
        starting = max(0, ctx.target_num_replicas - ctx.current_num_replicas)
        decision = decide(now_s, queued, loads, starting, before)
        return decision.wanted, dict(vars(decision))
