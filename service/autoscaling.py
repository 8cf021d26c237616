"""How many gangs a model needs, given the reports of its gangs and the requests that wait.

Ray Serve's controller calls `BacklogPolicy` several times a second with the gangs' `GangLoad.as_stats`. Serve keeps the
returned number within min_replicas and max_replicas and applies the delays of the deployment file.

`decide` is the policy itself and knows nothing of Ray. It counts seconds of work, never requests:

1. *Offered load*: the number of gangs that the arriving work keeps busy. Arriving work = work done + growth of the
   outstanding work, which holds even while every gang is busy and the queue grows. It is averaged over the time to
   start a gang and run a few requests: a faster answer is impossible, and a slower one lags.
2. *Enough for the load*: the fewest gangs at which 80 of 100 requests wait no longer than the target under this load,
    by
   Erlang's formula for queues. A lucky moment does not change it, so the number of gangs is steady.
3. *Enough for the backlog*: a gang that starts now helps only after its start-up time. The work that will still wait by
   then, after the running and starting gangs have cleared their part, must be cleared within the target.

The larger of 2 and 3 counts. A backlog that will be gone before a new gang is ready starts none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ray.serve.config import AutoscalingContext

from workers.gang.stats import GangLoad

LATE = 0.2
"""Share of requests that may wait longer than the target under a steady load."""

REQUESTS_AVERAGED = 2.0
"""The offered load is averaged over the start-up time plus the time of this many requests."""

EVERY_S = 1.0
"""Serve asks ten times a second, but reports change only every second."""

LOOK_BACK_S = 20.0
"""Serve averages the gangs' reports and the queue over this time. The policy itself accounts for the length of their
work."""

RECOVERY_S = 30.0
"""Seconds after the first decision by which the gangs of a lost controller have reported."""

MOST_GANGS = 1000
"""Numbers of gangs that are tried for a load, where the most that a model may have is not known."""


@dataclass(frozen=True)
class PolicyState:
    """What the policy keeps from one decision to the next: plain numbers, because Serve stores them.

    Attributes:
        at_s: when the decision was made, in seconds.
        wanted: the decided number of gangs.
        offered: offered load, in gangs.
        busy: gangs at work.
        queued: waiting requests.
        remaining_s: seconds of work left in the running requests.
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
    now_s: float,
    queued: float,
    loads: Sequence[GangLoad],
    starting: int,
    before: PolicyState | None = None,
    most: int = MOST_GANGS,
) -> PolicyState:
    """Decide how many gangs to run. The result is also the state for the next decision.

    Args:
        now_s: the time, in seconds.
        queued: requests that wait for a gang.
        loads: the loads of the running gangs; at least one.
        starting: gangs that were requested and do not serve yet.
        before: the last decision; None at first.
        most: gangs that the model may have.
    """
    target_s = max(load.target_s for load in loads)
    startup_s = sum(load.startup_s for load in loads) / len(loads)
    learned = [load.request_s for load in loads if load.request_s > 0]
    request_s = sum(learned) / len(learned) if learned else (before and before.request_s) or target_s
    busy = sum(load.busy for load in loads)
    remaining_s = sum(load.remaining_s for load in loads)
    offered = busy
    if before is not None:
        passed_s = max(now_s - before.at_s, 1e-3)
        # Compares requests, not their former seconds: a better estimate of a request is not work that came or went.
        grown_s = (queued - before.queued) * request_s + remaining_s - before.remaining_s
        arriving = before.busy + grown_s / passed_s
        weight = _weight(passed_s, startup_s, request_s)
        offered = max(0.0, before.offered + weight * (arriving - before.offered))
    waiting_then_s = queued * request_s + startup_s * (offered - len(loads) - starting / 2)  # half started, on average
    needed = gangs_for_load(offered, request_s, target_s, most)
    wanted = max(needed, math.ceil(offered + waiting_then_s / target_s - 1e-9))
    if wanted <= 1:
        wanted = int(queued > 0 or remaining_s > 0 or busy > 0)
    return PolicyState(now_s, wanted, offered, busy, queued, remaining_s, request_s, startup_s, target_s)


