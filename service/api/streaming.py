"""Server-sent events: what a streaming request yields, as text for the wire. For `service.api.images`."""

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Send

from service.api.backend import Report
from service.api.errors import answer, log
from service.api.responses import completed_events, progress_event
from service.state.model_states import ModelState
from workers.messages import GenerationRequest, GenerationResult


class EventStream(StreamingResponse):
    """A stream that ends at once when its client leaves, and cancels the generation that feeds it.

    Starlette only stops iterating; the generator would be closed whenever it is collected as garbage, and the gang
    would compute until then.
    """

    async def stream_response(self, send: Send) -> None:
        """Called by Starlette."""
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def stream_events(
    reports: AsyncGenerator[Report], request: GenerationRequest, include_progress: bool
) -> AsyncGenerator[str]:
    """The events of one request: progress, the pictures, `[DONE]`.

    Progress comes as comments, which clients skip, unless it is asked for: OpenAI's clients do not know its event.
    An error ends the stream as its last event, because the status line has been sent by then.
    """
    try:
        async with contextlib.aclosing(reports):
            async for report in reports:
                if isinstance(report, ModelState):
                    yield f": {request.model} is {report.state}, {report.queued} wait\n\n"
                elif isinstance(report, GenerationResult):
                    for event in completed_events(request, report):
                        yield _event(event)
                elif include_progress:
                    yield _event(progress_event(report))
                else:
                    yield f": step {report.step}/{report.total_steps}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:
        log(error)
        yield f"data: {json.dumps(answer(error)[1])}\n\n"


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
