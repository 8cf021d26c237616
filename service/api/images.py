"""Pictures: `POST /v1/images/generations`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from service.api.answers import GenerationResponse
from service.api.backend import Served
from service.api.bodies import ImageGenerationBody
from service.api.generation import respond
from service.api.openapi import BYTES, ERRORS, event_stream, takes
from service.api.reading import reader

router = APIRouter(prefix="/images")

SUCCESS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the pictures: in JSON, as events with `stream`, as files with `response_format: file`",
        "content": event_stream("events image_generation.progress, .partial_image and .completed, then [DONE]")
        | {f"image/{kind}": {"schema": BYTES} for kind in ("png", "jpeg", "webp")}
        | {"application/zip": {"schema": BYTES}},
    }
}


@router.post(
    "/generations",
    response_model=GenerationResponse,
    responses=ERRORS | SUCCESS,
    openapi_extra=takes(ImageGenerationBody),
)
async def generate_images(
    http: Request,
    backend: Served,
    body: Annotated[ImageGenerationBody, Depends(reader(ImageGenerationBody))],
) -> Response:
    """Draw pictures."""
    return await respond(http, backend, body, "b64_json")