def asleep(now_s: float, before: PolicyState) -> PolicyState:
    """The state while no gang runs and nothing waits: the offered load fades, so that a wake-up starts low."""
    weight = _weight(now_s - before.at_s, before.startup_s, before.request_s)
    offered = before.offered * (1 - weight)
    return replace(before, at_s=now_s, wanted=0, offered=offered, busy=0.0, queued=0.0, remaining_s=0.0)


def _weight(passed_s: float, startup_s: float, request_s: float) -> float:
    """The weight of the last `passed_s` seconds in the average of the offered load; 0 if the clock was set back."""
    return 1 - math.exp(-max(0.0, passed_s) / (startup_s + REQUESTS_AVERAGED * request_s))


def gangs_for_load(offered: float, request_s: float, target_s: float, most: int = MOST_GANGS) -> int:
    """The fewest gangs at which at most `LATE` of the requests wait longer than the target.

    By Erlang's C formula: the share of requests that wait, given the number of gangs. The length of their wait is
    distributed exponentially.

    Args:
        offered: gangs that the arriving work keeps busy, on average.
        request_s: seconds of a typical request.
        target_s: how many seconds a request should wait at most.
        most: the answer if more were needed. Serve's controller waits for it, so it must come soon for any load.
    """
    blocked = 1.0
    for gangs in range(1, most):
        blocked = offered * blocked / (gangs + offered * blocked)
        spare = gangs - offered
        if spare <= 0:
            continue
        share_waiting = gangs * blocked / (spare + offered * blocked)
        if share_waiting * math.exp(-spare * target_s / request_s) <= LATE:
            return gangs
    return max(1, most)


def keep(gangs: int, decision: PolicyState) -> PolicyState:
    """A decision without memory: the running gangs stay, and the offered load is at most typical for that many gangs.

    A new controller knows no past: one busy gang would count as a full load of 1.0, and a second gang would start.
    """
    fewer, enough = (_load_for(count, decision.request_s, decision.target_s) for count in (gangs - 1, gangs))
    return replace(decision, wanted=gangs, offered=min(decision.offered, (fewer + enough) / 2))


def _load_for(gangs: int, request_s: float, target_s: float) -> float:
    """The largest offered load for which this many gangs are enough: the inverse of `gangs_for_load`."""
    low, high = 0.0, float(gangs)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if gangs_for_load(middle, request_s, target_s, gangs + 1) <= gangs else (low, middle)
    return low


def loads_in(metrics: Mapping[str, Mapping[Any, float]]) -> list[GangLoad]:
    """The loads of the gangs that have reported everything, from Serve's table of metric name -> replica -> value."""
    names = [field.name for field in fields(GangLoad)]
    columns = [metrics.get(name, {}) for name in names]
    reported = [gang for gang in columns[0] if all(gang in column for column in columns)]
    return [GangLoad(*(column[gang] for column in columns)) for gang in reported]


class BacklogPolicy:
    """What Serve calls, by name: `AutoscalingPolicy(policy_function="service.autoscaling:BacklogPolicy")`.

    It takes no arguments, because Serve restarts an application when its policy changes.
    """

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of gangs to run, and the state for the next call.

        Without a running gang, or before the first report, nothing is known in seconds: the target stays as it is, and
        is at least one if anything waits. With neither gangs nor requests it is zero. The first decisions keep it too:
        the controller may have been lost.
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
            first_s = min(now_s, float(ctx.policy_state.get("first_s", now_s)))  # the clock may have been set back
            recovering = before is None and now_s - first_s < RECOVERY_S
            wanted = ctx.target_num_replicas if ctx.current_num_replicas or recovering else 0
            if before is not None and not wanted and not queued:
                state = dict(vars(asleep(now_s, before)))
            if queued:  # all gangs are lost, and what ran waits again: those that start in their places are needed
                wanted = max(1, ctx.target_num_replicas)
            return wanted, state or {"first_s": first_s}
        starting = max(0, ctx.target_num_replicas - ctx.current_num_replicas)
        decision = decide(now_s, queued, loads, starting, before, ctx.capacity_adjusted_max_replicas)
        if before is None and ctx.target_num_replicas:
            decision = keep(ctx.target_num_replicas, decision)
        return decision.wanted, dict(vars(decision))
