"""Videos: `POST /v1/videos/sync`, which answers with the MP4 itself."""

import json

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.api.backend import Served, run
from service.api.origin import request_id
from service.api.responses import ignored_header, metrics, warnings_header
from service.api.schemas import VideoGenerationBody, find_model, parse_body, read_json, to_request

router = APIRouter(prefix="/videos")


@router.post("/sync")
async def generate_video(http: Request, backend: Served) -> Response:
    body = parse_body(await read_json(http.stream(), backend.max_body_bytes), VideoGenerationBody)
    request = to_request(body, find_model(backend.models(), body.model), request_id(http))
    result = await run(backend, request)
    headers = {"x-seed": str(result.seeds[0]), "x-metrics": json.dumps(metrics(result))} | warnings_header(result)
    return Response(result.outputs[0], media_type="video/mp4", headers=headers | ignored_header(body.ignored))
