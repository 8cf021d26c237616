"""Videos as jobs: `/v1/videos`, in OpenAI's shapes. An accepted video is kept until it has ended and expired.

Every gateway knows every job. Each caller sees its own jobs; with the scope `admin`, all. The status of a failed video
is 200, since the request for it succeeds.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from service.api import job_calls
from service.api.answers import Video, VideoDeleted, VideoList
from service.api.backend import Served
from service.api.bodies import RemixBody, VideoJobBody
from service.api.generation import settled
from service.api.job_events import JobEvents
from service.api.once import KEY_HEADER, REPLAYED_HEADER
from service.api.openapi import BYTES, ERRORS, READING_ERRORS, event_stream, takes
from service.api.origin import request_id, timeout_s
from service.api.outputs import send_file
from service.api.reading import reader
from service.api.responses import ignored_header, video_object
from service.api.schemas import check_kept, find_model
from service.api.stills import Still, send_still
from service.jobs.inputs import request_of
from workers.errors import InvalidParameter

router = APIRouter(prefix="/videos")

POLL = {"openai-poll-after-ms": "1000"}
"""The header that says after how many milliseconds OpenAI's clients ask again."""

QUERY_ERRORS = READING_ERRORS | {400: ERRORS[400]}
"""Errors of routes with query parameters."""

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the video as it is, and whenever something of it changes",
        "content": event_stream("events video.queued, .in_progress, .completed, .failed, then [DONE]"),
    },
    429: ERRORS[429],
}

FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the MP4, or the picture of it that `variant` asks for",
        "content": {kind: {"schema": BYTES} for kind in ("video/mp4", "image/webp", "image/jpeg")},
    }
}


@router.post("", response_model=Video, responses=ERRORS, openapi_extra=takes(VideoJobBody, answered=False))
async def create_video(
    http: Request,
    response: Response,
    backend: Served,
    body: Annotated[VideoJobBody, Depends(reader(VideoJobBody))],
) -> dict[str, Any]:
    """Accept a video. It is kept on disk when this answers."""
    request = await settled(http, backend, body)
    key = http.headers.get(KEY_HEADER)
    deadline_s = timeout_s(http) if body.deadline_s is None else body.deadline_s
    job, fresh = await job_calls.submit(backend, request, body.priority, deadline_s, key, webhook_url=body.webhook_url)
    response.headers.update(POLL | ignored_header(body.ignored) | ({} if fresh else {REPLAYED_HEADER: "true"}))
    return video_object(job)


@router.get("", response_model=VideoList, responses=QUERY_ERRORS)
async def list_videos(
    backend: Served,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The videos that the caller may see, the newest first."""
    page = await job_calls.page(backend, "video", None, after, limit, order == "asc")
    data = [video_object(job) for job in page.jobs]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": page.has_more, **ends}


@router.get("/{video_id}", response_model=Video, responses=READING_ERRORS)
async def retrieve_video(response: Response, backend: Served, video_id: str) -> dict[str, Any]:
    """How a video is doing."""
    seen = await job_calls.find(backend, video_id, "video")
    response.headers.update(POLL)
    return video_object(seen.job, seen.position)


@router.get("/{video_id}/content", response_class=Response, responses=QUERY_ERRORS | FILE)
async def download_video(
    http: Request, backend: Served, video_id: str, variant: Literal["video"] | Still = "video"
) -> Response:
    """The MP4, or one range of its bytes; or a picture of it: its first frame, or a sheet of frames."""
    _, _, file = await job_calls.file_of(backend, video_id, kind="video")
    if variant != "video":
        return await send_still(http, file, variant, video_id)
    return send_file(http, file, f'attachment; filename="{video_id}.mp4"')


@router.get("/{video_id}/events", response_class=Response, responses=READING_ERRORS | EVENTS)
async def watch_video(backend: Served, video_id: str) -> Response:
    """How a video goes on, as server-sent events, up to its end."""
    return await JobEvents.open(backend, video_id, "video")


@router.post(
    "/{video_id}/remix", response_model=Video, responses=ERRORS, openapi_extra=takes(RemixBody, answered=False)
)
async def remix_video(
    http: Request,
    response: Response,
    backend: Served,
    video_id: str,
    body: Annotated[RemixBody, Depends(reader(RemixBody))],
) -> dict[str, Any]:
    """Accept a video that varies another one: a new prompt, and all else the same, seed and priority included."""
    before = (await job_calls.find(backend, video_id, "video")).job
    model = find_model(backend.models(), before.model)  # it may have been removed or renamed since
    request = await request_of(backend.jobs, backend.outputs, before)
    request = replace(request, request_id=request_id(http), model=model.name, deadline_at=None, prompt=body.prompt)
    try:
        check_kept(request, model)
    except InvalidParameter as error:  # the caller has set only the prompt
        text = f"{video_id} cannot be varied as it is: {error}; ask for a new one that {model.name!r} allows"
        raise InvalidParameter(error.param, text, error.code) from None
    key = http.headers.get(KEY_HEADER)
    deadline_s = timeout_s(http)
    job, fresh = await job_calls.submit(backend, request, before.priority, deadline_s, key, video_id, body.webhook_url)
    response.headers.update(POLL | ({} if fresh else {REPLAYED_HEADER: "true"}))
    return video_object(job)


@router.post("/{video_id}/cancel", response_model=Video, responses=READING_ERRORS)
async def cancel_video(backend: Served, video_id: str) -> dict[str, Any]:
    """End a video at its next step. One that has ended stays as it is."""
    return video_object(await job_calls.cancel(backend, video_id, "video"))


@router.delete("/{video_id}", response_model=VideoDeleted, responses=READING_ERRORS)
async def delete_video(backend: Served, video_id: str) -> dict[str, Any]:
    """Forget a video, and stop it if it runs."""
    await job_calls.delete(backend, video_id, "video")
    return {"id": video_id, "object": "video.deleted", "deleted": True}
