"""What a step of a request takes an elastic gang at each degree, learned from its steps.

`workers.gang.elastic` shows it every step, and gives the dealer what it says. Without torch.
"""

import statistics
from collections import deque

from workers.gang.cost import SHAPES_KEPT, shape_of
from workers.messages import GenerationRequest

EFFICIENCY = 0.9
"""Of twice as many ranks, until they were measured."""

STEPS_KEPT = 5
"""Of each shape and degree: the median of so many, since a first one may be cold."""

SURE_FROM = 3
"""Steps of a degree from which on they alone count."""

_Key = tuple[tuple[int, int, int], int, int]


class StepCosts:
    """Seconds of a step by shape and degree."""

    def __init__(self) -> None:
        self._known: dict[_Key, dict[int, deque[float]]] = {}
        self._tails: dict[tuple[tuple[int, int, int], int], deque[float]] = {}

    @property
    def any_known(self) -> bool:
        """Whether some step was measured."""
        return bool(self._known)

    def observe_tail(self, request: GenerationRequest, seconds: float) -> None:
        """Learn what a request took after its last step, on one rank."""
        key = shape_of(request), request.n
        tail = self._tails.pop(key, deque(maxlen=STEPS_KEPT))
        self._tails[key] = tail
        tail.append(seconds)
        if len(self._tails) > SHAPES_KEPT:
            del self._tails[next(iter(self._tails))]

    def tail(self, request: GenerationRequest) -> float:
        """Seconds after the last step of a request, scaled from the nearest shape by its pixels; 0: nobody knows."""
        if not self._tails:
            return 0.0
        work = _work((shape_of(request), request.n, 1))
        pixels = {(shape, n): _work((shape, n, 1)) for shape, n in self._tails}
        key = min(pixels, key=lambda each: max(pixels[each] / work, work / pixels[each]))
        return statistics.median(self._tails[key]) * work / pixels[key]

    def observe(self, request: GenerationRequest, forwards: int, degree: int, seconds: float) -> None:
        """Learn from one step.

        Args:
            request: what is drawn.
            forwards: of the transformer in one step.
            degree: units that took the step.
            seconds: what it took.
        """
        key = shape_of(request), request.n, forwards
        known = self._known.pop(key, {})
        known.setdefault(degree, deque(maxlen=STEPS_KEPT)).append(seconds)
        self._known[key] = known
        if len(self._known) > SHAPES_KEPT:
            del self._known[next(iter(self._known))]

    def seconds(self, request: GenerationRequest, forwards: int, degrees: list[int]) -> dict[int, float]:
        """What a step takes at each of these degrees.

        What was not measured is guessed: other degrees from the nearest one, other shapes by the work of a step. Before
        the first step all requests take a second on one unit.
        """
        shape = shape_of(request)
        work = _work((shape, request.n, forwards))
        if not self._known:
            return {degree: _scaled(1.0, 1, degree) for degree in degrees}
        key = (shape, request.n, forwards)
        if key not in self._known:
            key = min(self._known, key=lambda each: max(_work(each) / work, work / _work(each)))
        known, ratio = self._known[key], work / _work(key)
        return {degree: ratio * _estimate(known, degree) for degree in degrees}


def _estimate(known: dict[int, deque[float]], degree: int) -> float:
    """By what was measured at this degree, or the nearest one. A slow start alone rules no degree out: until there are
    enough steps of it, it may also be as fast as the nearest other one says."""
    measured, others = known.get(degree, ()), [each for each in known if each != degree]
    found = [statistics.median(measured)] if measured else []
    if others and len(measured) < SURE_FROM:
        nearest = min(others, key=lambda each: max(each / degree, degree / each))
        found.append(_scaled(statistics.median(known[nearest]), nearest, degree))
    return min(found)


def _work(key: _Key) -> float:
    (width, height, frames), n, forwards = key
    return float(width * height * frames * n * forwards)


def _scaled(seconds: float, degree: int, to: int) -> float:
    """The seconds at another degree, both powers of two."""
    doublings = to.bit_length() - degree.bit_length()
    return float(seconds * degree / to / EFFICIENCY**doublings)
