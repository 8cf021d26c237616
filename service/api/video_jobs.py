"""Videos as jobs: `/v1/videos`, in OpenAI's shapes. A video that was accepted is kept until it has ended and expired.

Every gateway knows every job; each caller sees its own, one with the scope `admin` all. A video that failed is an
answer with status 200, since asking for it succeeds.
"""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from service.api.answers import Video, VideoDeleted, VideoList
from service.api.backend import Backend, Served
from service.api.bodies import VideoJobBody
from service.api.once import KEY_HEADER, REPLAYED_HEADER, check_key
from service.api.openapi import BYTES, ERRORS, READING_ERRORS, takes
from service.api.origin import request_id
from service.api.outputs import send_file
from service.api.reading import reader
from service.api.responses import ignored_header, video_object
from service.api.schemas import find_model, to_request
from service.jobs.records import ID, Job, KeyReused
from service.jobs.requests import new_job
from service.jobs.store import JobStore
from service.state.quarantine import fingerprint
from workers.errors import IdempotencyKeyReused, InvalidParameter, JobNotFound, JobNotReady

router = APIRouter(prefix="/videos")

POLL = {"openai-poll-after-ms": "1000"}
"""After which OpenAI's clients ask again."""

QUERY_ERRORS = READING_ERRORS | {400: ERRORS[400]}
"""Of routes with parameters in their query."""

FILE: dict[int | str, dict[str, Any]] = {200: {"description": "the MP4", "content": {"video/mp4": {"schema": BYTES}}}}


@router.post("", response_model=Video, responses=ERRORS, openapi_extra=takes(VideoJobBody, answered=False))
async def create_video(
    http: Request,
    response: Response,
    backend: Served,
    body: Annotated[VideoJobBody, Depends(reader(VideoJobBody))],
) -> dict[str, Any]:
    """Accept a video. It is kept on disk when this answers."""
    key = http.headers.get(KEY_HEADER)
    if key is not None:
        check_key(key)
    request = to_request(body, find_model(backend.models(), body.model), request_id(http))
    backend.charge(request)
    await asyncio.to_thread(backend.outputs.prepare)
    known_as = fingerprint(backend.caller(), request)
    submitted = new_job(request, backend.caller(), body.priority, body.deadline_s, key, known_as)
    try:
        job, fresh = await backend.jobs.ask(JobStore.submit, submitted)
    except KeyReused as error:
        raise IdempotencyKeyReused(str(error)) from None
    backend.runner.wake()
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
    if after is not None and not ID.fullmatch(after):
        raise InvalidParameter("after", f"after must be the id of a video, got {after[:60]!r}")
    page = await backend.jobs.ask(
        JobStore.page, backend.sees(), kind="video", after=after, limit=limit, ascending=order == "asc"
    )
    data = [video_object(job) for job in page.jobs]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": page.has_more, **ends}


@router.get("/{video_id}", response_model=Video, responses=READING_ERRORS)
async def retrieve_video(response: Response, backend: Served, video_id: str) -> dict[str, Any]:
    """How a video is doing."""
    job = await _find(backend, video_id)
    position = await backend.jobs.ask(JobStore.position, video_id) if job.state == "queued" else 0
    response.headers.update(POLL)
    return video_object(job, position)


@router.get("/{video_id}/content", response_class=Response, responses=QUERY_ERRORS | FILE)
async def download_video(
    http: Request, backend: Served, video_id: str, variant: Literal["video"] = "video"
) -> Response:
    """The MP4, or one range of its bytes."""
    job = await _find(backend, video_id)
    if job.state != "succeeded":
        said = f"it is {job.state}" if not job.ended else f"there will be none: {job.error and job.error.message}"
        raise JobNotReady(f"{video_id!r} has no content; {said}")
    file = await asyncio.to_thread(backend.outputs.file, job.outputs[0].name)
    return send_file(http, file, f'attachment; filename="{video_id}.mp4"')


@router.post("/{video_id}/cancel", response_model=Video, responses=READING_ERRORS)
async def cancel_video(backend: Served, video_id: str) -> dict[str, Any]:
    """End a video at its next step. One that has ended stays as it is."""
    await _find(backend, video_id)
    job = await backend.jobs.ask(JobStore.cancel, video_id, backend.sees())
    backend.runner.drop(video_id)
    return video_object(job)


@router.delete("/{video_id}", response_model=VideoDeleted, responses=READING_ERRORS)
async def delete_video(backend: Served, video_id: str) -> dict[str, Any]:
    """Forget a video, and stop it if it runs."""
    await _find(backend, video_id)
    job = await backend.jobs.ask(JobStore.delete, video_id, backend.sees())
    backend.runner.drop(video_id)
    for output in job.outputs:
        await asyncio.to_thread(backend.outputs.discard, output.name)
    return {"id": video_id, "object": "video.deleted", "deleted": True}


async def _find(backend: Backend, video_id: str) -> Job:
    if not ID.fullmatch(video_id):  # databases do not take every text
        raise JobNotFound(f"{video_id[:60]!r} is no video")
    job = await backend.jobs.ask(JobStore.get, video_id, backend.sees())
    if job.kind != "video":
        raise JobNotFound(f"{video_id!r} is no video")
    return job
