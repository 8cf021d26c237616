"""Pictures: `POST /v1/images/generations`."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.api.backend import Served, run
from service.api.origin import request_id
from service.api.responses import ignored_header, images_response, warnings_header
from service.api.schemas import ImageGenerationBody, find_model, parse_body, read_json, to_request
from service.api.streaming import EventStream

router = APIRouter(prefix="/images")


@router.post("/generations")
async def generate_images(http: Request, backend: Served) -> Response:
    body = parse_body(await read_json(http.stream(), backend.max_body_bytes), ImageGenerationBody)
    request = to_request(body, find_model(backend.models(), body.model), request_id(http))
    headers = ignored_header(body.ignored)
    if body.stream:
        include_progress = body.stream_options.include_progress
        return await EventStream.open(backend.generate(request), request, include_progress, headers)
    result = await run(backend, request)
    return JSONResponse(images_response(request, result), headers=headers | warnings_header(result))
