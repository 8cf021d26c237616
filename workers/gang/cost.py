"""What a request costs a gang, in seconds, learned from the requests that it has run.

`workers.gang.gang` shows every finished request to its `CostModel` and asks it what the running one still needs. The
answers go to the autoscaler and the routers as backlog. What it has learned goes to the routers too, as `Costs`: they
say what a request would take before it has a gang.

The work of one step is forwards x tokens, and tokens grow with width x height x num_frames x n. Without torch.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from deploy.families.lookup import family_of
from workers.messages import GenerationRequest, GenerationResult

SHAPES_KEPT = 64
"""Shapes remembered; the least recently run one is forgotten first."""

WEIGHT = 0.3
"""Of the latest request in its shape's averages. High, since requests of one shape hardly differ."""

WEIGHT_OF_TYPICAL = 0.05
"""Of the latest request in the typical request. Low, since requests of one model differ a lot."""

Shape = tuple[int, int, int]
"""width, height, num_frames"""


SURE_FROM = 2
"""Requests of a shape from which on the fastest of them says what the shape takes at least: the first may be cold."""


@dataclass
class _Learned:
    steps_per_asked: float  # of the model's scheduler: one of second order takes nearly twice as many
    work: float
    step_s: float
    outside_s: float
    least_step_s: float
    least_outside_s: float
    requests: int = 0
    share: float = 1.0


class Cost(NamedTuple):
    """What requests of one shape have taken on a gang.

    Attributes:
        width: pixels.
        height: pixels.
        num_frames: 1 for pictures.
        n: pictures or videos of a request.
        forwards: of the transformer in one step.
        inputs: pictures and clips that they begin with; below 0 if the pipeline decides on their share of the steps.
        step_s: seconds for each step that a request asks for.
        outside_s: seconds outside the steps.
        least_step_s: those of the fastest request.
        least_outside_s: likewise.
        requests: how many there were.
        share: of the gang, that they have had while they ran; below 1 in an elastic one.
    """

    width: int
    height: int
    num_frames: int
    n: int
    forwards: int
    inputs: int
    step_s: float
    outside_s: float
    least_step_s: float
    least_outside_s: float
    requests: int
    share: float = 1.0

    @property
    def work(self) -> float:
        """Of one step."""
        return float(self.forwards * self.width * self.height * self.num_frames * self.n)


@dataclass(frozen=True)
class Costs:
    """What a gang has learned of costs.

    Attributes:
        pipeline: class of the model's pipeline, by which its forwards per step are known.
        known: each shape that it has run.
    """

    pipeline: str = ""
    known: tuple[Cost, ...] = ()

    def as_stats(self) -> dict[str, Any]:
        """Lists of plain numbers, which cross Serve."""
        return {"pipeline": self.pipeline, "known": [list(cost) for cost in self.known]}

    @classmethod
    def from_stats(cls, stats: dict[str, Any]) -> "Costs":
        """Invert `as_stats`. A gang that has not reported, or of an older version, knows nothing."""
        known = (Cost(*row) for row in stats.get("known", ()) if len(row) == len(Cost._fields))
        return cls(stats.get("pipeline", ""), tuple(known))

    def seconds(self, request: GenerationRequest) -> float:
        """What a request would take, scaled from the shape that is nearest in work; 0: nothing is known."""
        return self.seconds_and_share(request)[0]

    def seconds_and_share(self, request: GenerationRequest) -> tuple[float, float]:
        """Also the share of a gang that it would have meanwhile: times the seconds, it is what the request costs."""
        own, same = self._own(request)
        if not self.known or own is None:
            return 0.0, 1.0
        cost = same or min(self.known, key=lambda cost: max(cost.work / own, own / cost.work))
        return request.steps_asked * cost.step_s * own / cost.work + cost.outside_s, cost.share

    def least_seconds(self, request: GenerationRequest) -> float:
        """What it would take at the very least: as the fastest of its shape, or else of a smaller one; 0: not known."""
        own, same = self._own(request)
        if own is None:
            return 0.0
        sure = [cost for cost in ([same] if same else self.known) if cost.requests >= SURE_FROM and cost.work <= own]
        least = (request.steps_asked * cost.least_step_s + cost.least_outside_s for cost in sure)
        return max(least, default=0.0)

    def _own(self, request: GenerationRequest) -> tuple[float | None, Cost | None]:
        """The work of a step of the request, if that is known, and what is known of its shape."""
        try:
            family = family_of(self.pipeline)
        except ValueError:  # no gang has reported yet, or one of another version
            return None, None
        forwards = family.branches(request.guidance_scale, request.negative_prompt)
        key = (*shape_of(request), request.n, forwards, _inputs(request))
        return _work(request, forwards), next((cost for cost in self.known if cost[: len(key)] == key), None)


