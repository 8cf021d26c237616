"""What one rank did for a traced request: a span for itself, one for each of its stages, an event for each step.

`workers.gang.rank` marks stages and steps; `workers.gang.rank_actor` reports the spans at the end, whatever the end,
and the gang exports them. Marking costs a comparison where a request is not traced.
"""

import os
from collections.abc import Iterator

from workers.messages import GenerationRequest, Traced
from workers.metrics import Stage
from workers.model.step_ends import StepEnd
from workers.tracing import OpenSpan, Place, Value


class RankTrace:
    """The trace of one request on one rank.

    Args:
        request: which it is; one without `traceparent` is not recorded. None: none.
        rank: the number of the rank.
        node_id: where it runs.
    """

    def __init__(self, request: GenerationRequest | None, rank: int, node_id: str = "") -> None:
        parent = Place.parse(request.traceparent) if request else None
        of: dict[str, Value] = {"spray.rank": rank, "process.pid": os.getpid(), "spray.node_id": node_id}
        self._rank = OpenSpan(parent and parent.below(), parent.span_id if parent else "", f"rank {rank}", of)
        self._stage: OpenSpan | None = None

    def stage(self, name: Stage) -> None:
        """A stage begins, and the one before has ended."""
        if self._rank.place:
            self._end_stage()
            self._stage = OpenSpan(self._rank.place.below(), self._rank.place.span_id, name, {})

    def step(self, end: StepEnd, total: int, waited: float) -> None:
        """A step has ended.

        Args:
            end: what is known of it.
            total: steps of the request.
            waited: seconds that this rank waited in it for slower ones.
        """
        if self._stage is None:
            return
        told: dict[str, Value] = {"step": end.step, "total_steps": total, "seconds": end.seconds}
        if end.in_collectives is not None:
            spent = sum(end.in_collectives.values())
            told |= {"compute_seconds": end.seconds - spent, "communication_seconds": spent, "waiting_seconds": waited}
        self._stage.event("step", told)

    def end(self, error: Exception | None = None) -> Iterator[Traced]:
        """The request has ended on this rank: what to report. Nothing, if it is not traced."""
        if self._rank.place is None:
            return
        self._rank.error = f"{type(error).__name__}: {error}" if error else ""
        if self._stage:
            self._stage.error = self._rank.error
        self._end_stage()
        yield Traced(tuple(self._rank.end()))

    def _end_stage(self) -> None:
        if self._stage:
            self._rank.add(self._stage.end())
        self._stage = None
