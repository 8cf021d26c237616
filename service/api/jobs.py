"""Jobs of all kinds: `/v1/jobs`. Videos are made at `/v1/videos`, pictures at `/v1/images/generations` with the header
`prefer: respond-async`; both may come over gRPC, too. Every gateway knows every job; each caller sees its own.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from service.api import job_calls
from service.api.answers import JobDeleted, JobList, JobObject
from service.api.backend import Served
from service.api.job_events import JobEvents
from service.api.openapi import BYTES, ERRORS, READING_ERRORS, event_stream
from service.api.outputs import KINDS, send_file
from service.api.responses import job_object
from service.jobs.records import Kind, State

router = APIRouter(prefix="/jobs")

QUERY_ERRORS = READING_ERRORS | {400: ERRORS[400]}
"""Errors of routes with query parameters."""

FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "the file", "content": {kind: {"schema": BYTES} for kind in KINDS.values()}}
}

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the job as it is, and whenever something of it changes",
        "content": event_stream("events job.queued, .running, .succeeded, .failed, .cancelled, .expired, then [DONE]"),
    },
    429: ERRORS[429],
}


@router.get("", response_model=JobList, responses=QUERY_ERRORS)
async def list_jobs(
    backend: Served,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    kind: Kind | None = None,
    state: State | None = None,
) -> dict[str, Any]:
    """The jobs that the caller may see, the newest first."""
    page = await job_calls.page(backend, kind, state, after, limit, order == "asc")
    data = [job_object(job) for job in page.jobs]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": page.has_more, **ends}


@router.get("/{job_id}", response_model=JobObject, responses=READING_ERRORS)
async def retrieve_job(backend: Served, job_id: str) -> dict[str, Any]:
    """How a job is doing."""
    seen = await job_calls.find(backend, job_id)
    return job_object(seen.job, seen.position)


@router.get("/{job_id}/content", response_class=Response, responses=QUERY_ERRORS | FILE)
async def download_output(
    http: Request, backend: Served, job_id: str, index: Annotated[int, Query(ge=0, le=1000)] = 0
) -> Response:
    """One of its files, or one range of its bytes."""
    _, output, file = await job_calls.file_of(backend, job_id, index)
    number = f"-{index}" if index else ""
    return send_file(http, file, f'attachment; filename="{job_id}{number}.{output.kind}"')


@router.get("/{job_id}/events", response_class=Response, responses=READING_ERRORS | EVENTS)
async def watch_job(backend: Served, job_id: str) -> Response:
    """How a job goes on, as server-sent events, up to its end."""
    return await JobEvents.open(backend, job_id)


@router.post("/{job_id}/cancel", response_model=JobObject, responses=READING_ERRORS)
async def cancel_job(backend: Served, job_id: str) -> dict[str, Any]:
    """End a job at its next step. One that has ended stays as it is."""
    return job_object(await job_calls.cancel(backend, job_id))


@router.delete("/{job_id}", response_model=JobDeleted, responses=READING_ERRORS)
async def delete_job(backend: Served, job_id: str) -> dict[str, Any]:
    """Forget a job and its files, and stop it if it runs."""
    await job_calls.delete(backend, job_id)
    return {"id": job_id, "object": "job.deleted", "deleted": True}
