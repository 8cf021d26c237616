"""What one rank does for a traced request: it marks its stages and steps, and tells its gang of them as it goes.

`workers.gang.rank` marks and tells after each step, through its telemetry; `workers.gang.rank_actor` tells the rest at
the end, whatever the end. `workers.gang.rank_spans` makes spans of the marks, so a rank that is lost takes along only
what it has not told. Marking costs a comparison where a request is not traced.
"""

import time
from collections.abc import Iterator, Mapping

from workers.messages import GenerationRequest, Traced
from workers.metrics import Stage
from workers.model.step_ends import StepEnd
from workers.tracing import Event, Value


class RankTrace:
    """The marks of one request on one rank.

    Args:
        request: which it is; one without `traceparent` is not recorded. None: none.
    """

    def __init__(self, request: GenerationRequest | None) -> None:
        self._is_traced = request is not None and request.traceparent != ""
        self._offset = time.time() - time.monotonic()  # so that a clock that is set meanwhile cannot turn a span around
        self._marks: list[Event] = []
        self._mark("begin")

    def stage(self, name: Stage) -> None:
        """A stage begins, and the one before has ended."""
        self._mark(name)

    def step(self, end: StepEnd, total: int, waited: float) -> None:
        """A step has ended.

        Args:
            end: what is known of it.
            total: steps of the request.
            waited: seconds that this rank waited in it for slower ones.
        """
        if not self._is_traced:
            return
        told: dict[str, Value] = {"step": end.step, "total_steps": total, "seconds": end.seconds}
        if end.in_collectives is not None:
            spent = sum(end.in_collectives.values())
            told |= {"compute_seconds": end.seconds - spent, "communication_seconds": spent, "waiting_seconds": waited}
        self._mark("step", told)

    def told(self) -> Iterator[Traced]:
        """What was marked since the last call: what to report. Nothing, if the request is not traced."""
        if self._marks:
            marks, self._marks = self._marks, []
            yield Traced(tuple(marks))

    def end(self) -> Iterator[Traced]:
        """The request has ended on this rank: what to report."""
        self._mark("end")
        yield from self.told()

    def _mark(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        if self._is_traced:
            self._marks.append(Event(name, self._offset + time.monotonic(), attributes or {}))
