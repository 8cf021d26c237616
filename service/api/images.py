"""Pictures: `POST /v1/images/generations`, and `POST /v1/images/edits`, which begins with a picture.

With the header `prefer: respond-async` they are a job.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from service.api import job_calls
from service.api.answers import GenerationResponse, JobObject
from service.api.backend import Backend, Served
from service.api.bodies import ImageEditBody, ImageGenerationBody
from service.api.generation import respond, settled
from service.api.once import KEY_HEADER, REPLAYED_HEADER
from service.api.openapi import BYTES, ERRORS, event_stream, takes
from service.api.origin import timeout_s
from service.api.reading import reader
from service.api.responses import ignored_header, job_object
from workers.errors import InvalidParameter

router = APIRouter(prefix="/images")

PREFER, RESPOND_ASYNC = "prefer", "respond-async"


def _success(events: str) -> dict[int | str, dict[str, Any]]:
    described = {
        "description": "the pictures: in JSON, as events with `stream`, as files with `response_format: file`",
        "content": event_stream(f"events {events}.progress, .partial_image and .completed, then [DONE]")
        | {f"image/{kind}": {"schema": BYTES} for kind in ("png", "jpeg", "webp")}
        | {"application/zip": {"schema": BYTES}},
    }
    job = {"description": "the job that makes them, with `prefer: respond-async`", "model": JobObject}
    return {200: described, 202: job}


@router.post(
    "/generations",
    response_model=GenerationResponse,
    responses=ERRORS | _success("image_generation"),
    openapi_extra=takes(ImageGenerationBody, or_job=True),
)
async def generate_images(
    http: Request,
    backend: Served,
    body: Annotated[ImageGenerationBody, Depends(reader(ImageGenerationBody))],
) -> Response:
    """Draw pictures: at once, or as a job."""
    return await _answer(http, backend, body)


@router.post(
    "/edits",
    response_model=GenerationResponse,
    responses=ERRORS | _success("image_edit"),
    openapi_extra=takes(ImageEditBody, or_job=True),
)
async def edit_images(
    http: Request,
    backend: Served,
    body: Annotated[ImageEditBody, Depends(reader(ImageEditBody))],
) -> Response:
    """Draw pictures that begin with one, or draw a part of one anew: at once, or as a job."""
    return await _answer(http, backend, body)


async def _answer(http: Request, backend: Backend, body: ImageGenerationBody) -> Response:
    if _prefers_job(http):
        return await _accept(http, backend, body)
    for name in ("priority", "deadline_s", "webhook_url"):
        if name in body.model_fields_set:
            raise InvalidParameter(
                name, f"{name} is for jobs; send the header {PREFER}: {RESPOND_ASYNC}, or leave it out"
            )
    return await respond(http, backend, body, "b64_json")


async def _accept(http: Request, backend: Backend, body: ImageGenerationBody) -> Response:
    """Take the pictures in as a job.

    Raises:
        InvalidParameter: the body has options for an answer with the pictures.
        Exception: see `job_calls.submit`.
    """
    for name, refused in (("stream", body.stream), ("response_format", body.response_format in ("b64_json", "url"))):
        if refused:
            said = f"{name} is for an answer with the pictures; a job has events and files at /v1/jobs; leave it out"
            raise InvalidParameter(name, said)
    request = await settled(http, backend, body)
    key = http.headers.get(KEY_HEADER)
    deadline_s = timeout_s(http) if body.deadline_s is None else body.deadline_s
    job, fresh = await job_calls.submit(backend, request, body.priority, deadline_s, key, webhook_url=body.webhook_url)
    headers = {"location": f"/v1/jobs/{job.id}", "preference-applied": RESPOND_ASYNC, **ignored_header(body.ignored)}
    headers |= {} if fresh else {REPLAYED_HEADER: "true"}
    return JSONResponse(job_object(job), status_code=202, headers=headers)


def _prefers_job(http: Request) -> bool:
    """Whether the request has RFC 7240's preference."""
    given = ",".join(http.headers.getlist(PREFER)).split(",")
    return any(each.partition(";")[0].strip().lower() == RESPOND_ASYNC for each in given)
