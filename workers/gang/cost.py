"""What a request costs a gang, in seconds, learned from the requests that it has run.

`workers.gang.gang` shows every finished request to its `CostModel` and asks it what the running one still needs. The
answers go to the autoscaler and the routers as backlog.

The work of one step is forwards x tokens, and tokens grow with width x height x num_frames x n. Standard library only.
"""

import statistics
from dataclasses import dataclass

from workers.messages import GenerationRequest, GenerationResult

SHAPES_KEPT = 64
"""Shapes remembered; the least recently run one is forgotten first."""

WEIGHT = 0.3
"""Of the latest request in its shape's averages. High, since requests of one shape hardly differ."""

WEIGHT_OF_TYPICAL = 0.05
"""Of the latest request in the typical request. Low, since requests of one model differ a lot."""

Shape = tuple[int, int, int]
"""width, height, num_frames"""


@dataclass
class _Learned:
    work: float
    step_s: float
    outside_s: float


class CostModel:
    """Learns seconds per step, and seconds outside the steps, for each shape.

    A request of a shape that was run is known. Any other is estimated from the known one whose step is nearest in work
    (by ratio): its seconds per step times the ratio of work, its seconds outside the steps unchanged.
    """

    def __init__(self) -> None:
        self._learned: dict[tuple[Shape, int, int], _Learned] = {}
        self._steps_per_asked = 1.0  # of the model's scheduler: one of second order takes nearly twice as many
        self._typical_s = 0.0
        self._requests = 0

    def observe(self, request: GenerationRequest, forwards: int, result: GenerationResult) -> None:
        """Learn from a finished request.

        The median step counts: the first step of a shape may compile, which the next request does not pay for.

        Args:
            request: what was asked.
            forwards: of the transformer in one step; 2 with guidance, else 1.
            result: what it took.
        """
        steps = len(result.step_seconds)
        step_s = statistics.median(result.step_seconds) if steps else 0.0
        self._steps_per_asked = steps / request.num_inference_steps or 1.0
        outside_s = result.encode_seconds + result.decode_seconds  # not encode_media: the gang is free by then
        key = _key(request, forwards)
        learned = self._learned.pop(key, None) or _Learned(_work(request, forwards), step_s, outside_s)
        learned.step_s += WEIGHT * (step_s - learned.step_s)
        learned.outside_s += WEIGHT * (outside_s - learned.outside_s)
        self._learned[key] = learned
        if len(self._learned) > SHAPES_KEPT:
            del self._learned[next(iter(self._learned))]
        self._requests += 1
        weight = max(WEIGHT_OF_TYPICAL, 1 / self._requests)  # the plain mean at first
        self._typical_s += weight * (steps * step_s + outside_s - self._typical_s)

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
        steps = max(0.0, request.num_inference_steps * self._steps_per_asked - steps_done)
        return steps * learned.step_s * work / learned.work + learned.outside_s

    @property
    def mean_request_s(self) -> float | None:
        """Seconds of a typical request, averaged over the last twenty or so; None before the first."""
        return self._typical_s if self._requests else None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that this gang has run and is warm for, the latest last."""
        return tuple(dict.fromkeys(shape for shape, _, _ in self._learned))


def shape_of(request: GenerationRequest) -> Shape:
    """What kernels and compiled code depend on."""
    return request.width, request.height, request.num_frames


def _work(request: GenerationRequest, forwards: int) -> float:
    return float(forwards * request.width * request.height * request.num_frames * request.n)


def _key(request: GenerationRequest, forwards: int) -> tuple[Shape, int, int]:
    return shape_of(request), request.n, forwards
