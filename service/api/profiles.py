"""Profiles: `POST /v1/profiles` lets the ranks of one gang profile the steps of a request. For administrators.

The request waits its turn like any other, and its picture is discarded.
"""

import contextlib
import io
import json
import zipfile
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from service.api.backend import Restarted, Served
from service.api.bodies import ImageGenerationBody, VideoGenerationBody, parse_body
from service.api.openapi import BYTES, ERRORS
from service.api.origin import deadline, request_id
from service.api.schemas import find_model, media_of, to_request
from workers.messages import GenerationRequest, GenerationResult, Profiled

router = APIRouter(prefix="/profiles")

PROMPT = "a cup of coffee"
MOST_STEPS = 20

FILES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "a zip: `rank-N.json.gz`, a trace in Chrome's format for each rank, and `summary.json`",
        "content": {"application/zip": {"schema": BYTES}},
    }
}


@router.post("", responses=ERRORS | FILES, response_class=Response)
async def profile(
    http: Request,
    backend: Served,
    model: str | None = None,
    steps: Annotated[int, Query(ge=1, le=MOST_STEPS)] = 3,
    width: Annotated[int | None, Query(ge=1)] = None,
    height: Annotated[int | None, Query(ge=1)] = None,
    num_frames: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """Profile so many steps, of the model's usual size unless the call says otherwise."""
    backend.admit(http.headers.get("authorization"), admin=True)
    spec = find_model(backend.models(), model)
    video = num_frames is not None or (spec.tasks is not None and "text-to-image" not in spec.tasks)
    fields = {"model": spec.name, "prompt": PROMPT, "num_inference_steps": steps}
    fields |= {"width": width, "height": height} | ({"num_frames": num_frames} if video else {})
    body = parse_body(fields, VideoGenerationBody if video else ImageGenerationBody)
    media_of(body, spec)  # there is none; refuses models that only begin with a picture
    asked = replace(to_request(body, spec, request_id(http)), deadline_at=deadline(http), profile=True)
    profiles: dict[int, Profiled] = {}
    result: GenerationResult | None = None
    async with contextlib.aclosing(backend.generate(asked)) as reports:
        async for report in reports:
            if isinstance(report, Profiled):
                profiles[report.rank] = report
            elif isinstance(report, Restarted):  # it is profiled again, perhaps on other ranks
                profiles.clear()
            elif isinstance(report, GenerationResult):
                result = report
    return Response(_zip(asked, profiles, result), media_type="application/zip")


def _zip(asked: GenerationRequest, profiles: dict[int, Profiled], result: GenerationResult | None) -> bytes:
    """A zip with the traces of all ranks, which are compressed already, and a summary."""
    ranks = [profile for _, profile in sorted(profiles.items())]
    summary = {
        "object": "profile",
        "model": asked.model,
        "layout": str(result.degrees) if result else "",
        "width": asked.width,
        "height": asked.height,
        "num_frames": asked.num_frames,
        "ranks": [{name: value for name, value in asdict(each).items() if name != "trace"} for each in ranks],
    }
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("summary.json", json.dumps(summary, indent=2))
        for each in ranks:
            archive.writestr(f"rank-{each.rank}.json.gz", each.trace)
    return buffer.getvalue()
