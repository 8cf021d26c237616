"""What one request costs a gang, in seconds, learnt from what it has run.

`workers.gang.gang` shows every finished request to its `CostModel` and asks it what the running one still needs; the
answers go to the autoscaler and the router as backlog.

The work of one step is forwards x tokens, and tokens grow with width x height x num_frames x n. Standard library only.
"""

import statistics
from dataclasses import dataclass

from workers.messages import GenerationRequest, GenerationResult

SHAPES_KEPT = 64
"""Shapes remembered; the one that was run longest ago gives way."""

WEIGHT = 0.3
"""Of the newest request in a shape's averages. High, since requests of one shape hardly differ."""

WEIGHT_OF_TYPICAL = 0.05
"""Of the newest request in the typical one. Low, since requests of one model differ a lot."""

Shape = tuple[int, int, int]
"""width, height, num_frames"""


@dataclass
class _Learnt:
    work: float
    step_s: float
    outside_s: float


class CostModel:
    """Learns seconds per step, and seconds outside the steps, for each shape.

    What was run as it is asked for is known. Any other request is scaled from the known one whose step is nearest in
    work (by ratio): its seconds per step by the ratio of work, its seconds outside the steps as they are.
    """

    def __init__(self) -> None:
        self._learnt: dict[tuple[Shape, int, int], _Learnt] = {}
        self._typical_s = 0.0
        self._requests = 0

    def observe(self, request: GenerationRequest, forwards: int, result: GenerationResult) -> None:
        """Learn from a finished request.

        The median step counts: the first step of a shape may compile, and is not what the next request will cost.

        Args:
            request: what was asked.
            forwards: of the transformer in one step; 2 with guidance, else 1.
            result: what it took.
        """
        steps = len(result.step_seconds)
        step_s = statistics.median(result.step_seconds) if steps else 0.0
        outside_s = result.encode_seconds + result.decode_seconds
        key = _key(request, forwards)
        learnt = self._learnt.pop(key, None) or _Learnt(_work(request, forwards), step_s, outside_s)
        learnt.step_s += WEIGHT * (step_s - learnt.step_s)
        learnt.outside_s += WEIGHT * (outside_s - learnt.outside_s)
        self._learnt[key] = learnt
        if len(self._learnt) > SHAPES_KEPT:
            del self._learnt[next(iter(self._learnt))]
        self._requests += 1
        weight = max(WEIGHT_OF_TYPICAL, 1 / self._requests)  # at first the plain mean of all there were
        self._typical_s += weight * (steps * step_s + outside_s - self._typical_s)

    def seconds(self, request: GenerationRequest, forwards: int, steps_done: int = 0) -> float | None:
        """What a request costs, or still costs, in seconds; None before anything was learnt.

        Args:
            request: what is asked.
            forwards: of the transformer in one step; 2 with guidance, else 1.
            steps_done: steps behind it. After the first, only steps and the time outside them, decoding included,
                remain; encoding is not told apart.
        """
        if not self._learnt:
            return None
        work = _work(request, forwards)
        learnt = self._learnt.get(_key(request, forwards)) or min(
            self._learnt.values(), key=lambda known: max(known.work / work, work / known.work)
        )
        steps = max(0, request.num_inference_steps - steps_done)
        return steps * learnt.step_s * work / learnt.work + learnt.outside_s

    @property
    def mean_request_s(self) -> float | None:
        """Seconds of a typical request, averaged over the last twenty or so; None before the first."""
        return self._typical_s if self._requests else None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that this gang has run, and is therefore warm for; the latest last."""
        return tuple(dict.fromkeys(shape for shape, _, _ in self._learnt))


def shape_of(request: GenerationRequest) -> Shape:
    """What kernels and compiled code depend on."""
    return request.width, request.height, request.num_frames


def _work(request: GenerationRequest, forwards: int) -> float:
    return float(forwards * request.width * request.height * request.num_frames * request.n)


def _key(request: GenerationRequest, forwards: int) -> tuple[Shape, int, int]:
    return shape_of(request), request.n, forwards
