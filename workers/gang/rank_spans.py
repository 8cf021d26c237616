"""The spans of one rank for one request, made of what it has told: itself, in it its stages, steps as their events.

`workers.gang.rank_group` adds the marks of `workers.gang.rank_trace` as they come, and takes the spans when the request
has ended on the ranks. They are whole also where the rank was lost and will say no more.
"""

import time
from collections.abc import Iterable

from workers.messages import RankStatus
from workers.tracing import Event, Place, Span, Value


class RankSpans:
    """One rank's part of a traced request.

    Args:
        traceparent: of the span that the request has in the gang.
        rank: where it runs.

    Attributes:
        error: what the rank has raised; empty: nothing.
    """

    def __init__(self, traceparent: str, rank: RankStatus) -> None:
        parent = Place.parse(traceparent)
        assert parent is not None, "the gang has written it"
        self.error = ""
        self._place, self._parent_id = parent.below(), parent.span_id
        self._name = f"rank {rank.rank}"
        self._of: dict[str, Value] = {
            "spray.rank": rank.rank,
            "process.pid": rank.pid,
            "spray.node_id": rank.node_id,
        }
        self._marks: list[Event] = [Event("begin", time.time())]  # until it says when it has begun

    def add(self, marks: Iterable[Event]) -> None:
        """The rank has told these."""
        self._marks += marks

    def end(self, lost: str = "") -> list[Span]:
        """All spans. What has not ended by its own word ends now.

        Args:
            lost: why the ranks are lost; empty: they are not.
        """
        last = self._marks[-1]
        has_ended = last.name == "end"
        ended_at = last.at if has_ended else max(last.at, time.time())
        error = self.error or ("" if has_ended or not lost else f"GangLost: {lost}")
        began_at = [mark.at for mark in self._marks if mark.name == "begin"][-1]
        whole = Span(self._place, self._parent_id, self._name, began_at, ended_at, self._of, error=error)
        return [whole, *self._stages(ended_at, error)]

    def _stages(self, ended_at: float, error: str) -> list[Span]:
        """Each ends where the next begins, the last one with the rank, and as it."""
        begun: list[tuple[Event, list[Event]]] = []
        for mark in self._marks:
            if mark.name == "step" and begun:
                begun[-1][1].append(mark)
            elif mark.name not in ("begin", "end", "step"):
                begun.append((mark, []))
        ends = [(mark.at, "") for mark, _ in begun[1:]] + [(ended_at, error)]
        return [
            Span(self._place.below(), self._place.span_id, mark.name, mark.at, at, {}, tuple(steps), said)
            for (mark, steps), (at, said) in zip(begun, ends, strict=False)
        ]
