"""One request on some ranks: each is called, and what all of them report comes in one queue.

Made by `workers.gang.rank_group`, which reads the queue until every rank is done. Reports that are for the gang itself
end here: what a rank has drawn is asked for, and what it has done for a traced request becomes spans.
"""

import asyncio
import contextvars
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ray.exceptions import RayTaskError

from workers.gang.answers import Answers
from workers.gang.rank_spans import RankSpans
from workers.messages import Answer, Drawn, Kept, Preview, Profiled, RankStatus, StepEvent, Traced
from workers.tracing import Span

Report = StepEvent | Preview | Profiled | Drawn | Answer


class Call(NamedTuple):
    """What one rank is asked to do. `number`: of the rank."""

    number: int
    rank: Any
    method: str
    arguments: tuple[Any, ...]


class RankDone:
    """How a request ended on the rank of this number: None, or what the rank raised."""

    def __init__(self, rank: int, error: Exception | None) -> None:
        self.rank, self.error = rank, error


class RankRun:
    """One request on some ranks.

    Args:
        calls: one to each rank.
        traceparent: of the span that the request has in the gang; empty: it is not traced.
        statuses: of the same ranks, in the same order.
        context: of the ranks, so that Ray counts no call as the request's.
        answers: of the gang.

    Attributes:
        reports: what they report, and how each ends.
        ranks: who was called.
        running: how many of them are not done, as whoever reads the reports counts.
        together: the numbers of those that have not come to the end: each may wait for the others in a collective.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        traceparent: str,
        statuses: Sequence[RankStatus],
        context: contextvars.Context,
        answers: Answers,
    ) -> None:
        self.reports: asyncio.Queue[Report | Kept | RankDone] = asyncio.Queue()
        self.ranks = [call.rank for call in calls]
        self.running = len(calls)
        self.together = {call.number for call in calls}
        self._answers = answers
        self._spans = [RankSpans(traceparent, status) for status in statuses] if traceparent else [None] * len(calls)
        # Kept, because asyncio holds tasks weakly.
        self._relays = [
            asyncio.create_task(self._relay(call, spans), context=context)
            for call, spans in zip(calls, self._spans, strict=True)
        ]

    def spans(self, lost: str) -> Iterable[Span]:
        """What the ranks did, if the request is traced. Call it when they are done, or lost.

        Args:
            lost: why they are lost; empty: they are not.
        """
        return chain.from_iterable(each.end(lost) for each in self._spans if each)

    async def _relay(self, call: Call, spans: RankSpans | None) -> None:
        """Run the request on one rank, and put what it reports and how it ends into the queue of all.

        What was drawn is asked for at once, even if the caller has left: else its pictures would stay on the rank.
        """
        put = self.reports.put_nowait
        try:
            method = getattr(call.rank, call.method)
            async for reference in method.options(num_returns="streaming").remote(*call.arguments):
                report = await reference
                if isinstance(report, Traced):
                    assert spans is not None, "a rank tells of a traced request only"
                    spans.add(report.marks)
                    continue
                put(report)
                if isinstance(report, Drawn):
                    put(self._answers.open(call.rank.answer.remote(report.request_id)))
        except RayTaskError as error:
            if spans is not None:
                spans.error = f"{type(error.cause).__name__}: {error.cause}"
            self._end(call.number, error.cause)
        except Exception as error:
            self._end(call.number, error)
        else:
            self._end(call.number, None)

    def _end(self, number: int, error: Exception | None) -> None:
        if error is None:
            self.together.discard(number)
        self.reports.put_nowait(RankDone(number, error))
