"""A job as server-sent events: at each change the whole job, as `GET` returns it. For the routers."""

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any, Self

from fastapi.responses import StreamingResponse
from starlette.types import Send

from service.api.backend import Backend
from service.api.errors import answer, log
from service.api.job_calls import Seen, watch
from service.api.responses import job_object, video_object
from service.jobs.records import Kind


class JobEvents(StreamingResponse):
    """A stream that ends with its job, and leaves its place among the watchers when its client leaves. Made by `open`.

    Args:
        events: the events to send.
        looks: the looks at the job from which the events are made.
    """

    def __init__(self, events: AsyncGenerator[str], looks: AsyncGenerator[Seen | None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._looks = events, looks

    @classmethod
    async def open(cls, backend: Backend, job_id: str, kind: Kind | None = None) -> Self:
        """Look once, so that the status line can say whether the job exists.

        Args:
            backend: the backend of the gateway.
            job_id: the id of the job.
            kind: "video": in the form of `/v1/videos`; None: in the form of `/v1/jobs`, whatever it makes.

        Raises:
            Exception: see `job_calls.watch`.
        """
        looks = watch(backend, job_id, kind)
        first = await anext(looks)
        return cls(_events(first, looks, as_video=kind == "video"), looks)

    async def stream_response(self, send: Send) -> None:
        """Called by Starlette."""
        # Both: closing events that were never asked for does not close what they are made of.
        async with contextlib.aclosing(self._looks), contextlib.aclosing(self._events):
            await super().stream_response(send)


async def _events(first: Seen | None, looks: AsyncGenerator[Seen | None], as_video: bool) -> AsyncGenerator[str]:
    """An event for each look that shows something new, and `[DONE]` behind the last one of a job that has ended.

    An error ends the stream as its last event, because the status line has been sent by then.
    """
    ended = False
    try:
        yield _event(first, as_video)
        ended = first is not None and first.job.ended
        async for seen in looks:
            yield _event(seen, as_video)
            ended = seen is not None and seen.job.ended
        if ended:
            yield "data: [DONE]\n\n"
    except Exception as error:
        log(error)
        yield f"data: {json.dumps(answer(error)[1])}\n\n"


def _event(seen: Seen | None, as_video: bool) -> str:
    if seen is None:
        return ": nothing new\n\n"
    told = video_object(seen.job, seen.position) if as_video else job_object(seen.job, seen.position)
    name, status = ("video", told["status"]) if as_video else ("job", told["state"])
    event: dict[str, Any] = {"type": f"{name}.{status}", "eta_seconds": seen.eta_s, name: told}
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
