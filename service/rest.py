"""The REST door: routes only. `rest_app(hall)` turns HTTP into calls of the hall and back; it runs without Ray.

Paths and bodies are OpenAI's; every error, also of an unknown path, is in OpenAI's envelope.
"""

import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from deploy.spec import ModelSpec
from service.schemas import (
    ImageGenerationBody,
    completed_events,
    find_model,
    images_response,
    model_object,
    parse_body,
    progress_event,
    to_request,
)
from service.status import answer, envelope
from workers.errors import GangLost, InvalidParameter, SprayError
from workers.messages import GenerationRequest, GenerationResult, StepEvent

logger = logging.getLogger("ray.serve")

MAX_BODY_BYTES = 1 << 20


class Hall(Protocol):
    """What stands behind the doors; `service.gateway.Gateway` in a deployment."""

    instance_id: str

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[StepEvent | GenerationResult]:
        """Run one request."""

    async def waiting_for(self) -> list[str]:
        """The models that cannot answer yet."""


def rest_app(hall: Hall) -> FastAPI:
    """The application behind the HTTP port."""
    app = FastAPI(title="spray", openapi_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SprayError, _error)
    app.add_exception_handler(Exception, _error)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        waiting = await hall.waiting_for()
        body = {"status": "waiting" if waiting else "ok", "waiting_for": waiting, "instance_id": hall.instance_id}
        return JSONResponse(body, status_code=503 if waiting else 200)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(model) for model in hall.models().values()]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        return model_object(find_model(hall.models(), name))

    @app.post("/v1/images/generations")
    async def generate_images(http: Request) -> Response:
        body = parse_body(await _json(http))
        request = to_request(body, find_model(hall.models(), body.model), uuid.uuid4().hex)
        headers = {"x-ignored-params": ", ".join(body.ignored)} if body.ignored else {}
        if body.stream:
            return StreamingResponse(_stream(hall, body, request), media_type="text/event-stream", headers=headers)
        reports = [report async for report in hall.generate(request)]  # to the end: leaving early means cancelling
        if not reports or not isinstance(reports[-1], GenerationResult):
            raise GangLost("the ranks ended without a result")
        return JSONResponse(images_response(request, reports[-1]), headers=headers)

    return app


async def _json(http: Request) -> object:
    """The body of a request.

    Raises:
        InvalidParameter: it is not JSON, or too large.
    """
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise InvalidParameter(None, f"the body is larger than {MAX_BODY_BYTES} bytes", "body_too_large")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidParameter(None, "the body is not JSON", "invalid_body") from None


async def _stream(hall: Hall, body: ImageGenerationBody, request: GenerationRequest) -> AsyncIterator[str]:
    """Server-sent events: progress (as comments, which clients skip, unless asked for), the pictures, `[DONE]`."""
    try:
        async for report in hall.generate(request):
            if isinstance(report, GenerationResult):
                for event in completed_events(request, report):
                    yield _event(event)
            elif body.stream_options.include_progress:
                yield _event(progress_event(report))
            else:
                yield f": step {report.step}/{report.total_steps}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:
        _log(error)
        yield f"data: {json.dumps(answer(error)[1])}\n\n"


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


async def _error(http: Request, error: Exception) -> Response:
    _log(error)
    status, body, headers = answer(error)
    return JSONResponse(body, status_code=status, headers=headers)


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{http.method} {http.url.path}: {error.detail}"
    body = envelope(message, "invalid_request_error", None, code)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _log(error: Exception) -> None:
    if answer(error)[0] == 500:
        logger.error("request failed", exc_info=error)
