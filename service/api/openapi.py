"""The description of the API: `/openapi.json`, and the same as a page at `/docs`. For `service.api.rest`.

Routes declare their answers; their bodies are read within limits before they are validated (`service.api.reading`), so
the schemas of bodies are added here. `service.api.page` makes the page.
"""

from collections import defaultdict
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema

from service.api.answers import ErrorResponse
from service.api.bodies import (
    Body,
    ImageEditBody,
    ImageGenerationBody,
    RemixBody,
    VideoGenerationBody,
    VideoJobBody,
)
from service.api.errors import GATEWAY_LOST, STATUS, UNEXPECTED
from service.api.once import KEY_HEADER, LONGEST
from service.api.origin import MOST_SECONDS, TIMEOUT_HEADER
from service.api.page import page

BODIES = (ImageGenerationBody, ImageEditBody, VideoGenerationBody, VideoJobBody, RemixBody)
REF = "#/components/schemas/{model}"

BYTES = {"type": "string", "contentMediaType": "application/octet-stream"}
"""The schema of a file."""

NOT_FOR_READING = frozenset({400, 408, 413, 415, 422, 429, 499})
"""Statuses of requests with a body only."""

MORE_CODES = {
    400: "unknown_parameter missing_required_parameter invalid_size wrong_task too_much_work invalid_body"
    " invalid_picture invalid_clip picture_too_large unknown_lora"
    " invalid_http content_policy_violation".split(),
    404: ["unknown_path"],
    503: [GATEWAY_LOST, "overloaded"],
}
"""Codes of `InvalidParameter`, of unknown paths, and of what proxies answer themselves."""

router = APIRouter()


def _errors() -> dict[int | str, dict[str, Any]]:
    codes: dict[int, list[str]] = defaultdict(list)
    for row in (*STATUS.values(), UNEXPECTED):
        codes[row.http].append(row.code)
    for status, more in MORE_CODES.items():
        codes[status] += more
    headers = {
        "x-should-retry": {"schema": {"type": "string"}, "description": "false: the same request fails again"},
        "retry-after": {"schema": {"type": "string"}, "description": "seconds; the same request may succeed then"},
    }
    return {
        status: {"model": ErrorResponse, "description": ", ".join(sorted(set(codes[status]))), "headers": headers}
        for status in sorted(codes)
    }


ERRORS = _errors()
"""The declared errors of requests with a body."""

READING_ERRORS = {status: said for status, said in ERRORS.items() if status not in NOT_FOR_READING}
"""The declared errors of requests without a body."""


def takes(kind: type[Body], answered: bool = True, or_job: bool = False) -> dict[str, Any]:
    """The description of a route's body and headers, for `openapi_extra`.

    Args:
        kind: the class of the body.
        answered: whether the caller waits for the output; otherwise it is a job.
        or_job: whether the caller may ask for a job.
    """
    schema = {"$ref": REF.format(model=kind.__name__)}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": schema}}
    patience = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_SECONDS},
        "description": "seconds from now on; then the request is stopped, and answered with 504",
    }
    once = {
        "name": KEY_HEADER,
        "in": "header",
        "required": False,
        "schema": {"type": "string", "pattern": "^[!-~]+$", "maxLength": LONGEST},
        "description": "the same request with the same key is done once, and gets the same answer",
    }
    job = {
        "name": "prefer",
        "in": "header",
        "required": False,
        "schema": {"anyOf": [{"const": "respond-async"}, {"type": "string"}]},  # other preferences have no effect
        "description": "respond-async: the answer is a job, with status 202",
    }
    parameters = [*([patience] if answered else []), once, *([job] if or_job else [])]
    return {"requestBody": {"required": True, "content": content}, "parameters": parameters}


def event_stream(description: str) -> dict[str, Any]:
    """The description of a stream of server-sent events, for the `content` of an answer."""
    event = {
        "type": "object",
        "description": description,
        "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]"}},
    }
    return {"text/event-stream": {"schema": event}}


def describe(app: FastAPI) -> None:
    """Make the application's own description include the bodies of its requests."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REF)
    components = described.setdefault("components", {})
    components.setdefault("schemas", {}).update(bodies["$defs"])
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{}, {"key": []}]  # a key, if the deployment has keys
    for operation in (operation for path in described["paths"].values() for operation in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]  # FastAPI's own idea; `rest` puts such errors into the envelope
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    return described


@router.get("/openapi.json", include_in_schema=False)
async def openapi_json(http: Request) -> Response:
    return JSONResponse(http.app.openapi())


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> Response:
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse("".join(page(http.app.openapi())), headers=policy)
