"""Videos: `POST /v1/videos/sync`, which answers with the MP4 itself, or with events while it is made."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from service.api.answers import GenerationResponse
from service.api.backend import Served
from service.api.bodies import VideoGenerationBody
from service.api.generation import respond
from service.api.openapi import BYTES, ERRORS, event_stream, takes
from service.api.reading import reader

router = APIRouter(prefix="/videos")

SUCCESS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the video: the file itself, in JSON with another `response_format`, as events with `stream`",
        "content": event_stream("events video_generation.progress, .partial_image and .completed, then [DONE]")
        | {"video/mp4": {"schema": BYTES}},
    }
}


@router.post(
    "/sync", response_model=GenerationResponse, responses=ERRORS | SUCCESS, openapi_extra=takes(VideoGenerationBody)
)
async def generate_video(
    http: Request,
    backend: Served,
    body: Annotated[VideoGenerationBody, Depends(reader(VideoGenerationBody))],
) -> Response:
    """Make a video."""
    return await respond(http, backend, body, "file")
