"""The REST door: routes only. `rest_app(backend)` turns HTTP into calls of the hall and back; it runs without Ray.

Paths and bodies are OpenAI's; every error, also of an unknown path, is in OpenAI's envelope.
"""

import contextlib
import json
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Send

from deploy.spec import ModelSpec
from service.api.errors import answer, envelope
from service.api.schemas import (
    GenerationBody,
    ImageGenerationBody,
    VideoGenerationBody,
    completed_events,
    find_model,
    images_response,
    metrics,
    model_object,
    parse_body,
    progress_event,
    to_request,
)
from service.state.model_states import ModelState
from workers.errors import GangLost, InvalidParameter, SprayError
from workers.messages import GenerationRequest, GenerationResult, StepEvent

logger = logging.getLogger("ray.serve")


class Backend(Protocol):
    """What stands behind the doors; `service.gateway.Gateway` in a deployment."""

    instance_id: str
    max_body_bytes: int
    draining: bool
    in_flight: int

    def admit(self, authorization: str | None) -> None:
        """Let a caller in, or raise `Unauthorized`."""

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepEvent | GenerationResult | ModelState]:
        """Run one request; while it waits, the model's state comes now and then."""

    def states(self) -> dict[str, ModelState]:
        """The state of each model by name."""

    def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""


def rest_app(backend: Backend) -> FastAPI:
    """The application behind the HTTP port."""
    app = FastAPI(title="spray", openapi_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SprayError, _error)
    app.add_exception_handler(Exception, _error)

    async def admit(http: Request) -> None:
        backend.admit(http.headers.get("authorization"))

    for_callers = [Depends(admit)]

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        states = backend.states()
        waiting = [name for name, state in states.items() if state.state not in ("running", "asleep")]
        ready = len(waiting) < len(states)  # one model that cannot start must not take the others off the network
        status = "draining" if backend.draining else "ok" if ready else "waiting"
        body = {
            "status": status,
            "waiting_for": waiting,
            "in_flight": backend.in_flight,
            "instance_id": backend.instance_id,
        }
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    @app.get("/v1/cluster", dependencies=for_callers)
    async def cluster() -> dict[str, Any]:
        return backend.cluster()

    @app.get("/v1/models", dependencies=for_callers)
    async def list_models() -> dict[str, Any]:
        states = backend.states()
        data = [model_object(model, states.get(name)) for name, model in backend.models().items()]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}", dependencies=for_callers)
    async def retrieve_model(name: str) -> dict[str, Any]:
        model = find_model(backend.models(), name)
        return model_object(model, backend.states().get(model.name))

    @app.post("/v1/images/generations", dependencies=for_callers)
    async def generate_images(http: Request) -> Response:
        body = parse_body(await _json(http, backend.max_body_bytes), ImageGenerationBody)
        request = to_request(body, find_model(backend.models(), body.model), uuid.uuid4().hex)
        headers = _ignored(body)
        if body.stream:
            return _Events(_stream(backend, body, request), media_type="text/event-stream", headers=headers)
        return JSONResponse(images_response(request, await _result(backend, request)), headers=headers)

    @app.post("/v1/videos/sync", dependencies=for_callers)
    async def generate_video(http: Request) -> Response:
        body = parse_body(await _json(http, backend.max_body_bytes), VideoGenerationBody)
        request = to_request(body, find_model(backend.models(), body.model), uuid.uuid4().hex)
        result = await _result(backend, request)
        headers = {"x-seed": str(result.seeds[0]), "x-metrics": json.dumps(metrics(result))} | _ignored(body)
        return Response(result.outputs[0], media_type="video/mp4", headers=headers)

    return app


async def _result(backend: Backend, request: GenerationRequest) -> GenerationResult:
    reports = [report async for report in backend.generate(request)]  # to the end: leaving early means cancelling
    if not reports or not isinstance(reports[-1], GenerationResult):
        raise GangLost("the ranks ended without a result")
    return reports[-1]


def _ignored(body: GenerationBody) -> dict[str, str]:
    return {"x-ignored-params": ", ".join(body.ignored)} if body.ignored else {}


async def _json(http: Request, max_bytes: int) -> object:
    """The body of a request.

    Raises:
        InvalidParameter: it is not JSON, or too large.
    """
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > max_bytes:
            raise InvalidParameter(None, f"the body is larger than {max_bytes} bytes", "body_too_large")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidParameter(None, "the body is not JSON", "invalid_body") from None


class _Events(StreamingResponse):
    """A stream that ends at once, with the work behind it, when its client leaves."""

    async def stream_response(self, send: Send) -> None:
        """Called by Starlette."""
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def _stream(backend: Backend, body: ImageGenerationBody, request: GenerationRequest) -> AsyncGenerator[str]:
    """Server-sent events: progress (as comments, which clients skip, unless asked for), the pictures, `[DONE]`."""
    try:
        async with contextlib.aclosing(backend.generate(request)) as reports:
            async for report in reports:
                if isinstance(report, ModelState):
                    yield f": {request.model} is {report.state}, {report.queued} wait\n\n"
                elif isinstance(report, GenerationResult):
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
    if answer(error)[0] == 500 and not isinstance(error, ClientDisconnect):  # a client who leaves is no failure
        logger.error("request failed", exc_info=error)
