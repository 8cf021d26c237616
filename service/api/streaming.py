"""Turns the reports of a streaming request into server-sent events. For `service.api.generation`."""

import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Self

from fastapi.responses import StreamingResponse
from starlette.types import Send

from service.api.backend import Report, Restarted, Waiting
from service.api.errors import answer, log
from service.api.responses import completed_events, partial_event, progress_event
from workers.errors import GangLost
from workers.messages import GenerationRequest, GenerationResult, Preview, Profiled

Deliver = Callable[[GenerationRequest, GenerationResult], Awaitable[dict[str, Any]]]


class EventStream(StreamingResponse):
    """A stream that ends at once when its client leaves, and cancels the generation that feeds it.

    Starlette only stops iterating; the generator would be closed when it is garbage collected, and the gang would
    compute until then. Made by `open`.

    Args:
        events: the events to send.
        reports: the reports from which the events are made.
        headers: headers of the answer.
    """

    def __init__(
        self, events: AsyncGenerator[str], reports: AsyncGenerator[Report], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._reports = events, reports

    @classmethod
    async def open(
        cls,
        reports: AsyncGenerator[Report],
        request: GenerationRequest,
        include_progress: bool,
        headers: Mapping[str, str],
        deliver: Deliver,
    ) -> Self:
        """Wait for the first report, so that the status line can say whether the request was admitted.

        Args:
            reports: the reports of the request.
            request: what was asked for.
            include_progress: whether to send an event per step.
            headers: headers of the answer.
            deliver: makes the body of an answer from the result.

        Raises:
            Exception: any error of the backend before its first report.
        """
        first = await anext(reports, None)
        if first is None:
            raise GangLost("the ranks ended without a result")
        return cls(_events(first, reports, request, include_progress, deliver), reports, headers)

    async def stream_response(self, send: Send) -> None:
        """Called by Starlette."""
        # Both: closing events that were never asked for does not close what they are made of.
        async with contextlib.aclosing(self._reports), contextlib.aclosing(self._events):
            await super().stream_response(send)


async def _events(
    first: Report,
    reports: AsyncGenerator[Report],
    request: GenerationRequest,
    include_progress: bool,
    deliver: Deliver,
) -> AsyncGenerator[str]:
    """The events of one request: progress, previews, the pictures, `[DONE]`.

    Progress is sent as comments, which clients skip, unless events are asked for: OpenAI's clients do not know them. An
    error ends the stream as its last event, because the status line has been sent by then.
    """
    try:
        for event in await _of(first, request, include_progress, deliver):
            yield event
        async for report in reports:
            for event in await _of(report, request, include_progress, deliver):
                yield event
        yield "data: [DONE]\n\n"
    except Exception as error:
        log(error)
        yield f"data: {json.dumps(answer(error)[1])}\n\n"


async def _of(report: Report, request: GenerationRequest, include_progress: bool, deliver: Deliver) -> list[str]:
    """The events of one report."""
    if isinstance(report, Waiting):
        place = f", this is number {report.position}, in about {report.wait_s:.0f} s" if report.position else ""
        return [f": {request.model} is {report.state.state}, {report.state.queued} wait{place}\n\n"]
    if isinstance(report, Restarted):
        return [f": lost its ranks and starts again, attempt {report.attempt}\n\n"]
    if isinstance(report, GenerationResult):
        return [_event(event) for event in completed_events(request, await deliver(request, report))]
    if isinstance(report, Preview):
        return [_event(partial_event(request, report))]
    if isinstance(report, Profiled):  # nobody asks for it in a stream
        return []
    if include_progress:
        return [_event(progress_event(request, report))]
    return [f": step {report.step}/{report.total_steps}\n\n"]


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
