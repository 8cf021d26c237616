"""What a gang reports of its load: to the autoscaler and to the routers, every second.

`workers.gang.gang` returns these from `record_autoscaling_stats` and `record_routing_stats`, which Ray Serve calls;
`service.autoscaling` and `service.routing` read them. They cross Serve as dictionaries of plain numbers. `Progress` is
for people.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from workers.messages import GenerationRequest, Phase, RankStatus

NOTICED = 0.1
"""Ranks that wait for a smaller share of a step wait for no rank in particular."""


@dataclass(frozen=True)
class GangLoad:
    """For the autoscaler. It carries the model's target, since the arguments of a Serve policy cannot change.

    Attributes:
        remaining_s: seconds of work left of the running request; 0 when idle or unknown.
        request_s: seconds of the whole gang that a typical request costs; 0 before the first was learned.
        busy: 1 while a request runs, else 0; of an elastic gang, the share of its ranks at work. Serve averages it over
            its look-back period.
        startup_s: seconds that the gang's ranks took from their start until they served.
        target_s: `autoscaling.target_backlog_seconds` of the model.
    """

    remaining_s: float
    request_s: float
    busy: float
    startup_s: float
    target_s: float

    def as_stats(self) -> dict[str, float]:
        """What `record_autoscaling_stats` returns: one number per attribute, under its name."""
        return dict(vars(self))


@dataclass(frozen=True)
class GangBacklog:
    """For the routers.

    Attributes:
        backlog_s: seconds of work that the gang had accepted and not finished.
        reported_at: when, in seconds since the epoch; 0: the gang has not reported yet.
        request_s: seconds of the whole gang that a typical request costs; 0 before the first was learned.
        shapes: each (width, height, num_frames) that the gang has run.
        replacing: the gang has lost ranks; what comes waits until new ones have started.
        busy: a request has the ranks.
        slots: requests that it takes at once.
        takes_s: seconds that a typical request takes: more than it costs where others run beside it.
    """

    backlog_s: float = 0.0
    reported_at: float = 0.0
    request_s: float = 0.0
    shapes: frozenset[tuple[int, int, int]] = frozenset()
    replacing: bool = False
    busy: bool = False
    slots: int = 1
    takes_s: float = 0.0

    def as_stats(self) -> dict[str, Any]:
        """What `record_routing_stats` returns; shapes as lists of three numbers."""
        return {**vars(self), "shapes": [list(shape) for shape in sorted(self.shapes)]}

    @classmethod
    def from_stats(cls, stats: dict[str, Any]) -> "GangBacklog":
        """Invert `as_stats`. Before the first report Serve has an empty dictionary, which gives the defaults."""
        known = {field.name: stats[field.name] for field in fields(cls) if field.name in stats}
        return cls(**{**known, "shapes": frozenset(tuple(shape) for shape in known.get("shapes", ()))})


class Progress(NamedTuple):
    """What a gang is doing.

    Attributes:
        phase: that of the running request, or of the ranks; `encode_media`: nothing runs, pictures are still encoded.
        step: steps of the running request that are done.
        total_steps: all of its steps: as many as it asks for, until the ranks know how many its scheduler takes. 0 if
            none runs.
    """

    phase: Phase
    step: int
    total_steps: int


class Movement:
    """When a gang was last seen to be idle, or to pass a boundary of a request."""

    def __init__(self) -> None:
        self._passed: list[int] = []
        self._at = time.time()

    def at(self, statuses: Sequence[RankStatus], idle: bool) -> float:
        """Seconds since the epoch.

        Args:
            statuses: what the ranks have said last.
            idle: it has nothing to do.
        """
        passed = [status.progress for status in statuses]
        if idle or passed != self._passed:
            self._passed, self._at = passed, time.time()
        return self._at


def step_split(statuses: Sequence[RankStatus]) -> dict[str, float | int | None] | None:
    """Where the time of the latest timed step went: means of all ranks, in seconds; None before the first.

    Returns:
        `seconds` = `computes` + `transfers` + `waits`; `slowest`: the rank for which the others wait, None if nobody
        waits for more than `NOTICED` of a step.
    """
    steps = [status.latest_step for status in statuses]
    if not steps or not all(steps):
        return None
    seconds, spent, waits = (sum(column) / len(steps) for column in zip(*steps, strict=True))
    longest = max(step[2] for step in steps)
    slowest = min(statuses, key=lambda status: status.latest_step[2]).rank if longest > NOTICED * seconds else None
    parts = {"seconds": seconds, "computes": seconds - spent, "transfers": spent - waits, "waits": waits}
    return {name: round(value, 6) for name, value in parts.items()} | {"slowest": slowest}


def progress(latest: RankStatus | None, running: GenerationRequest | None, answering: bool) -> Progress:
    """What a gang is doing, to its own knowledge.

    Args:
        latest: what rank 0 has said last, some hundred milliseconds ago; None: there are no sound ranks.
        running: the request that has the ranks.
        answering: pictures of earlier requests are encoded.
    """
    if latest is None:
        return Progress("starting", 0, 0)
    if running is None:
        return Progress("encode_media" if answering else latest.phase, 0, 0)
    if latest.phase == "idle":  # from before the request
        return Progress("encode", 0, running.num_inference_steps)
    return Progress(latest.phase, latest.step, latest.total_steps if latest.step else running.num_inference_steps)