class CostModel:
    """Learns seconds per step, and seconds outside the steps, for each shape.

    A request of a shape that was run is known. Any other is estimated from the known one whose step is nearest in work
    (by ratio): its seconds per step times the ratio of work, its seconds outside the steps unchanged.
    """

    def __init__(self) -> None:
        self._learned: dict[tuple[Shape, int, int, int], _Learned] = {}
        self._typical_s = self._typical_cost_s = 0.0
        self._requests = 0

    def observe(
        self,
        request: GenerationRequest,
        forwards: int,
        result: GenerationResult,
        share: float = 1.0,
        least_step_s: float = math.inf,
    ) -> None:
        """Learn from a finished request.

        The median step counts: the first step of a shape may compile, which the next request does not pay for.

        Args:
            request: what was asked.
            forwards: of the transformer in one step; 2 with guidance, else 1.
            result: what it took.
            share: of the gang, that it has had on average; see `Cost`.
            least_step_s: of a step at the degree at which it would have been quickest, if that is known.
        """
        steps = len(result.step_seconds)
        step_s = statistics.median(result.step_seconds) if steps else 0.0
        outside_s = result.encode_seconds + result.decode_seconds  # not encode_media: the gang is free by then
        key = _key(request, forwards)
        learned = self._learned.pop(key, None)
        learned = learned or _Learned(1.0, _work(request, forwards), step_s, outside_s, step_s, outside_s)
        learned.steps_per_asked = steps / request.steps_asked or 1.0
        learned.step_s += WEIGHT * (step_s - learned.step_s)
        learned.outside_s += WEIGHT * (outside_s - learned.outside_s)
        learned.share += WEIGHT * (share - learned.share) if learned.requests else share - learned.share
        learned.least_step_s = min(learned.least_step_s, step_s, least_step_s)
        learned.least_outside_s = min(learned.least_outside_s, outside_s)
        learned.requests += 1
        self._learned[key] = learned
        if len(self._learned) > SHAPES_KEPT:
            del self._learned[next(iter(self._learned))]
        self._requests += 1
        weight = max(WEIGHT_OF_TYPICAL, 1 / self._requests)  # the plain mean at first
        seconds = steps * step_s + outside_s
        self._typical_s += weight * (seconds - self._typical_s)
        self._typical_cost_s += weight * (seconds * share - self._typical_cost_s)

    def seconds(self, request: GenerationRequest, forwards: int, steps_done: int = 0) -> float | None:
        """What a request costs, or still costs, in seconds; None before anything was learned.

        Args:
            request: what is asked.
            forwards: of the transformer in one step; 2 with guidance, else 1.
            steps_done: steps of the scheduler that are done. The seconds outside the steps stay in the estimate,
                although encoding is over by then: encoding and decoding are learned together.
        """
        if not self._learned:
            return None
        work = _work(request, forwards)
        learned = self._learned.get(_key(request, forwards)) or min(
            self._learned.values(), key=lambda known: max(known.work / work, work / known.work)
        )
        steps = max(0.0, request.steps_asked * learned.steps_per_asked - steps_done)
        return steps * learned.step_s * work / learned.work + learned.outside_s

    @property
    def mean_request_s(self) -> float | None:
        """Seconds of a typical request, averaged over the last twenty or so; None before the first."""
        return self._typical_s if self._requests else None

    @property
    def mean_cost_s(self) -> float | None:
        """Seconds of the whole gang that a typical request costs: fewer than it takes, where others run beside it."""
        return self._typical_cost_s if self._requests else None

    def costs(self, pipeline: str) -> Costs:
        """What was learned, for those who have no gang yet."""
        known = []
        for (shape, n, forwards, inputs), each in self._learned.items():
            ratio = each.steps_per_asked
            usual, least = (each.step_s * ratio, each.outside_s), (each.least_step_s * ratio, each.least_outside_s)
            known.append(Cost(*shape, n, forwards, inputs, *usual, *least, each.requests, each.share))
        return Costs(pipeline, tuple(known))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that this gang has run and is warm for, the latest last."""
        return tuple(dict.fromkeys(shape for shape, *_ in self._learned))


def shape_of(request: GenerationRequest) -> Shape:
    """What kernels and compiled code depend on."""
    return request.width, request.height, request.num_frames


def _work(request: GenerationRequest, forwards: int) -> float:
    return float(forwards * request.width * request.height * request.num_frames * request.n)


def _key(request: GenerationRequest, forwards: int) -> tuple[Shape, int, int, int]:
    return shape_of(request), request.n, forwards, _inputs(request)


def _inputs(request: GenerationRequest) -> int:
    """See `Cost.inputs`."""
    return len(request.inputs) * (-1 if request.strength is None else 1)
